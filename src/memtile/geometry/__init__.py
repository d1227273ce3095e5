"""Spans and grids: where the tiles of a weight begin and end. Imports no torch."""

from memtile.geometry.grid import (
    HUGE_PAGE,
    Grid,
    Rect,
    Span,
    partition_uniform,
    round_up,
    spans_of,
    spans_of_size,
)

__all__ = [
    "HUGE_PAGE",
    "Grid",
    "Rect",
    "Span",
    "partition_uniform",
    "round_up",
    "spans_of",
    "spans_of_size",
]

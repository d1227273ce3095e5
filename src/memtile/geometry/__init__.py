"""Spans and grids: where the tiles of a weight begin and end. Imports no torch."""

from memtile.geometry.grid import (
    Grid,
    Rect,
    Span,
    partition_uniform,
    round_up,
    spans_of,
    spans_of_size,
)

__all__ = [
    "Grid",
    "Rect",
    "Span",
    "partition_uniform",
    "round_up",
    "spans_of",
    "spans_of_size",
]

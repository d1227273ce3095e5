"""Optimizers that step tiles where they live."""

from memtile.optim.checks import is_finite
from memtile.optim.dense_state import DenseParameter, Part, dense_parameters
from memtile.optim.slice_optimizer import ParameterSlice, SliceOptimizer
from memtile.optim.stepping import CHUNK_ELEMENTS
from memtile.optim.tile_optimizer import TileOptimizer

__all__ = [
    "CHUNK_ELEMENTS",
    "DenseParameter",
    "ParameterSlice",
    "Part",
    "SliceOptimizer",
    "TileOptimizer",
    "dense_parameters",
    "is_finite",
]

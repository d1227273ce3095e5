"""Optimizers that step tiles where they live."""

from memtile.optim.dense_state import DenseParameter, Part, dense_parameters
from memtile.optim.finite import is_finite
from memtile.optim.inner import Inner, ParameterSlice
from memtile.optim.stepping import CHUNK_ELEMENTS
from memtile.optim.tile_optimizer import TileOptimizer

__all__ = [
    "CHUNK_ELEMENTS",
    "DenseParameter",
    "Inner",
    "ParameterSlice",
    "Part",
    "TileOptimizer",
    "dense_parameters",
    "is_finite",
]

"""Optimizers that step tiles where they live."""

from memtile.optim.dense_state import DenseParameter, Part, dense_parameters
from memtile.optim.inner import Inner, ParameterSlice
from memtile.optim.stepping import CHUNK_ELEMENTS, is_finite
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

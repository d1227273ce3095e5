"""Optimizers that step tiles where they live."""

from memtile.optim.dense_state import DenseParameter, Part, dense_parameters
from memtile.optim.tile_optimizer import TileOptimizer

__all__ = ["DenseParameter", "Part", "TileOptimizer", "dense_parameters"]

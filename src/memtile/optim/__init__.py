"""Optimizers that step parameters where they live, one piece at a time."""

from memtile.optim.tile_optimizer import TileOptimizer

__all__ = ["TileOptimizer"]

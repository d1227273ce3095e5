"""Whole models: tiled in place and back, and their dense checkpoints."""

from memtile.convert.dense import dense_items, dense_state_dict
from memtile.convert.empty import empty_model
from memtile.convert.kinds import Integration, Kind, register_integration
from memtile.convert.select import Choice, select_linears
from memtile.convert.tiling import tile
from memtile.convert.untiling import untile

__all__ = [
    "Choice",
    "Integration",
    "Kind",
    "dense_items",
    "dense_state_dict",
    "empty_model",
    "register_integration",
    "select_linears",
    "tile",
    "untile",
]

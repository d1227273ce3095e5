"""Whole models: tiled in place and back, and their dense checkpoints."""

from memtile.convert.dense import dense_items, dense_state_dict
from memtile.convert.empty import empty_model
from memtile.convert.kinds import (
    Integration,
    Kind,
    Naming,
    Work,
    naming_of,
    register_integration,
)
from memtile.convert.loading_checkpoints import Loaded, load_checkpoint
from memtile.convert.plans import plan
from memtile.convert.recutting import Recut, convert_checkpoint
from memtile.convert.saving import save_checkpoint
from memtile.convert.select import Choice, select_linears
from memtile.convert.tiling import tile
from memtile.convert.training import Resumed, has_training, resume_training, save_training
from memtile.convert.untiling import untile

__all__ = [
    "Choice",
    "Integration",
    "Kind",
    "Loaded",
    "Naming",
    "Recut",
    "Resumed",
    "Work",
    "convert_checkpoint",
    "dense_items",
    "dense_state_dict",
    "empty_model",
    "has_training",
    "load_checkpoint",
    "naming_of",
    "plan",
    "register_integration",
    "resume_training",
    "save_checkpoint",
    "save_training",
    "select_linears",
    "tile",
    "untile",
]

"""memtile: linear layers too big for the memory of the device that runs them."""

from memtile import interrupting  # noqa: F401  # before torch, which takes seconds

# isort: split
from memtile import errors
from memtile.checkpoints import training_folder
from memtile.convert import (
    Choice,
    Loaded,
    Recut,
    Resumed,
    convert_checkpoint,
    dense_state_dict,
    empty_model,
    has_training,
    load_checkpoint,
    resume_training,
    save_checkpoint,
    save_training,
    select_linears,
    tile,
    untile,
)
from memtile.engines import register_zero3_gatherer
from memtile.geometry import partition_uniform
from memtile.homes import DiskHome, Home, HostHome
from memtile.integrations import register_all
from memtile.layers import ParkedLinear, TiledEmbedding, TiledLinear, TiledLinearReturnBias
from memtile.ops import split_tensor_along_last_dim
from memtile.optim import TileOptimizer
from memtile.planner import plan, plan_ranks
from memtile.planning import Budget, Plan, RankPlan, Rates, Speeds

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "Choice",
    "DiskHome",
    "Home",
    "HostHome",
    "Loaded",
    "ParkedLinear",
    "Plan",
    "RankPlan",
    "Rates",
    "Recut",
    "Resumed",
    "Speeds",
    "TileOptimizer",
    "TiledEmbedding",
    "TiledLinear",
    "TiledLinearReturnBias",
    "__version__",
    "convert_checkpoint",
    "dense_state_dict",
    "empty_model",
    "errors",
    "has_training",
    "load_checkpoint",
    "partition_uniform",
    "plan",
    "plan_ranks",
    "resume_training",
    "save_checkpoint",
    "save_training",
    "select_linears",
    "split_tensor_along_last_dim",
    "tile",
    "training_folder",
    "untile",
]

register_all()
register_zero3_gatherer()

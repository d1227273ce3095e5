"""memtile: PyTorch models that are too big for memory, trained and run tile by tile.

`tile` cuts the linears and embeddings of a model into tiles and parks them in a home;
`TileOptimizer` steps them there. `docs/how-it-works.md` follows one tile through the folders of
this package.
"""

from typing import TYPE_CHECKING, Final

from memtile import interrupting  # noqa: F401  # before torch, which takes seconds

# isort: split
from memtile.convert import (
    defer_logits,
    dense_state_dict,
    empty_model,
    load_checkpoint,
    resume_training,
    save_checkpoint,
    save_training,
    tile,
    tile_mlps,
    untile,
)
from memtile.engines import register_engines
from memtile.geometry import partition_uniform
from memtile.homes import DiskHome, HostHome
from memtile.integrations import register_all
from memtile.layers import (
    LinearCrossEntropy,
    TiledEmbedding,
    TiledLinear,
    TiledLinearReturnBias,
    TiledMLP,
    linear_cross_entropy,
    tile_rows,
    tiled_mlp,
    token_log_probabilities,
)
from memtile.observing import observe
from memtile.ops import split_tensor_along_last_dim
from memtile.optim import TileOptimizer
from memtile.planner import plan
from memtile.transfer import park_activations

__version__ = "0.1.0"

__all__ = [
    "DiskHome",
    "HostHome",
    "LinearCrossEntropy",
    "TileOptimizer",
    "TiledEmbedding",
    "TiledLinear",
    "TiledLinearReturnBias",
    "TiledMLP",
    "__version__",
    "defer_logits",
    "dense_state_dict",
    "empty_model",
    "linear_cross_entropy",
    "load_checkpoint",
    "observe",
    "park_activations",
    "partition_uniform",
    "plan",
    "resume_training",
    "save_checkpoint",
    "save_training",
    "split_tensor_along_last_dim",
    "tile",
    "tile_mlps",
    "tile_rows",
    "tiled_mlp",
    "token_log_probabilities",
    "untile",
]

_MOVED: Final = {  # names that stood here before, and where they are now
    "Budget": "costmodel.Budget",
    "Choice": "convert.TilingDecision",
    "Home": "homes.Home",
    "Loaded": "convert.IncompatibleKeys",
    "ParkedLinear": "layers.ParkedLinear",
    "Plan": "costmodel.Plan",
    "RankPlan": "costmodel.RankPlan",
    "Rates": "costmodel.MachineProfile",
    "Recut": "convert.TilingSpec",
    "Resumed": "convert.Resumed",
    "Speeds": "costmodel.ClusterSpec",
    "convert_checkpoint": "convert.convert_checkpoint",
    "has_training": "convert.has_training",
    "plan_ranks": "planner.plan_ranks",
    "select_linears": "convert.select_linears",
    "training_folder": "checkpoints.training_folder",
}

register_all()
register_engines()

if not TYPE_CHECKING:  # type checkers are to report unknown names

    def __getattr__(name: str) -> object:
        """Say where a name is that stood here before."""
        if name in _MOVED:
            raise AttributeError(f"memtile.{name} is memtile.{_MOVED[name]} now")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Tiles whole models in place and back, and saves and loads their checkpoints and runs."""

from memtile.convert.deferring import defer_logits, set_deferring_of
from memtile.convert.dense import dense_items, dense_state_dict
from memtile.convert.derived import Latest, Shown, derived
from memtile.convert.empty import empty_model
from memtile.convert.kinds import (
    Integration,
    Kind,
    Stack,
    Tileable,
    Work,
    integrations,
    kind_of,
    naming_of,
    register_integration,
    replace_module,
    tileable,
    tileables,
    tiled_layers,
)
from memtile.convert.loading_checkpoints import IncompatibleKeys, in_own_names, load_checkpoint
from memtile.convert.model_tensors import persistent_buffers
from memtile.convert.name_matching import WAY_OUT, converting_bytes
from memtile.convert.naming import Naming, Outward, Renamed
from memtile.convert.planned import has_checkpointing, multiply, set_checkpointing, take_workspace
from memtile.convert.recutting import TilingSpec, convert_checkpoint
from memtile.convert.replaced import replacing
from memtile.convert.run_record import Resumed
from memtile.convert.saving import save_checkpoint
from memtile.convert.select import Cut, TilingDecision, choose, select_linears
from memtile.convert.sharded import ShardedCheckpoints, register_sharded
from memtile.convert.streaming import TensorSource
from memtile.convert.tiling import replace_chosen, tile
from memtile.convert.tiling_mlps import (
    MlpDecision,
    mlp_layers,
    put_mlps_in_tiles,
    select_mlps,
    tile_mlps,
    why_no_mlp,
)
from memtile.convert.training import has_training, resume_training, save_training
from memtile.convert.untiling import cannot_be_dense, untile

__all__ = [
    "WAY_OUT",
    "Cut",
    "IncompatibleKeys",
    "Integration",
    "Kind",
    "Latest",
    "MlpDecision",
    "Naming",
    "Outward",
    "Renamed",
    "Resumed",
    "ShardedCheckpoints",
    "Shown",
    "Stack",
    "TensorSource",
    "Tileable",
    "TilingDecision",
    "TilingSpec",
    "Work",
    "cannot_be_dense",
    "choose",
    "convert_checkpoint",
    "converting_bytes",
    "defer_logits",
    "dense_items",
    "dense_state_dict",
    "derived",
    "empty_model",
    "has_checkpointing",
    "has_training",
    "in_own_names",
    "integrations",
    "kind_of",
    "load_checkpoint",
    "mlp_layers",
    "multiply",
    "naming_of",
    "persistent_buffers",
    "put_mlps_in_tiles",
    "register_integration",
    "register_sharded",
    "replace_chosen",
    "replace_module",
    "replacing",
    "resume_training",
    "save_checkpoint",
    "save_training",
    "select_linears",
    "select_mlps",
    "set_checkpointing",
    "set_deferring_of",
    "take_workspace",
    "tile",
    "tile_mlps",
    "tileable",
    "tileables",
    "tiled_layers",
    "untile",
    "why_no_mlp",
]

"""The tiled layers: modules with the contract of the linear and the embedding that they replace."""

from memtile.layers.called_experts import agree_on_calls, called_experts
from memtile.layers.checks import class_of, has_hooks, is_plain
from memtile.layers.deferred_logits import DeferredLogits
from memtile.layers.deferred_results import compute_those_without_loss, hidden, shown
from memtile.layers.deferring_head import DeferringHead, defer_in_engine, set_deferring
from memtile.layers.gathered_calls import (
    has_only_hooks_of_engines,
    is_gathered_when_called,
    is_of_engine,
)
from memtile.layers.handle import DenseHandle
from memtile.layers.linear_cross_entropy import (
    LinearCrossEntropy,
    TokenLogProbabilities,
    linear_cross_entropy,
    token_log_probabilities,
)
from memtile.layers.low_rank import LowRank, low_rank_of, register_low_rank
from memtile.layers.mlp_in_tiles import (
    MlpInTiles,
    checked_structure,
    layers_of,
    put_in_tiles,
    take_out_of_tiles,
)
from memtile.layers.mlp_layers import MlpLayers
from memtile.layers.mlp_pairs import (
    MlpPair,
    MlpPairs,
    pairs_of,
    put_pairs_in_tiles,
    take_pairs_out_of_tiles,
)
from memtile.layers.mlp_structure import MlpStructure, NoMlpError, structure_of
from memtile.layers.parked import ParkedEmbedding, ParkedLinear, ParkedModule
from memtile.layers.return_bias import TiledLinearReturnBias
from memtile.layers.row_tiles import RowTiled, tile_rows, untile_rows
from memtile.layers.stack_owner import StackOwner
from memtile.layers.stack_tiles import ParkedStackTile, StackTile
from memtile.layers.tiled_embedding import TiledEmbedding
from memtile.layers.tiled_linear import TiledLinear
from memtile.layers.tiled_mlp import TiledMLP, tiled_mlp
from memtile.layers.tiled_module import TiledModule, watch_tiles
from memtile.layers.tiled_stack import TiledStack
from memtile.layers.values import DENSE_NAMES, gathered, is_shard, register_gatherer, whole_shape

__all__ = [
    "DENSE_NAMES",
    "DeferredLogits",
    "DeferringHead",
    "DenseHandle",
    "LinearCrossEntropy",
    "LowRank",
    "MlpInTiles",
    "MlpLayers",
    "MlpPair",
    "MlpPairs",
    "MlpStructure",
    "NoMlpError",
    "ParkedEmbedding",
    "ParkedLinear",
    "ParkedModule",
    "ParkedStackTile",
    "RowTiled",
    "StackOwner",
    "StackTile",
    "TiledEmbedding",
    "TiledLinear",
    "TiledLinearReturnBias",
    "TiledMLP",
    "TiledModule",
    "TiledStack",
    "TokenLogProbabilities",
    "agree_on_calls",
    "called_experts",
    "checked_structure",
    "class_of",
    "compute_those_without_loss",
    "defer_in_engine",
    "gathered",
    "has_hooks",
    "has_only_hooks_of_engines",
    "hidden",
    "is_gathered_when_called",
    "is_of_engine",
    "is_plain",
    "is_shard",
    "layers_of",
    "linear_cross_entropy",
    "low_rank_of",
    "pairs_of",
    "put_in_tiles",
    "put_pairs_in_tiles",
    "register_gatherer",
    "register_low_rank",
    "set_deferring",
    "shown",
    "structure_of",
    "take_out_of_tiles",
    "take_pairs_out_of_tiles",
    "tile_rows",
    "tiled_mlp",
    "token_log_probabilities",
    "untile_rows",
    "watch_tiles",
    "whole_shape",
]

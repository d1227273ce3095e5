"""Mathematics and autograd of tiled products and lookups."""

from memtile.ops.activations import check_element_wise
from memtile.ops.composed import (
    ResultShapes,
    float32_casts,
    float32_edges,
    join_rows,
    split_tensor_along_last_dim,
    write_results,
    write_rows,
)
from memtile.ops.embedding import (
    gather_rows,
    gather_rows_statically,
    gather_some_rows,
    parked_embedding,
    place_rows,
)
from memtile.ops.fused import FusedSpec, fused_linear
from memtile.ops.live_bytes import LiveBytes, repeats, tensors_in
from memtile.ops.logit_tiles import (
    LOGIT_ELEMENTS,
    LogitBlocks,
    plain_logit_sums,
    tile_logit_sums,
)
from memtile.ops.logits import LogitQuery, LogitSums, combine_sums, sum_logits
from memtile.ops.mlp import BLOCK_BYTES as MLP_BLOCK_BYTES
from memtile.ops.mlp import MlpSpec
from memtile.ops.mlp_chain import asking_first, inputs_saved_once, mlp_of_tiles
from memtile.ops.mlp_tile import MlpTile, halves, plain_mlp_tile
from memtile.ops.parked import (
    Groups,
    gathered_linear,
    grouped_linear,
    parked_linear,
)
from memtile.ops.parked_layer import parked_layer
from memtile.ops.products import autocast_dtype, needs_float32_sum, transformed, widened
from memtile.ops.recomputing import kept_random_states, saved_for_itself
from memtile.ops.row_calls import RowCall, checkpointed_row_tiles
from memtile.ops.row_tiles import row_tiles

__all__ = [
    "LOGIT_ELEMENTS",
    "MLP_BLOCK_BYTES",
    "FusedSpec",
    "Groups",
    "LiveBytes",
    "LogitBlocks",
    "LogitQuery",
    "LogitSums",
    "MlpSpec",
    "MlpTile",
    "ResultShapes",
    "RowCall",
    "asking_first",
    "autocast_dtype",
    "check_element_wise",
    "checkpointed_row_tiles",
    "combine_sums",
    "float32_casts",
    "float32_edges",
    "fused_linear",
    "gather_rows",
    "gather_rows_statically",
    "gather_some_rows",
    "gathered_linear",
    "grouped_linear",
    "halves",
    "inputs_saved_once",
    "join_rows",
    "kept_random_states",
    "mlp_of_tiles",
    "needs_float32_sum",
    "parked_embedding",
    "parked_layer",
    "parked_linear",
    "place_rows",
    "plain_logit_sums",
    "plain_mlp_tile",
    "repeats",
    "row_tiles",
    "saved_for_itself",
    "split_tensor_along_last_dim",
    "sum_logits",
    "tensors_in",
    "tile_logit_sums",
    "transformed",
    "widened",
    "write_results",
    "write_rows",
]

"""memtile: linear layers too big for the memory of the device that runs them."""

from memtile import errors
from memtile.convert import Choice, dense_state_dict, empty_model, select_linears, tile, untile
from memtile.geometry import partition_uniform
from memtile.homes import DiskHome, Home, HostHome
from memtile.integrations import register_all
from memtile.layers import ParkedLinear, TiledEmbedding, TiledLinear, TiledLinearReturnBias
from memtile.ops import split_tensor_along_last_dim
from memtile.optim import TileOptimizer

__version__ = "0.1.0"

__all__ = [
    "Choice",
    "DiskHome",
    "Home",
    "HostHome",
    "ParkedLinear",
    "TileOptimizer",
    "TiledEmbedding",
    "TiledLinear",
    "TiledLinearReturnBias",
    "__version__",
    "dense_state_dict",
    "empty_model",
    "errors",
    "partition_uniform",
    "select_linears",
    "split_tensor_along_last_dim",
    "tile",
    "untile",
]

register_all()

"""Every error that memtile raises on purpose: each is a `MemtileError` and a builtin too.

A message says what was given, the rule, and the way out.
"""


class MemtileError(Exception):
    """Anything that memtile refuses."""


class SplitsError(MemtileError, RuntimeError, ValueError):
    """A number of splits that the dimension cannot be cut into."""


class ArgumentError(MemtileError, ValueError):
    """An argument, or a combination of arguments, that has no meaning."""


class TileShapeError(MemtileError, ValueError, RuntimeError):
    """A tensor whose width, rank or number of chunks does not fit the layer."""


class TileDtypeError(MemtileError, TypeError, RuntimeError):
    """A tensor whose dtype does not fit the layer, or that is not a tensor at all."""


class TileDeviceError(MemtileError, RuntimeError):
    """A tensor on another device than the layer's tiles."""


class TileIndexError(MemtileError, IndexError):
    """An index outside an embedding's vocabulary."""


class TileClassError(MemtileError, TypeError):
    """A `linear_cls` whose tiles do not keep the contract of a linear layer."""


class HandleError(MemtileError, RuntimeError):
    """A use of a `.weight` or `.bias` handle that would silently change nothing."""


class StateDictError(MemtileError, RuntimeError):
    """A checkpoint that does not describe the layer."""


class CannotTileError(MemtileError, ValueError):
    """A module that cannot be tiled, or a tiled one that cannot be turned back."""


class UnsupportedPlatformError(MemtileError, OSError):
    """Something that this operating system does not offer."""


class TileSizeWarning(UserWarning):
    """Parameters that stay larger than the tile that was asked for."""

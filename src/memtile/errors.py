"""Every error that memtile raises on purpose: each is a `MemtileError` and a builtin too.

A message says what was given, the rule, and the way out.
"""

import errno
from collections.abc import Callable
from typing import Final

_WAYS_OUT: Final = {
    errno.ENOSPC: "make room, or give another folder",
    errno.EDQUOT: "make room within the quota, or give another folder",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or give a folder on a filesystem that "
    "takes larger files",
    errno.EROFS: "it is on a read-only filesystem: give a folder on one that may be written to",
    errno.EACCES: "it may not be written to: change its permissions, or give another folder",
    errno.EPERM: "it may not be written to: change its permissions, or give another folder",
    errno.EMFILE: "raise the limit of open files (ulimit -n), or close some",
    errno.ENFILE: "the system has too many open files: close some",
    errno.ENOMEM: "free memory, or raise the limit of address space (ulimit -v)",
    errno.EIO: "the disk or its connection is at fault: see the system's log",
}


def way_out(error: OSError) -> str:
    """What to do about a place that the system could not make or write to, for a message's end."""
    return _WAYS_OUT.get(error.errno or 0, "give another folder")


class MemtileError(Exception):
    """Anything that memtile refuses."""


class SplitsError(MemtileError, RuntimeError, ValueError):
    """A number of splits that the dimension cannot be cut into."""


class ArgumentError(MemtileError, ValueError):
    """An argument, or a combination of arguments, that has no meaning."""


def check_whole_number(name: str, value: object, least: int, example: str = "") -> None:
    """ArgumentError for what is no int, or less; `example` ends the message."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(f"{name}={value!r} must be a whole number of at least {least}{example}")


def check_number(name: str, value: object, rule: str, is_right: Callable[[float], bool]) -> None:
    """ArgumentError for what is no number, or not right; `rule` says which numbers are."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not is_right(value):
        raise ArgumentError(f"{name}={value!r} must be {rule}")


def check_fraction(name: str, value: object) -> None:
    """ArgumentError for what is no number from 0 to 1."""
    check_number(name, value, "a number from 0 to 1", lambda number: 0.0 <= number <= 1.0)


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


class RowTilesError(MemtileError, RuntimeError):
    """A function that cannot be computed in row tiles, or not again as it was computed before."""


class HandleError(MemtileError, RuntimeError):
    """A use of a `.weight` or `.bias` handle that would silently change nothing."""


class StateDictError(MemtileError, RuntimeError):
    """A checkpoint that does not describe the layer."""


class CannotTileError(MemtileError, ValueError):
    """A module that cannot be tiled, or a tiled one that cannot be turned back."""


class HomeError(MemtileError, RuntimeError):
    """A home that cannot be used as asked: closed, or not fit for tiles."""


class HomeFullError(MemtileError, OSError):
    """A home without room for what was to be parked; nothing was changed."""


class HomeIOError(MemtileError, OSError):
    """A read or a write of a home that failed, or moved fewer bytes than it should."""


class DeferredLogitsError(MemtileError, RuntimeError):
    """A use of deferred logits (or what an MLP's linear gives) that would give other values."""


class ParkedError(MemtileError, RuntimeError):
    """Something that a parked tile cannot do, or that would leave its home behind."""


class OptimizerError(MemtileError, ValueError, RuntimeError):
    """An optimizer, or a use of one, that cannot work tile by tile."""


class NotFiniteError(MemtileError, FloatingPointError):
    """A NaN or an infinity that was to be stepped with, or saved."""


class CheckpointError(MemtileError, ValueError):
    """A checkpoint that is missing, not whole, damaged, or not of this model."""


class CheckpointWriteError(MemtileError, OSError):
    """A checkpoint that could not be written; what was there before is as it was."""


class BudgetError(MemtileError, ValueError):
    """A budget that nothing fits in; the message says how much would be needed."""


class EngineError(MemtileError, RuntimeError):
    """A distributed engine that is missing, set up in a way that cannot work, or in the way."""


class UnsupportedPlatformError(MemtileError, OSError):
    """Something that this operating system does not offer."""


class ParkedCopyWarning(UserWarning):
    """A copy of a parked tile is an ordinary layer in memory."""


class TileSizeWarning(UserWarning):
    """Parameters that stay larger than the tile that was asked for, or MLPs that stay whole."""


class ReplacedParametersWarning(UserWarning):
    """An optimizer steps parameters that the model has no more, so that nothing is trained."""


class CheckpointWarning(UserWarning):
    """Names that a checkpoint and a model do not have in common, and what became of them."""


class NewWeightsWarning(CheckpointWarning):
    """Weights that no checkpoint had, initialised by the model's own rule."""


class ReplacedModuleWarning(UserWarning):
    """Something holds a module that was replaced, and would go on using the old one."""


class EngineConfigWarning(UserWarning):
    """A value of an engine's config that keeps tiles in memory."""

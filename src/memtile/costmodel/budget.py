"""The bytes that a run may use: of the working device, of host memory, of the disk."""

from dataclasses import dataclass
from typing import Final

from memtile.costmodel.byte_sizes import format_byte_size, parse_byte_size
from memtile.errors import ArgumentError

Size = int | str

_PART: Final = 16
_LEAST: Final = 12 << 20
_SMALLEST: Final = 24 << 20  # libraries alone take as much: no run takes less


@dataclass(frozen=True)
class Budget:
    """What a run may use, in bytes above what the process holds when its work begins.

    Each is a number of bytes, or a string such as "2GiB"; None: as much as there is. Where the CPU
    does the work, the device's memory is the host's: the smaller of the two counts.

    Args:
        device: memory of the device that does the work.
        host: host memory.
        disk: room on the disk that tiles live on.

    Raises:
        ArgumentError: one is no size, or less than one byte.
    """

    device: Size | None = None
    host: Size | None = None
    disk: Size | None = None

    def __post_init__(self) -> None:
        for name in ("device", "host", "disk"):
            object.__setattr__(self, name, checked_size(getattr(self, name), f"budget {name}"))

    @classmethod
    def of(cls, given: "Size | Budget") -> "Budget":
        """The budget that a user gave: a number or a string is for the working device."""
        if isinstance(given, Budget):
            return given
        if given is None:
            raise ArgumentError("budget=None: give a number of bytes, or a size such as '2GiB'")
        return cls(device=checked_size(given, "budget"))

    def on_cpu(self) -> "Budget":
        """The budget where device memory is host memory: the smaller of the two."""
        given = [size for size in (self.device, self.host) if isinstance(size, int)]
        return Budget(host=min(given, default=None), disk=self.disk)

    def of_place(self, place: str) -> int | None:
        """The bytes for "device", "host" or "disk"; None: as much as there is."""
        size: int | None = getattr(self, place)
        return size

    def __str__(self) -> str:
        given = {name: self.of_place(name) for name in ("device", "host", "disk")}
        words = [f"{name} {format_byte_size(size)}" for name, size in given.items() if size]
        return ", ".join(words) or "none"


def margin(nbytes: int) -> int:
    """What is left free of a budget: a sixteenth, and at least 12 MiB of one that a run fits in.

    Chosen, not measured: it is for what allocators round up and what is not counted.
    """
    return max(nbytes // _PART, min(_LEAST, nbytes - _SMALLEST))


def usable(nbytes: int) -> int:
    """What a plan may use of a budget: all except its margin."""
    return nbytes - margin(nbytes)


def needed(nbytes: int) -> int:
    """The least budget of which so many bytes may be used."""
    in_part = nbytes * _PART // (_PART - 1) + 1
    return in_part if nbytes <= _SMALLEST else max(in_part, nbytes + _LEAST)


def checked_size(given: object, option: str) -> int | None:
    """A size in bytes from a number or a string; None stays None."""
    if given is None:
        return None
    if isinstance(given, str):
        return parse_byte_size(given, option)
    if isinstance(given, bool) or not hasattr(given, "__index__"):
        raise ArgumentError(
            f"{option}={given!r} is no size: give a whole number of bytes, or a string such as "
            "'2GiB'"
        )
    nbytes = int(given.__index__())
    if nbytes < 1:
        raise ArgumentError(f"{option}={given!r} is less than one byte: give a size such as '2GiB'")
    return nbytes

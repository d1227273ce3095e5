"""Reads and writes byte sizes such as "1.5 GiB"; all other code has numbers of bytes."""

import re
from typing import Final

from memtile.errors import ArgumentError

_BINARY: Final = ("B", "KiB", "MiB", "GiB", "TiB")
_DECIMAL: Final = ("B", "KB", "MB", "GB", "TB")
_BYTES_OF_UNIT: Final = {
    **{unit.lower(): 1000**power for power, unit in enumerate(_DECIMAL)},
    **{unit.lower(): 1024**power for power, unit in enumerate(_BINARY)},
}
_NO_MACHINE: Final = 2.0**63
_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE | re.ASCII)


def parse_byte_size(text: str, option: str) -> int:
    """The number of bytes that `text` says, a fraction of a byte cut off.

    Args:
        text: A number and a unit, such as "1MiB", "1.5 GB" or "4096B".
        option: The name of the option it was given to, for the message.

    Raises:
        ArgumentError: If it is no size, has no unit, or is less than one byte.
    """
    match = _SIZE.fullmatch(text)
    unit = match[2].lower() if match else ""
    if match and not unit:
        raise ArgumentError(
            f"{option} {text[:40]!r} has no unit: write {match[1][:40]}MiB, {match[1][:40]}GB or "
            f"{match[1][:40]}B."
        )
    if match is None or unit not in _BYTES_OF_UNIT:
        raise ArgumentError(
            f"{option} {text!r} is not a size: "
            "write a number and a unit, such as 1MiB, 512KiB or 2GB."
        )
    size = float(match[1]) * _BYTES_OF_UNIT[unit]
    if not size < _NO_MACHINE:
        raise ArgumentError(
            f"{option} {text[:40]!r} is more than any machine has: write 2GiB, say."
        )
    nbytes = int(size)
    if nbytes < 1:
        raise ArgumentError(f"{option} {text!r} is less than one byte: write a size such as 1MiB.")
    return nbytes


def size_in_bytes(given: int | str | None, option: str) -> int | None:
    """What a size such as "16MiB" says; a number, or what is none, as it is."""
    return parse_byte_size(given, option) if isinstance(given, str) else given


def parse_speed(text: str, option: str, unit: str = "B") -> float:
    """What is done in a second, such as "50GB/s" in bytes or "400TFLOP/s" in operations.

    Args:
        text: A number and a unit with "/s" behind it; of operations "flops" will do.
        option: The name of the option it was given to, for the message.
        unit: "B", or "FLOP" where operations are meant.

    Raises:
        ArgumentError: If it is not a size in a second, or 0.
    """
    end = r"\s*/\s*s\s*$" if unit == "B" else rf"{unit}(s|s?\s*/\s*s)\s*$"
    size, found = re.subn(end, "" if unit == "B" else "B", text, flags=re.IGNORECASE)
    try:
        if not found:
            raise ArgumentError(f"{option} {text[:40]!r} says no time")
        return float(parse_byte_size(size, option))
    except ArgumentError as error:
        raise ArgumentError(
            f"{option} {text[:40]!r} is no speed: write what is done in a second, such as "
            f"{'50GB/s' if unit == 'B' else f'400T{unit}/s'}."
        ) from error


def format_byte_size(nbytes: int) -> str:
    """`nbytes` with three or four digits and a binary unit, such as "1.50 MiB"."""
    power = 0
    while power < len(_BINARY) - 1 and nbytes >= 1024 ** (power + 1):
        power += 1
    if power == 0:
        return f"{nbytes} B"
    size = nbytes / 1024**power
    digits = 2 if size < 10 else 1 if size < 100 else 0
    return f"{size:.{digits}f} {_BINARY[power]}"

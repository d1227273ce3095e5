"""`memtile generate`: text from a model that need not fit in memory."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from memtile.cli import models
from memtile.cli.console import interruptible
from memtile.cli.errors import CommandError
from memtile.cli.homes import check_home
from memtile.planning import format_byte_size, parse_byte_size


def run_generate(
    model: Annotated[Path, typer.Argument(help="A transformers folder with safetensors.")],
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    budget: Annotated[
        str, typer.Option(help="Memory to use above the imports, such as 2GiB.")
    ] = "2GiB",
    tokens: Annotated[int, typer.Option(help="New tokens, at most.")] = 64,
    home: Annotated[
        str,
        typer.Option(
            help="Where tiles live: checkpoint (the folder's own files), disk, disk:FOLDER, host."
        ),
    ] = "checkpoint",
    temperature: Annotated[float, typer.Option(help="0: the likeliest token; above: drawn.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a message: use the chat template.")
    ] = False,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Refuse a folder that holds more than the model has."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead.")] = False,
    trust_remote_code: models.TrustsCode = False,
) -> int:
    """Generate text straight from the unmodified safetensors, streamed as it comes."""
    if tokens < 1:
        raise CommandError(f"--tokens {tokens} is too few: give 1 or more.")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise CommandError(f"--temperature {temperature} is none: give 0 or more.")
    allowed = parse_byte_size(budget, "--budget")
    check_home(home, "checkpoint")
    models.check_folder(model)
    with interruptible():
        models.load_transformers(model)
        from memtile.cli import generation

        request = generation.Request(
            *(model, prompt, tokens, allowed, home, temperature, seed, chat),
            strict=strict,
            trusts_code=trust_remote_code,
        )
        console = Console(stderr=True, highlight=False)
        found = generation.generate(
            request,
            lambda words: None if as_json else console.print(words, style="dim", soft_wrap=True),
            (lambda text: None) if as_json else generation.say_at_once,
        )
    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return 0
    print()
    console.print(
        f"{len(found.token_ids)} tokens in {found.seconds:.1f} s, peak memory "
        f"{format_byte_size(found.peak_bytes)} of {format_byte_size(allowed)}",
        style="dim",
        soft_wrap=True,
    )
    return 0

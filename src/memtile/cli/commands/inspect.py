"""`memtile inspect`: what a checkpoint holds, of a model or of a run."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from memtile.cli import inspection
from memtile.cli.console import interruptible, progress


def run_inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint's folder or file.")],
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Read all bytes, verify checksums.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead.")] = False,
) -> int:
    """Show the tensors of a safetensors checkpoint, and verify their checksums.

    Nothing is loaded as code and nothing is changed. Damage ends with exit code 2.
    """
    with interruptible(), progress() as bars:
        contents = inspection.inspect(path, verify, bars)
    if as_json:
        print(json.dumps(asdict(contents), indent=2))
    else:
        inspection.show(contents, Console())
    return 0

"""The demo's worker process: does one task, and reports on stdout, one JSON document per line.

A line is {"step": …, "loss": …} while it trains, and {"result": …} or {"mistake": "a sentence"} at
the end. Everything else that is printed goes to stderr, which the parent keeps as a log.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from memtile.cli import models
from memtile.cli.demo.records import DemoSettings, Document
from memtile.errors import MemtileError


def main(arguments: list[str]) -> int:
    """Does the task that the one argument names, a JSON object, and gives the exit code."""
    if len(arguments) != 1:
        print("This is the worker of the demo; run: memtile demo", file=sys.stderr)
        return 2
    lines, sys.stdout = sys.stdout, sys.stderr
    try:
        result = _do(json.loads(arguments[0]), lines)
    except MemtileError as mistake:
        _say(lines, mistake=str(mistake))
        return 2
    _say(lines, result=result)
    return 0


def _do(task: Document, lines: TextIO) -> Document:
    models.quieten()
    if task["do"] == "unpack":
        from memtile.cli.demo.smollm2 import write_folder

        return {"folder": str(write_folder(Path(task["gguf"]), Path(task["cache"])))}
    from memtile.cli.demo.training import run_side

    side = run_side(
        DemoSettings(**task["settings"]),
        task["tiled"],
        Path(task["logits"]),
        lambda step, loss: _say(lines, step=step, loss=loss),
    )
    return asdict(side)


def _say(lines: TextIO, **document: object) -> None:
    print(json.dumps(document), file=lines, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

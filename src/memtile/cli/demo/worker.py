"""A worker process of the demo: `run_worker` starts it, `main` is what it does.

It gets one task, a JSON object, as its argument, and reports on stdout, one JSON document a line:
{"step": …, "loss": …} while it trains, and {"result": …} or {"mistake": "a sentence"} at the end.
Everything else that is printed goes to stderr, which the parent keeps as a log.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import IO, Final, TextIO, cast

from memtile.cli import models
from memtile.cli.demo.records import DemoSettings, Document
from memtile.cli.demo.smollm2 import write_folder
from memtile.cli.demo.training import run_side
from memtile.cli.errors import CommandError, WorkerError
from memtile.errors import MemtileError

_LOG_BYTES: Final = 8000
_ENVIRONMENT: Final = {
    "HF_HUB_OFFLINE": "1",  # it reads folders only
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONIOENCODING": "utf-8",
}


def run_worker(task: Document, on_step: Callable[[int, float], None]) -> Document:
    """Runs a task in a process of its own, and gives its result.

    `on_step` gets number and loss of each training step. A mistake that the worker finds is a
    CommandError, any other end without a result a WorkerError.
    """
    command = [sys.executable, "-m", __name__, json.dumps(task)]
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            encoding="utf-8",
            env=os.environ | _ENVIRONMENT,
        ) as worker,
    ):
        assert worker.stdout is not None  # it is a pipe
        last: Document = {}
        try:
            for line in worker.stdout:
                last = json.loads(line)
                if "step" in last:
                    on_step(last["step"], last["loss"])
        except BaseException:
            worker.kill()
            raise
        code = worker.wait()
        if "mistake" in last:
            raise CommandError(last["mistake"])
        if code != 0 or "result" not in last:
            raise WorkerError(_how_it_ended(code), _tail(log))
        return cast("Document", last["result"])


def _how_it_ended(code: int) -> str:
    if code == -signal.SIGKILL:
        return (
            "A worker of the demo was killed, most often for want of memory: "
            "close other programs or give fewer --tokens."
        )
    return f"A worker of the demo ended with exit code {code}; what it printed last is above."


def _tail(log: IO[bytes]) -> str:
    log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_BYTES))
    return log.read().decode(errors="replace")


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
        return {"folder": str(write_folder(Path(task["gguf"]), Path(task["cache"])))}
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

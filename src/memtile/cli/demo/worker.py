"""Starts a worker process of the demo, and reads its progress and its result."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from typing import IO, Final, cast

from memtile.cli.demo.records import Document
from memtile.cli.errors import CommandError, WorkerError

StepHeard = Callable[[int, float], None]

_LOG_BYTES: Final = 8000
_ENVIRONMENT: Final = {
    "HF_HUB_OFFLINE": "1",  # it reads folders only
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONIOENCODING": "utf-8",
}


def run_worker(task: Document, heard: StepHeard) -> Document:
    """Runs a task of `memtile.cli.demo.__main__` in a process of its own, and gives its result.

    `heard` is called with number and loss of each training step.

    Raises:
        CommandError: The worker found a mistake in what it was given; with its sentence.
        WorkerError: It ended in any other way without a result.
    """
    command = [sys.executable, "-m", "memtile.cli.demo", json.dumps(task)]
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
        try:
            last = _listen(worker.stdout, heard)
        except BaseException:
            worker.kill()
            raise
        code = worker.wait()
        if "mistake" in last:
            raise CommandError(last["mistake"])
        if code != 0 or "result" not in last:
            raise WorkerError(_how_it_ended(code), _tail(log))
        return cast("Document", last["result"])


def _listen(lines: Iterable[str], heard: StepHeard) -> Document:
    last: Document = {}
    for line in lines:
        last = json.loads(line)
        if "step" in last:
            heard(last["step"], last["loss"])
    return last


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

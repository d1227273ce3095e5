"""The log of a run: one JSON object a step, and a picture of its losses."""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

NAME: Final = "log.jsonl"
PICTURE: Final = "loss.png"


@dataclass(frozen=True)
class Entry:
    """What one step was.

    Attributes:
        step: from 1.
        loss: mean over the tokens, before the step.
        lr: learning rate of the step.
        seconds: it took.
        tokens_per_second: trained on.
        peak_bytes: the most memory so far, above the imports.
    """

    step: int
    loss: float
    lr: float
    seconds: float
    tokens_per_second: float
    peak_bytes: int


class Log:
    """A file that a line is added to after each step.

    Args:
        out: the run's folder.
        last_step: of the checkpoint that the run goes on from; later lines are dropped.
    """

    def __init__(self, out: Path, last_step: int) -> None:
        self._out = out
        kept = [line for line in _lines(out / NAME) if json.loads(line)["step"] <= last_step]
        self._file = (out / NAME).open("w", encoding="utf-8")
        self._file.writelines(line + "\n" for line in kept)
        self._file.flush()

    def add(self, entry: Entry) -> None:
        """Write a step down at once."""
        self._file.write(json.dumps(asdict(entry)) + "\n")
        self._file.flush()

    def close(self) -> None:
        """End the file, and draw its picture."""
        self._file.close()
        draw(self._out)


def draw(out: Path) -> bool:
    """Draw the losses into the folder, in a process of its own, whose memory is not the run's.

    Returns:
        Whether it could be drawn: it needs matplotlib.
    """
    script = Path(__file__).with_name("curve.py")
    command = [sys.executable, str(script), str(out / NAME), str(out / PICTURE)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def _lines(file: Path) -> list[str]:
    """The whole lines of a log; a killed run may leave half of one."""
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith("{") and line.endswith("}")]

"""The log of a run: one JSON object per step, and a picture of the losses."""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

LOG: Final = "log.jsonl"
PICTURE: Final = "loss.png"


@dataclass(frozen=True)
class LoggedStep:
    """One step: its loss before the update, and the peak memory so far above the imports."""

    step: int
    loss: float
    lr: float
    seconds: float
    tokens_per_second: float
    peak_bytes: int


class Log:
    """The log file in a run's folder; lines after `last_step`, the checkpoint's, are dropped."""

    def __init__(self, out: Path, last_step: int) -> None:
        self._out = out
        kept = [line for line in _lines(out / LOG) if json.loads(line)["step"] <= last_step]
        self._file = (out / LOG).open("w", encoding="utf-8")
        self._file.writelines(line + "\n" for line in kept)
        self._file.flush()

    def add(self, entry: LoggedStep) -> None:
        """Writes a step at once."""
        self._file.write(json.dumps(asdict(entry)) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file, and draws its picture."""
        self._file.close()
        draw(self._out)


def draw(out: Path) -> bool:
    """Draws the losses in a process of its own; False without matplotlib."""
    script = Path(__file__).with_name("curve.py")
    command = [sys.executable, str(script), str(out / LOG), str(out / PICTURE)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def _lines(file: Path) -> list[str]:
    """The whole lines of a log; a killed run may leave half of one."""
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith("{") and line.endswith("}")]

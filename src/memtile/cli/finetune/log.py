"""The log of a run: one JSON object a step, and a picture of its losses.

As a script, `python log.py LOG PNG`, it draws the picture; it imports no torch.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

LOG: Final = "log.jsonl"
PICTURE: Final = "loss.png"

_SMOOTHED: Final = 0.9  # weight of what came before, in the picture's second line


@dataclass(frozen=True)
class LoggedStep:
    """One step: its loss before the update, and the peak memory so far above the imports.

    The loss on the validation data is that after the update; None where it was not taken. Of the
    seconds, tiles were waited for in `waited_seconds`, and homes read or wrote in `moving_seconds`;
    None where an engine holds the tiles.
    """

    step: int
    loss: float
    lr: float
    seconds: float
    tokens_per_second: float
    peak_bytes: int
    validation_loss: float | None = None
    waited_seconds: float | None = None
    moving_seconds: float | None = None


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
        known = {name: value for name, value in asdict(entry).items() if value is not None}
        self._file.write(json.dumps(known) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file, and draws its picture."""
        self._file.close()
        draw(self._out)


def draw(out: Path) -> None:
    """Draws the losses in a process of its own; without matplotlib there is no picture."""
    command = [sys.executable, __file__, str(out / LOG), str(out / PICTURE)]
    subprocess.run(command, check=False, capture_output=True)


def _lines(file: Path) -> list[str]:
    """The whole lines of a log; a killed run may leave half of one."""
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith("{") and line.endswith("}")]


def _draw_here(log: Path, picture: Path) -> None:
    from matplotlib.figure import Figure

    entries = [json.loads(line) for line in _lines(log)]
    if not entries:
        return
    steps = [entry["step"] for entry in entries]
    losses = [entry["loss"] for entry in entries]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="0.7", linewidth=1, label="each step")
    axes.plot(steps, list(_smoothed(losses)), color="C0", label="smoothed")
    seen = [entry for entry in entries if "validation_loss" in entry]
    if seen:
        found = [entry["validation_loss"] for entry in seen]
        axes.plot([entry["step"] for entry in seen], found, color="C1", label="validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend()
    axes.grid(alpha=0.3)
    partial = picture.with_name(f"{picture.name}.partial")
    figure.savefig(partial, format="png", dpi=120)
    partial.replace(picture)


def _smoothed(losses: list[float]) -> Iterator[float]:
    """Means that weigh each loss less the longer ago it was."""
    total = weight = 0.0
    for loss in losses:
        total, weight = _SMOOTHED * total + loss, _SMOOTHED * weight + 1
        yield total / weight


if __name__ == "__main__":
    _draw_here(Path(sys.argv[1]), Path(sys.argv[2]))

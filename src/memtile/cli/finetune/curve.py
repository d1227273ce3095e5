"""Draws the losses of a log: the script `python curve.py LOG PNG`, which imports no torch."""

import json
import sys
from itertools import accumulate
from pathlib import Path
from typing import Final

_SMOOTHED: Final = 0.9  # weight of what came before, in the second line


def main(arguments: list[str]) -> int:
    """Draws one log and gives the exit code."""
    log, picture = map(Path, arguments)
    from matplotlib.figure import Figure

    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    if not entries:
        return 0
    steps = [entry["step"] for entry in entries]
    losses = [entry["loss"] for entry in entries]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="0.7", linewidth=1, label="each step")
    axes.plot(steps, _smoothed(losses), color="C0", label="smoothed")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend()
    axes.grid(alpha=0.3)
    partial = picture.with_name(f"{picture.name}.partial")
    figure.savefig(partial, format="png", dpi=120)
    partial.replace(picture)
    return 0


def _smoothed(losses: list[float]) -> list[float]:
    """Means that weigh each loss less the longer ago it was."""
    sums = accumulate(losses, lambda total, loss: _SMOOTHED * total + loss)
    weights = accumulate(losses, lambda total, _: _SMOOTHED * total + 1, initial=0.0)
    next(weights)
    return [total / weight for total, weight in zip(sums, weights, strict=True)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

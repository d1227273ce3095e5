"""Draws the losses of a log as a PNG: `python -m memtile.cli.finetune.curve LOG PNG`."""

import json
import sys
from itertools import accumulate
from pathlib import Path
from typing import Final

_SMOOTHED: Final = 0.9  # weight of what came before, in the second line


def main(arguments: list[str]) -> int:
    """Draws one log and gives the exit code."""
    log, picture = map(Path, arguments)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    if not entries:
        return 0
    steps = [entry["step"] for entry in entries]
    losses = [entry["loss"] for entry in entries]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, losses, color="0.7", linewidth=1, label="each step")
    smooth = accumulate(losses, lambda mean, loss: _SMOOTHED * mean + (1 - _SMOOTHED) * loss)
    axes.plot(steps, list(smooth), color="C0", label="smoothed")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend()
    axes.grid(alpha=0.3)
    partial = picture.with_name(f"{picture.name}.partial")
    figure.savefig(partial, format="png", dpi=120)
    partial.replace(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

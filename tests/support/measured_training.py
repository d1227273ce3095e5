"""A process that saves and resumes a model of 256 MiB on disk with AdamW, and measures its memory.

Run as a script: `measured_training.py FOLDER`. Prints one JSON object.
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn

import memtile
from memtile.testing import PeakMemory

FEATURES, LAYERS = 2048, 16
WEIGHT_BYTES = LAYERS * FEATURES * FEATURES * 4


def build(folder: Path) -> tuple[nn.Module, memtile.TileOptimizer]:
    """Half of the layers in rows of tiles, half in columns; one step, which makes the moments."""
    torch.manual_seed(0)
    home = memtile.DiskHome(folder)
    grids = [{"out_splits": 4}, {"out_splits": 2, "in_splits": 2}]
    layers = [
        memtile.TiledLinear(FEATURES, FEATURES, **grids[number % 2], home=home)
        for number in range(LAYERS)
    ]
    model = nn.Sequential(*layers)
    optimizer = memtile.TileOptimizer(model, torch.optim.AdamW, mode="in_backward", lr=1e-3)
    model(torch.randn(3, FEATURES)).square().mean().backward()
    optimizer.step()
    return model, optimizer


def main(folder: Path) -> None:
    """Save, resume, and print what was seen."""
    parts = build(folder)
    found: dict[str, object] = {}
    with PeakMemory() as peak:
        memtile.save_training(folder / "run", *parts, step=1)
    found["save_bytes"] = peak.nbytes
    bias = parts[0][0].bias[:3].tolist()
    del parts
    parts = build(folder)
    with PeakMemory() as peak:
        memtile.resume_training(folder / "run", *parts)
    found["resume_bytes"] = peak.nbytes
    found["same"] = parts[0][0].bias[:3].tolist() == bias
    found["file_bytes"] = sum(path.stat().st_size for path in (folder / "run").glob("*/*"))
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""A process that trains a large model, dense in memory or on disk under a hard memory limit.

Run as a script: `capped_training.py SIDE CAP FOLDER`, SIDE "dense" or a mode of TileOptimizer, CAP
"cgroup", "rlimit" or "none". Prints one JSON object. The limit is set after the imports.
"""

import contextlib
import json
import os
import resource
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import memtile
from memtile.testing import LargestAllocation

FEATURES, LAYERS, ROWS, STEPS = 8192, 5, 16, 5
TILE_BYTES = 16 << 20
CAP_BYTES = 512 << 20
STATE_BYTES = LAYERS * FEATURES * FEATURES * 16  # weights, gradients, two moments: 5 GiB

_V1, _V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


@contextlib.contextmanager
def memory_cgroup(cap_bytes: int = CAP_BYTES) -> Iterator[None]:
    """Inside, what this process allocates anew, cached pages included, is at most the cap.

    Raises:
        OSError: no memory cgroup can be made here.
    """
    root, limit = (_V1, "memory.limit_in_bytes") if _V1.is_dir() else (_V2, "memory.max")
    group = root / f"memtile-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / limit).write_text(str(cap_bytes))
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        (root / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


@contextlib.contextmanager
def data_limit() -> Iterator[None]:
    """Inside, private memory is at most the cap above what it is now."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + CAP_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def status(field: str) -> int:
    """A size from /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


class Sampled:
    """The most RssAnon + RssShmem seen while it runs, every 5 ms."""

    def __enter__(self) -> "Sampled":
        self.before = self.most = status("RssAnon") + status("RssShmem")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            self.most = max(self.most, status("RssAnon") + status("RssShmem"))

    def __exit__(self, *raised: object) -> None:
        self._stop.set()
        self._thread.join()


def build(side: str, folder: str) -> nn.Module:
    """The same model for each side: row tiles draw what a dense layer draws."""
    torch.manual_seed(0)
    if side == "dense":
        return nn.Sequential(*(nn.Linear(FEATURES, FEATURES) for _ in range(LAYERS)))
    home = memtile.DiskHome(folder)
    splits = FEATURES * FEATURES * 4 // TILE_BYTES
    return nn.Sequential(
        *(
            memtile.TiledLinear(FEATURES, FEATURES, out_splits=splits, home=home)
            for _ in range(LAYERS)
        )
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """The loss of each step."""
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(ROWS, FEATURES, generator=generator) for _ in range(2))
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(side: str, cap: str, folder: str) -> None:
    """Train one side and print what was seen."""
    caps = {"cgroup": memory_cgroup, "rlimit": data_limit, "none": contextlib.nullcontext}
    adamw = torch.optim.AdamW
    nn.Linear(8, 8)(torch.ones(8, 8)).sum().backward()  # threads and libraries of a first product
    with caps[cap](), Sampled() as sampled, LargestAllocation() as largest:
        model = build(side, folder)
        if side == "dense":
            optimizer = adamw(model.parameters(), lr=1e-4)
        else:
            optimizer = memtile.TileOptimizer(model, adamw, mode=side, lr=1e-4)
        losses = train(model, optimizer)
    result = {
        "losses": losses,
        "private_bytes": sampled.most - sampled.before,
        "largest_bytes": largest.nbytes,
        "largest_op": largest.op,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])

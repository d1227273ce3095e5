"""A process that trains a large model, in memory or on disk under a hard memory limit.

Run as a script: `capped_training.py SIDE CAP FOLDER SIZE`, SIDE "dense" or a mode of TileOptimizer,
CAP "cgroup", "rlimit" or "none". Prints one JSON object. The limit is set after the imports.

"mlp" is one gated MLP, whose tiles are read and written past the page cache, stepped with SGD.
"""

import contextlib
import json
import os
import resource
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # torch's optimizers import it when they first step
from forked import child_says
from torch import nn

import memtile
from memtile.homes import Allocation, DiskHome, Ending
from memtile.homes.home import Rooms
from memtile.testing import LargestAllocation

LAYERS, ROWS = 5, 16


@dataclass(frozen=True)
class Size:
    """A model whose weights, gradients and two moments are more than its cap."""

    features: int
    steps: int
    tile_bytes: int
    cap_bytes: int
    inner: int = 0  # of an MLP

    @property
    def state_bytes(self) -> int:
        """Of weights, gradients and moments in float32; of an MLP of its weights."""
        return 12 * self.features * self.inner or LAYERS * self.features**2 * 16


SIZES = {
    "small": Size(features=2592, steps=2, tile_bytes=1 << 20, cap_bytes=96 << 20),
    "large": Size(features=8192, steps=2, tile_bytes=16 << 20, cap_bytes=512 << 20),
    "mlp": Size(features=2048, inner=40960, steps=2, tile_bytes=1 << 20, cap_bytes=96 << 20),
}

_V1, _V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


@contextlib.contextmanager
def memory_cgroup(cap_bytes: int = SIZES["large"].cap_bytes) -> Iterator[None]:
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


def can_make_a_cgroup() -> bool:
    """Whether `memory_cgroup` works here; tried in a child."""

    def tried() -> bool:
        with memory_cgroup():
            return True

    return child_says(tried)


@contextlib.contextmanager
def data_limit(cap_bytes: int) -> Iterator[None]:
    """Inside, private memory is at most the cap above what it is now."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + cap_bytes, before[1]))
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


def build(side: str, folder: str, size: Size) -> nn.Module:
    """The same model for each side: row tiles draw what a dense layer draws."""
    torch.manual_seed(0)
    features = size.features
    if size.inner:
        return build_mlp(None if side == "dense" else memtile.DiskHome(folder), size)
    if side == "dense":
        return nn.Sequential(*(nn.Linear(features, features) for _ in range(LAYERS)))
    home = memtile.DiskHome(folder)
    splits = -(-features * features * 4 // size.tile_bytes)
    return nn.Sequential(
        *(
            memtile.TiledLinear(features, features, out_splits=splits, home=home)
            for _ in range(LAYERS)
        )
    )


def build_mlp(home: memtile.DiskHome | None, size: Size) -> nn.Module:
    """In tiles on both sides, since tiles of columns draw other values than a dense layer."""
    if home is not None:
        home.path = "direct"  # or it would be mapped where the machine has the memory
    splits = 4 * size.features * size.inner // size.tile_bytes
    shared: dict[str, Any] = {"bias": False, "home": home}
    gate, up = (
        memtile.TiledLinear(size.features, size.inner, out_splits=splits, **shared)
        for _ in range(2)
    )
    down = memtile.TiledLinear(size.inner, size.features, in_splits=splits, **shared)
    return memtile.TiledMLP(gate, up, down, activation=nn.functional.silu)


def count_reads() -> Counter[Allocation]:
    """From now on, the bytes that are read of each parked tensor."""
    found, real, by_kernel = Counter[Allocation](), Allocation.read, DiskHome.start_moves

    def read(allocation: Allocation, into: torch.Tensor, start: int = 0) -> None:
        found[allocation] += into.numel()
        real(allocation, into, start)

    def start_moves(home: DiskHome, rooms: Rooms, writes: bool, ending: Ending) -> bool:
        started = by_kernel(home, rooms, writes, ending)
        for allocation, into in rooms if started and not writes else ():
            found[allocation] += into.numel()
        return started

    Allocation.read = read  # type: ignore[method-assign]
    DiskHome.start_moves = start_moves  # type: ignore[method-assign]
    return found


def train(model: nn.Module, optimizer: torch.optim.Optimizer, size: Size) -> list[float]:
    """The loss of each step."""
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(ROWS, size.features, generator=generator) for _ in range(2))
    losses = []
    for _ in range(size.steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(side: str, cap: str, folder: str, name: str) -> None:
    """Train one side and print what was seen."""
    caps, size = {"cgroup": memory_cgroup, "rlimit": data_limit}, SIZES[name]
    limit = caps[cap](size.cap_bytes) if cap in caps else contextlib.nullcontext()
    kind = torch.optim.SGD if size.inner else torch.optim.AdamW
    nn.Linear(8, 8)(torch.ones(8, 8)).sum().backward()  # threads and libraries of a first product
    read_bytes = count_reads()
    with limit, Sampled() as sampled, LargestAllocation() as largest:
        model = build(side, folder, size)
        if side == "dense":
            optimizer = kind(model.parameters(), lr=1e-4)
        else:
            optimizer = memtile.TileOptimizer(model, kind, mode=side, lr=1e-4)
        losses = train(model, optimizer, size)
    result = {
        "losses": losses,
        "private_bytes": sampled.most - sampled.before,
        "largest_bytes": largest.nbytes,
        "largest_op": largest.op,
        "reads": [nbytes / each.room for each, nbytes in read_bytes.items()],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])

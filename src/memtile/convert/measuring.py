"""What this machine does in a second and what its libraries take, measured in a process of its own.

A fresh process, since memory that libraries take at first use is seen only once.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from memtile.convert.counting import count_step
from memtile.convert.tiling import tile
from memtile.convert.twins import meta_twin
from memtile.errors import MemtileError
from memtile.homes import DiskHome, Home, HostHome, aligned_buffer, keep_freed_memory_out
from memtile.optim import TileOptimizer
from memtile.planning import Rates

_ROWS: Final = (16, 64, 256, 1024)
_SIDE: Final = 1024
_WIDTH: Final = 64
_TILES: Final = 512
_DISK_BYTES: Final = 128 << 20
_PIECE: Final = 1 << 20
_THREADS: Final = 8
_LEAST_TIMES: Final = 3
_LONG_ENOUGH: Final = 0.05  # seconds


class MeasuringError(MemtileError, RuntimeError):
    """The process that measures ended without a result."""


def measured(folder: Path | None) -> Rates:
    """The rates of this machine, in a few seconds.

    Args:
        folder: on the disk whose rates are wanted; None: no disk is measured.

    Raises:
        MeasuringError: it failed.
    """
    code = "import memtile.convert.measuring as measuring; measuring.report()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code, *([str(folder)] if folder else [])],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise MeasuringError(
            f"the rates of this machine could not be measured:\n{done.stderr}\ngive rates=… instead"
        ) from error
    curves = ("product_flops", "product_flops_16")
    return Rates(**{**found, **{name: tuple(map(tuple, found[name])) for name in curves}})


def report() -> None:
    """Measure, and print the rates as one line of JSON: what the process runs."""
    folder = sys.argv[1] if len(sys.argv) > 1 else None
    keep_freed_memory_out()
    memory = _memory(folder)
    rates = {
        "product_flops": [(rows, _product_flops(rows, torch.float32)) for rows in _ROWS],
        "product_flops_16": [(rows, _product_flops(rows, torch.bfloat16)) for rows in _ROWS],
        "touched_bytes": _touched_bytes(),
        **_disk(folder),
    }
    print(json.dumps({**memory, **rates}))


def _memory(folder: str | None) -> dict[str, float]:
    """Memory that is taken at first, in the order in which a run takes it."""
    before = _resident_bytes()
    import torch._dynamo  # torch's optimizers import it when they first step

    imported = _resident_bytes()
    with DiskHome(folder) if folder else HostHome() as home:
        inferred = _use_everything(home, trains=False)
    with DiskHome(folder) if folder else HostHome() as home:
        used = _use_everything(home, trains=True)
    _product_flops(_ROWS[-1], torch.bfloat16)
    sixteen = _resident_bytes()
    with DiskHome(folder) if folder else HostHome() as home:
        tiles = _train_tiles(home)
    return {
        "import_bytes": max(0, imported - before),
        "inference_use_bytes": max(0, inferred - imported),
        "first_use_bytes": max(0, used - imported),
        "sixteen_bit_bytes": max(0, sixteen - used),
        **tiles,
        "stepped_elements": _stepped_elements(),
    }


class _Everything(nn.Module):
    """A little of what models are made of, so that each kernel's code is in memory afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(512, _WIDTH)
        self.norms = nn.ModuleList([nn.LayerNorm(_WIDTH), nn.RMSNorm(_WIDTH)])
        self.mixed = nn.Linear(_WIDTH, 3 * _WIDTH)
        self.up, self.down = nn.Linear(_WIDTH, 4 * _WIDTH), nn.Linear(4 * _WIDTH, _WIDTH)
        self.head = nn.Linear(_WIDTH, 512, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """The loss."""
        x = self.norms[1](self.norms[0](self.rows(ids)))
        query, key, value = self.mixed(x).view(1, ids.numel(), 12, -1).transpose(1, 2).chunk(3, 1)
        turned = torch.cat([-query[..., 8:], query[..., :8]], -1) * query.cos() + query.sin()
        mixed = functional.scaled_dot_product_attention(turned, key, value, is_causal=True)
        x = x + mixed.transpose(1, 2).reshape(x.shape)
        high = self.up(x)
        wide = functional.silu(high) * functional.gelu(high) * torch.tanh(high).pow(3)
        logits = self.head(x + self.down(wide)).float()
        return functional.cross_entropy(logits.view(-1, 512), ids.view(-1))


def _use_everything(home: Home, *, trains: bool) -> int:
    """Plan and run a little model as a run does; gives the memory of the process afterwards."""
    model, ids = _Everything().train(trains), torch.arange(128).view(1, -1)

    def work(twin: nn.Module) -> Tensor | None:
        loss: Tensor = twin(ids)
        return loss if trains else None

    count_step(meta_twin(model), work, drops_gradients=True, goes_home=True)
    tile(model, max_tile_bytes=16 << 10, home=home)
    if trains:
        optimizer = TileOptimizer(model, torch.optim.AdamW, mode="in_backward", lr=1e-3)
    for _ in range(3):
        with torch.set_grad_enabled(trains):
            loss = work(model)
        if loss is not None:
            loss.backward()
            optimizer.step()
    _product_flops(_ROWS[-1], torch.float32)
    return _resident_bytes()


def _train_tiles(home: Home) -> dict[str, float]:
    """Bytes of the objects of a tile, and seconds of a visit."""
    before = _resident_bytes()
    model = nn.Sequential(nn.Linear(16, 16 * _TILES, bias=False))
    tile(model, out_splits=_TILES, home=home)
    x = torch.randn(4, 16)
    with torch.no_grad():
        model(x)
    inferred = _resident_bytes()
    optimizer = TileOptimizer(model, torch.optim.AdamW, mode="in_backward", lr=1e-3)

    def step() -> None:
        model(x).sum().backward()
        optimizer.step()

    step()
    seconds = _least_seconds(step)
    return {
        "tile_memory": max(0, inferred - before) // _TILES,
        "trained_tile_memory": max(0, _resident_bytes() - before) // _TILES,
        "tile_seconds": seconds / (4 * _TILES),
    }


def _stepped_elements() -> float:
    """Elements that AdamW steps in a second."""
    weight = nn.Parameter(torch.zeros(_SIDE, 2 * _SIDE))
    weight.grad = torch.ones_like(weight)
    adamw = TileOptimizer(nn.ParameterList([weight]), torch.optim.AdamW, lr=1e-3)
    return weight.numel() / _least_seconds(adamw.step)


def _product_flops(rows: int, dtype: torch.dtype) -> float:
    x, weight = torch.ones(rows, _SIDE, dtype=dtype), torch.ones(_SIDE, _SIDE, dtype=dtype)
    return 2.0 * rows * _SIDE * _SIDE / _least_seconds(lambda: torch.mm(x, weight))


def _touched_bytes() -> float:
    """Of an operation whose result is new memory, as most are."""
    x = torch.ones(8 << 20)
    return 3.0 * x.nbytes / _least_seconds(lambda: torch.add(x, x))


def _disk(folder: str | None) -> dict[str, float]:
    names = ("read_bytes", "written_bytes", "cached_bytes")
    if folder is None:
        return dict.fromkeys(names, 0.0)
    with DiskHome(folder) as home:
        berth = home.berth((_DISK_BYTES,), torch.uint8)
        buffers = [aligned_buffer(_PIECE) for _ in range(_THREADS)]

        def each(move: Callable[[Tensor, int], None]) -> float:
            pieces = list(_pieces(buffers))
            with ThreadPoolExecutor(_THREADS) as pool:
                moves = lambda: list(pool.map(lambda piece: move(*piece), pieces))  # noqa: E731
                return _DISK_BYTES / _least_seconds(moves)

        home.path = "page cache"
        each(berth.write)
        cached = each(berth.read)
        home.path = "direct"
        written = each(berth.write)
        return dict(zip(names, (each(berth.read), written, cached), strict=True))


def _pieces(buffers: list[Tensor]) -> Iterator[tuple[Tensor, int]]:
    for number, start in enumerate(range(0, _DISK_BYTES, _PIECE)):
        yield buffers[number % len(buffers)], start


def _least_seconds(act: Callable[[], object]) -> float:
    """The least of some times, the first apart: what the machine does when nothing else runs."""
    times: list[float] = []
    act()
    while len(times) < _LEAST_TIMES or sum(times) < _LONG_ENOUGH:
        started = time.perf_counter()
        act()
        times.append(max(1e-9, time.perf_counter() - started))
    return min(times)


def _resident_bytes() -> int:
    """Memory of this process now; 0 where the system does not tell."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")

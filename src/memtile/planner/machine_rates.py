"""Measures the machine profile in a new process: its speeds, and the memory its libraries take.

The process is new because a library takes the memory of its first use only once.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from memtile.convert import take_workspace, tile
from memtile.costmodel import MachineProfile, Products
from memtile.costmodel.machine_profile import WORKSPACE_SHAPE
from memtile.errors import ArgumentError, MemtileError
from memtile.homes import (
    DeviceHome,
    DiskHome,
    Home,
    HostHome,
    keep_freed_memory_out,
)
from memtile.optim import TileOptimizer
from memtile.planner.moving_rates import MeasuredDisk, least_seconds
from memtile.planner.operation_count import count_step
from memtile.planner.step_count import make_meta_copy

_STAGE: Final = "measuring: "
_ROWS: Final = (16, 64, 256, 1024)
_SIDE: Final = 1024
_WIDTH: Final = 64
_LAYERS: Final = 256
_TILES: Final = 512
_STEPPED: Final = 8


class MeasuringError(MemtileError, RuntimeError):
    """The process that measures ended without a result."""


def measured(folder: Path | None, started: Callable[[str], None] | None = None) -> MachineProfile:
    """The rates of this machine, and of the disk of a folder, in a few seconds.

    Args:
        folder: on the disk to measure; None: none is measured.
        started: called with the name of each measurement when it begins.

    Raises:
        MeasuringError: the process that measures ended without a result.
    """
    code = "import memtile.planner.machine_rates as machine_rates; machine_rates.report()"
    words = [sys.executable, "-c", code, *([str(folder)] if folder else [])]
    pipe = subprocess.PIPE
    with (
        subprocess.Popen(
            words, stdout=pipe, stderr=pipe, text=True, env=child_environment()
        ) as process,
        ThreadPoolExecutor(1) as reader,
    ):
        assert process.stdout is not None
        assert process.stderr is not None
        log, last = reader.submit(process.stderr.read), ""
        try:
            for last in process.stdout:
                if started and last.startswith(_STAGE):
                    started(last.removeprefix(_STAGE).strip())
        except BaseException:  # Ctrl-C: the process would go on, and we would wait for it
            process.kill()
            raise
    try:
        return MachineProfile.from_json(last)
    except ArgumentError as error:
        raise MeasuringError(
            f"the rates of this machine could not be measured:\n{log.result()}\n"
            "give rates=… instead"
        ) from error


def child_environment() -> dict[str, str]:
    """The environment of a process with this one's import path and number of threads."""
    path = os.pathsep.join(filter(None, sys.path))
    threads = str(torch.get_num_threads())
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": threads}


def report() -> None:
    """Measure, and print the rates as one line of JSON: the new process runs this."""
    folder = sys.argv[1] if len(sys.argv) > 1 else None
    keep_freed_memory_out()
    _begin("what tiles cost")
    memory = _memory(folder)
    _begin("products in float32")
    flops = tuple((rows, _product_flops(rows, torch.float32)) for rows in _ROWS)
    _begin("products in bfloat16")
    flops_16 = tuple((rows, _product_flops(rows, torch.bfloat16)) for rows in _ROWS)
    _begin("memory")
    touched = _touched_bytes()
    rates = MachineProfile(
        **memory,
        product_flops=flops,
        product_flops_16=flops_16,
        touched_bytes=touched,
        **_disk(folder),
    )
    print(rates.to_json().replace("\n", ""))


def _begin(name: str) -> None:
    print(f"{_STAGE}{name}", flush=True)


def _memory(folder: str | None) -> dict[str, Any]:  # fields of `MachineProfile`
    """Memory of each first use, in the order in which a run takes it."""
    before = resident_bytes()
    import torch._dynamo  # torch's optimizers import it when they first step

    imported = resident_bytes()
    widest = _workspace_bytes()
    with _home(folder) as home:
        inferred = use_everything(home, trains=False)
    with _home(folder) as home:
        used = use_everything(home, trains=True)
    sixteen = [_product_bytes(rows, torch.bfloat16) for rows in _ROWS]
    with _home(folder) as home:
        objects = _objects(home)
    return {
        "import_bytes": max(0, imported - before),
        "inference_use_bytes": max(0, inferred - imported - widest),
        "first_use_bytes": max(0, used - imported - widest),
        "workspace_bytes": widest,
        "sixteen_bit_bytes": sixteen[0],
        "sixteen_bit_kind_bytes": sum(sixteen[1:]) // len(sixteen[1:]),
        **objects,
        "stepped_elements": _stepped_elements(),
    }


def _home(folder: str | None) -> Home:
    return DiskHome(folder) if folder else HostHome()


def _workspace_bytes() -> int:
    """Memory that a large product leaves; a small one first loads the code that all use."""
    _product_bytes(1, torch.float32)
    before = resident_bytes()
    take_workspace(Products((WORKSPACE_SHAPE,), 0))
    return max(0, resident_bytes() - before)


def _product_bytes(rows: int, dtype: torch.dtype) -> int:
    """Memory that one product leaves."""
    x, weight = torch.ones(rows, _SIDE, dtype=dtype), torch.ones(_SIDE, _SIDE, dtype=dtype)
    before = resident_bytes()
    torch.mm(x, weight)
    return max(0, resident_bytes() - before)


class _Everything(nn.Module):
    """A small model with the common operations, to load the code of their kernels."""

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
        rotated = torch.cat([-query[..., 8:], query[..., :8]], -1) * query.cos() + query.sin()
        mixed = functional.scaled_dot_product_attention(rotated, key, value, is_causal=True)
        x = x + mixed.transpose(1, 2).reshape(x.shape)
        high = self.up(x)
        wide = functional.silu(high) * functional.gelu(high) * torch.tanh(high).pow(3)
        logits = self.head(x + self.down(wide)).float()
        return functional.cross_entropy(logits.view(-1, 512), ids.view(-1))


def use_everything(home: Home, *, trains: bool) -> int:
    """Plan and run a small model as a run does; gives the memory of the process afterwards."""
    model, ids = _Everything().train(trains), torch.arange(128).view(1, -1)

    def work(meta_copy: nn.Module) -> Tensor | None:
        loss: Tensor = meta_copy(ids)
        return loss if trains else None

    count_step(make_meta_copy(model), work, drops_gradients=True, goes_home=True)
    tile(model, max_tile_bytes=16 << 10, home=home)
    if trains:
        optimizer = TileOptimizer(model, torch.optim.AdamW, mode="in_backward", lr=1e-3, fused=True)
    for _ in range(3):
        with torch.set_grad_enabled(trains):
            loss = work(model)
        if loss is not None:
            loss.backward()
            optimizer.step()
    return resident_bytes()


def _objects(home: Home) -> dict[str, float]:
    """Bytes of the objects of a layer and of a tile, planning included, and the time of a tile."""
    layers, tiles = _Lined(_LAYERS, 2, home), _Lined(1, _TILES, home)
    inferred = layers.infer(), tiles.infer()
    trained = inferred[0] + layers.train(), inferred[1] + tiles.train()
    return {
        **_each("", *inferred),
        **_each("trained_", *trained),
        "tile_seconds": least_seconds(tiles.step) / (4 * _TILES),
    }


def _each(word: str, layers: int, tiles: int) -> dict[str, float]:
    """Bytes of one tile and one layer, from one layer of many tiles and many layers of two."""
    tile_bytes = tiles // _TILES
    layer_bytes = layers // _LAYERS - 2 * tile_bytes
    return {f"{word}tile_memory": tile_bytes, f"{word}layer_memory": max(0, layer_bytes)}


class _Lined:
    """A sequence of linears, planned and tiled as a model is; gives the memory of each stage."""

    def __init__(self, layers: int, splits: int, home: Home) -> None:
        self._layers, self._splits, self._home = layers, splits, home
        self._ids = torch.ones(4, 16)

    def infer(self) -> int:
        before = resident_bytes()
        self._plan(trains=False)
        self._model = self._tiled(self._made(), self._home)
        with torch.no_grad():
            self._loss(self._model)
        return max(0, resident_bytes() - before)

    def train(self) -> int:
        before = resident_bytes()
        self._plan(trains=True)
        adamw = torch.optim.AdamW
        self._optimizer = TileOptimizer(self._model, adamw, mode="in_backward", lr=1e-3, fused=True)
        self.step()
        return max(0, resident_bytes() - before)

    def step(self) -> None:
        self._loss(self._model).backward()
        self._optimizer.step()

    def _plan(self, *, trains: bool) -> None:
        """Count as a search does: with nothing parked, and with everything."""
        dense = make_meta_copy(self._made()).train(trains)
        count_step(dense, self._loss, drops_gradients=True, goes_home=True)
        meta_copy = self._tiled(make_meta_copy(dense), DeviceHome("meta"))
        count_step(meta_copy, self._loss, drops_gradients=True, goes_home=True)

    def _made(self) -> nn.Sequential:
        width = 16 * (self._splits if self._layers == 1 else 1)
        return nn.Sequential(*(nn.Linear(16, width, bias=False) for _ in range(self._layers)))

    def _tiled(self, model: nn.Module, home: Home) -> nn.Module:
        return tile(model, out_splits=self._splits, home=home)

    def _loss(self, model: nn.Module) -> Tensor:
        loss: Tensor = model(self._ids).sum()
        return loss


def _stepped_elements() -> float:
    """Elements that fused AdamW steps in a second, a tile at a time, of more than a cache holds."""
    tiles = nn.ParameterList(nn.Parameter(torch.zeros(_SIDE, _SIDE)) for _ in range(_STEPPED))
    for tile_weight in tiles:
        tile_weight.grad = torch.ones_like(tile_weight)
    adamw = TileOptimizer(tiles, torch.optim.AdamW, lr=1e-3, fused=True)
    return _STEPPED * _SIDE**2 / least_seconds(adamw.step)


def _product_flops(rows: int, dtype: torch.dtype) -> float:
    x, weight = torch.ones(rows, _SIDE, dtype=dtype), torch.ones(_SIDE, _SIDE, dtype=dtype)
    return 2.0 * rows * _SIDE * _SIDE / least_seconds(lambda: torch.mm(x, weight))


def _touched_bytes() -> float:
    """Bytes a second of an operation that makes a new tensor, as most do."""
    x = torch.ones(8 << 20)
    return 3.0 * x.nbytes / least_seconds(lambda: torch.add(x, x))


def _disk(folder: str | None) -> dict[str, Any]:  # fields of `MachineProfile`
    """Zeros without a folder."""
    if folder is None:
        return dict.fromkeys(("read_bytes", "written_bytes", "mapped_bytes"), 0.0)
    with MeasuredDisk(folder) as disk:
        _begin("disk, page cache")
        mapped = disk.map()
        _begin("disk, direct writes")
        written = disk.write()
        _begin("disk, direct reads")
        return {
            "read_bytes": disk.read(),
            "written_bytes": written,
            "mapped_bytes": mapped,
        }


def resident_bytes() -> int:
    """Memory of this process now; 0 where the system does not report it."""
    return _pages()[1] * os.sysconf("SC_PAGE_SIZE")


def private_bytes() -> int:
    """Memory of this process without pages of files and those shared with other processes."""
    _, resident, shared = _pages()
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def _pages() -> list[int]:
    """Pages of the address space, resident ones, and shared ones; zeros where not reported."""
    try:
        return [int(word) for word in Path("/proc/self/statm").read_text().split()[:3]]
    except OSError:
        return [0, 0, 0]

"""Inference and AdamW training from a cold disk, over the floor measured in the same run.

The floor of a pass is the larger of two times: the same pass of the same layers in memory, and the
bytes that it must move at the rate that the disk has for raw direct I/O of this mix of reads and
writes. A float32 parameter is read once for inference (4 bytes); for training it is read twice and
its two moments once (16 bytes), and weight and moments are written (12 bytes). All candidates run
in turn, round after round; ratios are of medians of one run.

    python benchmarks/disk_training.py --output benchmarks/results/disk_training.json
"""

import argparse
import json
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from conditions import drop_cached, machine, spread
from rich.console import Console
from rich.table import Table
from torch import nn

import memtile

PIECE = 4 << 20
THREADS = 4
INFERENCE_MIX = (1, 0)  # times the weights' bytes: read, written
TRAINING_MIX = (4, 3)
HEADINGS = ["pass", "tokens", "memory s", "disk s", "floor s", "memtile s", "over floor", "spread"]


class RawDisk:
    """What the disk does with direct I/O of many threads and nothing else."""

    def __init__(self, folder: Path, nbytes: int) -> None:
        self.pieces = nbytes // PIECE
        self.fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT)
        self.memory = mmap.mmap(-1, THREADS * PIECE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory.madvise(mmap.MADV_HUGEPAGE)  # as memtile's slabs: half as fast without
        self.memory.write(os.urandom(THREADS * PIECE))
        os.posix_fallocate(self.fd, 0, nbytes)
        self.seconds((0, 1))  # blocks that were never written are not read from the disk

    def _move(self, number: int, writes: bool) -> None:
        start = number % THREADS * PIECE
        buffer = memoryview(self.memory)[start : start + PIECE]
        (os.pwritev if writes else os.preadv)(self.fd, [buffer], number % self.pieces * PIECE)

    def seconds(self, mix: tuple[int, int]) -> float:
        """Time to read and write these multiples of the file, both at once."""
        reads, writes = mix
        turn = [False] * reads + [True] * writes
        started = time.perf_counter()
        with ThreadPoolExecutor(THREADS) as pool:
            moves = range(self.pieces * (reads + writes))
            list(pool.map(lambda n: self._move(n // len(turn), turn[n % len(turn)]), moves))
        return time.perf_counter() - started

    def close(self) -> None:
        os.close(self.fd)


def dense_stack(features: int, layers: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(features, features, bias=False) for _ in range(layers)))


class InMemory:
    """The dense layers, with torch's own AdamW, fused as on the other side."""

    def __init__(self, features: int, layers: int) -> None:
        self.model = dense_stack(features, layers)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)

    def infer(self, x: torch.Tensor) -> None:
        with torch.no_grad():
            self.model(x)

    def train(self, x: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        self.model(x).square().mean().backward()
        self.optimizer.step()


class OnDisk(InMemory):
    """The same layers parked on disk, read and written past the page cache: cold at every pass."""

    def __init__(self, features: int, layers: int, folder: Path, max_tile_bytes: int) -> None:
        self.home = memtile.DiskHome(folder)
        self.model = memtile.tile(
            dense_stack(features, layers), max_tile_bytes=max_tile_bytes, home=self.home
        )
        self.optimizer = memtile.TileOptimizer(
            self.model, torch.optim.AdamW, mode="in_backward", lr=1e-5, fused=True
        )
        self.home.path = "direct"


@contextmanager
def accelerate_offload(features: int, layers: int) -> Iterator[Callable[[torch.Tensor], None]]:
    """accelerate's disk offload of the same layers; its files are dropped from the page cache."""
    from accelerate import disk_offload

    with tempfile.TemporaryDirectory() as folder:
        model = disk_offload(dense_stack(features, layers), folder, torch.device("cpu"))

        def infer(x: torch.Tensor) -> None:
            with torch.no_grad():
                model(x)

        infer.drop = partial(drop_cached, list(Path(folder).iterdir()))
        yield infer


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every pass at every number of tokens: the times of all rounds."""
    options = (args.features, args.layers)
    weights = args.features**2 * args.layers * 4
    raw = RawDisk(args.folder, weights)
    memory, disk = InMemory(*options), OnDisk(*options, args.folder, args.max_tile_bytes)
    cases = []
    for tokens in args.tokens:
        x = torch.randn(tokens, args.features, generator=torch.Generator().manual_seed(1))
        passes = {"inference": INFERENCE_MIX} if args.only != "training" else {}
        passes |= {"training": TRAINING_MIX} if args.only != "inference" else {}
        for name, mix in passes.items():
            act = "infer" if name == "inference" else "train"
            times: dict[str, list[float]] = {"memory": [], "disk": [], "memtile": []}
            for number in range(args.rounds + 1):
                taken = {
                    "memory": seconds(partial(getattr(memory, act), x)),
                    "disk": raw.seconds(mix),
                    "memtile": seconds(partial(getattr(disk, act), x)),
                }
                for side in taken if number else ():  # the first round is for learning the way
                    times[side].append(taken[side])
            cases.append({"pass": name, "tokens": tokens, "seconds": times})
            show(cases[-1])
    raw.close()
    return cases


def measure_accelerate(args: argparse.Namespace, cases: list[dict[str, Any]]) -> None:
    """accelerate's inference, in turn with memtile's, added to the cases."""
    with accelerate_offload(args.features, args.layers) as infer:
        disk = OnDisk(args.features, args.layers, args.folder, args.max_tile_bytes)
        for case in cases:
            if case["pass"] != "inference":
                continue
            x = torch.randn(case["tokens"], args.features)
            times = case["against_accelerate"] = {"accelerate": [], "memtile": []}
            disk.infer(x)
            for _ in range(args.rounds):
                infer.drop()
                times["accelerate"].append(seconds(partial(infer, x)))
                times["memtile"].append(seconds(partial(disk.infer, x)))


def floor(case: dict[str, Any]) -> float:
    medians = {side: statistics.median(values) for side, values in case["seconds"].items()}
    return max(medians["memory"], medians["disk"])


def show(case: dict[str, Any]) -> None:
    ratio = statistics.median(case["seconds"]["memtile"]) / floor(case)
    print(f"{case['pass']} {case['tokens']}: {ratio:.2f}", flush=True)


def table(cases: list[dict[str, Any]]) -> Table:
    result = Table(*HEADINGS, "accelerate over memtile")
    for column in result.columns:
        column.justify = "right"
    for case in cases:
        medians = {side: statistics.median(values) for side, values in case["seconds"].items()}
        against = case.get("against_accelerate")
        ratio = (
            statistics.median(against["accelerate"]) / statistics.median(against["memtile"])
            if against
            else None
        )
        result.add_row(
            case["pass"],
            str(case["tokens"]),
            *(f"{medians[side]:.2f}" for side in ("memory", "disk")),
            f"{floor(case):.2f}",
            f"{medians['memtile']:.2f}",
            f"{medians['memtile'] / floor(case):.2f}",
            f"±{spread(case['seconds']['memtile']):.0%}",
            "" if ratio is None else f"{ratio:.2f}",
        )
    return result


def main() -> None:
    """Measure every case, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 64, 256, 1024])
    parser.add_argument("--max-tile-bytes", type=int, default=16 << 20)
    parser.add_argument("--rounds", type=int, default=5, help="at least 5")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--only", choices=["inference", "training"])
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    cases = measure(args)
    if args.only != "training":
        measure_accelerate(args, cases)
    Console(width=120).print(table(cases))
    if args.output:
        settings = {
            key: str(value) for key, value in vars(args).items() if key not in ("output", "folder")
        }
        result = {"machine": machine(), "settings": settings, "cases": cases}
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

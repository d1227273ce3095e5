"""Peak memory and CPU time of a norm with a gated MLP, forward and backward, over row tiles.

Every peak is taken in a process of its own (`VmHWM`, above weights and input), whose malloc gives
freed blocks of a MiB and more back to the system, so that it is of what is used. For times all
candidates run in turn, round after round, in one process; a comparison is a ratio of medians of
CPU seconds taken in that run.

    python benchmarks/row_tiles.py --dtype bfloat16
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from conditions import spread
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import memtile
from memtile.testing import PeakMemory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TILES = 8
MIB = 1 << 20


class Mlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.down(functional.silu(self.gate(h)) * self.up(h))


def row_chunks(mlp: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([checkpoint(mlp, part, use_reentrant=False) for part in x.chunk(TILES)])


def over_row_tiles(mlp: nn.Module, x: Tensor) -> Tensor:
    return memtile.tile_rows(mlp.__call__, rows=-(-len(x) // TILES))(x)


CANDIDATES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "plain": lambda mlp, x: mlp(x),
    "checkpoint": lambda mlp, x: checkpoint(mlp, x, use_reentrant=False),
    "8 checkpoints of rows": row_chunks,
    "memtile.tile_rows": over_row_tiles,
}


def inputs(args: argparse.Namespace) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    dtype = DTYPES[args.dtype]
    x, seed = (torch.randn(args.tokens, args.width, dtype=dtype) for _ in range(2))
    return Mlp(args.width, args.inner).to(dtype), x.requires_grad_(), seed


def step(name: str, mlp: nn.Module, x: Tensor, seed: Tensor) -> None:
    x.grad = None
    mlp.zero_grad()
    CANDIDATES[name](mlp, x).backward(seed)


def print_peak(args: argparse.Namespace) -> None:
    mlp, x, seed = inputs(args)
    step(args.peak_of, Mlp(16, 32).to(x.dtype), x.detach()[:, :16].requires_grad_(), seed[:, :16])
    with PeakMemory() as peak:
        step(args.peak_of, mlp, x, seed)
    print(peak.nbytes)


def peak_bytes(args: argparse.Namespace, name: str) -> int:
    command = [sys.executable, __file__, "--peak-of", name, "--dtype", args.dtype]
    for option in ("tokens", "width", "inner"):
        command += [f"--{option}", str(getattr(args, option))]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB)}
    ran = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(ran.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=8192)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        print_peak(args)
        return
    given, times = inputs(args), {name: list[float]() for name in CANDIDATES}
    for number in range(args.rounds + 1):
        for name, each in times.items():
            begun = time.process_time()
            step(name, *given)
            if number:  # the first round warms up
                each.append(time.process_time() - begun)
    table = Table("candidate", "MiB", "CPU s", "÷ plain", "spread", title=args.dtype)
    plain = statistics.median(times["plain"])
    for name, each in times.items():
        seconds, mib = statistics.median(each), peak_bytes(args, name) / MIB
        table.add_row(
            name, f"{mib:.0f}", f"{seconds:.1f}", f"{seconds / plain:.2f}", f"±{spread(each):.0%}"
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()

"""Peak memory and CPU time of a head with its loss, forward and backward, against its peers.

Every peak is taken in a process of its own (`VmHWM`, above weights and input). For times all
candidates run in turn, round after round, in one process; a comparison is a ratio of medians of
CPU seconds taken in that run. Losses are compared with float64.

    python benchmarks/loss_vs_peers.py --dtype bfloat16 --output loss_bfloat16.json
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conditions import machine, spread
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import memtile
from memtile.testing import PeakMemory

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MIB = 1 << 20


def plain(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(functional.linear(x, weight), target)


def row_chunks(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Eight chunks of rows, each computed again in backward."""

    def one(rows: Tensor, classes: Tensor) -> Tensor:
        return functional.cross_entropy(functional.linear(rows, weight), classes, reduction="sum")

    parts = zip(x.chunk(8), target.chunk(8), strict=True)
    sums = [checkpoint(one, rows, classes, use_reentrant=False) for rows, classes in parts]
    return torch.stack(sums).sum() / len(target)


def torch_chunks(**options: Any) -> Loss:
    """PyTorch's own, of 2.13 or later."""

    def loss(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        chosen = torch.nn.LinearCrossEntropyOptions(**options)
        return functional.linear_cross_entropy(x, weight, target, options=chosen)

    return loss


def candidates() -> dict[str, Loss]:
    """By name; PyTorch's own where it has one."""
    found: dict[str, Loss] = {"plain": plain, "memtile": memtile.linear_cross_entropy}
    if hasattr(functional, "linear_cross_entropy"):
        by_rows = {"batch_chunk_size": 512, "chunking_method": None}
        found["torch, automatic"] = torch_chunks()
        found["torch, 512 rows"] = torch_chunks(**by_rows)
    found["8 row chunks"] = row_chunks
    return found


def inputs(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and targets, with logits of a spread that trained heads have."""
    torch.manual_seed(0)
    dtype = DTYPES[args.dtype]
    x = torch.randn(args.tokens, args.width, dtype=dtype).requires_grad_()
    weight = torch.randn(args.classes, args.width, dtype=dtype).mul_(args.width**-0.5 * 2)
    return x, weight.requires_grad_(), torch.randint(args.classes, (args.tokens,))


def step(loss: Loss, given: tuple[Tensor, Tensor, Tensor]) -> float:
    """The loss, after forward and backward."""
    x, weight, target = given
    x.grad = weight.grad = None
    found = loss(x, weight, target)
    found.backward()
    return found.item()


def peak_bytes(args: argparse.Namespace, name: str) -> int:
    """The peak of one candidate, in a process of its own."""
    command = [sys.executable, __file__, "--peak-of", name, "--dtype", args.dtype]
    for option in ("tokens", "width", "classes", "threads"):
        command += [f"--{option}", str(getattr(args, option))]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(args: argparse.Namespace) -> None:
    given = inputs(args)
    small = tuple(t.detach()[:16].clone() for t in given)
    step(
        candidates()[args.peak_of],
        (small[0].requires_grad_(), small[1].requires_grad_(), small[2] % 16),
    )
    with PeakMemory() as peak:
        step(candidates()[args.peak_of], given)
    print(peak.nbytes)


def cpu_seconds(args: argparse.Namespace, names: list[str]) -> dict[str, list[float]]:
    """CPU seconds of every round."""
    given, times = inputs(args), dict[str, list[float]]()
    for number in range(args.rounds + 1):
        for name in names:
            begun = time.process_time()
            step(candidates()[name], given)
            if number or args.rounds == 1:  # the first round warms up
                times.setdefault(name, []).append(time.process_time() - begun)
        if args.rounds == 1:
            break
    return times


def exact_loss(given: tuple[Tensor, Tensor, Tensor]) -> float:
    """In float64, row after row."""
    x, weight, target = (t.detach() for t in given)
    wide, total = weight.double(), 0.0
    for rows, classes in zip(x.split(256), target.split(256), strict=True):
        total += functional.cross_entropy(rows.double() @ wide.t(), classes, reduction="sum").item()
    return total / len(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--classes", type=int, default=65536)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--candidates", nargs="*", help="names; all by default")
    parser.add_argument("--skip", choices=["times", "peaks", "losses"], nargs="*", default=[])
    parser.add_argument("--output", type=Path, help="a list of runs, to which this one is added")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak_of:
        print_peak(args)
        return
    names = args.candidates or list(candidates())
    times = {} if "times" in args.skip else cpu_seconds(args, names)
    peaks = {} if "peaks" in args.skip else {name: peak_bytes(args, name) for name in names}
    losses: dict[str, float] = {}
    if "losses" not in args.skip:
        given = inputs(args)
        exact = exact_loss(given)
        losses = {name: step(candidates()[name], given) / exact - 1 for name in names}
    show(args, names, times, peaks, losses)


def show(
    args: argparse.Namespace,
    names: list[str],
    times: dict[str, list[float]],
    peaks: dict[str, int],
    losses: dict[str, float],
) -> None:
    """Print a line for each candidate, and write the file."""
    table = Table("candidate", "MiB", "CPU s", "÷ plain", "spread", "loss off by", title=args.dtype)
    medians = {name: statistics.median(each) for name, each in times.items()}
    for name in names:
        own = times.get(name, [])
        table.add_row(
            name,
            f"{peaks[name] / MIB:.0f}" if name in peaks else "",
            f"{medians[name]:.1f}" if own else "",
            f"{medians[name] / medians['plain']:.2f}" if own and "plain" in medians else "",
            f"±{spread(own):.0%}" if len(own) > 1 else "",
            f"{losses[name]:.1e}" if name in losses else "",
        )
    Console(width=100).print(table)
    if args.output:
        shown = {k: v for k, v in vars(args).items() if k not in ("output", "peak_of")}
        result = {
            "machine": machine(threads=args.threads),
            "settings": shown,
            "cpu_seconds": times,
            "peak_bytes": peaks,
            "relative_loss_error": losses,
        }
        runs = json.loads(args.output.read_text()) if args.output.exists() else []
        args.output.write_text(json.dumps([*runs, result], indent=1) + "\n")


if __name__ == "__main__":
    main()

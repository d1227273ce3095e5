"""Peak memory, CPU time and accuracy of a gated MLP, forward and backward, against its peers.

Every peak is taken in a process of its own (`VmHWM`, above weights, input and upstream gradient).
For times all candidates run in turn, round after round, in one process; a comparison is a ratio of
medians of CPU seconds taken in that run. Errors are root mean squares against float64, as multiples
of plain torch's in the same dtype.

    python benchmarks/mlp_vs_peers.py --output benchmarks/results/mlp_vs_peers.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from conditions import machine, spread
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import memtile
from memtile.testing import PeakMemory, error_ratio

Mlp = Callable[[nn.Module, Tensor], Tensor]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MIB = 1 << 20
SHARDS = 8
TILES = (4, 16, 64, 256)


class Plain(nn.Module):
    """Gate, up and down; what is in between is kept for backward."""

    def __init__(self, width: int, inner: int, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(width, inner, bias=False, dtype=dtype)
        self.up = nn.Linear(width, inner, bias=False, dtype=dtype)
        self.down = nn.Linear(inner, width, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return y


def whole_checkpoint(mlp: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = checkpoint(mlp, x, use_reentrant=False)
    return found


def row_chunks(mlp: nn.Module, x: Tensor) -> Tensor:
    """Chunks of rows, each computed again in backward."""
    return torch.cat([checkpoint(mlp, rows, use_reentrant=False) for rows in x.chunk(SHARDS)])


def deepspeed_tiles(mlp: nn.Module, x: Tensor) -> Tensor:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    parameters = list(mlp.parameters())
    found: Tensor = TiledMLP.apply(lambda self, rows: self(rows), mlp, x[None], SHARDS, parameters)
    return found[0]


def liger_tiles(mlp: nn.Module, x: Tensor) -> Tensor:
    from liger_kernel.ops.tiled_mlp import apply_tiled_mlp

    found: Tensor = apply_tiled_mlp(
        fn=lambda self, rows: self(rows), mlp_module=mlp, x=x, num_shards=SHARDS
    )
    return found


def ours(**block: int) -> Mlp:
    def run(mlp: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(mlp, Plain)
        return memtile.tiled_mlp(x, mlp.gate, mlp.up, mlp.down, **block)

    return run


def candidates() -> dict[str, Mlp]:
    """By name; those of libraries that are installed."""
    found: dict[str, Mlp] = {
        "plain": lambda mlp, x: mlp(x),
        "memtile": ours(),
        "memtile, 512 features": ours(block_features=512),
        "checkpoint": whole_checkpoint,
        f"{SHARDS} row chunks": row_chunks,
    }
    if find_spec("deepspeed"):
        found["DeepSpeed TiledMLP"] = deepspeed_tiles
    if find_spec("liger_kernel"):
        found["Liger"] = liger_tiles
    return found


def inputs(args: argparse.Namespace, dtype: str) -> tuple[Plain, Tensor, Tensor]:
    """The layers, hidden states and the gradient of the output."""
    mlp = Plain(args.width, args.inner, DTYPES[dtype])
    x, upstream = (torch.randn(args.rows, args.width, dtype=DTYPES[dtype]) for _ in range(2))
    return mlp, x.requires_grad_(), upstream


def step(run: Mlp, mlp: nn.Module, x: Tensor, upstream: Tensor) -> Tensor:
    """The output, after forward and backward."""
    mlp.zero_grad()
    x.grad = None
    y = run(mlp, x)
    y.backward(upstream)
    return y


def peak_bytes(args: argparse.Namespace, name: str, dtype: str) -> int:
    """The peak of one candidate, in a process of its own."""
    command = [sys.executable, __file__, "--peak-of", name, "--dtypes", dtype]
    for option in ("rows", "width", "inner", "threads"):
        command += [f"--{option}", str(getattr(args, option))]
    return int(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
    )


def print_peak(args: argparse.Namespace) -> None:
    run, (mlp, x, upstream) = candidates()[args.peak_of], inputs(args, args.dtypes[0])
    step(run, mlp, x.detach()[:16].requires_grad_(), upstream[:16])
    mlp.zero_grad()
    with torch.no_grad():  # buffers of the library of products, which it keeps
        functional.linear(x, mlp.gate.weight)
    with PeakMemory() as peak:
        step(run, mlp, x, upstream)
    print(peak.nbytes)


def cpu_seconds(args: argparse.Namespace, names: list[str], dtype: str) -> dict[str, list[float]]:
    """CPU seconds of every round."""
    given, times = inputs(args, dtype), dict[str, list[float]]()
    for number in range(args.rounds + 1):
        for name in names:
            begun = time.process_time()
            step(candidates()[name], *given)
            if number:  # the first round warms up
                times.setdefault(name, []).append(time.process_time() - begun)
    return times


def errors(args: argparse.Namespace, dtype: str) -> dict[str, float]:
    """The largest error of output and gradients over plain torch's, by the number of tiles."""
    rows, inner = args.rows // 4, args.inner // 4
    small = argparse.Namespace(rows=rows, width=args.width // 4, inner=inner)
    mlp, x, upstream = inputs(small, dtype)
    wide = Plain(small.width, inner, torch.float64)
    wide.load_state_dict(mlp.state_dict())
    x64 = x.detach().double().requires_grad_()

    def results(run: Mlp, mlp: nn.Module, x: Tensor, upstream: Tensor) -> list[Tensor]:
        y = step(run, mlp, x, upstream)
        return [each.detach().clone() for each in (y, *(p.grad for p in (x, *mlp.parameters())))]  # type: ignore[union-attr]

    plain = candidates()["plain"]
    truth = results(plain, wide, x64, upstream.double())
    theirs, found = results(plain, mlp, x, upstream), dict[str, float]()
    for tiles in TILES:
        for side, size in (("rows", rows), ("features", inner)):
            block = {f"block_{side}": -(-size // tiles)}
            own = results(ours(**block), mlp, x, upstream)
            ratios = map(error_ratio, own, theirs, truth)
            found[f"{tiles} tiles of {side}"] = max(ratios)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=8192)
    parser.add_argument("--dtypes", choices=DTYPES, nargs="*", default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--candidates", nargs="*", help="names; all by default")
    parser.add_argument("--skip", choices=["times", "peaks", "errors"], nargs="*", default=[])
    parser.add_argument("--output", type=Path, help="what it has already of others is kept")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(args.threads)
    if args.peak_of:
        print_peak(args)
        return
    names = args.candidates or list(candidates())
    for dtype in args.dtypes:
        found: dict[str, object] = {}
        if "times" not in args.skip:
            found["cpu_seconds"] = cpu_seconds(args, names, dtype)
        if "peaks" not in args.skip:
            found["peak_bytes"] = {name: peak_bytes(args, name, dtype) for name in names}
        if "errors" not in args.skip:
            found["error_over_plain"] = errors(args, dtype)
        show(dtype, names, found)
        if args.output:
            write(args, dtype, found)


def write(args: argparse.Namespace, dtype: str, found: dict[str, object]) -> None:
    """Add what was measured to the file."""
    stored = json.loads(args.output.read_text()) if args.output.exists() else {}
    hidden = ("output", "peak_of", "skip", "dtypes", "candidates")
    stored["machine"] = machine(threads=args.threads)
    stored["settings"] = {k: v for k, v in vars(args).items() if k not in hidden}
    stored.setdefault("results", {}).setdefault(dtype, {}).update(found)
    args.output.write_text(json.dumps(stored, indent=1) + "\n")


def show(dtype: str, names: list[str], found: dict[str, object]) -> None:
    """Print a line for each candidate, and the errors."""
    times, peaks = found.get("cpu_seconds", {}), found.get("peak_bytes", {})
    assert isinstance(times, dict)
    assert isinstance(peaks, dict)
    table = Table("candidate", "MiB", "CPU s", "÷ plain", "spread", title=dtype)
    medians = {name: statistics.median(each) for name, each in times.items()}
    for name in names:
        has_ratio = name in medians and "plain" in medians
        table.add_row(
            name,
            f"{peaks[name] / MIB:.0f}" if name in peaks else "",
            f"{medians[name]:.2f}" if name in medians else "",
            f"{medians[name] / medians['plain']:.2f}" if has_ratio else "",
            f"±{spread(times[name]):.0%}" if name in medians and len(times[name]) > 1 else "",
        )
    Console(width=100).print(table)
    print(found.get("error_over_plain", ""))


if __name__ == "__main__":
    main()

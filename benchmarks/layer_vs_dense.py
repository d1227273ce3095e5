"""Time and forward memory of the tiled layer against `nn.Linear` and DeepSpeed's tiled linear.

All candidates of one case run in turn, round after round, in one process, on the same weights and
inputs; times are medians over the rounds and comparisons are ratios of medians taken in one run.
DeepSpeed's layer is measured where DeepSpeed is installed (no engine is started).

    python benchmarks/layer_vs_dense.py --rounds 9 --output benchmarks/results/layer_vs_dense.json
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conditions import machine, spread
from rich.console import Console
from rich.table import Table
from torch import nn

import memtile
from memtile.testing import peak_allocated_bytes, rms_error

GRIDS = [(1, 1), (4, 1), (1, 4), (4, 4), (8, 8)]
HEADINGS = ["dtype", "grid", "layer", "forward", "both", "spread", "MiB", "dense MiB", "error"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def original_class() -> type[nn.Module] | None:
    """DeepSpeed's tiled linear, or None where DeepSpeed is not installed."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if not torch.cuda.is_available() else "cuda")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            from deepspeed.runtime.zero.tiling import TiledLinear
    except ImportError:
        return None
    found: type[nn.Module] = TiledLinear
    return found


def candidates(dense: nn.Linear, rows: int, columns: int) -> dict[str, nn.Module]:
    """The layers to compare, all with the dense layer's values."""
    built: dict[str, nn.Module] = {
        "dense": dense,
        "memtile": memtile.TiledLinear.from_linear(dense, in_splits=columns, out_splits=rows),
    }
    original = original_class()
    if original is not None:
        built["original"] = original(
            dense.in_features,
            dense.out_features,
            in_splits=columns,
            out_splits=rows,
            init_linear=dense,
            dtype=dense.weight.dtype,
            device=dense.weight.device,
        )
    return built


def seconds(function: Callable[[], object], device: str) -> float:
    """Wall time of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(function: Callable[[], object], device: str) -> int:
    """The most tensor memory above what was there before the call."""
    if device != "cuda":
        return peak_allocated_bytes(function)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() - before


def measure(args: argparse.Namespace, dtype: torch.dtype, grid: tuple[int, int]) -> dict[str, Any]:
    """One case: medians of every candidate, its memory and its error against float64."""
    torch.manual_seed(0)
    like = {"dtype": dtype, "device": args.device}
    dense = nn.Linear(args.in_features, args.out_features, **like)
    layers = candidates(dense, *grid)
    x = torch.randn(args.tokens, args.in_features, **like).requires_grad_()
    gradient = torch.randn(args.tokens, args.out_features, **like)

    def forward(layer: nn.Module) -> object:
        with torch.no_grad():
            return layer(x)

    def both(layer: nn.Module) -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        layer(x).backward(gradient)

    times: dict[str, dict[str, list[float]]] = {
        name: {"forward": [], "both": []} for name in layers
    }
    for layer in layers.values():
        both(layer)
    for _ in range(args.rounds):
        for name, layer in layers.items():
            times[name]["forward"].append(seconds(lambda layer=layer: forward(layer), args.device))
            times[name]["both"].append(seconds(lambda layer=layer: both(layer), args.device))
            layer.zero_grad(set_to_none=True)
    truth = torch.nn.functional.linear(x.double(), dense.weight.double(), dense.bias.double())
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "grid": list(grid),
        "layers": {
            name: {
                "forward_seconds": statistics.median(times[name]["forward"]),
                "forward_seconds_all": times[name]["forward"],
                "forward_backward_seconds": statistics.median(times[name]["both"]),
                "forward_backward_seconds_all": times[name]["both"],
                "forward_peak_bytes": peak_bytes(lambda layer=layer: forward(layer), args.device),
                "output_rms_error": rms_error(layer(x), truth),
            }
            for name, layer in layers.items()
        },
    }


def row(case: dict[str, Any]) -> list[list[str]]:
    """The printed lines of one case, a line for each tiled layer."""
    dense = case["layers"]["dense"]
    lines = []
    for name, layer in case["layers"].items():
        if name == "dense":
            continue
        lines.append(
            [
                case["dtype"],
                "{}×{}".format(*case["grid"]),
                name,
                f"{layer['forward_seconds'] / dense['forward_seconds']:.2f}",
                f"{layer['forward_backward_seconds'] / dense['forward_backward_seconds']:.2f}",
                f"±{spread(layer['forward_backward_seconds_all']):.0%}",
                f"{layer['forward_peak_bytes'] / 2**20:.1f}",
                f"{dense['forward_peak_bytes'] / 2**20:.1f}",
                f"{layer['output_rms_error'] / dense['output_rms_error']:.2f}",
            ]
        )
    return lines


def versions(device: str) -> dict[str, object]:
    """What differs between machines besides."""
    return {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "deepspeed": sys.modules["deepspeed"].__version__ if original_class() else None,
    }


def main() -> None:
    """Measure every case, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--in-features", type=int, default=4096)
    parser.add_argument("--out-features", type=int, default=16384)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9, help="at least 5")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--grids", nargs="+", help="out×in splits such as 4x1")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    grids = [tuple(map(int, g.split("x"))) for g in args.grids] if args.grids else GRIDS
    cases = []
    table = Table(
        title=f"{args.in_features}→{args.out_features}, {args.tokens} rows, over nn.Linear"
    )
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    for name in args.dtypes:
        for grid in grids:
            case = measure(args, DTYPES[name], grid)
            cases.append(case)
            for line in row(case):
                table.add_row(*line)
    Console().print(table)
    if args.output:
        settings = {key: str(value) for key, value in vars(args).items() if key != "output"}
        result = {"machine": machine(**versions(args.device)), "settings": settings, "cases": cases}
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

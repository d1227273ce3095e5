"""Time of a training step under FSDP2 and ZeRO-3: tiled, untiled, and DeepSpeed's tiled linear.

All candidates of an engine live in the same processes and step in turn, round after round, on the
same inputs; times are medians over the rounds, of rank 0, which waits for the others before and
after each step. DeepSpeed's candidates are measured where DeepSpeed is installed.

    python benchmarks/engines.py --rounds 7 --output benchmarks/results/engines.json
"""

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from conditions import machine, spread
from layer_vs_dense import original_class, versions
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import memtile
from memtile.engines.torch_fsdp2 import shard

Step = Callable[[Tensor], None]


def blocks(args: argparse.Namespace) -> nn.Sequential:
    """Pairs of linears, up and down, with a nonlinearity between them; the same on each rank."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(args.blocks):
        layers += [nn.Linear(args.width, 4 * args.width), nn.GELU()]
        layers += [nn.Linear(4 * args.width, args.width)]
    return nn.Sequential(*layers).to(args.device)


def tiles(args: argparse.Namespace) -> nn.Sequential:
    """The same in tiles."""
    model: nn.Sequential = memtile.tile(blocks(args), max_tile_bytes=args.tile_mib << 20)
    return model


def original(args: argparse.Namespace) -> nn.Sequential:
    """The same in tiles of DeepSpeed's own layer, of the same grids."""
    cls = original_class()
    assert cls is not None
    ours = tiles(args)
    for number, layer in enumerate(ours):
        if isinstance(layer, memtile.TiledLinear):
            ours[number] = cls(
                layer.in_features,
                layer.out_features,
                in_splits=layer.in_splits,
                out_splits=layer.out_splits,
                init_linear=layer.to_linear(),
                device=args.device,
            )
    return ours


def fsdp2(model: nn.Module) -> Step:
    """Step a model that is sharded already."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def fsdp2_untiled(args: argparse.Namespace) -> Step:
    """Each linear is a unit, as users of FSDP2 wrap blocks."""
    from torch.distributed.fsdp import fully_shard

    model = blocks(args)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    return fsdp2(model)


def fsdp2_tiled(args: argparse.Namespace) -> Step:
    """Each tile is a unit."""
    return fsdp2(shard(tiles(args)))


def zero3(model: nn.Module, config: dict[str, Any], held: bool) -> Step:
    """A DeepSpeed engine's step, with memtile's hold on its tiles or without."""
    import deepspeed

    from memtile.engines.deepspeed_zero3 import attach

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if held:
        attach(engine)

    def step(x: Tensor) -> None:
        engine.backward(engine(x).square().mean())
        engine.step()

    return step


def zero3_untiled(args: argparse.Namespace) -> Step:
    """DeepSpeed's defaults, but that no buffer is larger than the largest layer."""
    model = blocks(args)
    largest = max(parameter.numel() for parameter in model.parameters())
    section = {"stage": 3, "reduce_bucket_size": largest}
    config = {"train_micro_batch_size_per_gpu": args.tokens, "gradient_clipping": 0.0}
    return zero3(model, {**config, "zero_optimization": section}, held=False)


def zero3_tiled(args: argparse.Namespace) -> Step:
    """memtile's config: one tile at work, one on its way."""
    from memtile.engines.deepspeed_zero3 import config

    model = tiles(args)
    return zero3(model, config(model, micro_batch=args.tokens), held=True)


def zero3_original(args: argparse.Namespace) -> Step:
    """DeepSpeed's tiled linear at the keys that serve it best: one tile gathered at a time."""
    from memtile.engines.deepspeed_zero3 import config

    given = config(tiles(args), micro_batch=args.tokens, prefetch=0)
    return zero3(original(args), given, held=False)


ENGINES: dict[str, dict[str, Callable[[argparse.Namespace], Step]]] = {
    "FSDP2": {"untiled": fsdp2_untiled, "memtile": fsdp2_tiled},
    "ZeRO-3": {"untiled": zero3_untiled, "memtile": zero3_tiled, "original": zero3_original},
}


def seconds(step: Step, x: Tensor) -> float:
    """Of a step, from all ranks' beginning to all ranks' end."""
    dist.barrier()
    start = time.perf_counter()
    step(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter() - start


def run(rank: int, args: argparse.Namespace, engine: str, folder: str) -> None:
    """Every candidate of an engine in turn, round after round; rank 0 leaves the times."""
    quiet(rank, args.ranks)
    store = dist.FileStore(str(Path(folder) / "store"), args.ranks)
    dist.init_process_group(
        args.backend, store=store, rank=rank, world_size=args.ranks, timeout=timedelta(minutes=5)
    )
    x = torch.randn(args.tokens, args.width, generator=torch.Generator().manual_seed(rank))
    x = x.to(args.device).requires_grad_(not args.plain_input)
    steps = {name: make(args) for name, make in ENGINES[engine].items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(args.rounds + 2):  # the first two learn the order
        for name, step in steps.items():
            took = seconds(step, x)
            if number >= 2:
                times[name].append(took)
    if rank == 0:
        (Path(folder) / "times.json").write_text(json.dumps(times))
    dist.barrier()
    dist.destroy_process_group()


def quiet(rank: int, ranks: int) -> None:
    """One thread a rank, and nothing from DeepSpeed but errors."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(ranks)}


def measured(args: argparse.Namespace, engine: str) -> dict[str, list[float]]:
    """Seconds of every step of each candidate; an engine has processes of its own.

    DeepSpeed changes torch's linear for the process that it is in.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run, (args, engine, folder), nprocs=args.ranks)
        found: dict[str, list[float]] = json.loads((Path(folder) / "times.json").read_text())
        return found


def rows(engine: str, times: dict[str, list[float]]) -> list[list[str]]:
    """The printed lines: each way against its engine without tiles."""
    untiled = statistics.median(times["untiled"])
    lines = []
    for name, found in times.items():
        middle = statistics.median(found)
        ratio = f"{middle / untiled:.2f}"
        lines.append([engine, name, f"{middle:.2f}", f"±{spread(found):.0%}", ratio])
    return lines


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=2, help="pairs of linears")
    parser.add_argument("--width", type=int, default=2048, help="up to four times that and back")
    parser.add_argument("--tokens", type=int, default=256, help="of each rank")
    parser.add_argument("--tile-mib", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7, help="at least 5")
    parser.add_argument("--plain-input", action="store_true", help="input without gradient")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    args.backend = "gloo" if args.device == "cpu" else "nccl"
    engines = [name for name in ENGINES if name == "FSDP2" or original_class() is not None]
    times = {engine: measured(args, engine) for engine in engines}
    table = Table("engine", "layers", "s a step", "spread", "over untiled")
    for engine, found in times.items():
        for line in rows(engine, found):
            table.add_row(*line)
    Console().print(table)
    if args.output:
        asked = {k: v for k, v in vars(args).items() if k != "output"}
        record = {"machine": machine(**versions(args.device)), "asked": asked, "seconds": times}
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

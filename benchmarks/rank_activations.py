"""Memory and time of a step over ranks: losses without logits, and MLPs in tiles.

All ways of an engine live in the same processes and step in turn, round after round. Seconds are of
rank 0, which waits for the others before and after each step; a peak is the most that its resident
memory (`VmHWM`) rose in a step, the largest of all rounds; freed memory is given back at once.

    python benchmarks/rank_activations.py --output benchmarks/results/rank_activations.json
"""

import argparse
import gc
import json
import statistics
import tempfile
from collections.abc import Callable
from datetime import timedelta
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from conditions import machine, spread
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import memtile
from engines import Step, quiet, seconds
from memtile.engines.torch_fsdp2 import shard
from memtile.homes import keep_freed_memory_out
from memtile.testing import PeakMemory

MIB = 1 << 20
ENGINES = ("FSDP2", "ZeRO-3")


class Llama(nn.Module):
    """The loss of a small model with a large vocabulary."""

    def __init__(self, way: str) -> None:
        super().__init__()
        config = transformers.LlamaConfig(
            vocab_size=32_768,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            tie_word_embeddings="tied" in way,
        )
        self.model = transformers.LlamaForCausalLM(config)
        memtile.tile(self.model, max_tile_bytes=4 * MIB)
        memtile.defer_logits(self.model, "without" in way)

    def forward(self, ids: Tensor) -> Tensor:
        """The loss of the next token."""
        loss: Tensor = self.model(input_ids=ids, labels=ids).loss
        return loss


class Mlps(nn.Module):
    """Three gated MLPs, one after another."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.recomputes = "checkpoints" in way
        self.mlps = nn.ModuleList(Mlp() for _ in range(3))
        memtile.tile(self, max_tile_bytes=2 * MIB, tile_mlps=True)
        memtile.tile_mlps(self, "in tiles" in way)

    def forward(self, x: Tensor) -> Tensor:
        """The mean square of what they give."""
        for mlp in self.mlps:
            x = x + (checkpoint(mlp, x, use_reentrant=False) if self.recomputes else mlp(x))
        return x.square().mean()


class Mlp(nn.Module):
    """1024 → 4096 → 1024, SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(1024, 4096, bias=False) for _ in range(2))
        self.down = nn.Linear(4096, 1024, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, 1024) of (…, 1024)."""
        y: Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return y


Make = Callable[[str], nn.Module]
WAYS: dict[str, tuple[Make, tuple[str, ...]]] = {
    "loss": (Llama, ("logits", "without logits", "tied, logits", "tied, without logits")),
    "MLPs": (Mlps, ("own forwards", "own forwards in checkpoints", "in tiles")),
}


def step_of(model: nn.Module, engine: str) -> Step:
    """A step of AdamW of a model that is sharded for it."""
    if engine == "FSDP2":
        shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step(x: Tensor) -> None:
            optimizer.zero_grad()
            model(x).backward()
            optimizer.step()

        return step
    import deepspeed

    from memtile.engines.deepspeed_zero3 import attach, config

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    run, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config(model))
    attach(run)

    def step_engine(x: Tensor) -> None:
        run.backward(run(x))
        run.step()

    return step_engine


def run(rank: int, args: argparse.Namespace, engine: str, part: str, folder: str) -> None:
    """Every way of a part in turn, round after round; rank 0 leaves seconds and peaks."""
    quiet(rank, args.ranks)
    keep_freed_memory_out()  # or peaks have the heap's holes in them
    store = dist.FileStore(str(Path(folder) / "store"), args.ranks)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=args.ranks, timeout=timedelta(minutes=5)
    )
    generator, (make, ways) = torch.Generator().manual_seed(rank), WAYS[part]
    if part == "loss":
        x = torch.randint(32_768, (1, args.tokens), generator=generator)
    else:
        x = torch.randn(args.tokens, 1024, generator=generator)
    steps = {}
    for way in ways:
        torch.manual_seed(0)  # the same on each rank
        steps[way] = step_of(make(way), engine)
    found: dict[str, dict[str, list[float]]] = {way: {"seconds": [], "peaks": []} for way in ways}
    for number, (way, step) in product(range(args.rounds + 2), steps.items()):
        gc.collect()
        with PeakMemory() as peak:
            took = seconds(step, x)
        if number >= 2:  # the first two learn the order
            found[way]["seconds"].append(took)
            found[way]["peaks"].append(peak.nbytes)
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048, help="of each rank")
    parser.add_argument("--rounds", type=int, default=5, help="at least 5")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    table = Table("engine", "part", "way", "MiB", "s a step", "spread", "over the first")
    results = {}
    for engine, part in product(ENGINES, WAYS):
        if engine == "ZeRO-3" and find_spec("deepspeed") is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(run, (args, engine, part, folder), nprocs=args.ranks)
            found = json.loads((Path(folder) / "found.json").read_text())
        results[f"{engine}, {part}"] = found
        first = statistics.median(next(iter(found.values()))["seconds"])
        for way, each in found.items():
            middle, peak = statistics.median(each["seconds"]), max(each["peaks"]) / MIB
            over = f"{middle / first:.2f}"
            shown = f"{peak:.0f}", f"{middle:.2f}", f"±{spread(each['seconds']):.0%}", over
            table.add_row(engine, part, way, *shown)
    Console(width=110).print(table)
    if args.output:
        asked = {k: v for k, v in vars(args).items() if k != "output"}
        record = {"machine": machine(), "asked": asked, "found": results}
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""A step of parked models over the same step in memory: what parking costs beside moving bytes.

SmolLM2-135M and a stack of large linears, each dense in memory and tiled at every home and size of
tile: host memory, where nothing is moved; disk through the page cache; disk with direct I/O. Both
sides use `AdamW(fused=True)`, the tiled one in backward. The floor of direct I/O is the larger of
the dense time and that of the step's bytes on the raw disk. All sides run in turn, round after
round; ratios are of medians of one run.

    python benchmarks/parked_step.py --output benchmarks/results/parked_step.json
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from conditions import machine, spread
from disk_training import INFERENCE_MIX, TRAINING_MIX, RawDisk, dense_stack, seconds
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import memtile

SMOLLM2 = Path("~/.cache/memtile/SmolLM2-135M-Instruct-Q4_1-float32").expanduser()  # make model
HOMES = ("host", "page cache", "direct")
SIZES = {"1 MiB": 1 << 20, "16 MiB": 16 << 20}
Act = Callable[[], object]


def smollm2() -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2).train()


def linears() -> nn.Module:
    return dense_stack(4096, 4)


def loss_of(model: nn.Module, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, nn.Sequential):
        return model(torch.randn(tokens, 4096, generator=generator)).square().mean()
    ids = torch.randint(1000, (1, tokens), generator=generator)
    return model(input_ids=ids, labels=ids).loss


class Side:
    """One model and its optimizer; tiled where a home is given."""

    def __init__(self, make: Callable[[], nn.Module], home: str = "", tile_bytes: int = 0) -> None:
        self.model = make()
        if not home:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
            return
        self.home = memtile.HostHome() if home == "host" else memtile.DiskHome()
        memtile.tile(self.model, max_tile_bytes=tile_bytes, home=self.home)
        self.optimizer = memtile.TileOptimizer(
            self.model, torch.optim.AdamW, mode="in_backward", lr=1e-6, fused=True
        )
        if home != "host":
            self.home.path = home

    def training(self, tokens: int) -> None:
        self.optimizer.zero_grad()
        loss_of(self.model, tokens).backward()
        self.optimizer.step()

    def inference(self, tokens: int) -> None:
        with torch.no_grad():
            loss_of(self.model, tokens)


def measure(name: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every pass of one model at every number of tokens: the seconds of all rounds."""
    make = {"smollm2": smollm2, "linears": linears}[name]
    keys = [f"{home}, {size}" for home, size in product(HOMES, SIZES)]
    sides = {"memory": Side(make)}
    sides |= {key: Side(make, *_split(key)) for key in keys}
    raw = RawDisk(Path("/var/tmp"), sum(p.nbytes for p in sides["memory"].model.parameters()))
    for tokens, act in product(args.tokens, ("inference", "training")):
        acts: dict[str, Act] = {k: partial(getattr(s, act), tokens) for k, s in sides.items()}
        mix = INFERENCE_MIX if act == "inference" else TRAINING_MIX
        times: dict[str, list[float]] = {key: [] for key in acts} | {"raw disk": []}
        for number in range(args.rounds + 1):
            taken = {key: seconds(one) for key, one in acts.items()}
            taken["raw disk"] = raw.seconds(mix)
            for key in taken if number else ():  # the first round is for learning the order
                times[key].append(taken[key])
        yield {"model": name, "tokens": tokens, "pass": act, "seconds": times}
    raw.close()


def _split(key: str) -> tuple[str, int]:
    home, size = key.split(", ")
    return home, SIZES[size]


def ratios(case: dict[str, Any]) -> dict[str, float]:
    """Each side over its floor: the dense time, for direct I/O at least the raw disk's."""
    medians = {key: statistics.median(values) for key, values in case["seconds"].items()}
    dense, disk = medians.pop("memory"), medians.pop("raw disk")
    floors = {key: max(dense, disk) if "direct" in key else dense for key in medians}
    return {key: value / floors[key] for key, value in medians.items()}


def table(cases: list[dict[str, Any]]) -> Table:
    sides = list(ratios(cases[0]))
    result = Table("model", "pass", "tokens", "dense s", "raw disk s", *sides)
    for column in result.columns:
        column.justify = "right"
    for case in cases:
        times = (statistics.median(case["seconds"][key]) for key in ("memory", "raw disk"))
        found = ratios(case)
        cells = (f"{found[key]:.2f} ±{spread(case['seconds'][key]):.0%}" for key in sides)
        start = (case["model"], case["pass"], str(case["tokens"]))
        result.add_row(*start, *(f"{time:.2f}" for time in times), *cells)
    return result


def main() -> None:
    """Measure every case, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["linears", "smollm2"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 128, 512])
    parser.add_argument("--rounds", type=int, default=7, help="at least 5")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    cases = []
    for name in args.models:
        for case in measure(name, args):
            cases.append(case)
            shown = {key: round(value, 2) for key, value in ratios(case).items()}
            print(name, case["pass"], case["tokens"], shown, flush=True)
    Console(width=150).print(table(cases))
    if args.output:
        settings = {"tokens": args.tokens, "rounds": args.rounds}
        result = {"machine": machine(), "settings": settings, "cases": cases}
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

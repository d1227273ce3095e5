"""A step of parked models over the same step in memory: what parking costs beside moving bytes.

SmolLM2-135M and a stack of large linears, each dense in memory and tiled at one home, in two sizes
of tile: host memory, where nothing is moved; disk through the page cache; disk with direct I/O. All
sides use `AdamW(fused=True)`, the tiled one in backward. The floor of direct I/O is the larger of
the dense time and that of the step's bytes on the raw disk. The sides of a home run in turn, round
after round, with no other home there; ratios are of medians of these.

    python benchmarks/parked_step.py --output benchmarks/results/parked_step.json
"""

import argparse
import gc
import json
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from conditions import cores_are_near, machine, spread
from disk_training import INFERENCE_MIX, TRAINING_MIX, RawDisk, dense_stack, seconds
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import memtile

SMOLLM2 = Path("~/.cache/memtile/SmolLM2-135M-Instruct-Q4_1-float32").expanduser()  # make model
HOMES = ("host", "page cache", "direct")
SIZES = {"1 MiB": 1 << 20, "16 MiB": 16 << 20}
MIXES = {"inference": INFERENCE_MIX, "training": TRAINING_MIX}
KEYS = ("model", "home", "tokens", "pass")  # of a case
PLACES = ("near", "apart")  # of the cores: whether they shared a cache in a round
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


def measure(name: str, home: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every pass of one model at every number of tokens: the seconds of all rounds."""
    make = {"smollm2": smollm2, "linears": linears}[name]
    sides = {"memory": Side(make)}
    sides |= {size: Side(make, home, nbytes) for size, nbytes in SIZES.items()}
    weights = sum(p.nbytes for p in sides["memory"].model.parameters())
    raw = RawDisk(Path("/var/tmp"), weights) if home == "direct" else None
    for tokens, act in product(args.tokens, ("inference", "training")):
        acts: dict[str, Act] = {k: partial(getattr(s, act), tokens) for k, s in sides.items()}
        if raw is not None:
            acts["raw disk"] = partial(raw.seconds, MIXES[act])
        for one in acts.values():
            one()  # to learn the order of the tiles
        case: dict[str, Any] = {"model": name, "home": home, "tokens": tokens, "pass": act}
        near, apart = ({key: list[float]() for key in acts} for _ in PLACES)
        while len(near["memory"]) < args.rounds and len(apart["memory"]) < 3 * args.rounds:
            were_near = cores_are_near()
            taken = [seconds(one) for one in acts.values()]
            times = near if were_near and cores_are_near() else apart
            for key, one_taken in zip(acts, taken, strict=True):
                times[key].append(one_taken)
        yield case | dict(zip(PLACES, (near, apart), strict=True))
    if raw is not None:
        raw.close()


def ratios(times: dict[str, list[float]]) -> dict[str, float]:
    """Each side over its floor: the dense time, for direct I/O at least the raw disk's."""
    if not times["memory"]:
        return {}
    medians = {key: statistics.median(values) for key, values in times.items()}
    floor = max(medians.pop("memory"), medians.pop("raw disk", 0.0))
    return {key: value / floor for key, value in medians.items()}


def table(cases: list[dict[str, Any]]) -> Table:
    """A line for each case and each place of the cores."""
    result = Table("model", "home", "pass", "tokens", "rounds", "dense s", "raw disk s", *SIZES)
    for column in result.columns:
        column.justify = "right"
    for case, place in product(cases, PLACES):
        times = case[place]
        found, rounds = ratios(times), len(times["memory"])
        if rounds < 2:
            continue
        shown = (times.get(key) for key in ("memory", "raw disk"))
        medians = (f"{statistics.median(each):.2f}" if each else "" for each in shown)
        cells = (f"{found[size]:.2f} ±{spread(times[size]):.0%}" for size in SIZES)
        start = (case["model"], case["home"], case["pass"], str(case["tokens"]))
        result.add_row(*start, f"{rounds} {place}", *medians, *cells)
    return result


def main() -> None:
    """Measure every case, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["linears", "smollm2"])
    parser.add_argument("--homes", nargs="+", choices=HOMES, default=HOMES)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 128, 512])
    parser.add_argument("--rounds", type=int, default=7, help="at least 5")
    parser.add_argument("--output", type=Path, help="JSON file; other cases in it are kept")
    args = parser.parse_args()
    cases = (
        json.loads(args.output.read_text())["cases"] if args.output and args.output.exists() else []
    )
    for name, home in product(args.models, args.homes):
        for case in measure(name, home, args):
            cases = [each for each in cases if any(each[k] != case[k] for k in KEYS)] + [case]
            for place in PLACES:
                shown = {key: round(value, 2) for key, value in ratios(case[place]).items()}
                count = len(case[place]["memory"])
                print(name, home, case["pass"], case["tokens"], count, place, shown, flush=True)
            if args.output:
                result = {"machine": machine(), "rounds": args.rounds, "cases": cases}
                args.output.write_text(json.dumps(result, indent=1) + "\n")
        gc.collect()  # the home, before the next one is made
    Console(width=150).print(table(cases))


if __name__ == "__main__":
    main()

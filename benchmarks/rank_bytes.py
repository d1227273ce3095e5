"""Predicted against measured bytes of plans for ranks: real processes over gloo, on the CPU.

A small model with ragged tiles is trained in 1, 2 and 4 processes; of the third step of AdamW each
rank counts its shards, what it sends, and the most that is whole at once. Only bytes are compared:
they do not depend on the machine.

    python benchmarks/rank_bytes.py --output benchmarks/results/rank_bytes.json
    python benchmarks/rank_bytes.py --engine zero3 --output benchmarks/results/rank_bytes_zero3.json
"""

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

import rank_worker
import rank_zero3_worker

WORKERS: dict[str, Any] = {"fsdp2": rank_worker, "zero3": rank_zero3_worker}  # alike by name
KEPT = {
    "fsdp2": {
        "parameters": "shards of parameters",
        "gradients": "gradients of shards",
        "state": "optimizer's state of shards",
    },
    "zero3": rank_zero3_worker.KEPT,
}
HEADINGS = ["case", "ranks", "bytes of a rank", "predicted", "measured", "ratio"]


def compared(engine: str, name: str, world: int, measured: list[Any]) -> list[dict[str, Any]]:
    """Each number of a case: what was predicted, and what the fullest rank measured."""
    worker = WORKERS[engine]
    plan = worker.planned(worker.CASES[name], world)
    fullest = {
        term: max(getattr(rank, kind) for rank in measured) for kind, term in KEPT[engine].items()
    }
    predicted = {term: plan.term(term) for term in fullest}
    for kind in ("all-gather", "reduce-scatter"):
        predicted[kind] = plan.moved(kind)
        fullest[kind] = max(rank.sent.get(kind, 0) for rank in measured)
    predicted["gathered at once"] = worker.gathered_at_most(plan)
    fullest["gathered at once"] = max(rank.gathered for rank in measured)
    predicted["gradients whole at once"] = worker.reduced_at_most(plan)
    fullest["gradients whole at once"] = max(rank.reduced for rank in measured)
    return [
        {"case": name, "ranks": world, "what": k, "predicted": predicted[k], "measured": fullest[k]}
        for k in predicted
    ]


def ratio(found: dict[str, Any]) -> float:
    """Predicted over measured; endless where something was predicted and nothing measured."""
    if found["measured"]:
        return float(found["predicted"] / found["measured"])
    return float("inf") if found["predicted"] else 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worlds", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--engine", choices=WORKERS, default="fsdp2")
    arguments = parser.parse_args()
    worker, found = WORKERS[arguments.engine], []
    for world in arguments.worlds:
        ranks = worker.spawn(world)
        for name in worker.CASES:
            found += compared(arguments.engine, name, world, [rank[name] for rank in ranks])
    table = Table(*HEADINGS)
    for each in found:
        table.add_row(*(str(value) for value in each.values()), f"{ratio(each):.3f}")
    console = Console(width=120)
    console.print(table)
    exact = sum(each["predicted"] == each["measured"] for each in found)
    worst = max(ratio(each) for each in found)
    least = min(ratio(each) for each in found)
    console.print(
        f"{exact} of {len(found)} to the byte; predicted / measured from {least:.3f} to {worst:.3f}"
    )
    versions = {"torch": torch.__version__}
    if arguments.engine == "zero3":
        versions["deepspeed"] = version("deepspeed")
    if arguments.output:
        arguments.output.write_text(json.dumps({**versions, "cells": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

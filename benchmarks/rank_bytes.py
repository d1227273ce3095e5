"""Predicted against measured bytes of plans for ranks: real processes over gloo, FSDP2 on the CPU.

A small model with ragged tiles is trained in 1, 2 and 4 processes; of the third step of AdamW each
rank counts its shards, what it sends, and the most that is whole at once. Only bytes are compared:
they do not depend on the machine.

    python benchmarks/rank_bytes.py --output benchmarks/results/rank_bytes.json
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

from rank_worker import CASES, Measured, gathered_at_most, planned, reduced_at_most, spawn

HEADINGS = ["case", "ranks", "bytes of a rank", "predicted", "measured", "ratio"]


def compared(name: str, world: int, measured: list[Measured]) -> list[dict[str, Any]]:
    """Each number of a case: what was predicted, and what the fullest rank measured."""
    plan = planned(CASES[name], world)
    fullest = {
        "shards of parameters": max(rank.parameters for rank in measured),
        "gradients of shards": max(rank.gradients for rank in measured),
        "optimizer's state of shards": max(rank.state for rank in measured),
    }
    predicted = {term: plan.term(term) for term in fullest}
    for kind in ("all-gather", "reduce-scatter"):
        predicted[kind] = plan.moved(kind)
        fullest[kind] = max(rank.sent.get(kind, 0) for rank in measured)
    predicted["gathered at once"] = gathered_at_most(plan)
    fullest["gathered at once"] = max(rank.gathered for rank in measured)
    predicted["gradients whole at once"] = reduced_at_most(plan)
    fullest["gradients whole at once"] = max(rank.reduced for rank in measured)
    return [
        {"case": name, "ranks": world, "what": k, "predicted": predicted[k], "measured": fullest[k]}
        for k in predicted
    ]


def ratio(found: dict[str, Any]) -> float:
    return found["predicted"] / found["measured"] if found["measured"] else 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worlds", nargs="+", type=int, default=[1, 2, 4])
    arguments = parser.parse_args()
    found = []
    for world in arguments.worlds:
        ranks = spawn(world)
        for name in CASES:
            found += compared(name, world, [rank[name] for rank in ranks])
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
    if arguments.output:
        arguments.output.write_text(
            json.dumps({"torch": torch.__version__, "cells": found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()

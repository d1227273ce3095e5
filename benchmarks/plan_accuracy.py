"""Predicted against measured peak memory of plans, each cell in a fresh process.

Two architectures with random weights, three budgets that make different plans, host and disk homes,
training (three AdamW steps, in backward) and inference (the prompt's pass with its cache). The peak
is the kernel's own, above what the process holds after its imports. One cell at a time.

    python benchmarks/plan_accuracy.py --output benchmarks/results/plan_accuracy.json
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import memtile
from memtile.costmodel import Plan, format_byte_size, parse_byte_size
from memtile.errors import BudgetError
from memtile.testing import PeakMemory

STEPS = 3
TOKENS = (64, 512, 2048)
# Parts of what a plan with everything in memory takes, between the least that fits and all of it.
BUDGETS = ("small", "middle", "large")
HEADINGS = ["model", "work", "tokens", "home", "budget", "plan", "predicted", "measured", "error"]


def config_of(name: str) -> Any:
    import transformers

    if name == "llama":  # the shape of SmolLM2-135M, embeddings tied
        return transformers.LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
    return transformers.GPT2Config(n_positions=2048, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)


def write_checkpoint(name: str, folder: Path) -> None:
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(name), dtype=torch.float32)
    model.save_pretrained(folder)


def planned(cell: dict[str, Any], budget: int | str) -> Plan:
    return memtile.plan(
        config_of(cell["model"]),
        budget=budget,
        tokens=cell["tokens"],
        optimizer=torch.optim.AdamW if cell["work"] == "training" else None,
        home=cell["home"],
    )


def run_cell(cell: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Plan, load, run and measure: what a process of its own does."""
    import transformers

    factory = transformers.AutoModelForCausalLM
    getattr(transformers, "LlamaForCausalLM" if cell["model"] == "llama" else "GPT2LMHeadModel")
    with PeakMemory() as memory:
        plan = planned(cell, cell["budget_bytes"])
        model = memtile.empty_model(
            lambda: factory.from_config(config_of(cell["model"]), dtype=torch.float32)
        )
        memtile.tile(model, plan, checkpoint=folder)
        started = time.perf_counter()
        ids = torch.randint(config_of(cell["model"]).vocab_size, (1, cell["tokens"]))
        (train if cell["work"] == "training" else infer)(model, ids)
        seconds = (time.perf_counter() - started) / STEPS
    return {
        **cell,
        "predicted_bytes": plan.peak_bytes,
        "measured_bytes": memory.nbytes,
        "predicted_seconds": plan.seconds,
        "measured_seconds": seconds,
        "tiles": plan.tiles,
        "parked_layers": len(plan.parked_layers),
        "checkpointing": plan.checkpointing,
        "terms": {term.name: term.nbytes for term in plan.terms if term.place == plan.place},
    }


def train(model: nn.Module, ids: torch.Tensor) -> None:
    model.train()
    optimizer = memtile.TileOptimizer(model, torch.optim.AdamW, mode="in_backward", lr=1e-4)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()


def infer(model: nn.Module, ids: torch.Tensor) -> None:
    model.eval()
    for _ in range(STEPS):
        with torch.no_grad():
            model(input_ids=ids, use_cache=True, logits_to_keep=1)


def budgets_of(cell: dict[str, Any]) -> dict[str, int]:
    """From the least that a plan fits in to all that it can use."""
    most = int(planned(cell, "64GiB").peak_bytes * 1.07)
    try:
        planned(cell, 1 << 20)
    except BudgetError as error:
        words = str(error).split("need at least host ")[1].split(",")[0].split(";")[0]
        least = int(parse_byte_size(words, "need") * 1.03)
    middle = (least + most) // 2
    return dict(zip(BUDGETS, (least, middle, most), strict=True))


def measure(cell: dict[str, Any], folder: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--cell", json.dumps(cell), "--folder", str(folder)],
        capture_output=True,
        text=True,
        env=dict(os.environ),
        check=False,
    )
    if done.returncode:
        return {**cell, "failure": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def row(found: dict[str, Any]) -> list[str]:
    head = [str(found[key]) for key in ("model", "work", "tokens", "home")]
    head.append(format_byte_size(found["budget_bytes"]))
    if "failure" in found:
        return [*head, found["failure"]]
    again = ", checkpointing" if found["checkpointing"] else ""
    error = found["predicted_bytes"] / found["measured_bytes"] - 1
    over = " OVER BUDGET" if found["measured_bytes"] > found["budget_bytes"] else ""
    return [
        *head,
        f"{found['tiles']} tiles of {found['parked_layers']} layers{again}",
        format_byte_size(found["predicted_bytes"]),
        format_byte_size(found["measured_bytes"]),
        f"{error:+.1%}{over}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--models", nargs="+", default=["llama", "gpt2"])
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--homes", nargs="+", default=["disk", "host"])
    parser.add_argument("--work", nargs="+", default=["training", "inference"])
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS))
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        print(json.dumps(run_cell(json.loads(arguments.cell), arguments.folder)))
        return
    found = run_all(arguments)
    table = Table(*HEADINGS)
    for each in found:
        table.add_row(*row(each))
    Console(width=160).print(table)


def run_all(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for name in arguments.models:
        with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
            write_checkpoint(name, Path(folder))
            for work in arguments.work:
                for tokens in arguments.tokens:
                    for home in arguments.homes:
                        cell = {"model": name, "work": work, "tokens": tokens, "home": home}
                        for size, nbytes in budgets_of(cell).items():
                            if size in arguments.budgets:
                                found.append(
                                    measure({**cell, "budget_bytes": nbytes}, Path(folder))
                                )
                                print(*row(found[-1]), sep="  ", flush=True)
                                save(found, arguments.output)
    return found


def save(found: list[dict[str, Any]], path: Path | None) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"torch": torch.__version__, "cells": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

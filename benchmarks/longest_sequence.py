"""Memory and time of training steps on long sequences, within a budget and without one.

A step of AdamW (fused) on one sequence, of SmolLM2-135M or another folder: as transformers does it,
with its checkpointing, with DeepSpeed's tiles for MLPs and loss in place besides, and as memtile
does it by the plan of a budget. Each in a process of its own: the peak (`VmHWM`, above the imports)
and the median seconds of steps after a short first one. The positions of the config are set to what
is asked for, and --longest says what the budget would allow. What --output has already of other
runs stays, and --picture draws it.

    python benchmarks/longest_sequence.py FOLDER --tokens 4096 16384 --output longest_sequence.json
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from conditions import machine
from rich.console import Console
from rich.table import Table

import memtile
from memtile.homes import keep_freed_memory_out
from memtile.testing import PeakMemory

WAYS = ("dense", "checkpointing", "DeepSpeed's tiles", "memtile")
SHARDS = 8
SHORT = 64  # tokens of the first step
MIB = 1 << 20


def config_of(folder: str, tokens: int) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    config.max_position_embeddings = max(tokens, config.max_position_embeddings)
    return config


def dense_model(folder: str, tokens: int, way: str) -> tuple[Any, Any]:
    import transformers

    keep_freed_memory_out()  # as memtile has it
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=config_of(folder, tokens), dtype=torch.float32
    )
    if way != "dense":
        model.activation_checkpointing_enable()
    if way == "DeepSpeed's tiles":
        use_deepspeeds_tiles(model)
    return model.train(), torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)


def use_deepspeeds_tiles(model: Any) -> None:
    """MLPs in shards of rows, as its own patches for transformers do."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    for layer in model.model.layers:
        mlp, whole = layer.mlp, layer.mlp.forward
        mlp.forward = lambda x, mlp=mlp, whole=whole: TiledMLP.apply(
            lambda _, rows: whole(rows), mlp, x, SHARDS, list(mlp.parameters())
        )


def deepspeeds_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    targets = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], 1)

    def summed(head: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        logits = head(x).float().flatten(0, -2)
        return torch.nn.functional.cross_entropy(logits, y.flatten(), reduction="sum")

    head = model.lm_head
    total = TiledFusedLogitsLoss.apply(
        summed, head, hidden, targets, None, 4 * SHARDS, [head.weight], "sum"
    )
    return total / (ids.numel() - 1)


def planned_model(folder: str, tokens: int, budget: str) -> tuple[Any, Any, Any]:
    import transformers

    config = config_of(folder, tokens)
    plan = memtile.plan(config, budget=budget, tokens=tokens, options={"fused": True})
    model = memtile.empty_model(
        lambda: transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    )
    memtile.tile(model, plan, checkpoint=folder)
    adamw = memtile.TileOptimizer(model, torch.optim.AdamW, mode=plan.mode, lr=1e-5, fused=True)
    return model.train(), adamw, plan


def run(folder: str, way: str, tokens: int, budget: str, steps: int) -> dict[str, Any]:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    empty = transformers.AutoModelForCausalLM.from_config
    memtile.empty_model(lambda: empty(config_of(folder, tokens)))  # imports the model's parts
    plan = None
    with PeakMemory() as peak:
        if way == "memtile":
            model, optimizer, plan = planned_model(folder, tokens, budget)
        else:
            model, optimizer = dense_model(folder, tokens, way)
        ids = torch.randint(3, 40_000, (1, tokens), generator=torch.Generator().manual_seed(0))
        losses, seconds = [], list[float]()
        for number in range(1 + steps):
            begun, part = time.perf_counter(), ids if number else ids[:, :SHORT]
            optimizer.zero_grad()
            if way == "DeepSpeed's tiles":
                loss = deepspeeds_loss(model, part)
            else:
                loss = model(input_ids=part, labels=part, use_cache=False).loss
            loss.backward()
            optimizer.step()
            seconds += [time.perf_counter() - begun] * (number > 0)
            losses.append(loss.item())
    found = {"way": way, "tokens": tokens, "peak_bytes": peak.nbytes, "losses": losses}
    if plan is not None:
        found |= {"plan": plan.summary, "predicted_bytes": plan.peak_bytes}
    return {**found, "seconds": statistics.median(seconds), "all_seconds": seconds}


def longest(folder: str, budget: str) -> int:
    config = config_of(folder, 1 << 20)
    plan = memtile.plan(config, budget=budget, tokens="longest", options={"fused": True})
    return int(plan.tokens)


def in_own_process(given: argparse.Namespace, way: str, tokens: int) -> dict[str, Any]:
    words = [given.folder, "--one", way, "--tokens", str(tokens), "--budget", given.budget]
    words += ["--steps", str(given.steps)]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    if done.returncode:
        return {"way": way, "tokens": tokens, "error": done.stderr.strip()[-300:]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(found: dict[str, Any]) -> list[str]:
    if "error" in found:
        return [found["way"], str(found["tokens"]), found["error"]]
    peak, milliseconds = found["peak_bytes"] / MIB, 1e3 * found["seconds"] / found["tokens"]
    words = [f"{peak:.0f}", f"{milliseconds:.2f}", f"{found['losses'][-1]:.6f}"]
    return [found["way"], str(found["tokens"]), *words]


def draw(found: dict[str, Any], file: Path) -> None:
    """Peak and time a token of each way, by the number of tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    memory, time_ = figure.subplots(1, 2)
    for way in WAYS:
        runs = [each for each in found["runs"] if each["way"] == way and "error" not in each]
        runs.sort(key=lambda each: each["tokens"])
        tokens = [each["tokens"] for each in runs]
        memory.plot(tokens, [each["peak_bytes"] / 2**30 for each in runs], "o-", label=way)
        time_.plot(tokens, [1e3 * each["seconds"] / each["tokens"] for each in runs], "o-")
    memory.set(ylabel="peak above the imports, GiB", yscale="log", yticks=(1, 2, 4, 8))
    memory.yaxis.set_major_formatter("{x:g}")
    memory.yaxis.set_minor_formatter("")
    time_.set(ylabel="ms a token", ylim=(0, None))
    for axes in (memory, time_):
        axes.set(xlabel="tokens", xscale="log", xticks=sorted({r["tokens"] for r in found["runs"]}))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.grid(alpha=0.3)
    memory.legend(frameon=False)
    figure.savefig(file, dpi=110)


def stored_runs(file: Path | None, new: set[tuple[str, int]]) -> list[dict[str, Any]]:
    """What the file has already of others than these ways and tokens."""
    if file is None or not file.exists():
        return []
    runs = json.loads(file.read_text())["runs"]
    return [each for each in runs if (each["way"], each["tokens"]) not in new]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--tokens", type=int, nargs="*", default=[4096])
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=WAYS)
    parser.add_argument("--budget", default="2GiB")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--longest", action="store_true", help="search it: minutes")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--picture", type=Path, help="PNG file; needs matplotlib")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(run(given.folder, given.one, given.tokens[0], given.budget, given.steps)))
        return
    found: dict[str, Any] = machine(budget=given.budget)
    table = Table("way", "tokens", "peak MiB", "ms a token", "loss")
    new = {(way, tokens) for way in given.ways for tokens in given.tokens}
    found["runs"] = stored_runs(given.output, new)
    for tokens in given.tokens:
        for way in given.ways:
            found["runs"].append(in_own_process(given, way, tokens))
            table.add_row(*row(found["runs"][-1]))
            print(*row(found["runs"][-1]), sep="  ", flush=True)
            if given.output:
                given.output.write_text(json.dumps(found, indent=1) + "\n")
    Console(width=120).print(table)
    if given.picture:
        draw(found, given.picture)
    if given.longest:
        print(f"longest within {given.budget}: {longest(given.folder, given.budget)} tokens")


if __name__ == "__main__":
    main()

"""Memory and time of a long sequence: activations kept, recomputed, parked on disk, or both.

One forward and backward of SmolLM2-135M (or another folder), its head and loss without logits.
Every peak is taken in a process of its own (`VmHWM`, above weights and gradients), with the disk
read and written past the page cache. For times all candidates run in turn, round after round, in
one process; a comparison is a ratio of medians.

    python benchmarks/parked_activations.py FOLDER --tokens 4096 --output parked_activations.json
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from conditions import machine, spread
from rich.console import Console
from rich.table import Table

import memtile
from memtile.homes import disk, keep_freed_memory_out
from memtile.testing import PeakMemory

WAYS = ("kept", "recomputed", "parked", "recomputed, parked")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MIB = 1 << 20


class Steps:
    """A model, and one step of it in each way."""

    def __init__(self, folder: str, dtype: str, direct: bool = True) -> None:
        if direct:  # as where the file is larger than half of the free memory
            disk.page_cache_fit = lambda size: (False, "as asked for")
        keep_freed_memory_out()
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype]
        ).train()
        self.parked = memtile.park_activations("disk", model=self.model)

    def step(self, way: str, tokens: int) -> float:
        """The loss; gradients are added up, so that they take the same memory in each step."""
        if way.startswith("recomputed"):
            self.model.activation_checkpointing_enable()
        else:
            self.model.activation_checkpointing_disable()
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, 40_000, (1, tokens + 1), generator=generator)
        with self.parked if way.endswith("parked") else contextlib.nullcontext():
            hidden = self.model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
            loss = memtile.linear_cross_entropy(hidden, self.model.lm_head.weight, ids[:, 1:])
        loss.backward()
        return loss.item()


def measure_peak(folder: str, dtype: str, way: str, tokens: int) -> dict[str, float]:
    steps = Steps(folder, dtype)
    steps.step(way, 64)
    begun = time.perf_counter(), time.process_time()
    with PeakMemory() as peak:
        loss = steps.step(way, tokens)
    traffic = steps.parked.home.traffic
    return {
        "peak_bytes": peak.nbytes,
        "loss": loss,
        "seconds": time.perf_counter() - begun[0],
        "cpu_seconds": time.process_time() - begun[1],
        "written_bytes": traffic.written_bytes,
        "read_bytes": traffic.read_bytes,
    }


def measure_times(folder: str, dtype: str, tokens: int, rounds: int) -> dict[str, Any]:
    steps = Steps(folder, dtype)
    wall: dict[str, list[float]] = {way: [] for way in WAYS}
    cpu: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds + 1):
        for way in WAYS:
            begun = time.perf_counter(), time.process_time()
            steps.step(way, tokens if number else 64)
            if number:
                wall[way].append(time.perf_counter() - begun[0])
                cpu[way].append(time.process_time() - begun[1])
    found = {}
    for way in WAYS:
        found[way] = {
            "seconds": statistics.median(wall[way]),
            "over_kept": statistics.median(wall[way]) / statistics.median(wall["kept"]),
            "cpu_over_kept": statistics.median(cpu[way]) / statistics.median(cpu["kept"]),
            "spread": spread(wall[way]) if rounds > 1 else 0.0,
        }
    return found


def in_own_process(arguments: argparse.Namespace, way: str, tokens: int) -> dict[str, float]:
    words = [arguments.folder, "--dtype", arguments.dtype, "--one", way, "--tokens", str(tokens)]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    if done.returncode:
        return {"peak_bytes": float("nan"), "error": done.stderr[-300:]}  # type: ignore[dict-item]
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--tokens", type=int, nargs="*", default=[4096])
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=WAYS)
    parser.add_argument("--rounds", type=int, default=5, help="0: no times")
    parser.add_argument("--time-tokens", type=int, default=1024)
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.one:
        found = measure_peak(arguments.folder, arguments.dtype, arguments.one, arguments.tokens[0])
        print(json.dumps(found))
        return
    report: dict[str, Any] = {"machine": machine(dtype=arguments.dtype), "peaks": {}}
    table = Table("tokens", "way", "peak MiB", "seconds", "MiB written", "loss")
    for tokens in arguments.tokens:
        for way in arguments.ways:
            found = in_own_process(arguments, way, tokens)
            report["peaks"][f"{tokens} {way}"] = found
            if "error" in found:
                table.add_row(str(tokens), way, str(found["error"]))
                continue
            table.add_row(
                str(tokens),
                way,
                f"{found['peak_bytes'] / MIB:.0f}",
                f"{found['seconds']:.1f}",
                f"{found['written_bytes'] / MIB:.0f}",
                f"{found['loss']:.9f}",
            )
    Console().print(table)
    if arguments.rounds:
        report["times"] = measure_times(
            arguments.folder, arguments.dtype, arguments.time_tokens, arguments.rounds
        )
        Console().print(report["times"])
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

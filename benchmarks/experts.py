"""Generation with a mixture of experts that does not fit: bytes and seconds of a token.

A random Qwen3-MoE of three billion parameters (`random_moe.py`) generates within 1.5 GiB, which a
memory cgroup enforces where one can be made, else RLIMIT_DATA. Sides, each in a process of its own:

- memtile: planned, its tiles left in the folder's files.
- accelerate: its disk offload of the same model, which brings in whole stacks. No cap.
- plain: transformers with everything in memory, once, for the tokens.

memtile and accelerate generate in turn, for other prompts in every round. Before each token the
model's files are dropped from the page cache. What memtile reads is counted by the kernel
(`/proc/self/io`), and compared with the experts that the router chose and that were not kept.

    python benchmarks/experts.py /var/tmp/moe --output benchmarks/results/experts.json

The model takes 6.2 GB of disk, and accelerate's copy as much again; both are made where missing,
and are left there. The plain and the accelerate side take 7 GB of memory while they load.
"""

import argparse
import contextlib
import json
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from conditions import drop_cached, machine, spread
from disk_training import RawDisk
from random_moe import sizes, write_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import memtile
from memtile.costmodel import format_byte_size, parse_byte_size
from memtile.homes import allocation_of
from memtile.testing import PeakMemory
from memtile.transfer import rings_of

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
import capped_training

PROMPT = 8  # tokens


def disk_bytes() -> int:
    """What the kernel has read from disks for this process."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


class Experts:
    """Counts the bytes of the experts that routers choose, each once in a forward."""

    def __init__(self, model: nn.Module) -> None:
        self.nbytes = 0
        config: Any = model.config
        self._each = 3 * config.hidden_size * config.moe_intermediate_size * 2
        for module in model.modules():
            if type(module).__name__ == "Qwen3MoeTopKRouter":
                module.register_forward_hook(self._count)

    def _count(self, module: nn.Module, given: Any, chosen: tuple[Tensor, ...]) -> None:
        self.nbytes += chosen[-1].unique().numel() * self._each


class EachToken:
    """Called by `generate` after each token: notes what it took, and drops cached files."""

    def __init__(self, counters: Callable[[], dict[str, int]], folders: list[Path]) -> None:
        self.counters, self.folders = counters, folders
        self.tokens: list[dict[str, float]] = []
        self._begin()

    def _begin(self) -> None:
        drop_cached(file for folder in self.folders for file in folder.iterdir())
        self._before, self._started = self.counters(), time.perf_counter()

    def __call__(self, ids: Tensor, scores: Any, **options: Any) -> Tensor:
        seconds = time.perf_counter() - self._started
        now = self.counters()
        used = {name: now[name] - self._before[name] for name in now}
        self.tokens.append({"seconds": seconds, **used})
        self._begin()
        return torch.zeros(ids.shape[0], dtype=torch.bool)


def generated(model: Any, prompt: list[int], tokens: int, each: EachToken) -> dict[str, Any]:
    """The new tokens, and what each took; the first of them is the prompt's forward."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[each],
        )
    return {"ids": found[0, len(prompt) :].tolist(), "tokens": each.tokens}


@contextlib.contextmanager
def capped(nbytes: int) -> Iterator[str]:
    """Inside, what this process takes anew is at most so many bytes; says who enforces it."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(capped_training.memory_cgroup(nbytes))
            yield "cgroup"
        except OSError:
            stack.enter_context(capped_training.data_limit(nbytes))
            yield "rlimit"


def memtile_side(args: argparse.Namespace, pipe: Connection) -> None:
    """Plans, tiles and generates within the cap."""
    cap = parse_byte_size(args.budget, "--budget")
    transformers.Qwen3MoeForCausalLM  # noqa: B018  # imports its module
    with capped(cap) as kind, PeakMemory() as peak:
        config = transformers.AutoConfig.from_pretrained(args.folder)
        model = memtile.empty_model(
            lambda: transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        )
        plan = memtile.plan(
            model, budget=cap, tokens=PROMPT + args.tokens, optimizer=None, home="checkpoint"
        )
        memtile.tile(model, plan, checkpoint=args.folder)
        model.requires_grad_(False).eval()
        parked = [found for p in model.parameters() if (found := allocation_of(p)) is not None]
        experts, kept = Experts(model), rings_of(parked[0].home).kept

        def counters() -> dict[str, int]:
            return {
                "disk_bytes": disk_bytes(),
                "chosen_bytes": experts.nbytes,
                "kept_bytes": kept.hit_bytes,
            }

        pipe.send({"cap": kind, "plan": plan.summary, "predicted_bytes": plan.peak_bytes})
        while (prompt := pipe.recv()) is not None:
            each = EachToken(counters, [args.folder])
            found = generated(model, prompt, args.tokens, each)
            pipe.send(found | {"peak_bytes": peak.nbytes})


def accelerate_side(args: argparse.Namespace, pipe: Connection) -> None:
    """Generates with accelerate's disk offload."""
    from accelerate import disk_offload

    model = transformers.AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.bfloat16)
    model = disk_offload(model, args.offload, torch.device("cpu"))
    pipe.send({})
    while (prompt := pipe.recv()) is not None:
        pipe.send(generated(model, prompt, args.tokens, EachToken(dict, [args.offload])))


def plain_side(args: argparse.Namespace, pipe: Connection) -> None:
    """Generates with plain transformers, experts one after another as memtile's are."""
    model = transformers.AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.bfloat16)
    model.set_experts_implementation("eager")
    pipe.send({})
    while (prompt := pipe.recv()) is not None:
        pipe.send(generated(model, prompt, args.tokens, EachToken(dict, [])))


class Side:
    """A side in its own process, which generates on request."""

    def __init__(self, run: Callable[..., None], args: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=run, args=(args, theirs))
        self._process.start()
        theirs.close()
        self.about: dict[str, Any] = self._pipe.recv()

    def generate(self, prompt: list[int]) -> dict[str, Any]:
        """What `generated` gives."""
        self._pipe.send(prompt)
        found: dict[str, Any] = self._pipe.recv()
        return found

    def close(self) -> None:
        """End the process."""
        self._pipe.send(None)
        self._process.join()


def measure(args: argparse.Namespace, prompts: list[list[int]]) -> dict[str, Any]:
    """All sides' tokens: memtile and accelerate in turn, plain before them."""
    rounds: list[dict[str, Any]] = [{} for _ in prompts]
    about: dict[str, Any] = {}
    names = [name for name in SIDES if name not in args.without]
    if "plain" in names:
        plain = Side(plain_side, args)
        for found, prompt in zip(rounds, prompts, strict=True):
            found["plain"] = plain.generate(prompt)
        plain.close()
    sides = {name: Side(SIDES[name], args) for name in names if name != "plain"}
    for number, (found, prompt) in enumerate(zip(rounds, prompts, strict=True)):
        for name, side in sides.items():
            found[name] = side.generate(prompt)
        print(f"round {number}: " + ", ".join(f"{n} {rate(found[n]):.2f} tokens/s" for n in found))
    for side in sides.values():
        about |= side.about
        side.close()
    return {"about": about, "rounds": rounds}


SIDES = {"plain": plain_side, "memtile": memtile_side, "accelerate": accelerate_side}


def decoded(found: dict[str, Any]) -> list[dict[str, float]]:
    """What each token took but the first, which is the prompt's."""
    tokens: list[dict[str, float]] = found["tokens"][1:]
    return tokens


def rate(found: dict[str, Any]) -> float:
    return 1 / statistics.median(each["seconds"] for each in decoded(found))


def summary(result: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The figures of all rounds together."""
    rounds = result["rounds"]
    ours = [token for found in rounds for token in decoded(found["memtile"])]
    chosen, kept, read = [
        sum(token[f"{name}_bytes"] for token in ours) for name in ("chosen", "kept", "disk")
    ]
    figures: dict[str, Any] = {
        "read_over_needed": read / (chosen - kept),
        "kept": kept / chosen,
        "read_bytes_a_token": read / len(ours),
        "peak_bytes": max(found["memtile"]["peak_bytes"] for found in rounds),
    }
    for name in ("memtile", "accelerate", "plain"):
        if name in rounds[0]:
            rates = [rate(found[name]) for found in rounds]
            figures[name] = statistics.median(rates)
            figures[f"{name}_spread"] = spread(rates) if len(rates) > 1 else 0.0
    if "accelerate" in figures:
        figures["over_accelerate"] = figures["memtile"] / figures["accelerate"]
    if "plain" in figures:
        same = [found["memtile"]["ids"] == found["plain"]["ids"] for found in rounds]
        figures["same_tokens"] = all(same)
    raw = RawDisk(args.folder, 1 << 30)
    figures["raw_disk"] = (1 << 30) / raw.seconds((1, 0))
    raw.close()
    figures["disk_used"] = figures["read_bytes_a_token"] * figures["memtile"] / figures["raw_disk"]
    return figures


def table(figures: dict[str, Any]) -> Table:
    result = Table("figure", "value")
    for name, value in figures.items():
        shown = f"{value:.3g}" if isinstance(value, float) else str(value)
        if "bytes" in name:
            shown = format_byte_size(int(value))
        result.add_row(name, shown)
    return result


def main() -> None:
    """Make the model where it is missing, measure every side, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the model; made where it is missing")
    parser.add_argument("--offload", type=Path, help="accelerate's folder; FOLDER-offload")
    parser.add_argument("--budget", default="1.5GiB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=6, help="of each prompt")
    parser.add_argument("--without", nargs="*", default=[], choices=["plain", "accelerate"])
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    sizes(parser)
    args = parser.parse_args()
    args.offload = args.offload or args.folder.with_name(f"{args.folder.name}-offload")
    if not (args.folder / "config.json").is_file():
        print(f"{write_model(args.folder, args):,} parameters in {args.folder}")
    draw = random.Random(0)
    prompts = [[draw.randrange(1, args.words) for _ in range(PROMPT)] for _ in range(args.rounds)]
    result = measure(args, prompts)
    figures = summary(result, args)
    Console(width=100).print(table(figures))
    if args.output:
        settings = {"budget": args.budget, "rounds": args.rounds, "tokens": args.tokens}
        document = {"machine": machine(), "settings": settings, "figures": figures, **result}
        args.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()

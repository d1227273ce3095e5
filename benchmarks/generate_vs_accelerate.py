"""Generation from a cold disk: seconds a token over accelerate's, and what part of the raw rate.

A random Llama of 0.84 billion parameters in bfloat16, more than the memory that it may use, after
prompts of several lengths. Sides, each in a process of its own:

- memtile: planned for the budget, its tiles left in the folder's files. A memory cgroup of the
  budget enforces it where one can be made, else RLIMIT_DATA.
- accelerate: its offload to disk by `device_map="auto"`, with the budget as its largest memory of
  weights, from the same files. No cap.

Both generate in turn, in random order, and before every token the files are dropped from the page
cache. After both the same files are read with direct I/O and nothing else: the raw rate.

    python benchmarks/generate_vs_accelerate.py /var/tmp/llama --output FILE

The folder takes 1.7 GB of disk, and is made where it is missing and left there.
"""

import argparse
import json
import random
import statistics
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from conditions import machine, raw_read_rate, spread
from experts import EachToken, Side, capped, disk_bytes, generated
from rich.console import Console
from rich.table import Table

import memtile
from memtile.costmodel import parse_byte_size
from memtile.homes import allocation_of
from memtile.testing import PeakMemory


def write_model(args: argparse.Namespace) -> None:
    """A random Llama, in shards."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=args.words,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 128,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        dtype="bfloat16",
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(args.folder, max_shard_size="700MB")


def memtile_side(args: argparse.Namespace, pipe: Connection) -> None:
    """Plans, tiles and generates within the budget."""
    budget = parse_byte_size(args.budget, "--budget")
    transformers.LlamaForCausalLM  # noqa: B018  # imports its module
    config = transformers.AutoConfig.from_pretrained(args.folder)
    model = memtile.empty_model(
        lambda: transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    )
    most = max(args.prompts) + args.tokens
    plan = memtile.plan(model, budget=budget, tokens=most, optimizer=None, home="checkpoint")
    with capped(budget) as kind, PeakMemory() as peak:
        memtile.tile(model, plan, checkpoint=args.folder)
        model.requires_grad_(False).eval()
        parked = [found for p in model.parameters() if (found := allocation_of(p)) is not None]
        home = parked[0].home

        def counters() -> dict[str, int]:
            return {"read_bytes": home.traffic.read_bytes, "disk_bytes": disk_bytes()}

        pipe.send({"cap": kind, "plan": plan.summary, "predicted_bytes": plan.peak_bytes})
        while (prompt := pipe.recv()) is not None:
            each = EachToken(counters, [args.folder])
            found = generated(model, prompt, args.tokens, each)
            pipe.send(found | {"peak_bytes": peak.nbytes, "path": home.path})


def accelerate_side(args: argparse.Namespace, pipe: Connection) -> None:
    """Generates with what accelerate leaves on disk."""
    args.offload.mkdir(exist_ok=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.folder,
        dtype=torch.bfloat16,
        device_map="auto",
        max_memory={"cpu": parse_byte_size(args.budget, "--budget")},
        offload_folder=args.offload,
    )
    places = {name: str(place) for name, place in model.hf_device_map.items()}
    pipe.send({"accelerate_map": places})
    while (prompt := pipe.recv()) is not None:
        each = EachToken(lambda: {"disk_bytes": disk_bytes()}, [args.folder, args.offload])
        pipe.send(generated(model, prompt, args.tokens, each))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Both sides' tokens for every prompt, in turn, and the raw rate of each round."""
    sides = {"memtile": Side(memtile_side, args), "accelerate": Side(accelerate_side, args)}
    draw, files = random.Random(0), sorted(args.folder.glob("*.safetensors"))
    rounds = []
    for number in range(args.rounds + 1):
        found: dict[str, Any] = {"prompts": {}}
        for length in args.prompts:
            prompt = [draw.randrange(1, args.words) for _ in range(length)]
            turn = draw.sample(list(sides), len(sides))
            case = {name: sides[name].generate(prompt) for name in turn}
            found["prompts"][length] = case | {"raw_bytes_a_second": raw_read_rate(files)}
        if number:  # the first round is for learning the order
            rounds.append(found)
            print(
                f"round {number}: " + ", ".join(map(shown, found["prompts"].values())), flush=True
            )
    about: dict[str, Any] = {}
    for side in sides.values():
        about |= side.about
        side.close()
    return {"about": about, "rounds": rounds}


def seconds(found: dict[str, Any]) -> list[float]:
    """Of each token; the first is the prompt's."""
    return [token["seconds"] for token in found["tokens"]]


def shown(case: dict[str, Any]) -> str:
    return f"{sum(seconds(case['memtile'])):.2f} and {sum(seconds(case['accelerate'])):.2f} s"


def figures(result: dict[str, Any], length: int) -> dict[str, Any]:
    """What all rounds say of one length of prompt: medians, the prompt's token and later ones."""
    cases = [found["prompts"][length] for found in result["rounds"]]
    raw = statistics.median(case["raw_bytes_a_second"] for case in cases)
    same = [case["memtile"]["ids"] == case["accelerate"]["ids"] for case in cases]
    found: dict[str, Any] = {"prompt": length, "raw": raw, "same_tokens": all(same)}
    for name, part in (("first", slice(0, 1)), ("later", slice(1, None))):
        taken = [time for case in cases for time in seconds(case["memtile"])[part]]
        theirs = [time for case in cases for time in seconds(case["accelerate"])[part]]
        found[name] = {
            "memtile": statistics.median(taken),
            "spread": spread(taken),
            "accelerate": statistics.median(theirs),
            "over_accelerate": statistics.median(ratio(case, part) for case in cases),
            "of_raw": statistics.median(part_of_raw(case, part) for case in cases),
        }
    return found


def ratio(case: dict[str, Any], part: slice) -> float:
    """accelerate's seconds over memtile's in one round: a virtual disk's rate moves with time."""
    sides = (seconds(case[name])[part] for name in ("accelerate", "memtile"))
    theirs, ours = (statistics.median(each) for each in sides)
    return theirs / ours


def part_of_raw(case: dict[str, Any], part: slice) -> float:
    """What memtile read a second over the raw rate of the same round."""
    tokens = case["memtile"]["tokens"][part]
    rate = statistics.median(token["read_bytes"] / token["seconds"] for token in tokens)
    raw: float = case["raw_bytes_a_second"]
    return rate / raw


def table(found: list[dict[str, Any]]) -> Table:
    headings = ["prompt", "token", "memtile s", "spread", "accelerate s", "ratio", "of raw rate"]
    result = Table(*headings, "raw GB/s")
    for each in found:
        for name in ("first", "later"):
            own = each[name]
            result.add_row(
                str(each["prompt"]),
                name,
                f"{own['memtile']:.2f}",
                f"±{own['spread']:.0%}",
                f"{own['accelerate']:.2f}",
                f"{own['over_accelerate']:.2f}",
                f"{own['of_raw']:.2f}",
                f"{each['raw'] / 1e9:.2f}",
            )
    return result


def main() -> None:
    """Make the model where it is missing, measure both sides, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the model; made where it is missing")
    parser.add_argument("--offload", type=Path, help="accelerate's folder; FOLDER-offload")
    parser.add_argument("--budget", default="600MiB")
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 16, 256], help="tokens")
    parser.add_argument("--tokens", type=int, default=3, help="new ones of each prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5504)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--words", type=int, default=32000)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    args.offload = args.offload or args.folder.with_name(f"{args.folder.name}-offload")
    if not (args.folder / "config.json").is_file():
        write_model(args)
    result = measure(args)
    found = [figures(result, length) for length in args.prompts]
    Console(width=100).print(table(found))
    if args.output:
        settings = {"budget": args.budget, "rounds": args.rounds, "tokens": args.tokens}
        document = {"machine": machine(), "settings": settings, "figures": found, **result}
        args.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()

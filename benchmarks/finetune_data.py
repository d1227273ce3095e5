"""Peak memory of `memtile finetune` on files that are larger than its budget, read cold.

A text and JSON lines of conversations are written, the same bytes for the same sizes, and a small
random Llama with a token for each word is fine-tuned on each for some steps, the tokenizing
included: once as it is, and once more, when the tokens are found in the cache. The peak is the
kernel's count of the process above its imports, which the command holds against its budget; the
peak of the whole process is given too.

    python benchmarks/finetune_data.py --output benchmarks/results/finetune_data.json
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from conditions import drop_cached, machine
from rich.console import Console
from rich.table import Table
from tokenizers import models, pre_tokenizers

from memtile.costmodel import format_byte_size, parse_byte_size

CHATML = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\n' }}{%- else %}{{ message.content + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}"
)
SENTENCES = 20_000  # that differ
RUN = "import sys; from memtile.cli import main; sys.exit(main(sys.argv[1:]))"


def vocabulary() -> list[str]:
    drawn = random.Random(0)
    return ["".join(drawn.choices("etaoinshrdlu", k=drawn.randint(6, 24))) for _ in range(3000)]


def make_model(folder: Path) -> None:
    """A random Llama of 4 million parameters, and a tokenizer that is fast: it knows all words."""
    special = ["<|unknown|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    words = {word: number for number, word in enumerate([*special, *sorted(set(vocabulary()))])}
    inner = tokenizers.Tokenizer(models.WordLevel(words, unk_token=special[0]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(special)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def sentences() -> Iterator[str]:
    """Texts of a dozen to a hundred words."""
    drawn, words = random.Random(1), vocabulary()
    for _ in range(SENTENCES):
        yield " ".join(drawn.choices(words, k=drawn.randint(12, 100)))


def conversations() -> Iterator[str]:
    """Two questions and two answers in each, as JSON."""
    roles, parts = ("user", "assistant") * 2, sentences()
    while said := list(islice(parts, len(roles))):
        turns = zip(roles, said, strict=True)
        yield json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]})


def write(file: Path, nbytes: int, lines: list[str]) -> None:
    """The lines in another order each time, as often as they are needed."""
    drawn, left = random.Random(2), nbytes
    with file.open("w") as stream:
        while left > 0:
            drawn.shuffle(lines)
            left -= stream.write("\n".join(lines)[: max(left, 1 << 12)].rpartition("\n")[0] + "\n")


def finetune(
    model: Path, file: Path, out: Path, cache: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """One run in a process of its own."""
    drop_cached([file])
    options = ["--budget", args.budget, "--steps", args.steps, "--tokens", args.tokens]
    words = ["finetune", model, file, "--out", out, "--cache", cache, *options]
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, *map(str, words)], stdout=subprocess.PIPE, text=True
    )
    said = process.stdout.read() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(said)
    steps = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {
        "data": next(line for line in said.splitlines() if line.startswith("DATA")).split(";")[0],
        "seconds": time.perf_counter() - started,
        "peak_bytes": max(step["peak_bytes"] for step in steps),
        "process_peak_bytes": usage.ru_maxrss * 1024,
        "losses": [step["loss"] for step in steps],
    }


def measure(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    make_model(folder / "model")
    sizes = {"text.txt": args.text_bytes, "chats.jsonl": args.jsonl_bytes}
    sizes = {name: size for name, size in sizes.items() if args.only in (None, name)}
    cases = []
    for name, size in sizes.items():
        file, nbytes = folder / name, parse_byte_size(size, "size")
        write(file, nbytes, list(sentences() if name.endswith(".txt") else conversations()))
        for number, way in enumerate(("tokenized", "found in the cache")):
            out = folder / f"{name}-{number}"
            found = finetune(folder / "model", file, out, folder / "cache", args)
            cases.append({"file": name, "nbytes": nbytes, "way": way, **found})
            print(name, way, f"{found['seconds']:.0f} s", format_byte_size(found["peak_bytes"]))
        file.unlink()
    return cases


def table(cases: list[dict[str, Any]], budget: str) -> Table:
    headings = ["file", "size", "tokens", "seconds", f"peak of {budget}", "whole process"]
    result = Table(*headings)
    for case in cases:
        result.add_row(
            case["file"],
            format_byte_size(case["nbytes"]),
            case["way"],
            f"{case['seconds']:.0f}",
            format_byte_size(case["peak_bytes"]),
            format_byte_size(case["process_peak_bytes"]),
        )
    return result


def main() -> None:
    """Measure both files, print the table, write the JSON; fails where a budget was not kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text-bytes", default="2GB")
    parser.add_argument("--jsonl-bytes", default="1GB")
    parser.add_argument("--budget", default="600MiB")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--only", choices=["text.txt", "chats.jsonl"])
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="with 15 GB of room")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        cases = measure(Path(scratch), args)
    Console(width=120).print(table(cases, args.budget))
    if args.output:
        settings = {
            key: str(value) for key, value in vars(args).items() if key not in ("output", "folder")
        }
        versions = {each.__name__: each.__version__ for each in (transformers, tokenizers)}
        result = {"machine": machine(**versions), "settings": settings, "cases": cases}
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    if any(case["peak_bytes"] > parse_byte_size(args.budget, "--budget") for case in cases):
        raise SystemExit("a budget was not kept")


if __name__ == "__main__":
    main()

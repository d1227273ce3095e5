"""A process that makes a random Llama on disk, plans, loads, trains and saves it, memory capped.

Run as a script: `whole_run.py SIZE FOLDER CAP`, SIZE "small" or "large", CAP "cgroup" or "none".
Prints one JSON object. The limit is set after the imports, and after the machine was measured, in
a process of its own; all but the last layer is frozen.
"""

import contextlib
import json
import sys
import time
from pathlib import Path

import torch
from capped_training import Sampled, memory_cgroup
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import memtile
from memtile.checkpoints import Checkpoint, Outgoing, write_checkpoint
from memtile.optim import dense_parameters
from memtile.planner.saved_rates import rates_of

SIZES = {
    "small": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "large": {  # the shape of Llama 3.2 3B: 3.2 billion parameters
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
CAPS = {"small": 256 << 20, "large": 1536 << 20}
BUDGETS = {size: cap * 7 // 8 for size, cap in CAPS.items()}
SHARDS = {"small": 50_000_000, "large": 1_500_000_000}
TOKENS, STEPS, TRAINED_LAYERS = 64, 2, 1


def empty(size):
    """The model without weights, its last layers to be trained."""
    config = LlamaConfig(**SIZES[size], tie_word_embeddings=True)
    model = memtile.empty_model(
        lambda: AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    )
    first = config.num_hidden_layers - TRAINED_LAYERS
    for name, parameter in model.named_parameters():
        number = name.removeprefix("model.layers.").partition(".")[0]
        parameter.requires_grad_(number.isdigit() and int(number) >= first)
    return model


def create(model, size, folder):
    """Write random weights, a few MiB at a time, and the config."""
    generator = torch.Generator().manual_seed(0)

    def drawn(shape):
        count = shape.numel()
        for start in range(0, count, 1 << 20):
            values = torch.empty(min(1 << 20, count - start)).normal_(0, 0.02, generator=generator)
            yield values.bfloat16()

    tensors = [
        Outgoing(dense.name, torch.bfloat16, dense.shape, lambda shape=dense.shape: drawn(shape))
        for dense in dense_parameters(model)
    ]
    write_checkpoint(folder, tensors, max_shard_bytes=SHARDS[size])
    model.config.save_pretrained(folder)


def train(model):
    """The loss of each step."""
    optimizer = memtile.TileOptimizer(model, torch.optim.AdamW, mode="in_backward", lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        ids = torch.randint(model.config.vocab_size, (1, TOKENS), generator=generator)
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def changed(before, after):
    """Names of the tensors whose bytes differ."""
    one, other = Checkpoint.open(before), Checkpoint.open(after)
    assert one.keys() == other.keys()
    return [
        name
        for name in one
        if any(
            not torch.equal(a, b) for a, b in zip(one[name].raw(), other[name].raw(), strict=True)
        )
    ]


def main(size, folder, cap):
    """Do all of it and print what was seen."""
    source, target, seconds = Path(folder) / "random", Path(folder) / "trained", {}

    @contextlib.contextmanager
    def timed(name):
        started = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - started, 1)

    assert LlamaForCausalLM  # its module belongs to the imports
    torch.nn.Linear(8, 8)(torch.ones(8, 8)).sum().backward()  # threads of a first product
    rates_of(None, Path(folder))
    limit = memory_cgroup(CAPS[size]) if cap == "cgroup" else contextlib.nullcontext()
    with limit, Sampled() as sampled:
        with timed("create"):
            create(empty(size), size, source)
        with timed("plan and load"):
            model = empty(size)
            plan = memtile.plan(
                model,
                budget=BUDGETS[size],
                tokens=TOKENS,
                optimizer=torch.optim.AdamW,
                home=f"disk:{folder}",
            )
            memtile.tile(model, plan, checkpoint=source)
        trained = sorted(
            d.name for d in dense_parameters(model) if d.parts[0].parameter.requires_grad
        )
        with timed("train"):
            losses = train(model)
        with timed("save"):
            memtile.save_checkpoint(model, target, max_shard_bytes=SHARDS[size])
        with timed("compare"):
            differing = sorted(changed(source, target))
    result = {
        "parameters": sum(d.shape.numel() for d in dense_parameters(model)),
        "losses": losses,
        "private_bytes": sampled.most - sampled.before,
        "predicted_bytes": plan.peak_bytes,
        "trained": trained,
        "changed": differing,
        "shards": len(list(target.glob("*.safetensors"))),
        "seconds": seconds,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])

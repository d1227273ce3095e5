"""A small Llama planned, tiled from its checkpoint and run in this process, its peak measured.

python planned_run.py FOLDER BUDGET TOKENS HOME training|inference
"""

import json
import sys

import torch
import transformers

import memtile
from memtile.testing import PeakMemory


def main(folder: str, budget: str, tokens: str, home: str, work: str) -> None:
    config = transformers.AutoConfig.from_pretrained(folder)
    factory = transformers.LlamaForCausalLM
    trains = work == "training"
    with PeakMemory() as memory:
        plan = memtile.plan(
            config,
            budget=budget,
            tokens=int(tokens),
            optimizer=torch.optim.AdamW if trains else None,
            home=home,
        )
        model = memtile.empty_model(lambda: factory(config))
        memtile.tile(model, plan, checkpoint=folder)
        ids = torch.randint(config.vocab_size, (1, int(tokens)))
        (_train if trains else _infer)(model, ids)
    around = sum(term.nbytes for term in plan.terms if term.name.startswith("file pages around"))
    found = {"measured": memory.nbytes, "predicted": plan.peak_bytes, "around": around}
    print(json.dumps({**found, "budget": plan.budget.of_place("host")}))


def _train(model: torch.nn.Module, ids: torch.Tensor) -> None:
    model.train()
    optimizer = memtile.TileOptimizer(model, torch.optim.AdamW, mode="in_backward", lr=1e-4)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()


def _infer(model: torch.nn.Module, ids: torch.Tensor) -> None:
    model.eval()
    for _ in range(3):
        with torch.no_grad():
            model(input_ids=ids, use_cache=True, logits_to_keep=1)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A small model planned, tiled from its checkpoint and run in this process, its peak measured.

python planned_run.py FOLDER BUDGET TOKENS HOME training|inference
"""

import json
import sys
from typing import Any

import torch
import transformers

import memtile
from memtile.integrations.pretrained import architecture
from memtile.integrations.step_inputs import StepInputs
from memtile.testing import PeakMemory


def main(folder: str, budget: str, tokens: str, home: str, work: str) -> None:
    config = transformers.AutoConfig.from_pretrained(folder)
    factory = architecture(config)
    trains = work == "training"
    memtile.empty_model(lambda: factory._from_config(config))  # imports the model's parts
    with PeakMemory() as memory:
        plan = memtile.plan(
            config,
            budget=budget,
            tokens=int(tokens),
            optimizer=torch.optim.AdamW if trains else None,
            home=home,
        )
        model = memtile.empty_model(lambda: factory._from_config(config))
        step = StepInputs(model, int(tokens), 1)
        memtile.tile(model, plan, checkpoint=folder)
        batch = step.inputs()
        (_train if trains else _infer)(model, step, batch)
    around = sum(term.nbytes for term in plan.terms if term.name.startswith("file pages around"))
    found = {"measured": memory.nbytes, "predicted": plan.peak_bytes, "around": around}
    print(json.dumps({**found, "budget": plan.budget.of_place("host")}))


def _train(model: torch.nn.Module, step: StepInputs, batch: dict[str, Any]) -> None:
    model.train()
    optimizer = memtile.TileOptimizer(model, torch.optim.AdamW, mode="in_backward", lr=1e-4)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch, **step.learning(batch)).loss.backward()
        optimizer.step()


def _infer(model: torch.nn.Module, step: StepInputs, batch: dict[str, Any]) -> None:
    model.eval()
    for _ in range(3):
        with torch.no_grad():
            model(**batch, **step.writing())


if __name__ == "__main__":
    main(*sys.argv[1:])

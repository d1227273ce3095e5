"""A small model planned, tiled from its checkpoint and run in this process, its peak measured.

What libraries take at the first step depends on the process and on the page cache: inference
took 84 to 104 MB where 110 were predicted, by that alone, training 262 where 292 were. So it is
measured here, and stands in the place of the number that the plan has from another process; the
budget is checked with all of it.

python planned_run.py FOLDER BUDGET TOKENS HOME training|parking|inference

parking: training that parks activations, and recomputes none.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

import memtile
from memtile.costmodel import Plan
from memtile.integrations.pretrained import architecture
from memtile.integrations.step_inputs import StepInputs
from memtile.planner.machine_rates import resident_bytes, use_everything
from memtile.testing import PeakMemory


def main(folder: str, budget: str, tokens: str, home: str, work: str) -> None:
    config = transformers.AutoConfig.from_pretrained(folder)
    factory = architecture(config)
    trains, parks = work != "inference", work == "parking"
    memtile.empty_model(lambda: factory._from_config(config))  # imports the model's parts
    before = resident_bytes()
    first_use = use_everything(memtile.HostHome(), trains=trains) - before
    code = _code_bytes()
    with PeakMemory() as memory:
        plan = memtile.plan(
            config,
            budget=budget,
            tokens=int(tokens),
            optimizer=torch.optim.AdamW if trains else None,
            home=home,
            checkpointing=False if parks else None,
            park_activations=True if parks else None,
        )
        model = memtile.empty_model(lambda: factory._from_config(config))
        step = StepInputs(model, int(tokens), 1)
        memtile.tile(model, plan, checkpoint=folder)
        batch = step.inputs()
        (_train if trains else _infer)(model, step, batch)
    libraries = first_use + _code_bytes() - code
    predicted = plan.peak_bytes + libraries - _term(plan, "libraries, at first use")
    found = {
        "measured": first_use + memory.nbytes,
        "predicted": predicted,
        "around": _term(plan, "file pages around looked-up rows"),
        "budget": plan.budget.of_place("host"),
        "terms": {term.name: term.nbytes for term in plan.terms},
    }
    print(json.dumps(found))


def _term(plan: Plan, name: str) -> int:
    return sum(term.nbytes for term in plan.terms if term.name == name)


def _code_bytes() -> int:
    """Resident pages of shared libraries."""
    areas = re.split(r"^(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text(), flags=re.M)
    code = (area for area in areas if ".so" in area.partition("\n")[0])
    return sum(int(re.search(r"^Rss: +(\d+)", area, re.M)[1]) << 10 for area in code)


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

"""What is neither weights nor moments comes back exactly: schedulers, positions, random states."""

import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
from resumable import a_run
from torch import nn, optim

from memtile.checkpoints.exact_json import from_json, to_json

SGD = {"optimizer_class": optim.SGD, "momentum": 0.9}


SCHEDULERS = {
    "plateau": lambda o: optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "milestones": lambda o: optim.lr_scheduler.MultiStepLR(o, [1, 3, 3, 4]),
    "lambda": lambda o: optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 3)),
    "one cycle": lambda o: optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
    "sequence": lambda o: optim.lr_scheduler.SequentialLR(
        o,
        [
            optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3),
            optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
        ],
        milestones=[3],
    ),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers_go_on(tmp_path, kind):
    """Infinite bests, counters with integer keys and nested schedulers come back exactly."""

    def begin():
        run = a_run(**SGD)
        run.scheduler = SCHEDULERS[kind](run.optimizer)
        return run

    def rates(run, steps):
        found = []
        for step in range(steps):
            run.optimizer.step()
            run.scheduler.step(*([1.5 - step] if kind == "plateau" else []))
            found.append(run.optimizer.param_groups[0]["lr"])
        return found

    first = begin()
    rates(first, 2)
    first.save(tmp_path)
    expected = rates(first, 5)
    second = begin()

    second.resume(tmp_path)

    assert rates(second, 5) == expected
    assert second.scheduler.state_dict() == first.scheduler.state_dict()


def test_numbers_that_numpy_draws_go_on(tmp_path):
    """numpy's own generator is set too, with a normal number that it holds back."""
    run = a_run()
    np.random.seed(3)
    np.random.standard_normal()
    run.save(tmp_path)
    expected = np.random.standard_normal(3).tolist()

    run.resume(tmp_path)

    assert np.random.standard_normal(3).tolist() == expected


def test_position_and_extra_come_back(tmp_path):
    """Numbers, texts, lists, tuples and dictionaries come back as they were."""
    position = {"file": "a.txt", "offset": 3, "seen": [1, 2.5, None], 7: ("x", True)}
    extra = [0.1 + 0.2, float("inf"), -0.0, 2**80, {"$": 1}, "\udcff"]
    run = a_run()

    run.save(tmp_path, position=position, extra=extra)
    resumed = run.resume(tmp_path)

    assert (resumed.position, resumed.extra) == (position, extra)
    assert str(resumed.extra[2]) == "-0.0"


@pytest.mark.parametrize(
    "value",
    [
        Counter({3: 2, 1: 1}),
        {"a": {1: (2, [3.5])}},
        torch.tensor(0.1, dtype=torch.bfloat16),
        torch.tensor([7]),
        torch.empty(0, 3),
        True,
        5e-324,
    ],
    ids=str,
)
def test_small_values_are_exact_in_strict_json(value):
    """Each comes back with its type and bits from JSON that any reader takes."""
    found = from_json(json.loads(json.dumps(to_json(value, "it"), allow_nan=False)))

    assert type(found) is type(value)
    if isinstance(value, torch.Tensor):
        assert (found.dtype, found.shape) == (value.dtype, value.shape)
        assert torch.equal(found, value)
    else:
        assert found == value


def test_not_a_number_comes_back():
    """NaN is marked too: JSON has none."""
    assert str(from_json(json.loads(json.dumps(to_json(float("nan"), "x"))))) == "nan"


def test_generators_are_the_last_to_change(tmp_path):
    """Random numbers drawn while the run is made and resumed do not matter."""
    run = a_run()
    run.save(tmp_path)
    expected = random.random(), torch.rand(1).item()

    second = a_run("disk", seed=4)
    nn.Linear(3, 3)
    second.resume(tmp_path)

    assert (random.random(), torch.rand(1).item()) == expected

"""A step of any model of `families.py`: a batch with labels, and its loss."""

from typing import Any

import torch
from torch import Tensor

from memtile.integrations.step_inputs import StepInputs, is_known

TOKENS, BATCH = 24, 2


def batch_of(model: Any) -> dict[str, Any]:
    """What a plan counts a step of, with random values where it has shapes alone."""
    assert is_known(model)
    step = StepInputs(model, TOKENS, BATCH)
    made = step.inputs()
    generator = torch.Generator().manual_seed(1)
    random = {
        name: torch.randn(value.shape, generator=generator)
        for name, value in made.items()
        if value.is_floating_point()
    }
    return {**made, **step.learning(made), **random}


def loss_and_result(model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The loss of the head, or of the first output, and the first output that is no loss."""
    found = model(**batch)
    tensors = [value for value in found.values() if isinstance(value, Tensor) and value.dim()]
    return found["loss"] if "loss" in found else tensors[0].square().mean(), tensors[0]

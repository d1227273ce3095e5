"""What is not a finite number, found before anything is stepped with it, or saved."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from memtile.errors import NotFiniteError


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity.

    A sum with one of those is none of the finite numbers; only where finite numbers have a sum that
    is too large are they looked at one by one. It takes 4% of AdamW's time for the same values
    (measured, one thread).
    """
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def check_gradients(model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Look at gradients that lie in memory; where all are finite, with one wait for a device.

    Raises:
        NotFiniteError: one is not.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    sums = [gradient.detach().sum().isfinite() for gradient in gradients]
    if not sums or bool(torch.stack([each.to(sums[0].device) for each in sums]).all()):
        return
    for parameter in parameters:
        check_gradient(model, parameter, parameter.grad)


def check_gradient(model: nn.Module, parameter: nn.Parameter, gradient: Tensor | None) -> None:
    """Refuse a gradient that no step can be taken with.

    Raises:
        NotFiniteError: it is not finite.
    """
    if gradient is None or is_finite(gradient):
        return
    names = (name for name, each in model.named_parameters() if each is parameter)
    raise NotFiniteError(
        f"the gradient of {next(names, 'a parameter')} is not finite; it was not applied, nor "
        "those after it: leave this batch out with zero_grad(), or go back to the last checkpoint "
        "and lower lr; in float16 use a torch.amp.GradScaler, or train in bfloat16"
    )

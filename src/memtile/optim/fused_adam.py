"""torch's fused kernels of Adam and AdamW, called without the optimizer's class around them.

They get the arguments that `torch.optim.Adam.step` gives them, so results have the same bits. What
they save is the class's Python for each tile: 130 calls around a kernel of 0.3 ms for a MiB.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any  # options and state hold whatever the optimizer's class wants

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

_OWN_FOLDER = os.path.dirname(torch.optim.__file__)


def has_fused_adam(optimizer_class: type[Optimizer], step: Any) -> bool:
    """Whether a class is torch's own Adam or AdamW, with a step that nobody has replaced."""
    code = getattr(step, "__code__", None)
    is_own = code is not None and os.path.dirname(code.co_filename) == _OWN_FOLDER
    return is_own and optimizer_class in (Adam, AdamW)


def fused_tensors(
    options: Mapping[str, Any], value: Tensor, gradient: Tensor, state: Mapping[str, Any]
) -> list[Tensor] | None:
    """Value, gradient and moments, for `fused_adam`; None where the class itself has to step.

    It has to before its first step, for options that are tensors, outside of the CPU, and whatever
    else is unusual in options or state.
    """
    number, dtype = state.get("step"), value.dtype
    if type(number) is not Tensor or number.dtype is not torch.float32 or not number.is_cpu:
        return None
    if not value.is_cpu or not _are_usual(options):
        return None
    tensors: list[Any] = [value, gradient, state.get("exp_avg"), state.get("exp_avg_sq")]
    if options["amsgrad"]:
        tensors.append(state.get("max_exp_avg_sq"))
    if gradient.requires_grad or gradient.layout is not torch.strided:
        return None
    for each in tensors:
        if type(each) is not Tensor or each.dtype is not dtype or not each.is_cpu:
            return None
    return tensors


def fused_adam(
    optimizer_class: type[Optimizer],
    options: Mapping[str, Any],
    tensors: Sequence[Tensor],
    number: Tensor,
) -> None:
    """Apply step `number`, counted from 1, in place; tensors as of `fused_tensors`, or rows."""
    is_decoupled = options.get("decoupled_weight_decay", optimizer_class is AdamW)
    value, gradient, moment, second, *largest = tensors
    beta1, beta2 = options["betas"]
    (torch._fused_adamw_ if is_decoupled else torch._fused_adam_)(
        [value],
        [gradient],
        [moment],
        [second],
        largest,
        [number],
        lr=options["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=options["weight_decay"],
        eps=options["eps"],
        amsgrad=options["amsgrad"],
        maximize=options["maximize"],
    )


def _are_usual(options: Mapping[str, Any]) -> bool:
    """Whether the class would call the fused kernel, with plain numbers."""
    get = options.get
    betas = get("betas", ())
    numbers = (get("lr"), get("eps"), get("weight_decay"), *betas)
    return (
        get("fused") is True
        and not get("capturable")
        and not get("differentiable")
        and type(get("amsgrad")) is bool
        and type(get("maximize")) is bool
        and len(betas) == 2
        and {*map(type, numbers)} <= {float, int}
    )

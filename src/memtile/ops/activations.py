"""Activations of MLPs: functions of a tensor whose every element depends on one element only."""

from collections import deque
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from memtile.errors import ArgumentError
from memtile.ops.recomputing import kept_random_states

Activation = Callable[[Tensor], Tensor]
_element_wise: Final = deque[Activation](maxlen=16)  # the last that were checked


def activated(activation: Activation, z: Tensor) -> Tensor:
    """s(z); ArgumentError where it is no tensor, or has another shape or dtype."""
    found: Any = activation(z)
    if isinstance(found, Tensor) and found.shape == z.shape and found.dtype == z.dtype:
        return found
    is_tensor = isinstance(found, Tensor)
    what = f"{tuple(found.shape)} in {found.dtype}" if is_tensor else f"a {type(found).__name__}"
    raise ArgumentError(
        f"the activation gives {what} for {tuple(z.shape)} in {z.dtype}: it must be element-wise, "
        "a function of a tensor such as torch.nn.functional.silu or torch.nn.GELU(); a gated one "
        "is an activation and a gate"
    )


def check_element_wise(activation: Activation) -> None:
    """ArgumentError where a part of a matrix has not the values that it has in the whole.

    So it is where elements depend on each other, or on chance. An activation that cannot be
    computed on the CPU in float64 is not checked.
    """
    if activation in _element_wise:
        return
    z = torch.linspace(-9.0, 11.0, 70, dtype=torch.float64, device="cpu").view(7, 10)
    try:
        with torch.no_grad(), kept_random_states([]):
            whole, part = activated(activation, z.clone()), activated(activation, z[:4, :6].clone())
    except ArgumentError:
        raise
    except Exception:
        return
    if not torch.allclose(whole[:4, :6], part, 1e-9, 1e-12, equal_nan=True):
        raise ArgumentError(
            f"the activation {activation!r} is not element-wise: it gives a part of a matrix other "
            "values than in the whole, as softmax, norms and dropout do (dropout is an option)"
        )
    _element_wise.append(activation)

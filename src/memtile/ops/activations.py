"""Activations of MLPs: functions of a tensor whose every element depends on one element only."""

from collections import deque
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from memtile.errors import ArgumentError
from memtile.ops.recomputing import kept_random_states

Activation = Callable[[Tensor], Tensor]
_SOME: Final = 64  # elements of the part that is compared with the whole
_element_wise: Final = deque[tuple[Activation, int | None]](maxlen=16)  # the last that were checked


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


def check_element_wise(
    activation: Activation, features: int | None = None, *, runs: bool = False
) -> None:
    """ArgumentError where the same elements, fewer and in another order, get other values.

    So it is where elements depend on each other, on their place, or on chance. An activation that
    cannot be computed on the CPU in float64, in rows of so many features, is not checked, or is
    refused too (`runs`).
    """
    if (activation, features) in _element_wise:
        return
    rows, width = 3, features or 10
    z = torch.linspace(-9.0, 11.0, rows * width, dtype=torch.float64, device="cpu")
    order = torch.Generator("cpu").manual_seed(0)
    some = torch.randperm(len(z), generator=order, device="cpu")[:_SOME]
    with torch.no_grad(), kept_random_states([]):
        try:
            whole = activated(activation, z.clone().view(rows, width))
        except ArgumentError:
            raise
        except Exception as error:
            if not runs:
                return
            raise ArgumentError(
                f"the activation {activation!r} cannot be computed of rows ({error})"
            ) from error
        try:
            part: Tensor | None = activated(activation, z[some].view(1, -1))
        except Exception:
            part = None  # it needs the shape of the whole
    expected = whole.reshape(-1)[some]
    if part is None or not torch.allclose(part[0], expected, 1e-9, 1e-12, equal_nan=True):
        raise ArgumentError(
            f"the activation {activation!r} is not element-wise: it gives a part of a matrix other "
            "values than in the whole, as softmax, norms and dropout do (dropout is an option)"
        )
    _element_wise.append((activation, features))

"""Activations of MLPs: functions of a tensor whose every element depends on one element only."""

import math
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from memtile.errors import ArgumentError
from memtile.ops.recomputing import kept_random_states

Activation = Callable[[Tensor], Tensor]
_SOME: Final = 64  # elements of the part that is compared with the whole
_LEAD: Final = (1, 1, 2, 5, 11)  # rows: primes, so that few rolls of them do nothing
_element_wise: Final = deque[Any](maxlen=16)  # the last that were checked


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
    activation: Activation, features: int | None = None, *, dims: int | None = None
) -> None:
    """ArgumentError where the same elements, fewer and in another order, get other values.

    So it is where elements depend on each other or on their place, and where it takes random
    numbers. One that cannot be computed on the CPU in float64, in rows of so many features, is not
    checked. With `dims` it is refused, and so is what depends on whether rows are in one dimension
    or in those of a tensor of so many dimensions.
    """
    key = activation, features, dims, getattr(activation, "training", None)
    if key in _element_wise:
        return
    lead = _LEAD[len(_LEAD) + 1 - (dims or 2) :]
    width, rows = features or 10, math.prod(lead)
    z = torch.linspace(-9.0, 11.0, rows * width, dtype=torch.float64, device="cpu")
    order = torch.Generator("cpu").manual_seed(0)
    some = torch.randperm(len(z), generator=order, device="cpu")[:_SOME]
    with torch.no_grad(), kept_random_states([]):
        before = torch.get_rng_state()
        try:
            whole = activated(activation, z.clone().view(*lead, width))
        except ArgumentError:
            raise
        except Exception as error:
            if dims is None:
                return
            raise ArgumentError(
                f"the activation {activation!r} cannot be computed of rows ({error})"
            ) from error
        is_random = not torch.equal(before, torch.get_rng_state())
        flat = _or_none(activation, z.clone().view(-1, width))
        part = _or_none(activation, z[some].view(1, -1))
    expected = whole.reshape(-1)
    for found, truth in (part, expected[some]), (flat, expected):
        same = found is not None and _are_close(found.reshape(-1), truth)
        if is_random or not same:
            raise ArgumentError(
                f"the activation {activation!r} is not element-wise: it gives a part of a matrix "
                "other values than in the whole, as softmax, norms and dropout do (dropout is an "
                "option)"
            )
    _element_wise.append(key)


def _or_none(activation: Activation, z: Tensor) -> Tensor | None:
    """s(z); None where it needs another shape."""
    try:
        return activated(activation, z)
    except Exception:
        return None


def _are_close(found: Tensor, truth: Tensor) -> bool:
    return torch.allclose(found, truth, 1e-9, 1e-12, equal_nan=True)

"""Clipping of gradients that live in homes, tile by tile, and of those that are gone: refused."""

import inspect
import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import reduce, wraps
from types import CellType, GeneratorType
from typing import Any, Final  # torch's own functions take what they take

import torch
from torch import Tensor, nn

from memtile.errors import OptimizerError
from memtile.homes import Berth, lock_of_a_module, streamed_allocation
from memtile.transfer import ferries_of, is_stepped_in_backward

Clip = Callable[..., Any]  # one of torch's functions


def clip_gradients(
    parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float, error_if_nonfinite: bool
) -> Tensor:
    """Scale the parameters' gradients to a norm of at most `max_norm`; gives the norm before.

    Source: the formula, the 1e-6 included, is that of `torch.nn.utils.clip_grad_norm_`.

    Raises:
        OptimizerError: with `error_if_nonfinite`, the norm is not finite; nothing was scaled.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.tensor(0.0)
    for home in {berth.home for berth in map(streamed_allocation, gradients) if berth is not None}:
        ferries_of(home).steps.clear()  # what was read before may have been written since
    norms = _norms(gradients, norm_type)
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    if error_if_nonfinite and not total.isfinite():
        raise OptimizerError(
            f"the norm of the gradients is {total.item()}, so they cannot be clipped; look for the "
            "layer that gives it, or pass error_if_nonfinite=False"
        )
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    if scale.item() != 1.0:  # NaN scales too, as in torch
        _scale(gradients, scale)
    return total


def _norms(gradients: Sequence[Tensor], norm_type: float) -> list[Tensor]:
    norms = []
    dtype = reduce(torch.promote_types, {each.dtype for each in gradients}, torch.float32)
    for number, gradient in enumerate(gradients):
        berth = streamed_allocation(gradient)
        if berth is None:
            norm = torch.linalg.vector_norm(gradient, norm_type)
        else:
            ahead = _cargoes(gradients[number + 1 :])
            with ferries_of(berth.home).steps.borrow((berth,), ahead=ahead) as loan:
                norm = torch.linalg.vector_norm(loan.tensors[0], norm_type)
        norms.append(norm.to(gradients[0].device, dtype))
    return norms


def _scale(gradients: Sequence[Tensor], scale: Tensor) -> None:
    homes = set()
    for number, gradient in enumerate(gradients):
        berth = streamed_allocation(gradient)
        if berth is None:
            gradient.mul_(scale.to(gradient.device))
            continue
        homes.add(berth.home)
        ahead = _cargoes(gradients[number + 1 :])
        with ferries_of(berth.home).steps.borrow((berth,), ahead=ahead) as loan:
            loan.tensors[0].mul_(scale)
            loan.store()
        torch.autograd.graph.increment_version(gradient)
    for home in homes:
        ferries_of(home).steps.settle()
        ferries_of(home).steps.clear()


def _cargoes(gradients: Iterable[Tensor]) -> Iterable[tuple[Berth]]:
    return ((berth,) for berth in map(streamed_allocation, gradients) if berth is not None)


_CLIPPING: Final = ("clip_grad_norm_", "clip_grad_value_", "_clip_grads_with_norm_")
_installing = lock_of_a_module()  # a finalizer may come while its thread is inside
_owners: set[object] = set()
_originals: list[tuple[CellType, Clip]] = []


def refuse_clipping(owner: object) -> None:
    """Have torch's clipping refuse parameters that are stepped in backward, while the owner lives.

    It would find no gradients, clip nothing and say 0, and nothing that a parameter offers could
    tell: `p.grad is None` is an ordinary state. So torch's functions are changed, for as long as an
    optimizer is there that needs it. Not their names in `torch.nn.utils`: who imported them before
    would not meet the change. All of them are made by torch's `@_no_grad`, and hold what is called
    in a closure; that is exchanged, so that every name that leads to them leads to the check.
    """
    token = object()
    with _installing:
        _owners.add(token)
        if not _originals:
            for cell in _cells():
                _originals.append((cell, cell.cell_contents))
                cell.cell_contents = _checked(cell.cell_contents)
    weakref.finalize(owner, _allow_clipping, token).atexit = False


def _allow_clipping(token: object) -> None:
    with _installing:
        _owners.discard(token)
        while _originals and not _owners:
            cell, original = _originals.pop()
            cell.cell_contents = original


def _cells() -> list[CellType]:
    """Where torch's functions for clipping hold what they call."""
    functions = [vars(torch.nn.utils.clip_grad).get(name) for name in _CLIPPING]
    held = [
        dict(zip(found.__code__.co_freevars, found.__closure__ or (), strict=True)).get("func")
        for found in functions
        if found is not None
    ]
    return [cell for cell in held if cell is not None]


def _checked(clip: Clip) -> Clip:
    """The function, which looks first whether there can be something to clip."""
    signature = inspect.signature(clip)

    @wraps(clip)
    def checked(*given: Any, **named: Any) -> Any:  # as torch's
        bound = signature.bind(*given, **named)
        (first, parameters), (_, limit) = list(bound.arguments.items())[:2]
        if not isinstance(parameters, Tensor):
            listed = list(parameters)
            if listed or not isinstance(parameters, GeneratorType):  # torch warns of empty ones
                bound.arguments[first] = parameters = listed
        if math.isfinite(limit):  # without a limit it is only asked for the norm
            _refuse_stepped([parameters] if isinstance(parameters, Tensor) else parameters)
        return clip(*bound.args, **bound.kwargs)

    return checked


def _refuse_stepped(parameters: Iterable[Tensor]) -> None:
    gone = sum(map(is_stepped_in_backward, parameters))
    if gone:
        raise OptimizerError(
            f"{gone} of these parameters are stepped in backward (mode='in_backward'), so their "
            "gradients are gone and nothing would be clipped; use mode='classic', or clip nothing: "
            "max_grad_norm=0 of a Trainer, gradient_clip_val=None of Lightning"
        )

"""Clips gradients that live in homes; refuses to clip those that were stepped in backward."""

import inspect
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce, wraps
from numbers import Real
from types import CellType, GeneratorType
from typing import Any, Final  # torch's own functions take what they take

import torch
from torch import Tensor, nn

from memtile.errors import ArgumentError, OptimizerError
from memtile.homes import fork_safe_lock, streamed_allocation
from memtile.transfer import Lease, is_stepped_in_backward, rings_of

_CLIPPING: Final = ("clip_grad_norm_", "clip_grad_value_", "_clip_grads_with_norm_")
ClipFunction = Callable[..., Any]  # one of torch's


def clip_gradients(
    parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float, error_if_nonfinite: bool
) -> Tensor:
    """Scale the gradients to a norm of at most `max_norm`; gives the norm before.

    Source: the formula, with its 1e-6, is that of `torch.nn.utils.clip_grad_norm_`.
    """
    _check_number("max_norm", max_norm, "of at least 0, such as 1.0", lambda limit: limit >= 0)
    _check_number("norm_type", norm_type, "such as 2.0 or inf", lambda kind: not math.isnan(kind))
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.tensor(0.0)
    homes = {each.home for each in map(streamed_allocation, gradients) if each is not None}
    for home in homes:
        rings_of(home).steps.clear()  # gradients may have been written since they were read
    norms = _norms(gradients, norm_type)
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    if error_if_nonfinite and not total.isfinite():
        raise OptimizerError(
            f"the norm of the gradients is {total.item()}, so they cannot be clipped; look for the "
            "layer that gives it, or pass error_if_nonfinite=False"
        )
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    if scale.item() != 1.0:  # NaN scales too, as in torch
        for number, gradient in enumerate(gradients):
            with _in_memory(gradients, number, written=True) as (values, lease):
                values.mul_(scale.to(values.device))
                if lease is not None:
                    lease.store()
            if lease is not None:
                torch.autograd.graph.increment_version(gradient)
        for home in homes:
            rings_of(home).steps.flush()
            rings_of(home).steps.clear()
    return total


def _check_number(name: str, given: object, rule: str, is_right: Callable[[float], bool]) -> None:
    value = given.item() if isinstance(given, Tensor) and given.numel() == 1 else given
    if isinstance(value, bool) or not isinstance(value, Real) or not is_right(float(value)):
        raise ArgumentError(f"{name}={given!r} must be a number {rule}")


def _norms(gradients: Sequence[Tensor], norm_type: float) -> list[Tensor]:
    dtype = reduce(torch.promote_types, {each.dtype for each in gradients}, torch.float32)
    norms = []
    for number in range(len(gradients)):
        with _in_memory(gradients, number) as (values, _):
            norm = torch.linalg.vector_norm(values, norm_type)
        norms.append(norm.to(gradients[0].device, dtype))
    return norms


@contextmanager
def _in_memory(
    gradients: Sequence[Tensor], number: int, written: bool = False
) -> Iterator[tuple[Tensor, Lease | None]]:
    """One gradient: itself, or a parked one in a slab, while the next ones are read."""
    allocation = streamed_allocation(gradients[number])
    if allocation is None:
        yield gradients[number], None
        return
    later = map(streamed_allocation, gradients[number + 1 :])
    ahead = ((each,) for each in later if each is not None)
    ring = rings_of(allocation.home).steps
    with ring.acquire((allocation,), written=written, ahead=ahead) as lease:
        yield lease.tensors[0], lease


class _ClippingCheck:
    """Has torch's clipping functions refuse parameters that are stepped in backward.

    Such a parameter has no gradient, so torch would clip nothing and say 0. Names in
    `torch.nn.utils` are not replaced: code that imported them before would keep the old ones. All
    of the functions are made by torch's `@_no_grad`, and hold what they call in a closure; that is
    replaced.
    """

    def __init__(self) -> None:
        self._lock = fork_safe_lock()  # a finalizer may run while its thread is inside
        self._owners: set[object] = set()
        self._originals: list[tuple[CellType, ClipFunction]] = []

    def add(self, owner: object) -> None:
        """Check for as long as the owner lives."""
        token = object()
        with self._lock:
            self._owners.add(token)
            if not self._originals:
                for cell in _cells():
                    self._originals.append((cell, cell.cell_contents))
                    cell.cell_contents = _checked(cell.cell_contents)
        weakref.finalize(owner, self._remove, token).atexit = False

    def _remove(self, token: object) -> None:
        with self._lock:
            self._owners.discard(token)
            while self._originals and not self._owners:
                cell, original = self._originals.pop()
                cell.cell_contents = original


torch_clipping_check = _ClippingCheck()  # of the process, as torch's functions are


def _cells() -> list[CellType]:
    """The closure cells in which torch's clipping functions hold what they call."""
    functions = [vars(torch.nn.utils.clip_grad).get(name) for name in _CLIPPING]
    held = [
        dict(zip(found.__code__.co_freevars, found.__closure__ or (), strict=True)).get("func")
        for found in functions
        if found is not None
    ]
    return [cell for cell in held if cell is not None]


def _checked(clip: ClipFunction) -> ClipFunction:
    """The function, with a check of its parameters before."""
    signature = inspect.signature(clip)

    @wraps(clip)
    def checked(*given: Any, **named: Any) -> Any:  # as torch's
        bound = signature.bind(*given, **named)
        (first, parameters), (_, limit) = list(bound.arguments.items())[:2]
        if not isinstance(parameters, Tensor):
            listed = list(parameters)
            if listed or not isinstance(parameters, GeneratorType):  # torch warns of empty ones
                bound.arguments[first] = parameters = listed
        if math.isfinite(limit):  # an infinite limit only asks for the norm
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

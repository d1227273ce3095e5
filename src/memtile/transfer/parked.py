"""A parked parameter as an operation sees it: values to bring in, a gradient to send home."""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from memtile.errors import ParkedError
from memtile.homes import (
    Berth,
    berth_of,
    renew_in_child,
    room_of,
    scratch_like,
    streamed_allocation,
    tensor_of,
)
from memtile.transfer.ferries import ferries_of
from memtile.transfer.passes import current_pass, enter_backward

Form = Callable[[Tensor], object]  # writes the gradient into a tensor


class Use:
    """One node of a graph that will bring the parameter in again."""

    def __init__(self, version: int) -> None:
        self.version, self.number = version, current_pass()


class _Trained:
    """What is known of a parked parameter while it is trained.

    Attributes:
        uses: nodes whose backward has not run.
        is_stepped_in_backward: a hook takes the gradient, so it need not go home.
        lock: held by a thread that adds to the gradient, or takes it.
    """

    def __init__(self) -> None:
        self._renew_lock()
        renew_in_child(self, _Trained._renew_lock)
        self.uses: weakref.WeakSet[Use] = weakref.WeakSet()
        self.is_stepped_in_backward = False

    def _renew_lock(self) -> None:
        self.lock = threading.RLock()


_trained = WeakIdKeyDictionary()


def _record(parameter: Tensor) -> _Trained:
    found: _Trained | None = _trained.get(parameter)
    if found is None:  # `setdefault`: another thread may have made one meanwhile
        found = _trained.setdefault(parameter, _Trained())
    return found


def gradient_of(parameter: Tensor) -> AbstractContextManager[object]:
    """Inside, no other thread adds to the parameter's gradient, or takes it."""
    return _record(parameter).lock


def is_stepped_in_backward(parameter: Tensor) -> bool:
    """Whether a hook takes its gradients."""
    found: _Trained | None = _trained.get(parameter)
    return found is not None and found.is_stepped_in_backward


def step_in_backward(parameter: Tensor, yes: bool) -> None:
    """Leave gradients in memory after the parameter's last use, for a hook that takes them."""
    _record(parameter).is_stepped_in_backward = yes


class ParkedSource:
    """The values of one parked parameter, and where its gradient goes.

    Args:
        parameter: one that has a berth.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter

    def use(self) -> Use:
        """Note that a graph will need the parameter again."""
        use = Use(self.parameter._version)
        _record(self.parameter).uses.add(use)
        return use

    def resume(self, use: Use) -> None:
        """A node that noted its use runs backward now.

        Raises:
            ParkedError: the parameter was written to since.
        """
        if self.parameter._version != use.version:
            raise ParkedError(
                f"a parked tile of shape {tuple(self.parameter.shape)} was modified between its "
                f"forward (version {use.version}) and its backward (version "
                f"{self.parameter._version}): gradients would be wrong; run backward before the "
                "optimizer steps or weights are written"
            )
        enter_backward(use.number)
        _record(self.parameter).uses.discard(use)

    @contextmanager
    def values(self, device: torch.device) -> Iterator[Tensor]:
        """The values on this device: only to be read, and not after the block."""
        berth = streamed_allocation(self.parameter)
        if berth is None:
            yield self.parameter.detach().to(device)
            return
        with ferries_of(berth.home).weights.borrow((berth,)) as loan:
            yield loan.tensors[0].to(device)

    def deliver(self, form: Form) -> None:
        """Put the gradient that `form` writes to the parameter's, or add it.

        Threads may enter at once, as in torch's own accumulation. They take turns to add to the
        gradient of one parameter; none waits for another's product to form its own.
        """
        parameter, berth = self.parameter, streamed_allocation(self.parameter)
        record = _record(parameter)
        stays = record.is_stepped_in_backward and not record.uses
        if berth is None:
            gradient = torch.empty_like(parameter)
            form(gradient)
            _accumulate(parameter, gradient)
        elif stays:
            _accumulate(parameter, _formed(parameter, form), home_sum_stays=True)
        else:
            _send_home(parameter, berth, form)
            if parameter._post_accumulate_grad_hooks:
                self.settle()  # they may read it

    def settle(self) -> None:
        """Return once gradients on their way home have arrived.

        Raises:
            HomeIOError: one could not be written.
        """
        berth = streamed_allocation(self.parameter)
        if berth is not None:
            ferries_of(berth.home).gradients.settle()


def _formed(parameter: nn.Parameter, form: Form) -> Tensor:
    """A gradient that soon goes elsewhere."""
    gradient = scratch_like(parameter)
    form(gradient)
    return gradient


def _accumulate(parameter: nn.Parameter, new: Tensor, home_sum_stays: bool = False) -> None:
    """Put or add a gradient in memory; a sum that was sent home before comes back to it."""
    with gradient_of(parameter):
        old = parameter.grad
        berth = berth_of(old) if old is not None else None
        if old is None:
            parameter.grad = new
        elif berth is None or not home_sum_stays:
            old.add_(new)
        else:
            with ferries_of(berth.home).gradients.borrow((berth,)) as loan:
                parameter.grad = new.add_(loan.tensors[0])


def _send_home(parameter: nn.Parameter, berth: Berth, form: Form) -> None:
    lock = _record(parameter).lock
    if parameter.grad is None and lock.acquire(blocking=False):
        try:
            if parameter.grad is None:  # formed where it stays; others' are added once it is whole
                parameter.grad = _formed_at_home(parameter, berth, form)
                return
        finally:
            lock.release()
    formed = _formed(parameter, form)
    with lock:
        _add_at_home(parameter, berth, formed)


def _formed_at_home(parameter: nn.Parameter, berth: Berth, form: Form) -> Tensor:
    with room_of(parameter):
        new = berth.home.berth(parameter.shape, parameter.dtype)
    with ferries_of(berth.home).gradients.borrow(made=(new,)) as loan:
        form(loan.tensors[0])
        loan.store()
    return tensor_of(new)


def _add_at_home(parameter: nn.Parameter, berth: Berth, formed: Tensor) -> None:
    old = parameter.grad
    if old is None:  # someone has taken it meanwhile
        parameter.grad = _formed_at_home(parameter, berth, lambda out: out.copy_(formed))
        return
    old_berth = berth_of(old)
    if old_berth is None:
        old.add_(formed)
        return
    with ferries_of(old_berth.home).gradients.borrow((old_berth,)) as loan:
        loan.tensors[0].add_(formed)
        loan.store()
    torch.autograd.graph.increment_version(old)

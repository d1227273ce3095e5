"""A parked parameter as an operation sees it: values to read, a place to write its gradient."""

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from memtile.errors import ParkedError
from memtile.homes import (
    Allocation,
    allocation_of,
    fork_safe_lock,
    room_of,
    scratch_like,
    streamed_allocation,
    tensor_of,
)
from memtile.transfer.iterations import enter_backward, rings_of, state


class _Trained:
    """What is known of a parameter while it is trained."""

    def __init__(self) -> None:
        self.lock = fork_safe_lock()  # held while the gradient is added to, or taken
        self.uses: weakref.WeakSet[ParkedSource] = weakref.WeakSet()  # whose backward has not run
        self.is_stepped_in_backward = False  # a hook takes the gradient: it need not go home


def _record(parameter: Tensor) -> _Trained:
    found: _Trained | None = state.trained.get(parameter)
    if found is None:  # `setdefault`: another thread may have made one meanwhile
        found = state.trained.setdefault(parameter, _Trained())
    return found


def gradient_of(parameter: Tensor) -> AbstractContextManager[object]:
    """Inside, no other thread adds to the parameter's gradient, or takes it."""
    return _record(parameter).lock


def is_stepped_in_backward(parameter: Tensor) -> bool:
    """Whether a hook takes its gradients."""
    found: _Trained | None = state.trained.get(parameter)
    return found is not None and found.is_stepped_in_backward


def step_in_backward(parameter: Tensor, yes: bool) -> None:
    """Keep its gradient in memory after its last use, for a hook that takes it."""
    _record(parameter).is_stepped_in_backward = yes


class ParkedSource:
    """The values of one parked parameter for one node of a graph, and a place for its gradient."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self._noted: tuple[int, int] | None = None  # version and iteration in forward

    def note_use(self) -> None:
        """The node will need the parameter in its backward."""
        self._noted = self.parameter._version, state.iteration
        _record(self.parameter).uses.add(self)

    def resume(self) -> None:
        """The node's backward begins; ParkedError where the parameter was written to since."""
        if self._noted is None:
            return
        (version, iteration), now = self._noted, self.parameter._version
        if version != now:
            raise ParkedError(
                f"a parked tile of shape {tuple(self.parameter.shape)} was modified between its "
                f"forward (version {version}) and its backward (version {now}): gradients would be "
                "wrong; run backward before the optimizer steps or weights are written"
            )
        enter_backward(iteration)
        _record(self.parameter).uses.discard(self)

    @contextmanager
    def values(self, device: torch.device) -> Iterator[Tensor]:
        """The values on this device: only to be read, and not after the block."""
        allocation = streamed_allocation(self.parameter)
        if allocation is None:
            yield self.parameter.detach().to(device)
            return
        with rings_of(allocation.home).weights.acquire((allocation,)) as lease:
            yield lease.tensors[0].to(device)

    @contextmanager
    def gradient(self) -> Iterator[Tensor]:
        """A tensor to write the gradient into; after the block it is in `.grad`, or added to it.

        Threads may enter at once, as in torch's own accumulation. They take turns to add to the
        gradient of one parameter; none waits for another's product.
        """
        parameter, allocation = self.parameter, streamed_allocation(self.parameter)
        record = _record(parameter)
        if allocation is None:
            out = torch.empty_like(parameter)
            yield out
            _accumulate(parameter, out)
        elif record.is_stepped_in_backward and not record.uses:
            out = scratch_like(parameter)
            yield out
            _accumulate(parameter, out, replaces_sum_at_home=True)
        else:
            with _gradient_at_home(parameter, allocation) as out:
                yield out
            if parameter._post_accumulate_grad_hooks:
                self.flush()  # they may read it

    def flush(self) -> None:
        """Return once stored gradients are at home; HomeIOError where one could not be written."""
        allocation = streamed_allocation(self.parameter)
        if allocation is not None:
            rings_of(allocation.home).gradients.flush()


def _accumulate(parameter: nn.Parameter, new: Tensor, replaces_sum_at_home: bool = False) -> None:
    """Put `new` into `.grad`, in memory, or add it to what is there.

    With `replaces_sum_at_home` a sum that was sent home before comes back into memory.
    """
    with gradient_of(parameter):
        old = parameter.grad
        allocation = allocation_of(old) if old is not None else None
        if old is None:
            parameter.grad = new
        elif allocation is None or not replaces_sum_at_home:
            old.add_(new)
        else:
            with rings_of(allocation.home).gradients.acquire((allocation,)) as lease:
                parameter.grad = new.add_(lease.tensors[0])


@contextmanager
def _gradient_at_home(parameter: nn.Parameter, allocation: Allocation) -> Iterator[Tensor]:
    """A tensor whose content is sent home after the block, to be `.grad` or added to it."""
    lock = _record(parameter).lock
    if parameter.grad is None and lock.acquire(blocking=False):
        try:
            if parameter.grad is None:  # other threads add theirs once this one is whole
                with _new_gradient(parameter, allocation) as out:
                    yield out
                return
        finally:
            lock.release()
    out = scratch_like(parameter)
    yield out
    with lock:
        _add_at_home(parameter, allocation, out)


@contextmanager
def _new_gradient(parameter: nn.Parameter, allocation: Allocation) -> Iterator[Tensor]:
    """A slab to write the first gradient into; after the block it is `.grad`, at home."""
    with room_of(parameter):
        new = allocation.home.allocate(parameter.shape, parameter.dtype)
    with rings_of(allocation.home).gradients.acquire(made=(new,)) as lease:
        yield lease.tensors[0]
        lease.store()
    parameter.grad = tensor_of(new)


def _add_at_home(parameter: nn.Parameter, allocation: Allocation, new: Tensor) -> None:
    old = parameter.grad
    if old is None:  # another thread has taken it since
        with _new_gradient(parameter, allocation) as out:
            out.copy_(new)
        return
    old_allocation = allocation_of(old)
    if old_allocation is None:
        old.add_(new)
        return
    with rings_of(old_allocation.home).gradients.acquire((old_allocation,)) as lease:
        lease.tensors[0].add_(new)
        lease.store()
    torch.autograd.graph.increment_version(old)

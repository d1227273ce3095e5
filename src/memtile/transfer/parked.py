"""`ParkedSource`: how an operation reads a parked parameter's values and writes its gradient."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Final, Protocol

import torch
from torch import Tensor, nn

from memtile.errors import ParkedError
from memtile.homes import (
    Allocation,
    Home,
    fork_safe_lock,
    reservation_of,
    scratch_like,
    streamed_allocation,
    tensor_of,
)
from memtile.transfer.iterations import (
    SlabRings,
    enter_backward,
    rings_of,
    state,
    visited_rings,
)

# Bytes from which what is freed goes back to the kernel, so that each new tensor takes page faults:
# a step with tiles of 16 MiB in host memory took 1.17 of the time, with tiles of 1 MiB the same.
_FAULTS_FROM: Final = 4 << 20


class Replayer(Protocol):
    """An optimizer's idle steps: those that it has put off, of parameters without a gradient."""

    def replay(self, parameter: Tensor) -> None:
        """Apply those of one parameter, which is then read through its home's slabs."""

    def catch_up(self, parameters: Sequence[Tensor]) -> None:
        """Apply those of these parameters; values and state are at home afterwards."""


class _TrainingState:
    """What is known of a parameter while it is trained."""

    def __init__(self) -> None:
        self.lock = fork_safe_lock()  # held while the gradient is added to, or taken
        self.uses: weakref.WeakSet[ParkedSource] = weakref.WeakSet()  # whose backward has not run
        self.is_stepped_in_backward = False  # a hook takes the gradient: it need not go home
        self.replayer: Callable[[], Replayer | None] | None = None  # of idle steps


def _record(parameter: Tensor) -> _TrainingState:
    found: _TrainingState | None = state.trained.get(parameter)
    if found is None:  # `setdefault`: another thread may have made one meanwhile
        found = state.trained.setdefault(parameter, _TrainingState())
    return found


def gradient_lock(parameter: Tensor) -> AbstractContextManager[object]:
    """Held by a thread that adds to the parameter's gradient, or takes it."""
    return _record(parameter).lock


def is_stepped_in_backward(parameter: Tensor) -> bool:
    """Whether a hook takes its gradients."""
    found: _TrainingState | None = state.trained.get(parameter)
    return found is not None and found.is_stepped_in_backward


def step_in_backward(parameter: Tensor, yes: bool) -> None:
    """Keep its gradient in memory after its last use, for a hook that takes it."""
    _record(parameter).is_stepped_in_backward = yes


def put_off_idle_steps(parameter: Tensor, replayer: Callable[[], Replayer | None] | None) -> None:
    """Have idle steps of the parameter replayed before its values are read; None: it has none.

    A weak reference, unless the replayer keeps no parameter alive.
    """
    _record(parameter).replayer = replayer


def _replayer_of(parameter: Tensor) -> Replayer | None:
    record: _TrainingState | None = state.trained.get(parameter)
    return None if record is None or record.replayer is None else record.replayer()


def catch_up(parameters: Iterable[Tensor]) -> None:
    """Have all idle steps of these replayed, before values or state are read where they lie.

    Raises:
        HomeIOError: a tile could not be read or written; what is left is replayed the next time.
    """
    found: dict[Replayer, list[Tensor]] = {}
    for parameter in parameters:
        replayer = _replayer_of(parameter)
        if replayer is not None:
            found.setdefault(replayer, []).append(parameter)
    for replayer, own in found.items():
        replayer.catch_up(own)


@contextmanager
def gradients_go_home() -> Iterator[None]:
    """Have parked parameters that are used inside get their gradients at home.

    Also where `autograd.grad` asks for them: their hooks are called later, by an outer backward.
    """
    thread = state.thread
    before, thread.goes_home = thread.goes_home, True
    try:
        yield
    finally:
        thread.goes_home = before


class ParkedSource:
    """The values of one parked parameter for one node of a graph, and a place for its gradient.

    Args:
        parameter: the tile.
        experts: of a tile of experts: all tiles of experts that its layer uses in this forward, in
            order. The next ones are read ahead, in backward those before it, and the most used
            ones are kept in memory where the home has room for that (`Home.kept_bytes`).

    Attributes:
        goes_home: whether it was made inside `gradients_go_home`.
    """

    def __init__(self, parameter: nn.Parameter, experts: Sequence[Tensor] = ()) -> None:
        self.parameter = parameter
        self._experts = experts
        self._noted: int | None = None  # the version in forward
        self._iteration: int | None = None  # of the home, in forward
        self._in_backward = False
        self.goes_home = state.thread.goes_home

    def note_use(self) -> None:
        """The node will need the parameter in its backward."""
        self._noted = self.parameter._version
        _record(self.parameter).uses.add(self)

    def resume(self) -> None:
        """The node's backward begins; ParkedError where the parameter was written to since."""
        self._in_backward = True
        if self._noted is None:
            return
        version, now = self._noted, self.parameter._version
        if version != now:
            raise ParkedError(
                f"a tile of shape {tuple(self.parameter.shape)} was modified between its "
                f"forward (version {version}) and its backward (version {now}): gradients would be "
                "wrong; run backward before the optimizer steps or weights are written"
            )
        allocation = streamed_allocation(self.parameter)
        if allocation is not None:
            enter_backward(allocation.home, self._iteration)
        _record(self.parameter).uses.discard(self)

    def visit(self) -> tuple[Allocation, SlabRings] | None:
        """Its allocation, and the rings of its home, in this iteration; None: it needs no slab."""
        allocation = streamed_allocation(self.parameter)
        if allocation is None:
            return None
        rings = visited_rings(allocation.home)
        if not self._in_backward:
            self._iteration = rings.iteration
        return allocation, rings

    def values(self, device: torch.device) -> AbstractContextManager[Tensor]:
        """The values on this device: only to be read, and not after the block."""
        parameter, visited = self.parameter, self.visit()
        replayer = _replayer_of(parameter)
        if replayer is not None:
            replayer.replay(parameter)  # after the visit: it leaves the tile in a slab
        if visited is None:
            return nullcontext(parameter.detach().to(device))
        if self._experts:
            return _expert(*visited, self._following(), device)
        return _weights(*visited, device)

    def _following(self) -> Sequence[Tensor]:
        """The experts that are needed after this one."""
        order = self._experts[::-1] if self._in_backward else self._experts
        places = (n for n, each in enumerate(order) if each is self.parameter)
        return order[1 + next(places, len(order)) :]

    def gradient(self) -> AbstractContextManager[Tensor]:
        """A tensor to write the gradient into; after the block it is in `.grad`, or added to it.

        Threads may enter at once, as in torch's own accumulation. They take turns to add to the
        gradient of one parameter; none waits for another's product.
        """
        parameter, allocation = self.parameter, streamed_allocation(self.parameter)
        if allocation is None and parameter.nbytes < _FAULTS_FROM:
            return _GradientInMemory(parameter, torch.empty_like(parameter))
        record = _record(parameter)
        if record.is_stepped_in_backward and (allocation is None or not record.uses):
            return _GradientInMemory(parameter, scratch_like(parameter))
        if allocation is None:
            return _GradientInMemory(parameter, torch.empty_like(parameter))
        return self._stored_gradient(allocation.home)

    @contextmanager
    def _stored_gradient(self, home: Home) -> Iterator[Tensor]:
        with _gradient_at_home(self.parameter, home) as out:
            yield out
        if self.parameter._post_accumulate_grad_hooks:
            self.flush()  # they may read it

    def may_be_storing(self) -> bool:
        """Whether a gradient may be on its way home."""
        return streamed_allocation(self.parameter) is not None

    def flush(self) -> None:
        """Return once stored gradients are at home; HomeIOError where one could not be written."""
        allocation = streamed_allocation(self.parameter)
        if allocation is not None:
            rings_of(allocation.home).gradients.flush()


@contextmanager
def values_together(
    sources: Sequence[ParkedSource], device: torch.device
) -> Iterator[list[Tensor]]:
    """The values of several parameters, parked or not, those of one home in one slab.

    As from `ParkedSource.values`. One lease for all of them: a ring has fewer slabs than two
    threads would hold, and wait for, if each took a slab for each parameter.
    """
    catch_up([source.parameter for source in sources])
    groups: dict[SlabRings, list[int]] = {}
    visited = [source.visit() for source in sources]
    found = [source.parameter.detach() for source in sources]
    for number, visit in enumerate(visited):
        if visit is not None:
            groups.setdefault(visit[1], []).append(number)
    with ExitStack() as stack:
        for rings, numbers in groups.items():
            group = tuple(visit[0] for visit in (visited[n] for n in numbers) if visit is not None)
            lease = stack.enter_context(rings.weights.acquire(group))
            for number, values in zip(numbers, lease.tensors, strict=True):
                found[number] = values
        yield [values.to(device) for values in found]


class _GradientInMemory:
    """A tensor to write a gradient into, which is kept in memory, or added to what is there."""

    def __init__(self, parameter: nn.Parameter, out: Tensor) -> None:
        self._parameter, self._out = parameter, out

    def __enter__(self) -> Tensor:
        return self._out

    def __exit__(self, raised: object, *where: object) -> None:
        if raised is None:
            _add(self._parameter, self._out, home=None)


@contextmanager
def _weights(allocation: Allocation, rings: SlabRings, device: torch.device) -> Iterator[Tensor]:
    """The values of a tile, read, while what follows is being read."""
    with rings.weights.acquire((allocation,)) as lease:
        yield lease.tensors[0].to(device)


@contextmanager
def _expert(
    allocation: Allocation, rings: SlabRings, following: Sequence[Tensor], device: torch.device
) -> Iterator[Tensor]:
    """The values of a tile of experts, kept or read, while those that follow are being read."""
    kept, epoch = rings.kept, rings.kept.epoch
    found = kept.find(allocation)
    ahead = [(each,) for each in _to_read(following, allocation.home) if each not in kept]
    with rings.weights.acquire(() if found is not None else (allocation,), experts=ahead) as lease:
        if found is None and not allocation.home.is_mapped:
            kept.offer(allocation, lease.tensors[0], epoch)
        yield (lease.tensors[0] if found is None else found).to(device)


def _to_read(parameters: Sequence[Tensor], home: Home) -> Iterator[Allocation]:
    for parameter in parameters:
        allocation = streamed_allocation(parameter)
        if allocation is not None and allocation.home is home:
            yield allocation


@contextmanager
def _gradient_at_home(parameter: nn.Parameter, home: Home) -> Iterator[Tensor]:
    """A tensor whose content is sent home after the block, to be `.grad` or added to it."""
    lock = _record(parameter).lock
    if parameter.grad is None and lock.acquire(blocking=False):
        try:
            if parameter.grad is None:  # other threads add theirs once this one is whole
                with _new_gradient(parameter, home) as out:
                    yield out
                return
        finally:
            lock.release()
    out = scratch_like(parameter)
    yield out
    _add(parameter, out, home)


@contextmanager
def _new_gradient(parameter: nn.Parameter, home: Home) -> Iterator[Tensor]:
    """A slab to write the first gradient into; after the block it is `.grad`, at home."""
    with reservation_of(parameter):
        new = home.allocate(parameter.shape, parameter.dtype)
    with rings_of(home).gradients.acquire(made=(new,)) as lease:
        yield lease.tensors[0]
        lease.store()
    parameter.grad = tensor_of(new)


def _add(parameter: nn.Parameter, new: Tensor, home: Home | None) -> None:
    """Put `new` into `.grad`, or add it to what is there, and keep the sum in the home.

    Without a home it is kept in memory, where a sum that was sent home before comes back to.
    """
    with gradient_lock(parameter):
        old = parameter.grad
        allocation = None if old is None else streamed_allocation(old)
        if old is None and home is not None:
            with _new_gradient(parameter, home) as out:
                out.copy_(new)
        elif old is None:
            parameter.grad = new
        elif allocation is None:
            old.add_(new)
        else:
            with rings_of(allocation.home).gradients.acquire((allocation,), written=True) as lease:
                if home is None:
                    parameter.grad = new.add_(lease.tensors[0])
                else:
                    lease.tensors[0].add_(new)
                    lease.store()
                    torch.autograd.graph.increment_version(old)

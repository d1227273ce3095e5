"""One step of one parameter: its values, gradient and state are read, stepped and written.

A parked parameter's tensors come into slabs, and are written home while the next ones are read.
Tensors in memory are stepped in place, also those that replaced parked ones.

A parameter is stepped a few rows at a time. An optimizer makes temporary tensors of the size of
what it steps: of a whole tile they would cost memory, leave holes in the heap that grow it
(1.3 GiB for 80 tiles of 16 MiB, measured), and not stay in the cache.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any  # a state holds whatever the optimizer's class wants

import torch
from torch import Tensor, nn

from memtile.homes import (
    Allocation,
    allocate_copy,
    allocation_of,
    reservation_of,
    streamed_allocation,
    tensor_of,
    trim_heap,
)
from memtile.observing import recording
from memtile.observing.recording import STEP, clock
from memtile.optim.checks import check_finite
from memtile.optim.slice_optimizer import ParameterSlice
from memtile.optim.state_layout import (
    MASTER,
    SIXTEEN_BITS,
    Options,
    ParameterState,
    StateLayout,
    copy_of,
    is_shaped,
    put_in_place,
)
from memtile.transfer import Lease, rings_of

VALUE, GRADIENT = "<value>", "<gradient>"  # no key of a state: those are identifiers
CHUNK_ELEMENTS = 1 << 18  # four float32 tensors of these are 4 MiB
_TRIMMED_AFTER = 16 << 20  # bytes of parameters: to trim takes a fraction of a millisecond

Runs = Sequence[tuple[Options, int]]  # idle steps, in order: with which options how many


@dataclass
class StepTensors:
    """What one step of a parameter works on."""

    tensors: dict[str, Tensor]  # by key: value, gradient, and the state's tensors
    new: ParameterState  # state tensors without values yet, which this step makes
    leases: list[tuple[Lease, Sequence[str]]] = field(default_factory=list)  # slabs, their keys

    def add(self, lease: Lease, keys: Sequence[str]) -> None:
        """Work on the tensors of these keys in slabs."""
        self.tensors.update(zip(keys, lease.tensors, strict=True))
        self.leases.append((lease, keys))

    def store(self) -> None:
        """Start writing home what was stepped."""
        for lease, keys in self.leases:
            lease.store(*(number for number, key in enumerate(keys) if key != GRADIENT))


@dataclass(eq=False)
class Stepper:
    """Steps parameters one at a time."""

    layout: StateLayout  # the optimizer, and what it keeps
    model: nn.Module  # has the parameters' names, for errors
    _since_trim: int = 0  # bytes of parameters

    def allocations(self, parameter: Tensor, *, idle: bool = False) -> tuple[Allocation, ...]:
        """All allocations that a step of a parked parameter works on; of others none."""
        gradient = None if idle else parameter.grad
        return tuple(self.allocations_by_key(parameter, gradient).values())

    def allocations_by_key(
        self, parameter: Tensor, gradient: Tensor | None = None
    ) -> dict[str, Allocation]:
        """Those of a parked parameter's value, gradient if given, and state in its own home."""
        own = streamed_allocation(parameter)
        return {} if own is None else self._allocations_by_key(parameter, own, gradient)

    def step(
        self,
        parameter: nn.Parameter,
        group: Options,
        ahead: Iterable[Sequence[Allocation]] | None = None,
        in_backward: bool = False,
        idle: Runs = (),
    ) -> None:
        """Step one parameter, of this parameter group, with its gradient; zeros where it has none.

        `ahead` gives the allocations of later steps, to be read meanwhile. With `in_backward` the
        value is taken from the slabs of forward and backward, where it is likely to be. An error
        leaves a parked parameter and its state as they were; a parameter in memory may be stepped
        in part. Steps with a gradient of zeros come before, as `idle` says.
        """
        begun = clock() if recording.active else 0
        gradient, parked = parameter.grad, streamed_allocation(parameter)
        if gradient is not None and in_backward and parked is None:  # others: see check_in_memory
            check_finite(self.model, parameter, gradient)
        if idle or gradient is None or not self._step_in_place(parameter, parked, group, gradient):
            self._step_brought_in(parameter, [*idle, (group, 1)], ahead, in_backward)
        torch.autograd.graph.increment_version(parameter)
        if begun:
            recording.add(STEP, begun, allocation_of(parameter) or parameter)

    def _step_brought_in(
        self,
        parameter: nn.Parameter,
        runs: Runs,
        ahead: Iterable[Sequence[Allocation]] | None,
        in_backward: bool,
    ) -> None:
        gradient = parameter.grad
        with torch.no_grad(), self._brought_in(parameter, runs, gradient, ahead, in_backward) as w:
            if gradient is not None and w.leases:  # in memory it was checked before
                check_finite(self.model, parameter, w.tensors[GRADIENT])
            self._apply(parameter, w, runs)

    def replay(
        self,
        parameter: Tensor,
        idle: Runs,
        ahead: Iterable[Sequence[Allocation]],
        in_forward: bool = False,
    ) -> None:
        """Apply steps with a gradient of zeros that were put off; errors and `ahead` as of `step`.

        Autograd is not told: for it the parameter was written to when the step was put off.
        """
        # torch's grad modes are of the caller, and what is made here outlives them
        brought_in = self._brought_in(parameter, idle, None, ahead, in_forward)
        with torch.inference_mode(False), torch.no_grad(), brought_in as work:
            self._apply(parameter, work, idle)

    def _step_in_place(
        self, parameter: nn.Parameter, parked: Allocation | None, group: Options, gradient: Tensor
    ) -> bool:
        """Step what lies in memory, or in mapped pages of a home, as `_step_directly` does."""
        if parked is None:
            return self._step_directly(parameter, group, parameter.data, gradient)
        if not parked.home.is_mapped:
            return False
        mapped = tuple(self._allocations_by_key(parameter, parked, gradient).values())
        with rings_of(parked.home).steps.acquire(mapped, written=True):
            check_finite(self.model, parameter, gradient)
            return self._step_directly(parameter, group, parameter.data, gradient)

    def _step_directly(
        self,
        parameter: Tensor,
        group: Options,
        value: Tensor,
        gradient: Tensor,
        work: StepTensors | None = None,
    ) -> bool:
        """Step with torch's own function what lies in memory or was brought in, where that can be.

        An error leaves the number of the step as it was.
        """
        if value.dtype in SIXTEEN_BITS and self.layout.keeps_masters:
            return False
        function, state = self.layout.inner.step_function(group), self.layout.state[parameter]
        if function is None or (not state if work is None else work.new):
            return False
        shaped = state if work is None else {**state, **work.tensors}
        tensors = function.tensors(value, gradient, shaped)
        if tensors is None:
            return False
        number: Tensor | None = state["step"].add_(1) if function.counts else None
        try:
            if function.is_fused:
                function.step(tensors, number)
            else:
                for rows in _chunks(value):
                    part = tensors if rows is ... else [each[rows] for each in tensors]
                    function.step(part, number)
            if work is not None:
                work.store()
        except BaseException:
            if number is not None:
                number.sub_(1)
            raise
        return True

    def _apply(self, parameter: Tensor, work: StepTensors, runs: Runs) -> None:
        """Step what was brought in, a few rows at a time, and start writing it home."""
        tensors, ((group, times), *more) = work.tensors, runs
        if GRADIENT in tensors and times == 1 and not more:
            value, gradient = tensors[VALUE], tensors[GRADIENT]
            if self._step_directly(parameter, group, value, gradient, work):
                return
        state, allocation = self.layout.state[parameter], streamed_allocation(parameter)
        numbers = {key: entry for key, entry in state.items() if key not in work.tensors}
        kept: ParameterState = {}
        late: ParameterState = {}
        for rows in _chunks(work.tensors[VALUE]):
            views = {key: tensor[rows] for key, tensor in work.tensors.items()}
            kept = self._step_rows(views, work.new, numbers, runs)
            _move_late(kept, late, work.tensors[VALUE], rows)
        if allocation is not None:
            late = {key: allocate_copy(allocation.home, entry) for key, entry in late.items()}
        work.store()
        state.update({**work.new, **late})
        state.update({key: put_in_place(state.get(key), entry) for key, entry in kept.items()})
        if work.new:
            self._trim_now_and_then(parameter.nbytes)

    def _trim_now_and_then(self, nbytes: int) -> None:
        """Give free heap back to the system: a first step's new state leaves holes in it.

        Without it the heap grew by half of what was stepped: 158 MiB for 134 MiB of weights.
        """
        self._since_trim += nbytes
        if self._since_trim >= _TRIMMED_AFTER:
            self._since_trim = 0
            trim_heap()

    def _step_rows(
        self,
        views: dict[str, Tensor],
        new: Mapping[str, Tensor],
        numbers: ParameterState,
        runs: Runs,
    ) -> ParameterState:
        """Step some rows; gives the state entries that are not tensors of `views`.

        The gradient is for the last step; those before it are idle.
        """
        value, gradient = views.pop(VALUE), views.pop(GRADIENT, None)
        is_wide = self.layout.stepped_dtype(value) != value.dtype
        master = views.pop(MASTER, None) if is_wide else None
        if master is not None:
            _refresh(master, value, MASTER in new)
        target = value if master is None else master
        moments = {key: view for key, view in views.items() if key not in new}
        copies = {key: copy_of(entry) for key, entry in numbers.items()}
        piece = ParameterSlice(target, target, {**copies, **moments})
        for options, piece.gradient in _gradients(runs, gradient, target):
            self.layout.inner.step([piece], options)
        for key, view in views.items():
            if piece.state[key] is not view:
                view.copy_(piece.state[key])
        if master is not None:
            value.copy_(master)
        return {key: entry for key, entry in piece.state.items() if key not in views}

    @contextmanager
    def _brought_in(
        self,
        parameter: Tensor,
        runs: Runs,
        gradient: Tensor | None,
        ahead: Iterable[Sequence[Allocation]] | None,
        in_iteration: bool,
    ) -> Iterator[StepTensors]:
        """The tensors of one step, or of several, in slabs where the parameter is parked."""
        missing = self.layout.missing(parameter, runs[0][0])
        allocation, tensors = streamed_allocation(parameter), self._tensors(parameter, gradient)
        if allocation is None:
            made = {key: torch.empty_like(parameter, dtype=missing[key]) for key in missing}
            yield StepTensors({**tensors, **made}, made)
            return
        with reservation_of(parameter):
            rooms = {
                key: allocation.home.allocate(allocation.shape, missing[key]) for key in missing
            }
        made = {key: tensor_of(room) for key, room in rooms.items()}
        old, new = self._allocations_by_key(parameter, allocation, gradient), rooms
        work, rings = StepTensors(tensors, made), rings_of(allocation.home)
        with ExitStack() as stack:
            # Every thread acquires the rings in this order, or two could wait for each other.
            if in_iteration:
                values = rings.weights.acquire((old.pop(VALUE),), written=True, ahead=ahead)
                work.add(stack.enter_context(values), [VALUE])
            if old or new:
                lease = rings.steps.acquire(
                    tuple(old.values()), made=tuple(new.values()), written=True, ahead=ahead
                )
                work.add(stack.enter_context(lease), [*old, *new])
            yield work

    def _tensors(self, parameter: Tensor, gradient: Tensor | None) -> dict[str, Tensor]:
        """Value, gradient if any, and parameter-shaped state."""
        entries = self.layout.state[parameter].items()
        shaped = {key: entry for key, entry in entries if is_shaped(entry, parameter)}
        given = {} if gradient is None else {GRADIENT: gradient}
        return {VALUE: parameter.data, **given, **shaped}  # a step tells autograd itself

    def _allocations_by_key(
        self, parameter: Tensor, own: Allocation, gradient: Tensor | None
    ) -> dict[str, Allocation]:
        """Allocations of value, gradient and state that are in the parameter's own home."""
        found = {VALUE: own}
        for key, entry in [(GRADIENT, gradient), *self.layout.state[parameter].items()]:
            allocation = allocation_of(entry) if isinstance(entry, Tensor) else None
            if allocation is not None and allocation.home is own.home:
                found[key] = allocation
        return found


def _chunks(value: Tensor) -> Iterator[Any]:  # what a tensor is indexed with
    """Rows of a parameter that are stepped together."""
    if not value.dim() or value.numel() <= CHUNK_ELEMENTS:
        yield ...
        return
    rows = max(1, CHUNK_ELEMENTS * value.shape[0] // value.numel())
    for start in range(0, value.shape[0], rows):
        yield slice(start, start + rows)


def _gradients(
    runs: Runs, gradient: Tensor | None, target: Tensor
) -> Iterator[tuple[Options, Tensor]]:
    """Options and gradient of each step: zeros, but for the last one where that has a gradient."""
    idle, zeros = sum(times for _, times in runs) - (gradient is not None), None
    for options, times in runs:
        for _ in range(min(times, idle)):
            zeros = torch.zeros_like(target) if zeros is None else zeros.zero_()
            yield options, zeros
        idle -= times
    if gradient is not None:
        yield runs[-1][0], gradient.to(target.dtype)


def _move_late(kept: ParameterState, late: ParameterState, value: Tensor, rows: Any) -> None:
    """Copy tensors that the optimizer makes after its first step into tensors of all rows."""
    shape = value[rows].shape
    for key, entry in list(kept.items()):
        if isinstance(entry, Tensor) and entry.dim() and entry.shape == shape:
            whole = late.setdefault(key, torch.empty_like(value, dtype=entry.dtype))
            whole[rows] = kept.pop(key)


def _refresh(master: Tensor, value: Tensor, is_new: bool) -> None:
    """Take over into the float32 master those 16-bit values that were written to since."""
    if is_new:
        master.copy_(value)
        return
    written = master.to(value.dtype) != value
    if written.any():
        master[written] = value[written].float()

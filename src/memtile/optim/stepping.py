"""One step of one parameter, wherever it lives: bring in, step, send home.

A parked parameter's values, gradient, moments and master come into slabs, are stepped there, and
are written home while the next ones are read. What lies in memory is stepped where it lies. A
tensor that is found in place of a parked one is used as it is.

A parameter is stepped a few rows at a time. An optimizer makes temporary tensors of the size of
what it steps: of a whole tile they would cost memory, and leave holes in the heap that grow it
(1.3 GiB for 80 tiles of 16 MiB, measured), and they would not stay in the cache.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any  # a state holds whatever the optimizer's class wants

import torch
from torch import Tensor, nn

from memtile.errors import NotFiniteError, OptimizerError
from memtile.homes import PAGE, Berth, berth_of, register, room_of, settle_in, trim_heap
from memtile.optim.inner import Inner, ParameterSlice
from memtile.transfer import Ferry, Loan, ferries_of

MASTER = "master"
VALUE, GRADIENT = "<value>", "<gradient>"  # beside the keys of a state, which are identifiers
SIXTEEN_BITS = frozenset({torch.float16, torch.bfloat16})
CHUNK_ELEMENTS = 1 << 18  # four float32 tensors of these are 4 MiB
_TRIMMED_AFTER = 16 << 20  # bytes of parameters: to trim takes a fraction of a millisecond

ParameterState = dict[str, Any]
StateDtypes = dict[str, torch.dtype]


@dataclass
class StepTensors:
    """What one step of a parameter works on.

    Args:
        tensors: value, gradient, and the state's tensors by their keys.
        new: keys of tensors that have no values yet.
        made: the tensors to keep in the state for them.
        loans: which of the tensors are in which slab, by number.
    """

    tensors: dict[str, Tensor]
    new: frozenset[str] = frozenset()
    made: ParameterState = field(default_factory=dict)
    loans: list[tuple[Loan, Sequence[str]]] = field(default_factory=list)

    def store(self) -> None:
        """Start writing home what was stepped."""
        for loan, names in self.loans:
            loan.store(*(number for number, name in enumerate(names) if name != GRADIENT))


class Stepper:
    """Steps parameters one at a time.

    Args:
        inner: the optimizer, applied to pieces.
        state: of every parameter, as `torch.optim.Optimizer.state`.
        keeps_masters: whether 16-bit parameters are stepped in float32.
        model: that names the parameters in errors.
    """

    def __init__(
        self,
        inner: Inner,
        state: MutableMapping[Tensor, ParameterState],
        keeps_masters: bool,
        model: nn.Module,
    ) -> None:
        self._inner, self._state, self._keeps_masters = inner, state, keeps_masters
        self._model, self._since_trim = model, 0

    def stepped_dtype(self, parameter: Tensor) -> torch.dtype:
        """The dtype that the parameter is stepped in."""
        wide = self._keeps_masters and parameter.dtype in SIXTEEN_BITS
        return torch.float32 if wide else parameter.dtype

    def drop_idle_master(self, parameter: Tensor, group: Mapping[str, Any]) -> None:
        """Keep no master that was loaded for a parameter that is stepped as it is."""
        if MASTER in self._state[parameter] and MASTER not in self._layout(parameter, group):
            del self._state[parameter][MASTER]

    def state_rooms(self, parameter: Tensor, group: Mapping[str, Any]) -> list[int]:
        """Whole pages of each tensor that will be kept for the parameter, its master included."""
        dtypes = self._layout(parameter, group).values()
        return [-(-parameter.numel() * each.itemsize // PAGE) * PAGE for each in dtypes]

    def cargo(self, parameter: Tensor) -> tuple[Berth, ...]:
        """Everything of a parked parameter that a step works on, empty where it is in memory."""
        berth = _parked(parameter)
        return () if berth is None else tuple(self._berths(parameter, berth).values())

    def check_in_memory(self, parameters: Iterable[nn.Parameter]) -> None:
        """Look at those gradients that no slab is needed for, before any parameter is stepped.

        Raises:
            NotFiniteError: one is not finite.
        """
        check_gradients(self._model, [each for each in parameters if _parked(each) is None])

    def step(
        self,
        parameter: nn.Parameter,
        group: Mapping[str, Any],
        ahead: Iterable[Sequence[Berth]] | None = None,
        in_backward: bool = False,
    ) -> None:
        """Step one parameter with its gradient.

        Either all of it is stepped, state included, or nothing: slabs that were not stored are
        dropped, where memory is not stepped in place.

        Args:
            parameter: has a gradient, which `check_in_memory` has seen, or is looked at here.
            group: the options of its group.
            ahead: the cargoes that come next.
            in_backward: its values are likely to be in the slabs of forward and backward.

        Raises:
            NotFiniteError: the gradient is not finite.
            HomeFullError: there is no room for the state that its first step makes.
            HomeIOError: something could not be read.
        """
        state, berth = self._state[parameter], _parked(parameter)
        with (
            torch.no_grad(),
            self._brought_in(
                parameter, self._missing(parameter, group), ahead, in_backward
            ) as work,
        ):
            if in_backward or berth is not None:
                check_gradient(self._model, parameter, work.tensors[GRADIENT])
            numbers = {key: entry for key, entry in state.items() if key not in work.tensors}
            kept: ParameterState = {}
            late: ParameterState = {}
            for rows in _chunks(work.tensors[VALUE]):
                views = {key: tensor[rows] for key, tensor in work.tensors.items()}
                kept = self._step_rows(views, work.new, numbers, group)
                _move_late(kept, late, work.tensors[VALUE], rows)
            if berth is not None:
                late = {key: settle_in(berth.home, entry) for key, entry in late.items()}
            work.store()
            state.update({**work.made, **late})
            state.update({key: _in_place(state.get(key), entry) for key, entry in kept.items()})
            if work.new:
                self._give_back(parameter.nbytes)
        torch.autograd.graph.increment_version(parameter)

    def _give_back(self, nbytes: int) -> None:
        """Free the heap now and then: what first steps make to be kept lies between its holes.

        Without it the heap grew by half of what was stepped: 158 MiB for 134 MiB of weights.
        """
        self._since_trim += nbytes
        if self._since_trim >= _TRIMMED_AFTER:
            self._since_trim = 0
            trim_heap()

    def _step_rows(
        self,
        views: dict[str, Tensor],
        new: frozenset[str],
        numbers: ParameterState,
        group: Mapping[str, Any],
    ) -> ParameterState:
        """Step some rows; gives what the optimizer keeps besides tensors of the rows' shape."""
        value, gradient = views.pop(VALUE), views.pop(GRADIENT)
        is_wide = self.stepped_dtype(value) != value.dtype
        master = views.pop(MASTER, None) if is_wide else None
        if master is not None:
            _refresh(master, value, MASTER in new)
        target = value if master is None else master
        moments = {key: view for key, view in views.items() if key not in new}
        piece = ParameterSlice(
            target, gradient.to(target.dtype), {**copy.deepcopy(numbers), **moments}
        )
        self._inner.step([piece], group)
        for key, view in views.items():
            if piece.state[key] is not view:
                view.copy_(piece.state[key])
        if master is not None:
            value.copy_(master)
        return {key: entry for key, entry in piece.state.items() if key not in views}

    def _layout(self, parameter: Tensor, group: Mapping[str, Any]) -> StateDtypes:
        """The dtypes of the tensors that are kept for a parameter."""
        dtype = self.stepped_dtype(parameter)
        layout = self._inner.fields(group, dtype) if parameter.dim() else {}
        if dtype == parameter.dtype:
            return layout
        if MASTER in layout:
            raise OptimizerError(
                f"{self._inner.name} keeps {MASTER!r} itself, the name of the float32 values that "
                "16-bit parameters are stepped in: pass masters=False"
            )
        return {**layout, MASTER: dtype}

    def _missing(self, parameter: Tensor, group: Mapping[str, Any]) -> StateDtypes:
        """Those of them that are still to be made: all before the first step."""
        state = self._state[parameter]
        if set(state) - {MASTER}:  # only a master can be wanting: a plain optimizer kept none
            is_wanting = self.stepped_dtype(parameter) != parameter.dtype and MASTER not in state
            return {MASTER: self.stepped_dtype(parameter)} if is_wanting else {}
        layout = self._layout(parameter, group)
        return {key: dtype for key, dtype in layout.items() if key not in state}

    @contextmanager
    def _brought_in(
        self,
        parameter: nn.Parameter,
        missing: StateDtypes,
        ahead: Iterable[Sequence[Berth]] | None,
        in_backward: bool,
    ) -> Iterator[StepTensors]:
        berth, tensors = _parked(parameter), self._tensors(parameter)
        if berth is None:
            made = {key: torch.empty_like(parameter, dtype=missing[key]) for key in missing}
            yield StepTensors({**tensors, **made}, frozenset(made), dict(made))
            return
        with room_of(parameter):
            rooms = {key: berth.home.berth(berth.shape, dtype) for key, dtype in missing.items()}
        berths = self._berths(parameter, berth)
        ferries = ferries_of(berth.home)
        work = StepTensors(
            tensors, frozenset(rooms), {key: _at(room) for key, room in rooms.items()}
        )
        with ExitStack() as stack:

            def borrow(ring: Ferry, cargo: dict[str, Berth], made: dict[str, Berth]) -> None:
                old, new = tuple(cargo.values()), tuple(made.values())
                loan = stack.enter_context(ring.borrow(old, made=new, ahead=ahead))
                tensors.update(zip((*cargo, *made), loan.tensors, strict=True))
                work.loans.append((loan, (*cargo, *made)))

            # Threads that hold a slab of one ring and wait for the other do it in this order only.
            if in_backward:
                borrow(ferries.weights, {VALUE: berths.pop(VALUE)}, {})
            if berths or rooms:
                borrow(ferries.steps, berths, rooms)
            yield work

    def _tensors(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Value, gradient and state as they are found."""
        assert parameter.grad is not None
        shaped = {
            key: entry
            for key, entry in self._state[parameter].items()
            if isinstance(entry, Tensor) and entry.shape == parameter.shape and entry.dim()
        }
        return {VALUE: parameter.detach(), GRADIENT: parameter.grad, **shaped}

    def _berths(self, parameter: Tensor, own: Berth) -> dict[str, Berth]:
        """Those of them that live where the parameter lives."""
        found = {VALUE: own}
        for key, entry in [(GRADIENT, parameter.grad), *self._state[parameter].items()]:
            berth = berth_of(entry) if isinstance(entry, Tensor) else None
            if berth is not None and berth.home is own.home:
                found[key] = berth
        return found


def _chunks(value: Tensor) -> Iterator[Any]:  # what a tensor is indexed with
    """Rows of a parameter that are stepped together."""
    if not value.dim() or not value.numel():
        yield ...
        return
    rows = max(1, CHUNK_ELEMENTS * value.shape[0] // value.numel())
    for start in range(0, value.shape[0], rows):
        yield slice(start, start + rows)


def _move_late(kept: ParameterState, late: ParameterState, value: Tensor, rows: Any) -> None:
    """Move what the optimizer made in a later step than its first into a tensor of all rows."""
    shape = value[rows].shape
    for key, entry in list(kept.items()):
        if isinstance(entry, Tensor) and entry.dim() and entry.shape == shape:
            whole = late.setdefault(key, torch.empty_like(value, dtype=entry.dtype))
            whole[rows] = kept.pop(key)


def _in_place(old: Any, new: Any) -> Any:
    """A new number, kept where the old one was.

    A small tensor made anew in each step would lie where a large one lay before, and grow the heap.
    """
    if not (isinstance(old, Tensor) and isinstance(new, Tensor) and old.shape == new.shape):
        return new
    return old.copy_(new) if old.dtype == new.dtype and old.device == new.device else new


def _at(berth: Berth) -> Tensor:
    tensor = berth.tensor()
    register(tensor, berth)
    return tensor


def _parked(parameter: Tensor) -> Berth | None:
    """The berth of a parameter that is not worked on where it lies."""
    berth = berth_of(parameter)
    return None if berth is None or berth.home.works_in_place else berth


def _refresh(master: Tensor, value: Tensor, is_new: bool) -> None:
    """Take the float32 values anew wherever someone wrote to the 16-bit ones since."""
    if is_new:
        master.copy_(value)
        return
    written = master.to(value.dtype) != value
    if written.any():
        master[written] = value[written].float()


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity.

    A sum with one of those is none of the finite numbers; only where finite numbers have a sum that
    is too large are they looked at one by one. It takes 4% of AdamW's time for the same values
    (measured, one thread).
    """
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def check_gradients(model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Look at gradients that lie in memory; where all are finite, with one wait for a device.

    Raises:
        NotFiniteError: one is not.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    sums = [gradient.detach().sum().isfinite() for gradient in gradients]
    if not sums or bool(torch.stack([each.to(sums[0].device) for each in sums]).all()):
        return
    for parameter in parameters:
        check_gradient(model, parameter, parameter.grad)


def check_gradient(model: nn.Module, parameter: nn.Parameter, gradient: Tensor | None) -> None:
    """Refuse a gradient that no step can be taken with.

    Raises:
        NotFiniteError: it is not finite.
    """
    if gradient is None or is_finite(gradient):
        return
    names = (name for name, each in model.named_parameters() if each is parameter)
    raise NotFiniteError(
        f"the gradient of {next(names, 'a parameter')} is not finite; it was not applied, nor "
        "those after it: leave this batch out with zero_grad(), or go back to the last checkpoint "
        "and lower lr; in float16 use a torch.amp.GradScaler, or train in bfloat16"
    )

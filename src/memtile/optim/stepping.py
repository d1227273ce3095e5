"""One step of one parameter, wherever it lives: bring in, step, send home.

A parked parameter's values, gradient, moments and master come into slabs, are stepped there, and
are written home while the next ones are read. What lies in memory is stepped where it lies. A
tensor that is found in place of a parked one is used as it is.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any  # a state holds whatever the optimizer's class wants

import torch
from torch import Tensor, nn

from memtile.homes import Berth, berth_of, settle_in
from memtile.optim.inner import Inner, Piece
from memtile.transfer import Loan, ferries_of

MASTER = "master"
VALUE, GRADIENT = "value", "gradient"
SIXTEEN_BITS = frozenset({torch.float16, torch.bfloat16})

State = dict[str, Any]


@dataclass
class Work:
    """What one step of a parameter works on.

    Args:
        tensors: value, gradient, and the state's tensors by their keys.
        loans: which of them are in which slab, by number.
    """

    tensors: dict[str, Tensor]
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
    """

    def __init__(
        self, inner: Inner, state: MutableMapping[Tensor, State], keeps_masters: bool
    ) -> None:
        self._inner, self._state, self._keeps_masters = inner, state, keeps_masters

    def stepped_dtype(self, parameter: Tensor) -> torch.dtype:
        """The dtype that the parameter is stepped in."""
        wide = self._keeps_masters and parameter.dtype in SIXTEEN_BITS
        return torch.float32 if wide else parameter.dtype

    def state_bytes(self, parameter: Tensor, group: Mapping[str, Any]) -> int:
        """Bytes of the tensors that will be kept for the parameter, its master included."""
        dtype = self.stepped_dtype(parameter)
        dtypes = list(self._inner.fields(group, dtype).values())
        dtypes += [dtype] if dtype != parameter.dtype else []
        return parameter.numel() * sum(each.itemsize for each in dtypes)

    def cargo(self, parameter: Tensor) -> tuple[Berth, ...]:
        """Everything of a parked parameter that a step works on, empty where it is in memory."""
        berth = _parked(parameter)
        return () if berth is None else tuple(self._berths(parameter, berth).values())

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
            parameter: has a gradient.
            group: the options of its group.
            ahead: the cargoes that come next.
            in_backward: its values are likely to be in the slabs of forward and backward.
        """
        state = self._state[parameter]
        with torch.no_grad(), self._brought_in(parameter, ahead, in_backward) as work:
            numbers = copy.deepcopy({k: v for k, v in state.items() if k not in work.tensors})
            made = self._step(parameter, work, numbers, group)
            self._settle(parameter, state, work, made)
        torch.autograd.graph.increment_version(parameter)

    def _step(
        self, parameter: nn.Parameter, work: Work, numbers: State, group: Mapping[str, Any]
    ) -> State:
        """Step what was brought in; gives the state with what the optimizer made anew."""
        value, gradient = work.tensors[VALUE], work.tensors[GRADIENT]
        moments = {k: v for k, v in work.tensors.items() if k not in (VALUE, GRADIENT, MASTER)}
        dtype = self.stepped_dtype(parameter)
        if dtype == value.dtype:
            piece = Piece(value, gradient, {**numbers, **moments})
            self._inner.step([piece], group)
            return piece.state
        master = _current_master(work.tensors.get(MASTER), value)
        piece = Piece(master, gradient.to(dtype), {**numbers, **moments})
        self._inner.step([piece], group)
        value.copy_(master)
        return {**piece.state, MASTER: master}

    def _settle(self, parameter: Tensor, state: State, work: Work, made: State) -> None:
        """Keep the state where the parameter lives, and what was stepped."""
        berth = _parked(parameter)
        kept: State = {}
        for key, entry in made.items():
            found = work.tensors.get(key)
            if found is not None:
                if entry is not found:
                    found.copy_(entry)
                kept[key] = state[key]
            elif berth is not None and isinstance(entry, Tensor) and entry.shape == berth.shape:
                kept[key] = settle_in(berth.home, entry)
            else:
                kept[key] = entry
        work.store()
        state.clear()
        state.update(kept)

    @contextmanager
    def _brought_in(
        self,
        parameter: nn.Parameter,
        ahead: Iterable[Sequence[Berth]] | None,
        in_backward: bool,
    ) -> Iterator[Work]:
        berth = _parked(parameter)
        tensors = self._tensors(parameter)
        if berth is None:
            yield Work(tensors)
            return
        berths = self._berths(parameter, berth)
        ferries = ferries_of(berth.home)
        with ExitStack() as stack:
            work = Work(tensors)
            if in_backward:
                loan = stack.enter_context(ferries.weights.borrow((berths.pop(VALUE),)))
                work.loans.append((loan, (VALUE,)))
            if berths:
                cargo = tuple(berths.values())
                loan = stack.enter_context(ferries.steps.borrow(cargo, ahead=ahead))
                work.loans.append((loan, tuple(berths)))
            for loan, names in work.loans:
                tensors.update(zip(names, loan.tensors, strict=True))
            yield work

    def _tensors(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Value, gradient and state as they are found."""
        assert parameter.grad is not None
        state = self._state[parameter]
        shaped = {
            key: entry
            for key, entry in state.items()
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


def _parked(parameter: Tensor) -> Berth | None:
    """The berth of a parameter that is not worked on where it lies."""
    berth = berth_of(parameter)
    return None if berth is None or berth.home.works_in_place else berth


def _current_master(master: Tensor | None, value: Tensor) -> Tensor:
    """The float32 values, taken anew wherever someone wrote to the 16-bit ones since."""
    if master is None:
        return value.float()
    written = master.to(value.dtype) != value
    master[written] = value[written].float()
    return master

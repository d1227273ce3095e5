"""A hypothesis state machine that uses a home in any order, compared with a model in memory."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from home_probes import read_whole, write_whole
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from memtile.homes import PAGE, Allocation, Home

_DTYPES: Final = (torch.uint8, torch.int16, torch.int32, torch.int64)
_LONGEST: Final = 3 * PAGE


@dataclass
class _Parked:
    """An allocation, or tensors over it, or both, and what they must hold."""

    allocation: Allocation | None
    truth: Tensor
    tensors: list[Tensor] = field(default_factory=list)


def home_state_machine(make_home: Callable[[], Home]) -> type[RuleBasedStateMachine]:
    """A state machine for homes of this kind, for `run_state_machine_as_test`.

    It parks, writes through tensors and past them, reads both ways, evicts, holds, drops
    allocations and tensors in any order, and compares with a plain model after every step.

    Args:
        make_home: gives a new, open, empty home.
    """
    # Any: hypothesis has no type for its draws.
    choices: Any = st.integers(min_value=0)
    bytes_: Any = st.integers(0, 100)

    class HomeMachine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.home, self.parked = make_home(), list[_Parked]()

        @rule(length=st.integers(0, _LONGEST), dtype=st.sampled_from(_DTYPES), value=bytes_)
        def park(self, length: int, dtype: torch.dtype, value: int) -> None:
            allocation = self.home.allocate((length,), dtype)
            tensor = allocation.tensor().fill_(value)
            self.parked.append(_Parked(allocation, tensor.cpu().clone(), [tensor]))

        @precondition(lambda self: self.parked)
        @rule(choice=choices, value=bytes_)
        def write_through_a_tensor(self, choice: int, value: int) -> None:
            parked = self._pick(choice)
            if parked.tensors:
                parked.tensors[-1][: 1 + value].fill_(value)
                parked.truth[: 1 + value].fill_(value)

        @precondition(lambda self: self.parked)
        @rule(choice=choices, value=bytes_)
        def write_past_tensors(self, choice: int, value: int) -> None:
            parked = self._pick(choice)
            if parked.allocation is not None:
                parked.truth.add_(value)
                write_whole(parked.allocation, parked.truth)

        @precondition(lambda self: self.parked)
        @rule(choice=choices)
        def read_past_tensors(self, choice: int) -> None:
            parked = self._pick(choice)
            if parked.allocation is not None:
                assert torch.equal(read_whole(parked.allocation), parked.truth)

        @precondition(lambda self: self.parked)
        @rule(choice=choices)
        def evict(self, choice: int) -> None:
            parked = self._pick(choice)
            if parked.allocation is not None:
                parked.allocation.evict()

        @precondition(lambda self: self.parked)
        @rule(choice=choices)
        def make_another_tensor(self, choice: int) -> None:
            parked = self._pick(choice)
            if parked.allocation is not None:
                parked.tensors.append(parked.allocation.tensor())

        @precondition(lambda self: self.parked)
        @rule(choice=choices)
        def drop_the_allocation(self, choice: int) -> None:
            parked = self._pick(choice)
            if parked.tensors:
                parked.allocation = None

        @precondition(lambda self: self.parked)
        @rule(choice=choices)
        def drop_a_tensor(self, choice: int) -> None:
            parked = self._pick(choice)
            if parked.tensors:
                parked.tensors.pop()
            if parked.allocation is None and not parked.tensors:
                self._drop(parked)

        @precondition(lambda self: self.parked)
        @rule(choice=choices)
        def drop_everything_of_one(self, choice: int) -> None:
            self._drop(self._pick(choice))

        @rule(pages=st.integers(0, 300))
        def hold(self, pages: int) -> None:
            self.home.hold([pages * PAGE])

        @invariant()
        def tensors_hold_what_they_must(self) -> None:
            for parked in self.parked:
                for tensor in parked.tensors:
                    assert torch.equal(tensor.cpu(), parked.truth)

        def teardown(self) -> None:
            self.home.close()
            self.tensors_hold_what_they_must()

        def _pick(self, choice: int) -> _Parked:
            return self.parked[choice % len(self.parked)]

        def _drop(self, parked: _Parked) -> None:
            self.parked = [other for other in self.parked if other is not parked]

    return HomeMachine

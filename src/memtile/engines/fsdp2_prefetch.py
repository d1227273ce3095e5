"""Which FSDP2 units are gathered ahead: the next ones in forward, the ones before in backward.

Forward follows the order of the last forward, backward that of its own forward. A unit that was
gathered ahead and is not used, because a step took another path, is freed as soon as that is seen.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, Final

import torch
from torch import nn

from memtile.errors import EngineError

UnitModule = Any  # first FSDPModule of a unit; to mypy, FSDPModule is no nn.Module
_NONE: Final[list[UnitModule]] = []


def bring_ahead(model: nn.Module, units: Sequence[Sequence[nn.Module]], ahead: int) -> None:
    """Gather so many units of a sharded model ahead of the one in use."""
    order = _Order(model, ahead)
    for unit in units:
        _Prefetch(unit, order)


class _Order:
    """The order in which a forward uses units, and so the neighbours of each."""

    def __init__(self, model: nn.Module, ahead: int) -> None:
        self._root: UnitModule = model
        self._ahead = ahead
        self._has_begun, self._has_ended = False, True
        self._used: list[UnitModule] = []
        self.with_backward: set[UnitModule] = set()  # in this forward, whose results require grad
        self._before: dict[UnitModule, list[UnitModule]] = {}  # likewise
        self._waiting: set[UnitModule] = set()  # gathered ahead, and not used yet
        self._following: dict[UnitModule, list[UnitModule]] = {}
        model.register_forward_pre_hook(self._begin, prepend=True)
        model.register_forward_hook(self._end)

    def use(self, unit: UnitModule) -> tuple[list[UnitModule], list[UnitModule]]:
        """Note that a unit is used now; give the units after it and before it, nearest first."""
        if not self._has_begun:
            raise EngineError(
                f"a layer inside the {type(self._root).__name__} was called before the model "
                "itself: FSDP2 finds its root in the model's first forward; call model(…) once, "
                "then its parts"
            )
        following = self._following.get(unit, _NONE)
        self._waiting.discard(unit)
        self._free(self._waiting.difference(following))
        self._waiting.update(following)
        earlier = (each for each in reversed(self._used) if each in self.with_backward)
        before = [each for each, _ in groupby(earlier) if each is not unit][: self._ahead]
        if self._before.setdefault(unit, before) != before:  # a second use, after other units
            before = _NONE
        self._used.append(unit)
        return following, before

    def _begin(self, *_: object) -> None:
        self._has_begun = True
        for unit in [] if self._has_ended else self._used:  # the forward before raised
            unit.reshard()
        self._free(self._waiting)
        self._has_ended = False
        self._used, self.with_backward, self._before = [], set(), {}

    def _end(self, *_: object) -> None:
        self._has_ended = True
        self._free(self._waiting)
        used, ahead = [unit for unit, _ in groupby(self._used)], self._ahead
        places: dict[UnitModule, set[tuple[UnitModule, ...]]] = {}
        for place, unit in enumerate(used):
            places.setdefault(unit, set()).add(tuple(used[place + 1 : place + 1 + ahead]))
        self._following = {
            unit: list(found.pop()) if len(found) == 1 else _NONE for unit, found in places.items()
        }

    def _free(self, units: Iterable[UnitModule]) -> None:
        for unit in list(units):
            self._waiting.discard(unit)
            unit.unshard()  # waits for a gather that is under way
            unit.reshard()


class _Prefetch:
    """Sets what one unit prefetches in forward and backward; nothing where it is recomputed.

    FSDP2 keeps what is recomputed in backward until its own backward: all tiles of a checkpointed
    block. So such a unit is freed after its recomputation and prefetches nothing; nor does any
    unit in its first backward, which shows whether it is recomputed.
    """

    def __init__(self, unit: Sequence[nn.Module], order: _Order) -> None:
        self._first: UnitModule = unit[0]
        self._order = order
        self._recomputed, self._trained = False, False
        unit[0].register_forward_pre_hook(self._choose, prepend=True)
        for module in unit:
            module.register_forward_hook(self._note)
        unit[-1].register_forward_hook(self._free)

    def _choose(self, *_: object) -> None:
        following, before = _NONE, _NONE
        if _in_backward():
            self._recomputed = True
        else:
            following, before = self._order.use(self._first)
        self._first.set_modules_to_forward_prefetch(following)
        if torch.is_grad_enabled():
            if not self._trained or self._recomputed:
                before = _NONE
            # The unit itself, gathered already, stands for none: after an empty list FSDP2 guesses,
            # which left a third unit gathered where a tied one has other units before each use.
            self._first.set_modules_to_backward_prefetch(before or [self._first])
            self._trained = True

    def _note(self, module: nn.Module, inputs: object, result: object) -> None:
        results = result if isinstance(result, tuple) else (result,)
        if any(isinstance(each, torch.Tensor) and each.requires_grad for each in results):
            self._order.with_backward.add(self._first)

    def _free(self, *_: object) -> None:
        if _in_backward():
            self._first.reshard()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1  # as torch's own checkpointing asks

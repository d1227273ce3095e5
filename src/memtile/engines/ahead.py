"""Which unit of FSDP2 is gathered ahead: the next one in forward, the one before in backward.

The order is that of the last forward, whatever the order in which modules were registered.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import nn

Units = list[Any]  # FSDPModules, which are no nn.Module


def bring_ahead(model: nn.Module, units: Sequence[Sequence[nn.Module]], ahead: int) -> None:
    """Gather units ahead of their use, where all uses of a unit have the same ones beside them.

    Args:
        model: the root, sharded already.
        units: modules that are gathered together, sharded already.
        ahead: how many.
    """
    order = _Order(model, ahead)
    for unit in units:
        _Ahead(unit, order)


class _Order:
    """What the last forward used, one unit after the other, and so what is beside each of them.

    Attributes:
        following: each unit in forward.
        before: each unit, the nearest first.
    """

    def __init__(self, model: nn.Module, ahead: int) -> None:
        self._ahead = ahead
        self._used: list[nn.Module] = []
        self.following: dict[nn.Module, Units] = {}
        self.before: dict[nn.Module, Units] = {}
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end)

    def use(self, unit: nn.Module) -> None:
        """A unit works now, the first module of which is this."""
        self._used.append(unit)

    def _begin(self, *_: object) -> None:
        self._used = []

    def _end(self, *_: object) -> None:
        if _in_backward():
            return
        used, ahead = [unit for unit, _ in groupby(self._used)], self._ahead
        for unit in set(used):
            places = [place for place, each in enumerate(used) if each is unit]
            self.following[unit] = _only({tuple(used[p + 1 : p + 1 + ahead]) for p in places})
            self.before[unit] = _only({tuple(used[max(0, p - ahead) : p][::-1]) for p in places})


def _only(found: set[tuple[nn.Module, ...]]) -> Units:
    return list(found.pop()) if len(found) == 1 else []


class _Ahead:
    """What one unit brings in ahead, in either direction; nothing where it is recomputed.

    FSDP2 keeps what is recomputed in backward until its own backward: of a checkpointed block, all
    tiles. So such a unit is let go of right after, and brings in no other. Whether it is recomputed
    is seen in its first backward, which therefore has nothing ahead.

    Args:
        unit: its modules.
        order: of all units.
    """

    def __init__(self, unit: Sequence[nn.Module], order: _Order) -> None:
        self._key, self._order = unit[0], order
        self._first: Any = unit[0]  # an FSDPModule, which is no nn.Module
        self._recomputed, self._trained = False, False
        unit[0].register_forward_pre_hook(self._choose, prepend=True)
        unit[-1].register_forward_hook(self._let_go)

    def _choose(self, *_: object) -> None:
        following: Units = []
        before: Units = []
        if _in_backward():
            self._recomputed = True
        else:
            self._order.use(self._key)
            following = self._order.following.get(self._key, [])
            if self._trained and not self._recomputed:
                before = self._order.before.get(self._key, [])
            self._trained = self._trained or torch.is_grad_enabled()
        self._first.set_modules_to_forward_prefetch(following)
        # A unit that is there already is none: an empty list would be the engine's own guess, which
        # left a third unit gathered where a tied one has other units before each of its uses.
        self._first.set_modules_to_backward_prefetch(before or [self._first])

    def _let_go(self, *_: object) -> None:
        if _in_backward():
            self._first.reshard()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1  # as torch's own checkpointing asks

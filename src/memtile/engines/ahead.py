"""Which unit of FSDP2 is gathered ahead: the next tile in forward, the one before in backward."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def bring_ahead(
    order: Sequence[nn.Module], units: Sequence[Sequence[nn.Module]], ahead: int
) -> None:
    """Gather units ahead of their use, where all uses of a unit have the same ones beside them.

    Args:
        order: the first tile of each unit, as often and in the order as units are used.
        units: tiles that are gathered together, sharded already.
        ahead: how many.
    """
    for unit in units:
        uses = [number for number, each in enumerate(order) if each is unit[0]]
        following = _only({tuple(order[number + 1 : number + 1 + ahead]) for number in uses})
        before = _only({tuple(order[max(0, number - ahead) : number][::-1]) for number in uses})
        _Ahead(unit, following, before if ahead else [unit[0]])


def _only(found: set[tuple[nn.Module, ...]]) -> list[Any]:  # of FSDPModules, which are no nn.Module
    return list(found.pop()) if len(found) == 1 else []


class _Ahead:
    """What one unit brings in ahead, in either direction; nothing where it is recomputed.

    FSDP2 keeps what is recomputed in backward until its own backward: of a checkpointed block, all
    tiles. So such a unit is let go of right after, and brings in no other. Whether it is recomputed
    is seen in its first step, which therefore has nothing ahead in backward.

    Args:
        unit: its tiles.
        following: of it in forward; an empty list is none.
        before: it in backward; an empty list is the engine's own record of the forward.
    """

    def __init__(self, unit: Sequence[nn.Module], following: list[Any], before: list[Any]) -> None:
        self._first: Any = unit[0]  # an FSDPModule, which is no nn.Module
        self._following, self._before = following, before
        self._ran, self._recomputed = False, False
        unit[0].register_forward_pre_hook(self._choose, prepend=True)
        unit[-1].register_forward_hook(self._let_go)

    def _choose(self, *_: object) -> None:
        self._recomputed = self._recomputed or _in_backward()
        alone = self._recomputed or not self._ran
        self._ran = self._ran or torch.is_grad_enabled()
        self._first.set_modules_to_forward_prefetch([] if _in_backward() else self._following)
        # A unit that is there already: none, since an empty list would be the engine's guess.
        self._first.set_modules_to_backward_prefetch([self._first] if alone else self._before)

    def _let_go(self, *_: object) -> None:
        if _in_backward():
            self._first.reshard()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1  # as torch's own checkpointing asks

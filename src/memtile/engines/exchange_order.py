"""Checks that ranks exchange the same modules in the same order, by comparing names.

Collectives of a process group are paired by their number alone: ranks that use different modules
(samples routed to different experts, say) would compute with the bytes of others. So each exchange
is noted by name, and every few exchanges all ranks compare the names since the last comparison.
"""

import weakref
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from memtile.engines.ranks import of_all_ranks
from memtile.errors import EngineError

FIRST: Final = 64
"""Exchanges that are all compared: a model's mistakes show in its first steps."""
EVERY: Final = 32
"""After them, one exchange in so many: comparing took as long as gathering 1 MiB, over gloo."""

_orders: "weakref.WeakKeyDictionary[ProcessGroup, ExchangeOrder]" = weakref.WeakKeyDictionary()


def compare_order(model: Any, units: Sequence[Any], groups: Sequence[ProcessGroup]) -> None:
    """Compare what the ranks of a model exchange that FSDP2 has sharded.

    `units` are the first modules of units; the last group is the one that is sharded over. Nothing
    is compared where torch does not let exchanges be seen (`set_custom_all_gather`).
    """
    if not hasattr(model, "set_custom_all_gather") or max(group.size() for group in groups) == 1:
        return
    names = {module: name for name, module in model.named_modules()}
    orders = [order_in(group) for group in groups]
    orders[-1].models += 1
    for unit in [*units, model]:
        name = names[unit] or "what is in no unit"
        label = f"{name} of model {orders[-1].models} ({type(model).__name__.removeprefix('FSDP')})"
        unit.set_custom_all_gather(_Gather(f"gathers {label}", orders[-1:]))
        unit.set_custom_reduce_scatter(_Reduce(f"reduces {label}", orders))


def order_in(group: ProcessGroup) -> "ExchangeOrder":
    """The one order of a group, shared by all models that use it."""
    return _orders.setdefault(group, ExchangeOrder(group))


class ExchangeOrder:
    """What this rank exchanged in one process group, in order."""

    def __init__(self, group: ProcessGroup) -> None:
        self.models = 0
        self._group = weakref.ref(group)  # or it would outlive its destruction
        self._count = 0
        self._recent: list[str] = []  # since the last comparison

    def note(self, what: str) -> None:
        """Note an exchange before it begins; EngineError on each rank where ranks differ."""
        group = self._group()
        assert group is not None  # the caller, who is about to use it, holds it
        if group.size() == 1:
            return
        self._count += 1
        self._recent.append(what)
        if self._count > FIRST and self._count % EVERY:
            return
        recent, self._recent = self._recent, []
        for step in zip_longest(*of_all_ranks(recent, group), fillvalue="is done"):
            for rank, name in enumerate(step):
                if name != step[0]:
                    raise EngineError(
                        f"rank 0 of the group {step[0]} while rank {rank} {name}: ranks that use "
                        "other modules than the others, or in another order, get bytes that are "
                        "not theirs; use the same modules in the same order on each rank, also "
                        "those that get no samples on one of them (call them with an empty batch); "
                        "reading logits after their loss uses the head: do it on all ranks or none"
                    )


class _Noted:
    """torch's own collective, noted before it begins."""

    _collective: Any

    def __init__(self, what: str, orders: Sequence[ExchangeOrder]) -> None:
        self._what, self._orders = what, orders

    def allocate(
        self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """The buffer for it, allocated as torch's own does."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: ProcessGroup,
        **options: Any,  # op, of a reduction: torch's, or one that scales before; async_op
    ) -> Any:  # work, or None
        for order in self._orders:
            order.note(self._what)
        return self._collective(output_tensor, input_tensor, group=group, **options)


# the second names are those of torch before 2.13, which warns of them
class _Gather(_Noted):
    _collective = staticmethod(
        getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    )


class _Reduce(_Noted):
    _collective = staticmethod(
        getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    )

"""Checks that ranks exchange the same modules in the same order, by comparing names as they go.

The collectives of a process group are paired by their number alone. Ranks that use other modules
than the others (samples routed to other experts, say) would get bytes of modules that they did not
ask for, and compute with them. So the name of each exchange is recorded, and every few exchanges a
hash of all names so far is compared. Ranks that wait for each other have made the same number of
exchanges, whatever they are about to exchange; so no rank compares alone.
"""

import hashlib
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

# the names of torch before 2.13, which warns of them
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_orders: "weakref.WeakKeyDictionary[ProcessGroup, ExchangeOrder]" = weakref.WeakKeyDictionary()


def compare_order(model: Any, units: Sequence[Any], groups: Sequence[ProcessGroup]) -> None:
    """Compare what the ranks of a sharded model exchange.

    Nothing is compared where torch does not let exchanges be seen (`set_custom_all_gather`).

    Args:
        model: sharded by FSDP2 (torch's own methods are on it).
        units: the first module of each unit.
        groups: of the mesh; the last one is the one that is sharded over.
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
        self._count, self._hash = 0, hashlib.blake2b(digest_size=8)
        self._recent: list[str] = []  # since the last comparison

    def note(self, what: str) -> None:
        """Note an exchange before it begins; compare, if this one is to be compared.

        Raises:
            EngineError: the ranks are not about to exchange the same; on each rank.
        """
        group = self._group()
        assert group is not None  # the caller, who is about to use it, holds it
        if group.size() == 1:
            return
        self._count += 1
        self._recent.append(what)
        self._hash.update(what.encode())
        if self._count > FIRST and self._count % EVERY:
            return
        logs, self._recent = self._recent, []
        if len(set(of_all_ranks(self._hash.digest(), group))) > 1:
            self._hash = hashlib.blake2b(digest_size=8)  # the ranks are at the same number still
            raise EngineError(_difference(of_all_ranks(logs, group)))


def _difference(logs: Sequence[Sequence[str]]) -> str:
    """Where the ranks' logs begin to differ, in words."""
    steps = zip_longest(*logs, fillvalue="is done")
    step = next((step for step in steps if len(set(step)) > 1), ("began anew", "did not"))
    other = next(rank for rank, what in enumerate(step) if what != step[0])
    return (
        f"rank 0 of the group {step[0]} while rank {other} {step[other]}: ranks that use other "
        "modules than the others, or in another order, get bytes that are not theirs; use the same "
        "modules in the same order on each rank, also those that get no samples on one of them "
        "(call them with an empty batch)"
    )


class _Noted:
    """torch's own collective, noted before it begins."""

    def __init__(self, what: str, orders: Sequence[ExchangeOrder]) -> None:
        self._what, self._orders = what, orders

    def allocate(
        self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """The buffer for it, allocated as torch's own does."""
        return torch.empty(*size, dtype=dtype, device=device)

    def _note(self) -> None:
        for order in self._orders:
            order.note(self._what)


class _Gather(_Noted):
    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: ProcessGroup,
        async_op: bool = False,
    ) -> Any:  # work, or None
        self._note()
        return _all_gather(output_tensor, input_tensor, group, async_op)


class _Reduce(_Noted):
    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: ProcessGroup,
        op: Any,  # torch's, or one that scales before
        async_op: bool = False,
    ) -> Any:  # work, or None
        self._note()
        return _reduce_scatter(output_tensor, input_tensor, op, group, async_op)

"""Low-rank adapters (LoRA) around linears, for operations that do not call them.

Shapes: y = W x + s B A x; W (out, in), A (r, in), B (out, r).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class LowRank(NamedTuple):
    """A linear and its adapter, plain linears without biases."""

    base: nn.Module
    a: Any  # an nn.Linear
    b: Any  # likewise
    scaling: float
    dropout: nn.Module  # of the adapter's input

    def reduced(self, x: Tensor) -> Tensor:
        """s A x (…, r), in the dtype of x (…, in)."""
        made: Tensor = self.a(self.dropout(x.to(self.a.weight.dtype))) * self.scaling
        return made.to(x.dtype)

    def expanded(self, z: Tensor) -> Tensor:
        """s B z (…, out), in the dtype of z = A x (…, r)."""
        made: Tensor = self.b(z.to(self.b.weight.dtype)) * self.scaling
        return made.to(z.dtype)

    @property
    def drops(self) -> bool:
        """Whether dropout zeroes anything."""
        part = getattr(self.dropout, "p", 0.0) if self.dropout.training else 0.0
        return part > 0.0 or not isinstance(self.dropout, nn.Dropout | nn.Identity)


LowRanks = dict[str, LowRank]  # of the layers of an MLP, by their names
_readers: list[Callable[[nn.Module], LowRank | None]] = []


def register_low_rank(reader: Callable[[nn.Module], LowRank | None]) -> None:
    """Let a library say which of its modules are a linear and a low-rank adapter."""
    _readers.append(reader)


def low_rank_of(layer: object) -> LowRank | None:
    """The linear and adapter that a module is; None where it is anything else."""
    if not isinstance(layer, nn.Module) or not hasattr(layer, "base_layer"):
        return None
    return next((found for reader in _readers if (found := reader(layer)) is not None), None)


def widened_input(x: Tensor, lows: LowRanks) -> Tensor:
    """x (N, H) with the columns that adapters of gate and up need."""
    more = [lows[name].reduced(x) for name in ("gate", "up") if name in lows]
    return torch.cat([x, *more], 1) if more else x


def low_parts(lows: LowRanks, sizes: Sequence[int]) -> list[dict[str, Tensor]]:
    """What each tile, of these numbers of features, has of the adapters."""
    found: list[dict[str, Tensor]] = [{} for _ in sizes]
    for name, low in lows.items():
        down = name == "down"
        weight: Tensor = low.a.weight if down else low.b.weight
        for own, part in zip(found, weight.split(sizes, int(down)), strict=True):
            own[f"{name}_low"] = part
    return found


def narrowed_output(y: Tensor, low: LowRank | None, bias: Tensor | None) -> Tensor:
    """What down gives, of the columns that its adapter needs; `bias` is added where it has one."""
    if low is None:
        return y
    own, reduced = y.split([low.b.weight.shape[0], low.a.weight.shape[0]], 1)
    made: Tensor = own + low.expanded(reduced)
    return made if bias is None else made + bias.to(made.dtype)

"""Low-rank adapters (LoRA) around linears, for operations that do not call them.

Shapes: y = W x + s B A x; W (out, in), A (r, in), B (out, r).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from memtile.layers import checks


class LowRank(NamedTuple):
    """A linear and its adapter, whose linears have no biases; an engine may gather each."""

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

    def part_of_tiles(self, is_down: bool) -> nn.Module:
        """The linear that tiles of an MLP have parts of: A of down, B of gate and up."""
        part: nn.Module = self.a if is_down else self.b
        return part

    @property
    def rank(self) -> int:
        """r; the shape of a weight is another one while an engine has shards of it."""
        return int(self.a.out_features)


class LowRanks(dict[str, LowRank]):
    """Those of the layers of an MLP, by their names."""

    @property
    def are_gathered(self) -> bool:
        """Whether an engine gathers any of their linears when it is called."""
        return any(checks.has_hooks(each) for low in self.values() for each in (low.a, low.b))

    @property
    def gathered_for_tiles(self) -> list[nn.Module]:
        """Those of which tiles have parts: the engine gathers them for each."""
        parts = [low.part_of_tiles(name == "down") for name, low in self.items()]
        return [each for each in parts if checks.has_hooks(each)]

    @property
    def drop_hidden(self) -> bool:
        """Whether parts of the intermediate activation are dropped, which does not exist."""
        return "down" in self and self["down"].drops

    def widened(self, x: Tensor) -> Tensor:
        """x (N, H) with the columns that adapters of gate and up need."""
        more = [self[name].reduced(x) for name in ("gate", "up") if name in self]
        return torch.cat([x, *more], 1) if more else x

    def parts(self, sizes: Sequence[int]) -> list[dict[str, Tensor]]:
        """What each tile, of these numbers of features, has of the adapters."""
        found: list[dict[str, Tensor]] = [{} for _ in sizes]
        for name, low in self.items():
            is_down = name == "down"
            weight: Any = low.part_of_tiles(is_down).weight  # a Tensor, which mypy does not know
            for own, part in zip(found, weight.split(sizes, int(is_down)), strict=True):
                own[f"{name}_low"] = part
        return found

    def padded(self, bias: Tensor | None) -> Tensor | None:
        """The bias of down, with zeros for the columns that its adapter needs."""
        if bias is None or "down" not in self:
            return bias
        return functional.pad(bias, (0, self["down"].rank))

    def narrowed(self, y: Tensor) -> Tensor:
        """What down gives, of y with those columns."""
        if "down" not in self:
            return y
        low = self["down"]
        own, reduced = y.split([y.shape[1] - low.rank, low.rank], 1)
        made: Tensor = own + low.expanded(reduced)
        return made


_readers: list[Callable[[nn.Module], LowRank | None]] = []


def register_low_rank(reader: Callable[[nn.Module], LowRank | None]) -> None:
    """Let a library say which of its modules are a linear and a low-rank adapter."""
    _readers.append(reader)


def low_rank_of(layer: object) -> LowRank | None:
    """The linear and adapter that a module is; None where it is anything else."""
    if not isinstance(layer, nn.Module) or not hasattr(layer, "base_layer"):
        return None
    return next((found for reader in _readers if (found := reader(layer)) is not None), None)

"""One tile of an MLP: its tensors, and what it computes in ordinary operations.

Shapes: as in `ops.mlp`. Low-rank adapters make the operands wider: with gate's B A, x has columns
A x after its own, and G the columns B; with down's, D has the rows A, and y as many columns, which
are for B.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from memtile.geometry import Span
from memtile.ops.activations import Activation
from memtile.ops.parked import no_autocast


class MlpTile(NamedTuple):
    """The features of a tile, its weights and biases."""

    span: Span
    gate: Any  # a Tensor or None; a Parameter where it is parked
    up: Any
    down: Any
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    gate_low: Tensor | None = None  # (T, r), of the columns of x that come after its own
    up_low: Tensor | None = None  # likewise, of those after gate's
    down_low: Tensor | None = None  # (r, T)

    def weights(self) -> dict[str, Any]:
        """Those that it has, by their names."""
        found = {"gate": self.gate, "up": self.up, "down": self.down}
        return {name: weight for name, weight in found.items() if weight is not None}

    def tensors(self) -> dict[str, Any]:
        """All tensors that it has, by their names."""
        found = self._asdict()
        return {n: t for n, t in found.items() if t is not None and n != "span"}

    def factor(self, name: str, x: Tensor) -> Tensor:
        """Those columns of x, or of y for "down" and "down_low", that a tensor has to do with."""
        if name in ("down", "down_low"):
            width = self.down.shape[0]
            return x[..., :width] if name == "down" else x[..., width:]
        width = self.up.shape[1]
        if name in ("gate", "up"):
            return x[..., :width]
        rank = 0 if self.gate_low is None else self.gate_low.shape[1]
        return x[..., width : width + rank] if name == "gate_low" else x[..., width + rank :]


def plain_mlp_tile(x: Tensor, tile: MlpTile, activation: Activation, factors: Any) -> Tensor:
    """h Dᵀ (N, M) of x (…, H) in ordinary operations, which keep h; `factors` gives k h of h."""
    with no_autocast(x):
        cast = {name: tensor.to(x.dtype) for name, tensor in tile.tensors().items()}

        def inner(name: str) -> Tensor:
            y = functional.linear(tile.factor(name, x), cast[name], cast.get(f"{name}_bias"))
            low = cast.get(f"{name}_low")
            return y if low is None else y + functional.linear(tile.factor(f"{name}_low", x), low)

        h = inner("up")
        h = activation(h) if tile.gate is None else activation(inner("gate")) * h
        low = [] if tile.down_low is None else [cast["down_low"]]
        return functional.linear(factors(h), joined([cast["down"], *low]))


def halves(whole: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and the lower half of a matrix, whose gradient is one tensor.

    Without a copy where those of the halves lie one behind the other in memory (`follows`).
    """
    found: tuple[Tensor, Tensor] = _Halves.apply(whole)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return found


class _Halves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor) -> tuple[Tensor, ...]:
        return whole.detach().chunk(2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        first, second = grads
        if torch.is_grad_enabled() or not follows(first, second):
            return torch.cat([first, second])
        shape = (2 * first.shape[0], first.shape[1])
        return first.as_strided(shape, first.stride())


def follows(first: Tensor, second: Tensor) -> bool:
    """Whether two contiguous matrices lie one behind the other in one memory."""
    return (
        first.is_contiguous()
        and second.is_contiguous()
        and first.shape == second.shape
        and first.untyped_storage()._cdata == second.untyped_storage()._cdata
        and first.storage_offset() + first.numel() == second.storage_offset()
    )


def joined(matrices: list[Tensor]) -> Tensor:
    """Matrices one below the other; one alone as it is."""
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices)

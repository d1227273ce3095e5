"""One tile of an MLP, in blocks, so that its intermediate activation never exists.

Shapes: N tokens, H and M width of input and output, T features of the tile; x (N, H), gate G and
up U (T, H), down D (M, T), y and its gradient g (N, M).

With s the activation, k the factors of dropout, a = x Gᵀ and b = x Uᵀ (and their biases):

    h = k s(a) b,  y += h Dᵀ;  without a gate h = k s(b).

Backward: dh = k g D, da = s'(a) b dh, db = s(a) dh; dD = gᵀ h, dG = daᵀ x, dU = dbᵀ x, and
dx += da G + db U. a and b are computed again, h Dᵀ is not: 11 products instead of 12.

Blocks of rows × features are worked on one after another, features in the outer loop, so that each
part of a weight's gradient is finished before the next one is begun. A block is in the dtype of the
products, and what is between two products is float32, in strips that stay in the cache. y, dx and,
over several blocks of rows, the weights' gradients are summed in float32.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from memtile.errors import ArgumentError
from memtile.geometry import Span, spans_of_size
from memtile.ops.parked import no_autocast
from memtile.ops.products import (
    SIXTEEN_BITS,
    add_product,
    strips_of,
    sum_of_products,
    wide_dtype,
)

Activation = Callable[[Tensor], Tensor]

BLOCK: Final = 1 << 20  # elements
FEWEST_FEATURES: Final = 1 << 8  # of a block; products over fewer are slower


@dataclass(frozen=True)
class MlpSpec:
    """What an MLP does between its products, and the block that is worked on at once.

    Args:
        activation: an element-wise function.
        dropout: the part of h that is zeroed.
        seed: of what dropout keeps.
        rows: of a block.
        features: of a block.
    """

    activation: Activation
    dropout: float
    seed: int
    rows: int
    features: int

    @classmethod
    def fitting(
        cls,
        activation: Activation,
        dropout: float,
        tokens: int,
        rows: int | None,
        features: int | None,
    ) -> "MlpSpec":
        """With the given block, and what is left out of it chosen for as many tokens."""
        features = features or max(FEWEST_FEATURES, BLOCK // max(1, rows or tokens))
        rows = rows or max(1, BLOCK // min(features, FEWEST_FEATURES))
        # the CPU's generator: checkpoints restore it, and no device is waited for
        seed = int(torch.randint(1 << 62, (), device="cpu")) if dropout else 0
        return cls(activation, dropout, seed, rows, features)

    def blocks(self, tokens: int, features: int) -> tuple[list[Span], list[Span]]:
        """Rows and features of the blocks of a tile."""
        rows = spans_of_size(tokens, self.rows) if tokens else []
        return rows, spans_of_size(features, self.features)

    def kept(self, tokens: int, rows: Span, features: Span, device: torch.device) -> Tensor:
        """Which elements of a block of h dropout keeps: the same in forward and backward."""
        generator = torch.Generator(device)
        generator.manual_seed(self.seed + features.start * tokens + rows.start)
        kept = torch.empty((rows.size, features.size), dtype=torch.bool, device=device)
        return kept.bernoulli_(1.0 - self.dropout, generator=generator)

    def kept_of_tile(self, tokens: int, tile: Span, device: torch.device) -> Tensor:
        """The same of all blocks of a tile."""
        kept = torch.empty((tokens, tile.size), dtype=torch.bool, device=device)
        all_rows, columns = self.blocks(tokens, tile.size)
        for rows, some in product(all_rows, columns):
            features = Span(tile.start + some.start, tile.start + some.stop)
            block = self.kept(tokens, rows, features, device)
            kept[rows.as_slice(), some.as_slice()] = block
        return kept

    def drop(self, tensor: Tensor, kept: Tensor | None) -> Tensor:
        """k times a part of h or dh, in place; None: all is kept."""
        if kept is None:
            return tensor
        tensor.masked_fill_(~kept, 0.0)
        return tensor if self.dropout == 1.0 else tensor.div_(1.0 - self.dropout)

    def activate(self, z: Tensor) -> Tensor:
        """s(z); ArgumentError where it has another shape or dtype."""
        found = self.activation(z)
        if found.shape == z.shape and found.dtype == z.dtype:
            return found
        raise ArgumentError(
            f"the activation gives {tuple(found.shape)} in {found.dtype} for {tuple(z.shape)} in "
            f"{z.dtype}: it must be element-wise; a gated one is an activation and a gate"
        )


class MlpTile(NamedTuple):
    """The features of a tile, its weights and biases."""

    span: Span
    gate: Any  # a Tensor or None; a Parameter where it is parked
    up: Any
    down: Any
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None

    def weights(self) -> dict[str, Any]:
        """Those that it has, by their names."""
        found = {"gate": self.gate, "up": self.up, "down": self.down}
        return {name: weight for name, weight in found.items() if weight is not None}

    def tensors(self) -> dict[str, Any]:
        """Weights and biases that it has, by their names."""
        biases = {"gate_bias": self.gate_bias, "up_bias": self.up_bias}
        return {
            **self.weights(),
            **{name: bias for name, bias in biases.items() if bias is not None},
        }


def plain_mlp_tile(x: Tensor, tile: MlpTile, activation: Activation, factors: Any) -> Tensor:
    """h Dᵀ (N, M) of x (…, H) in ordinary operations, which keep h; `factors` gives k h of h."""
    with no_autocast(x):
        cast = {name: tensor.to(x.dtype) for name, tensor in tile.tensors().items()}
        h = functional.linear(x, cast["up"], cast.get("up_bias"))
        if tile.gate is None:
            h = activation(h)
        else:
            h = activation(functional.linear(x, cast["gate"], cast.get("gate_bias"))) * h
        return functional.linear(factors(h), cast["down"])


@dataclass(eq=False)
class MlpVisit:
    """One pass over the blocks of a tile, whose weights are in memory meanwhile.

    `tile` has their values.
    """

    spec: MlpSpec
    x: Tensor
    tile: MlpTile

    def __post_init__(self) -> None:
        self.names = ("up",) if self.tile.gate is None else ("gate", "up")
        self.rows, self.features = self.spec.blocks(len(self.x), self.tile.span.size)
        size = self.features[0].size * (self.rows[0].size if self.rows else 0)
        self.buffers = [self.x.new_empty(size) for _ in range(3)]

    def add_output(self, y: Tensor, is_first: bool) -> None:
        """Add h Dᵀ to y (N, M), or write it there."""
        for features in self.features:
            block = _Block(self, features)
            for rows in self.rows:
                h = block.hidden(rows)
                add_product(y[rows.as_slice()], h, block.down.t(), is_first=is_first)
            is_first = False

    def add_gradients(self, grad: Tensor, found: Mapping[str, Tensor], is_first: bool) -> None:
        """Write the gradients that are in `found`, those of the tile's tensors by their names.

        To that of "x" they are added, unless it `is_first`.
        """
        own = {name: out for name, out in found.items() if name != "x"}
        for features in self.features:
            block = _Block(self, features)
            parts = {name: _part_of(name, out, features) for name, out in own.items()}
            totals = {name: self._total(part) for name, part in parts.items()}
            for rows in self.rows:
                some = grad[rows.as_slice()]
                factors = block.factors(rows, some, bool(found.keys() - {"down"}))
                if "x" in found:
                    block.add_input_gradient(found["x"][rows.as_slice()], factors, is_first)
                self._add(totals, some, rows, factors)
            for name, part in parts.items():
                if not self.rows:
                    part.zero_()
                elif totals[name] is not part:
                    part.copy_(totals[name])
            is_first = False

    def _total(self, part: Tensor) -> Tensor:
        """What the products of all blocks of rows are summed in: the gradient itself or another."""
        if len(self.rows) < 2 or (part.dtype not in SIXTEEN_BITS and part.is_contiguous()):
            return part
        return torch.empty(part.shape, dtype=wide_dtype(part.dtype), device=part.device)

    def _add(
        self, totals: Mapping[str, Tensor], grad: Tensor, rows: Span, factors: Mapping[str, Tensor]
    ) -> None:
        """Add a block's part to the gradients of the tile's tensors."""
        x, is_first = self.x[rows.as_slice()], rows.start == 0
        for name, total in totals.items():
            if name == "down":
                add_product(total, grad.t(), factors["h"], is_first=is_first)
            elif name in factors:
                add_product(total, factors[name].t(), x, is_first=is_first)
            else:
                part = factors[name.removesuffix("_bias")].sum(0, dtype=wide_dtype(x.dtype))
                total.copy_(part if is_first else total + part)


class _Block:
    """Some features of a visit; what it gives is in buffers that the next rows overwrite."""

    def __init__(self, visit: MlpVisit, features: Span) -> None:
        self.visit, self.features, self.spec = visit, features, visit.spec
        tile, dtype, part = visit.tile, visit.x.dtype, features.as_slice()
        self.down = tile.down[:, part].to(dtype)
        self.into = {name: getattr(tile, name)[part].to(dtype) for name in visit.names}
        biases = {name: getattr(tile, f"{name}_bias") for name in visit.names}
        self.biases = {name: None if b is None else b[part].to(dtype) for name, b in biases.items()}

    def hidden(self, rows: Span) -> Tensor:
        """h."""
        found, kept = self._products(rows), self._kept(rows)
        out = found["up"]
        for part in (strip.as_slice() for strip in strips_of(out)):
            z = {name: each[part].to(wide_dtype(out.dtype)) for name, each in found.items()}
            h = self.spec.activate(z[self.visit.names[0]])
            h = h * z["up"] if "gate" in z else h
            out[part] = self.spec.drop(h, None if kept is None else kept[part])
        return out

    def factors(self, rows: Span, grad: Tensor, has_inner: bool) -> dict[str, Tensor]:
        """h, and da and db, as "gate" and "up", where they are wanted."""
        if not has_inner:
            return {"h": self.hidden(rows)}
        found, kept = self._products(rows), self._kept(rows)
        dh = found["h"] = self._buffer(2, rows)
        sum_of_products(dh, [(grad, self.down)], 1)
        for part in (strip.as_slice() for strip in strips_of(dh)):
            z = {name: each[part].to(wide_dtype(dh.dtype)) for name, each in found.items()}
            z = self._differentiate(z, None if kept is None else kept[part])
            for name, each in z.items():
                found[name][part] = each
        return found

    def add_input_gradient(self, dx: Tensor, factors: Mapping[str, Tensor], is_first: bool) -> None:
        """Add da G + db U."""
        for number, name in enumerate(self.visit.names):
            add_product(dx, factors[name], self.into[name], is_first=is_first and number == 0)

    def _differentiate(self, z: dict[str, Tensor], kept: Tensor | None) -> dict[str, Tensor]:
        """h, da and db of a strip of dh (as "h"), a and b."""
        first, spec = self.visit.names[0], self.spec
        leaf, dh = z[first].detach().requires_grad_(), spec.drop(z["h"], kept)
        with torch.enable_grad():
            s = spec.activate(leaf.clone())  # which may work in place
        h, found = s.detach(), dict[str, Tensor]()
        if first == "gate":
            found["up"] = h * dh
            h, dh = h * z["up"], z["up"] * dh
        (found[first],) = torch.autograd.grad(s, leaf, dh)
        found["h"] = spec.drop(h, kept)
        return found

    def _products(self, rows: Span) -> dict[str, Tensor]:
        """a and b, as "gate" and "up"."""
        x, found = self.visit.x[rows.as_slice()], dict[str, Tensor]()
        for number, (name, matrix) in enumerate(self.into.items()):
            found[name] = self._buffer(number, rows)
            sum_of_products(found[name], [(x, matrix.t())], 1, self.biases[name])
        return found

    def _buffer(self, number: int, rows: Span) -> Tensor:
        shape = rows.size, self.features.size
        return self.visit.buffers[number][: shape[0] * shape[1]].view(shape)

    def _kept(self, rows: Span) -> Tensor | None:
        if not self.spec.dropout:
            return None
        start = self.visit.tile.span.start + self.features.start
        features = Span(start, start + self.features.size)
        return self.spec.kept(len(self.visit.x), rows, features, self.visit.x.device)


def _part_of(name: str, tensor: Tensor, features: Span) -> Tensor:
    """The features of a weight, a bias, or the gradient of one."""
    return tensor[:, features.as_slice()] if name == "down" else tensor[features.as_slice()]

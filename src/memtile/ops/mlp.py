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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final

import torch
from torch import Tensor

from memtile.geometry import Span, spans_of_size
from memtile.ops.activations import Activation, activated
from memtile.ops.live_bytes import counted_parts
from memtile.ops.mlp_tile import MlpTile, joined
from memtile.ops.products import (
    add_product,
    strips_of,
    sum_of_products,
    sum_of_rows,
    wide_dtype,
    widened,
)

BLOCK_BYTES: Final = 2 << 20
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
        x: Tensor,
        rows: int | None,
        features: int | None,
    ) -> "MlpSpec":
        """With the given block, and what is left out of it chosen for x (N, H)."""
        elements = BLOCK_BYTES // x.element_size()
        features = features or max(FEWEST_FEATURES, elements // max(1, rows or len(x)))
        rows = rows or max(1, elements // min(features, FEWEST_FEATURES))
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
        """s(z); ArgumentError where it has another shape or dtype, or is no tensor."""
        return activated(self.activation, z)


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
        self.inner, self.hidden = self.x.new_empty(len(self.names) * size), self.x.new_empty(size)

    def add_output(self, y: Tensor, is_first: bool) -> None:
        """Add h Dᵀ to y (N, M), or write it there."""
        for features in counted_parts(self.features, self.x):
            block = _Block(self, features)
            for rows in counted_parts(self.rows, self.x):
                h = block.compute_hidden(rows)
                add_product(y[rows.as_slice()], h, block.down.t(), is_first=is_first)
            is_first = False

    def add_gradients(self, grad: Tensor, found: Mapping[str, Tensor], is_first: bool) -> None:
        """Write the gradients that are in `found`, those of the tile's tensors by their names.

        To that of "x" they are added, unless it `is_first`.
        """
        wants_inner, x = bool(found.keys() - {"down", "down_low"}), found.get("x")
        for features in counted_parts(self.features, self.x):
            block, sums = _Block(self, features), _Sums(self, features, found)
            for rows in counted_parts(self.rows, self.x):
                some = grad[rows.as_slice()]
                if wants_inner:
                    block.compute_factors(rows, some)
                else:
                    block.compute_hidden(rows)
                if x is not None:
                    add_product(x[rows.as_slice()], block.inner, block.into, is_first=is_first)
                sums.add(block, rows, some)
            sums.write()
            is_first = False


class _Block:
    """Some features of a visit, in buffers that the next rows overwrite.

    Attributes:
        into: G over U (2T, H), or U.
        inner: a beside b (rows, 2T), or b; then their gradients.
        hidden: h (rows, T).
    """

    def __init__(self, visit: MlpVisit, features: Span) -> None:
        self.visit, self.features, self.spec = visit, features, visit.spec
        tile, dtype, part = visit.tile, visit.x.dtype, features.as_slice()
        own = [tile.down] if tile.down_low is None else [tile.down, tile.down_low]
        self.down = joined([each[:, part].to(dtype) for each in own]).contiguous()
        self.into = joined([self._widened(name, part) for name in visit.names])
        biases = [getattr(tile, f"{name}_bias") for name in visit.names]
        self.biases = [None if bias is None else bias[part].to(dtype) for bias in biases]
        self.inner = self.hidden = visit.hidden

    def _widened(self, name: str, part: slice) -> Tensor:
        """G or U for all columns of x."""
        tile, x = self.visit.tile, self.visit.x
        weight: Tensor = getattr(tile, name)[part].to(x.dtype)
        if weight.shape[1] == x.shape[1]:
            return weight
        made = weight.new_zeros((len(weight), x.shape[1]))
        tile.factor(name, made).copy_(weight)
        low = getattr(tile, f"{name}_low")
        if low is not None:
            tile.factor(f"{name}_low", made).copy_(low[part])
        return made

    def compute_hidden(self, rows: Span) -> Tensor:
        """h; what is in `inner` is lost."""
        kept = self._multiply(rows)
        for part, (first, *up) in self._strips():
            h = self.spec.activate(first)
            h = h * up[0] if up else h
            self.hidden[part] = self.spec.drop(h, None if kept is None else kept[part])
        return self.hidden

    def compute_factors(self, rows: Span, grad: Tensor) -> None:
        """h, and in `inner` da and db, from g (rows, M)."""
        kept = self._multiply(rows)
        sum_of_products(self.hidden, [(grad, self.down)], 1)
        width = self.features.size
        for part, inner in self._strips():
            dh = self.spec.drop(widened(self.hidden[part]), None if kept is None else kept[part])
            h, gradients = self._differentiate(dh, *inner)
            for out, gradient in zip(self.inner[part].split(width, 1), gradients, strict=True):
                out.copy_(gradient)
            # last: it overwrites dh, which the gradient of the identity, say, is
            self.hidden[part] = self.spec.drop(h, None if kept is None else kept[part])

    def of(self, name: str) -> Tensor:
        """da, where the name is "gate", or db."""
        columns: tuple[Tensor, ...] = self.inner.split(self.features.size, 1)
        return columns[self.visit.names.index(name)]

    def _differentiate(
        self, dh: Tensor, first: Tensor, *up: Tensor
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """h without dropout, and da and db, of a strip."""
        leaf = first.detach().requires_grad_()
        with torch.enable_grad():
            s = self.spec.activate(leaf.clone())  # which may work in place
        ds = dh * up[0] if up else dh
        # a step function, say, has no derivative that torch knows: it is zero
        gradients = (
            torch.autograd.grad(s, leaf, ds) if s.requires_grad else (ds.new_zeros(ds.shape),)
        )
        h = s.detach()
        return (h * up[0], (*gradients, h * dh)) if up else (h, gradients)

    def _strips(self) -> Iterator[tuple[slice, list[Tensor]]]:
        """Rows of a strip; of them a and b, or b, as what is between products is computed."""
        columns = self.inner.split(self.features.size, 1)
        for part in (strip.as_slice() for strip in strips_of(self.hidden)):
            yield part, [widened(column[part]) for column in columns]

    def _multiply(self, rows: Span) -> Tensor | None:
        """Compute `inner`; gives what dropout keeps of h."""
        visit, shape = self.visit, (rows.size, self.features.size)
        size = shape[0] * shape[1]
        self.hidden = visit.hidden[:size].view(shape)
        self.inner = visit.inner[: size * len(visit.names)].view(rows.size, -1)
        sum_of_products(self.inner, [(visit.x[rows.as_slice()], self.into.t())], 1)
        for column, bias in zip(self.inner.split(shape[1], 1), self.biases, strict=True):
            if bias is not None:
                column.add_(bias)
        if not self.spec.dropout:
            return None
        start = visit.tile.span.start + self.features.start
        features = Span(start, start + shape[1])
        return self.spec.kept(len(visit.x), rows, features, visit.x.device)


class _Sums:
    """The gradients of a block of features, summed over blocks of rows, in float32 if several.

    Those of G and U are one product, where both are wanted: a 16-bit one of columns of a wider
    matrix took 6 × the time (torch 2.13, CPU).
    """

    def __init__(self, visit: MlpVisit, features: Span, found: Mapping[str, Tensor]) -> None:
        self.visit, part = visit, features.as_slice()
        self.parts = {
            name: out[:, part] if name.startswith("down") else out[part]
            for name, out in found.items()
            if name != "x"
        }
        self.inner = [name for name in visit.names if name in found]
        self.totals: dict[str, Tensor] = {}

    def add(self, block: _Block, rows: Span, grad: Tensor) -> None:
        """Add a block of rows."""
        x, tile = self.visit.x[rows.as_slice()], self.visit.tile
        if self.inner:
            whole = len(self.inner) == len(self.visit.names)
            factor = block.inner if whole else block.of(self.inner[0]).contiguous()
            self._add("inner", factor.t(), tile.factor("up", x))
        for name in self.parts.keys() & {"gate_low", "up_low"}:
            self._add(name, block.of(name.removesuffix("_low")).t(), tile.factor(name, x))
        for name in self.parts.keys() & {"down", "down_low"}:
            self._add(name, tile.factor(name, grad).t(), block.hidden)
        for name in self.parts.keys() & {"gate_bias", "up_bias"}:
            factor = block.of(name.removesuffix("_bias"))
            part = sum_of_rows(factor)
            self.totals[name] = part + self.totals[name] if name in self.totals else part

    def _add(self, name: str, a: Tensor, b: Tensor) -> None:
        total, several = self.totals.get(name), len(self.visit.rows) > 1
        if total is None:
            dtype = wide_dtype(b.dtype) if several else b.dtype
            total = self.totals[name] = b.new_empty((a.shape[0], b.shape[1]), dtype=dtype)
            add_product(total, a, b, is_first=True)
        else:
            add_product(total, a, b)

    def write(self) -> None:
        """Write them to where they belong; zeros, without rows."""
        if "inner" in self.totals:
            parts = self.totals.pop("inner").chunk(len(self.inner))
            self.totals.update(zip(self.inner, parts, strict=True))
        for name, part in self.parts.items():
            if name in self.totals:
                part.copy_(self.totals[name])
            else:
                part.zero_()

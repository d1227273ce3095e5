"""Products with a weight whose 16-bit tiles are copied side by side first, a block at a time.

A sum of products over tiles is slow where the products are fast: on a CPU with AMX the float32 sums
of a 4×4 grid of 2048→8192 took as long as its products (bf16, 512 tokens). Tiles that lie side by
side are one product, summed in float32 inside: no rounded parts, so the dense layer's error, where
one copy holds all terms. The copies cost the same for any number of tokens, the sums more the more
tokens there are.

Shapes: N tokens; W (out, in) is the weight that the tiles make.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from memtile.geometry import Grid, Rect, Span, spans_of
from memtile.ops.products import SIXTEEN_BITS, sum_of_products

# oneDNN (torch 2.13, AMX, 2 threads) multiplies 512×2048 by 2048×512 on one thread, at 0.9 TFLOP/s,
# and by 2048×1024 at 1.8; so for 384 to 1024 rows and fewer than 1024 columns.
WIDE = 1024

# With this many terms and fewer than twice WIDE columns, the copy has about 16 MiB at most.
JOINED_TERMS = 4096

# Slices that begin elsewhere are slower: 35 against 29 ms for 4096→11008 at 512 tokens.
ALIGNED = 64

# With fewer, the copy costs more than the sums (tiles of 512×2048: as much at 256 tokens).
FEWEST_TOKENS = 256


def worth_joining(a: Tensor, grid: Grid, *, transposed: bool) -> bool:
    """Whether `multiply_joined` is faster than sums of the tiles' products.

    Copies and sums cost about the same where a tile has twice as many terms as there are tokens.
    """
    tokens = a.shape[:-1].numel()
    if not a.is_cpu or a.dtype not in SIXTEEN_BITS or tokens < FEWEST_TOKENS:
        return False
    terms, widths = grid.out_spans, grid.in_spans
    if transposed:
        terms, widths = widths, terms
    return widths[0].size < WIDE or (len(terms) > 1 and terms[0].size <= 2 * tokens)


def multiply_joined(
    a: Tensor,
    grid: Grid,
    tiles: Sequence[Tensor],
    biases: Sequence[Tensor] = (),
    *,
    transposed: bool,
) -> Tensor:
    """`a @ W`, or `a @ Wᵀ + bias` when `transposed`, outside of autograd.

    Args:
        a: (…, out), or (…, in) when transposed; N rows in all.
        grid: how the tiles cut W.
        tiles: row by row, in a's dtype.
        biases: of the rows of tiles, or none.
        transposed: whether W is transposed.

    Returns:
        (…, in), or (…, out) when transposed.
    """
    out = a.new_empty((*a.shape[:-1], grid.out_features if transposed else grid.in_features))
    matrix, result = (t.reshape(-1, t.shape[-1]) for t in (a, out))
    bias = torch.cat(list(biases)) if biases else None
    groups = _spans(matrix.shape[1], -(-matrix.shape[1] // JOINED_TERMS))
    blocks = _spans(result.shape[1], max(1, result.shape[1] // WIDE))
    buffer = a.new_empty(max(s.size for s in groups) * max(s.size for s in blocks))

    def factors(block: Span, group: Span) -> tuple[Tensor, Tensor]:
        rect = Rect(block, group) if transposed else Rect(group, block)
        joined = _join(grid, tiles, rect, buffer)
        return matrix[:, group.as_slice()], joined.t() if transposed else joined

    for block in blocks:
        pairs = (factors(block, group) for group in groups)
        part = None if bias is None else bias[block.as_slice()]
        sum_of_products(result[:, block.as_slice()], pairs, len(groups), part)
    return out


def _spans(size: int, parts: int) -> tuple[Span, ...]:
    """That many spans, about even, which begin at multiples of `ALIGNED`."""
    starts = (size * part // parts // ALIGNED * ALIGNED for part in range(parts))
    return spans_of([*starts, size])


def _join(grid: Grid, tiles: Sequence[Tensor], rect: Rect, buffer: Tensor) -> Tensor:
    """The rectangle of W: a view of the tile that holds it, or copied into the buffer."""
    shared = [
        (part, tiles[row * grid.in_splits + column][part.since(grid.rect(row, column)).index])
        for (row, column), part in grid.overlapping(rect)
    ]
    if len(shared) == 1:
        return shared[0][1]
    joined = buffer[: rect.out.size * rect.into.size].view(rect.shape)
    for part, values in shared:
        joined[part.since(rect).index].copy_(values)
    return joined

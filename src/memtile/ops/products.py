"""Sums of matrix products, written in place and accumulated in float32; autocast and transforms.

Shapes: N tokens, K inner, M outer; a (N, K), b (K, M), out (N, M), any of them a slice.

A 16-bit product can be written in float32 by CUDA's `mm(out_dtype=…)`; the CPU has no such
product in torch 2.13, so there each part is rounded once to 16 bits before it is added in
float32: √2 of the dense error is then the floor, whatever the number of parts. (`ops.joined` makes
one product of them, where that is faster.)
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache, reduce

import torch
from torch import Tensor

from memtile.geometry import Span, spans_of_size
from memtile.homes import discard_pages
from memtile.ops.live_bytes import counted_parts

SIXTEEN_BITS = frozenset({torch.float16, torch.bfloat16})

# A mixed add makes a float32 copy of the 16-bit operand; in blocks of about 1 MiB the copy stays
# in the cache (512×16384 bf16 on 2 cores: 32 ms at once, 11 ms in blocks).
BLOCK_ELEMENTS = 1 << 18

# Of a strip, of which several float32 tensors are in memory at once.
STRIP_ELEMENTS = 1 << 16

# MKL adds the terms of a product with fewer than 12 rows or columns one by one: 1.6 × the error of
# a wide product at 515 terms, 4.2 × at 4096 (float32, AVX-512); in blocks of 128 it is below 1.
NARROW_SIDE, BLOCK_TERMS = 16, 128


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums of results of this dtype are kept in."""
    return torch.float32 if dtype in SIXTEEN_BITS else dtype


def widened(tensor: Tensor) -> Tensor:
    """The tensor in that dtype."""
    return tensor.to(wide_dtype(tensor.dtype))


def narrow_in_place(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of a contiguous float32 tensor in 16 bits, in the first half of its memory.

    The other half goes back to the kernel. A copy would be made while all the sums are in memory.
    """
    flat = wide.view(-1)
    narrow = flat.view(dtype)
    for span in spans_of_size(flat.numel(), BLOCK_ELEMENTS) if flat.numel() else ():
        narrow[span.as_slice()] = flat[span.as_slice()].to(dtype)  # a copy: they may overlap
    discard_pages(narrow[flat.numel() :])
    return narrow[: flat.numel()].view(wide.shape)


def strips_of(block: Tensor) -> Iterator[Span]:
    """Rows of a block that stay in a CPU's cache together; elsewhere all of them.

    On the meta device as on the CPU, of which the planner counts a step there: `counted_parts`.
    """
    rows, on_cpu = max(1, len(block)), block.is_cpu or block.is_meta
    size = max(1, STRIP_ELEMENTS // max(1, block.shape[1])) if on_cpu else rows
    yield from counted_parts(spans_of_size(len(block), size), block)


def sum_of_rows(block: Tensor) -> Tensor:
    """(M,) of a block (N, M); of 16 bits in float32, without a float32 copy of the block."""
    dtype = wide_dtype(block.dtype)
    if dtype == block.dtype or not (block.is_cpu or block.is_meta):
        return block.sum(0, dtype=dtype)  # which makes such a copy on a CPU
    total = block.new_zeros(block.shape[1], dtype=dtype)
    for rows in strips_of(block):
        total += block[rows.as_slice()].to(dtype).sum(0)
    return total


def needs_float32_sum(dtype: torch.dtype, parts: int) -> bool:
    """Whether a sum of `parts` results of this dtype must be kept in float32."""
    return parts > 1 and dtype in SIXTEEN_BITS


def sum_of_products(
    out: Tensor, pairs: Iterable[tuple[Tensor, Tensor]], parts: int, bias: Tensor | None = None
) -> None:
    """Write `Σ a @ b + bias` into `out` (N, M), in place and outside of autograd.

    The `parts` pairs (a, b), at least 1, are in out's dtype and drawn one at a time.
    """
    if needs_float32_sum(out.dtype, parts):
        _sum_in_float32(out, pairs, bias)
    elif out.shape[1] < NARROW_SIDE:
        _sum_narrow(out, pairs, bias)
    elif out.is_cpu and out.dtype not in SIXTEEN_BITS and not out.is_contiguous():
        # A product into a slice of a wide output is slower than into a matrix of its own: 595
        # against 457 ms for 4×4 tiles of 16384×4096 at 512 rows, 615 against 530 for 4×1 (float32,
        # 2 cores); 16-bit products do not care.
        total = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        _sum_in_place(total, pairs, bias)
        out.copy_(total)
    else:
        _sum_in_place(out, pairs, bias)


def write_products(
    out: Tensor, pairs: Iterable[tuple[Tensor, Tensor]], parts: int, like: Tensor
) -> None:
    """`sum_of_products` of pairs with the dtype and device of `like`, into an `out` of any."""
    if out.dtype == like.dtype and out.device == like.device:
        sum_of_products(out, pairs, parts)
        return
    product = like.new_empty(out.shape)
    sum_of_products(product, pairs, parts)
    out.copy_(product)


def add_product(
    total: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None, *, is_first: bool = False
) -> None:
    """Add `a @ b + bias` to `total` (N, M), or write it there, in place and outside of autograd.

    The total of 16-bit products is float32, and its `bias` is added in float32.
    """
    same = total.dtype == a.dtype
    if same and is_first:
        sum_of_products(total, [(a, b)], 1)
    elif same and min(total.shape) >= NARROW_SIDE and total.is_contiguous():
        torch.addmm(total, a, b, out=total)
    elif (total.is_cpu or total.is_meta) and not same and a.is_contiguous():
        # in parts, of which the 16-bit product stays in the cache
        rows = max(1, 4 * BLOCK_ELEMENTS // max(1, total.shape[1]))
        for some_total, some_a in zip(total.split(rows), a.split(rows), strict=True):
            _add_part(some_total, multiply(some_a, b), is_first)
    else:
        wide = not same and writes_float32(total.device.type, a.dtype)
        _add_part(total, multiply_to_float32(a, b) if wide else multiply(a, b), is_first)
    if bias is not None:
        total.add_(bias)


def _add_part(total: Tensor, part: Tensor, is_first: bool) -> None:
    if is_first:
        total.copy_(part)
    else:
        add_into(total, part)


def _sum_in_place(out: Tensor, pairs: Iterable[tuple[Tensor, Tensor]], bias: Tensor | None) -> None:
    for number, (a, b) in enumerate(pairs):
        if number:
            torch.addmm(out, a, b, out=out)
        elif bias is not None:
            torch.addmm(bias, a, b, out=out)
        else:
            torch.mm(a, b, out=out)


def _sum_narrow(out: Tensor, pairs: Iterable[tuple[Tensor, Tensor]], bias: Tensor | None) -> None:
    for number, (a, b) in enumerate(pairs):
        if number:
            out.add_(multiply(a, b))
        else:
            torch.add(multiply(a, b), 0 if bias is None else bias, out=out)


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a @ b as a new matrix, differentiable; a narrow result is summed in blocks of terms."""
    wide = min(a.shape[0], b.shape[1]) >= NARROW_SIDE
    if wide or a.dtype in SIXTEEN_BITS or not a.is_cpu:
        return torch.mm(a, b)
    blocks = zip(a.split(BLOCK_TERMS, 1), b.split(BLOCK_TERMS, 0), strict=True)
    return reduce(torch.add, (torch.mm(some_a, some_b) for some_a, some_b in blocks))


def add_into(total: Tensor, part: Tensor) -> None:
    """Add a 16-bit `part` (…, M) to a float32 `total` of the same shape, in cache-sized blocks."""
    if part.dim() < 2 or part.dtype == total.dtype or part.is_cuda:
        total.add_(part)
        return
    if part.dim() > 2:
        total, part = total.view(-1, total.shape[-1]), part.reshape(-1, part.shape[-1])
    rows = max(1, BLOCK_ELEMENTS // max(1, part.shape[-1]))
    for some_total, some_part in zip(total.split(rows), part.split(rows), strict=True):
        some_total.add_(some_part)


def _sum_in_float32(
    out: Tensor, pairs: Iterable[tuple[Tensor, Tensor]], bias: Tensor | None
) -> None:
    total = torch.empty(out.shape, dtype=torch.float32, device=out.device)
    scratch = (
        None
        if writes_float32(out.device.type, out.dtype)
        else torch.empty_like(total, dtype=out.dtype)
    )
    for number, (a, b) in enumerate(pairs):
        part = multiply_to_float32(a, b) if scratch is None else torch.mm(a, b, out=scratch)
        if number:
            add_into(total, part)
        else:
            total.copy_(part)
    if bias is not None:
        total.add_(bias.to(torch.float32))
    out.copy_(total)


def multiply_to_float32(a: Tensor, b: Tensor) -> Tensor:
    """The float32 product of two 16-bit matrices, where `writes_float32` says so."""
    return torch.mm(a, b, out_dtype=torch.float32)


@lru_cache
def writes_float32(device_type: str, dtype: torch.dtype) -> bool:
    """Whether this kind of device can write a product of this dtype in float32; tried once."""
    if device_type == "cpu":
        return False
    tiny = torch.zeros(16, 16, dtype=dtype, device=device_type)
    try:
        multiply_to_float32(tiny, tiny)
    except (RuntimeError, TypeError):  # an older torch, or a device without such a kernel
        return False
    return True


def transformed() -> bool:
    """Whether the call is compiled, exported, in a `torch.func` transform or in forward-mode AD.

    These need operations without in-place writes into one output: the function that writes slices
    cannot be vmapped, since `mark_dirty` and generated vmap rules exclude each other.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def is_batched(gradient: Tensor) -> bool:
    """Whether it is a batch of gradients (`is_grads_batched=True`), which out= cannot write."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(gradient) or functorch.is_legacy_batchedtensor(gradient)


def autocast_dtype(tensor: Tensor, device_type: str | None = None) -> torch.dtype | None:
    """The dtype that autocast gives this tensor in a matrix product; None where it is off.

    `device_type` is the product's, where it is not the tensor's.
    """
    if tensor.is_meta or not tensor.is_floating_point():  # asked about meta, torch raises
        return None
    device_type = device_type or tensor.device.type
    if not torch.is_autocast_enabled(device_type):
        return None
    return None if tensor.dtype == torch.float64 else torch.get_autocast_dtype(device_type)

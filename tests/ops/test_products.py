"""Sums of products: written in place, and accumulated in float32."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from memtile.ops import products
from memtile.ops.products import (
    add_into,
    multiply,
    narrow_in_place,
    needs_float32_sum,
    sum_of_products,
)
from memtile.testing import assert_as_accurate

SIXTEEN_BITS = [torch.bfloat16, torch.float16]


def operands(
    dtype: torch.dtype, rows: int = 131, terms: int = 389, width: int = 131, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """a, b and a bias, random in the given dtype."""
    torch.manual_seed(seed)
    shapes = [(rows, terms), (terms, width), (width,)]
    a, b, bias = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)
    return a, b, bias


def parts_of(a: Tensor, b: Tensor, parts: int) -> list[tuple[Tensor, Tensor]]:
    """The product as a sum of that many."""
    return list(zip(a.tensor_split(parts, 1), b.tensor_split(parts, 0), strict=True))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("parts", [1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *SIXTEEN_BITS], ids=str)
def test_the_sum_is_written_into_its_slice_and_nowhere_else(dtype, parts, with_bias):
    """`out` may be a slice of a wider tensor, whose other columns stay; the bias counts once."""
    torch.manual_seed(0)  # small whole numbers: every sum is exact in every dtype
    a, b, bias = (torch.randint(-3, 4, shape).to(dtype) for shape in [(5, 14), (14, 19), (19,)])
    whole = torch.full((5, 30), 7.0, dtype=dtype)

    sum_of_products(whole[:, 4:23], parts_of(a, b, parts), parts, bias if with_bias else None)

    truth = a.double() @ b.double() + (bias.double() if with_bias else 0)
    assert torch.equal(whole[:, 4:23].double(), truth)
    assert (whole[:, :4] == 7).all()
    assert (whole[:, 23:] == 7).all()


def test_pairs_are_drawn_one_at_a_time():
    """A pair is asked for only when the one before it has been added."""
    a, b, _ = operands(torch.float32, 3, 8, 20)
    out, sums = torch.zeros(3, 20), []

    def pairs():
        for pair in parts_of(a, b, 4):
            sums.append(out.clone())
            yield pair

    sum_of_products(out, pairs(), 4)

    partial = [sum((x @ y for x, y in parts_of(a, b, 4)[:n]), torch.zeros(3, 20)) for n in range(4)]
    torch.testing.assert_close(sums, partial)


@pytest.mark.parametrize("parts", [2, 7, 64])
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_a_sixteen_bit_sum_has_at_most_one_and_a_half_times_the_dense_error(dtype, parts):
    """Each part is rounded once, the sum once: √2 of the dense error, for any number of parts."""
    a, b, bias = operands(dtype)
    truth = a.double() @ b.double() + bias.double()
    out = torch.empty_like(truth, dtype=dtype)

    sum_of_products(out, parts_of(a, b, parts), parts, bias)

    assert_as_accurate(out, torch.addmm(bias, a, b), truth, 1.5)


@pytest.mark.parametrize("parts", [2, 7, 64])
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_where_products_are_written_in_float32_the_sum_is_as_accurate_as_the_dense_product(
    monkeypatch, dtype, parts
):
    """The branch for devices with such a product: at most 1.1 × the dense error, no 16-bit part."""
    a, b, bias = operands(dtype)
    truth = a.double() @ b.double() + bias.double()
    out = torch.empty_like(truth, dtype=dtype)
    widened = []

    def multiply_to_float32(some_a: Tensor, some_b: Tensor) -> Tensor:
        widened.append(some_a.dtype)
        return some_a.to(torch.float32) @ some_b.to(torch.float32)

    monkeypatch.setattr(products, "writes_float32", lambda device_type, dtype: True)
    monkeypatch.setattr(products, "multiply_to_float32", multiply_to_float32)
    sum_of_products(out, parts_of(a, b, parts), parts, bias)

    assert widened == [dtype] * parts
    assert_as_accurate(out, torch.addmm(bias, a, b), truth, 1.1)


def test_the_cpu_writes_no_sixteen_bit_product_in_float32():
    """torch has no such product there: it is known, not tried."""
    assert not products.writes_float32("cpu", torch.bfloat16)
    with pytest.raises((RuntimeError, TypeError)):
        products.multiply_to_float32(*operands(torch.bfloat16, 4, 4, 4)[:2])


@pytest.mark.parametrize("width", [1, 2, 7, 8, 11, 12, 15])
def test_narrow_products_are_as_accurate_as_wide_ones(width):
    """Columns of fewer than 12 features, which the library adds term by term, are no worse."""
    a, b, _ = operands(torch.float32, 1024, 2048, 64)
    truth = a.double() @ b.double()
    dense = a @ b
    thin = b[:, :width].contiguous()
    out = torch.empty(1024, width)

    sum_of_products(out, [(a, thin)], 1)

    factor = 1.1 * _share(dense, truth, width)
    assert_as_accurate(out, dense[:, :width], truth[:, :width], factor)
    assert_as_accurate(multiply(thin.t(), a.t()).t(), dense[:, :width], truth[:, :width], factor)


def _share(dense: Tensor, truth: Tensor, width: int) -> float:
    """The whole dense product's error in units of its first columns' (few elements vary more)."""
    errors = (dense.double() - truth).square()
    return float((errors.mean() / errors[:, :width].mean()).sqrt())


def test_a_narrow_product_is_differentiable():
    """gradcheck passes through the blocks that a narrow product is summed in."""
    torch.manual_seed(0)
    a = torch.randn(3, 131, dtype=torch.float64, requires_grad=True)
    b = torch.randn(131, 2, dtype=torch.float64, requires_grad=True)

    assert gradcheck(multiply, (a, b))


@pytest.mark.parametrize("rows", [0, 3])
def test_a_product_without_rows_or_terms_is_empty_or_zero(rows):
    """An empty batch has an empty output and weight gradients of zeros."""
    x, g = torch.ones(rows, 5), torch.ones(rows, 7)

    assert multiply(x, torch.ones(5, 7)).shape == (rows, 7)
    assert torch.equal(multiply(g.t(), x), torch.full((7, 5), float(rows)))


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 5, 7), (2, 3, 5, 7), (0, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS], ids=str)
def test_adding_in_blocks_gives_the_bits_of_adding_at_once(monkeypatch, dtype, shape):
    """Blocks save time, not accuracy: every float32 sum is the same."""
    torch.manual_seed(0)
    total, part = torch.randn(shape), torch.randn(shape).to(dtype)
    expected = total + part.to(torch.float32)
    monkeypatch.setattr(products, "BLOCK_ELEMENTS", 15)  # two rows of 7 in each block

    add_into(total, part)

    assert torch.equal(total, expected)


@pytest.mark.parametrize("shape", [(7,), (5, 7), (0, 7), (3, 2048)], ids=str)
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_narrowing_in_place_gives_the_bits_of_a_copy_in_half_the_memory(monkeypatch, dtype, shape):
    """Strip by strip, of which the first overwrites itself."""
    torch.manual_seed(0)
    wide = torch.randn(shape)
    expected, memory = wide.to(dtype), wide.untyped_storage().data_ptr()
    monkeypatch.setattr(products, "BLOCK_ELEMENTS", 3)

    narrow = narrow_in_place(wide, dtype)

    assert torch.equal(narrow, expected)
    assert narrow.is_contiguous()
    assert narrow.untyped_storage().data_ptr() == memory


def test_narrowing_in_place_gives_half_of_the_memory_back():
    """16 MiB of sums leave 8 in memory, though their tensor has 16."""
    wide = torch.ones(4 << 20)
    before = resident_bytes()

    narrow = narrow_in_place(wide, torch.bfloat16)

    assert before - resident_bytes() > 7 << 20
    assert torch.equal(narrow, torch.ones(4 << 20, dtype=torch.bfloat16))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize(
    ("dtype", "parts", "needed"),
    [
        (torch.bfloat16, 2, True),
        (torch.float16, 2, True),
        (torch.bfloat16, 1, False),
        (torch.float32, 2, False),
        (torch.float64, 9, False),
    ],
)
def test_a_float32_sum_is_needed_for_several_sixteen_bit_results_only(dtype, parts, needed):
    """One result needs no sum, and wider dtypes sum in their own."""
    assert needs_float32_sum(dtype, parts) is needed

"""Tensors made of others: rows that move are read where they are, anything else is computed."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from memtile.convert.derived import Computed, Latest, RowMap, derived, pieces_of

WIDTH = 10


@dataclass
class Source:
    """A tensor that notes what is read of it."""

    tensor: Tensor
    reads: list[tuple[int, int]] = field(default_factory=list)

    @property
    def shape(self):
        return self.tensor.shape

    @property
    def dtype(self):
        return self.tensor.dtype

    def elements(self, start, stop):
        self.reads.append((start, stop))
        return self.tensor.reshape(-1)[start:stop].clone()

    def rows(self, start, stop):
        return self.tensor[start:stop].clone()


def sources(*shapes, dtype=torch.float32):
    """Sources a, b, … with different values."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: Source(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in zip("abcdef", shapes, strict=False)
    }


def rope(x):
    """Rows of two heads, pairs (even, odd) moved apart."""
    return x.view(2, x.shape[0] // 4, 2, x.shape[1]).transpose(1, 2).reshape(x.shape)


MOVED = {
    "the same": (lambda t: t["a"], [(8, WIDTH)]),
    "one below another": (lambda t: torch.cat([t["b"], t["a"]]), [(8, WIDTH), (5, WIDTH)]),
    "stacked": (lambda t: torch.stack([t["a"], t["b"]]), [(7, WIDTH)] * 2),
    "stacked and joined": (
        lambda t: torch.cat([torch.stack([t["a"], t["b"]]), torch.stack([t["c"], t["d"]])], 1),
        [(7, WIDTH)] * 4,
    ),
    "a part": (lambda t: t["a"].chunk(3)[1].contiguous(), [(9, WIDTH)]),
    "every second": (lambda t: t["a"][::2], [(9, WIDTH)]),
    "reversed": (lambda t: t["a"].flip(0), [(9, WIDTH)]),
    "permuted heads": (lambda t: rope(t["a"]), [(16, WIDTH)]),
    "another shape": (lambda t: t["a"].reshape(2, -1), [(2, 3, 5, WIDTH)]),
    "narrow rows": (lambda t: torch.cat([t["a"], t["b"]]), [(6, 3), (2, 3)]),
    "side by side": (lambda t: torch.cat([t["a"], t["b"]], 1), [(8, WIDTH), (8, WIDTH)]),
    "an inner dimension": (lambda t: t["a"].transpose(0, 1), [(3, 5, WIDTH)]),
}
COMPUTED = {
    "transposed": (lambda t: t["a"].t(), [(8, WIDTH)]),
    "halves of rows": (lambda t: t["a"].chunk(2, dim=1)[1], [(8, WIDTH)]),
    "columns in another order": (
        lambda t: t["a"].view(8, 2, 2).transpose(1, 2).reshape(8, 4),
        [(8, 4)],
    ),
    "one more": (lambda t: t["a"] + 1, [(8, WIDTH)]),
    "negative": (lambda t: -t["a"], [(8, WIDTH)]),
    "padded": (lambda t: torch.cat([t["a"], t["a"].new_zeros(2, t["a"].shape[1])]), [(8, WIDTH)]),
    "a vector": (lambda t: torch.cat([t["a"], t["b"]]), [(8,), (5,)]),
    "rows of two widths": (lambda t: t["b"], [(8, WIDTH), (8, WIDTH + 1)]),
    "a width that is looked at": (lambda t: t["a"].view(8, 2, WIDTH // 2), [(8, WIDTH)]),
}


def made_of(make, given):
    """What is made of the sources, under one name."""
    found = derived(given, lambda tensors, shown: {"made": make(tensors)}, None, Latest())
    return found["made"], make({name: source.tensor for name, source in given.items()})


@pytest.mark.parametrize("name", MOVED)
def test_moved_rows_are_read_where_they_are(name):
    """Any stretch of elements, and of rows, has the bits of the whole; no more rows are read."""
    make, shapes = MOVED[name]
    found, truth = made_of(make, given := sources(*shapes))

    assert isinstance(found, RowMap)
    assert found.shape == truth.shape
    flat = truth.reshape(-1)
    for start in range(0, flat.numel(), 7):
        for stop in (start + 1, min(start + 23, flat.numel())):
            assert torch.equal(found.elements(start, stop), flat[start:stop])
    assert torch.equal(found.rows(1, truth.shape[0]), truth[1:])
    for source in given.values():
        source.reads.clear()
    width = given["a"].shape[-1]
    found.elements(0, width)
    assert [stop - start for source in given.values() for start, stop in source.reads] == [width]


@pytest.mark.parametrize("name", MOVED)
def test_pieces_are_where_the_rows_lie(name):
    """Joined, the pieces of a stretch of rows are its elements."""
    make, shapes = MOVED[name]
    found, truth = made_of(make, given := sources(*shapes))
    start, stop = given["a"].shape[-1], truth.numel()

    pieces = list(pieces_of(found, start, stop))

    joined = [each.source.elements(each.first, each.first + each.count) for each in pieces]
    assert torch.equal(torch.cat(joined), truth.reshape(-1)[start:stop])


@pytest.mark.parametrize("name", COMPUTED)
def test_anything_else_is_computed(name):
    """Its values are those of the function, and are read from all of its sources."""
    make, shapes = COMPUTED[name]
    found, truth = made_of(make, sources(*shapes))

    assert isinstance(found, Computed)
    assert found.shape == truth.shape
    assert torch.equal(found.elements(1, truth.numel()), truth.reshape(-1)[1:])
    assert torch.equal(found.rows(0, 2), truth[:2])


def test_nothing_is_read_before_values_are_asked_for():
    """Neither what can be moved nor what must be computed."""
    for make, shapes in (*MOVED.values(), *COMPUTED.values()):
        _, _ = made_of(make, given := sources(*shapes))

        assert not any(source.reads for source in given.values())


def test_results_of_one_call_are_kept_until_the_next():
    """Three results of a call need its sources once; another call frees them."""
    latest = Latest()
    first, second = sources((6, 4)), sources((6, 4))

    def make(tensors, shown):
        return {str(n): part for n, part in enumerate(tensors["a"].t().contiguous().chunk(2))}

    found = derived(first, make, None, latest), derived(second, make, None, latest)
    for each in ("0", "1"):
        found[0][each].elements(0, 12)
    assert len(first["a"].reads) == 1
    found[1]["0"].elements(0, 12)

    assert latest.of is found[1]["1"]._call
    found[0]["0"].elements(0, 12)
    assert len(first["a"].reads) == 2


def test_sources_are_cast_before_they_come_to_the_function():
    """A sum in 16 bits is that of cast values, not the cast of a sum."""
    given = sources((5, 6), (5, 6))

    found = derived(
        given,
        lambda t, shown: {"sum": t["a"] + t["b"]},
        torch.bfloat16,
        Latest(),
    )["sum"]

    cast = [source.tensor.bfloat16() for source in given.values()]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.rows(0, 5), cast[0] + cast[1])


def test_sources_of_two_dtypes_come_as_the_one_that_is_wanted():
    """Moved rows are cast too, where their sources are of two dtypes."""
    a, b = sources((5, 6))["a"], sources((5, 6), dtype=torch.float16)["a"]

    found = derived(
        {"a": a, "b": b},
        lambda t, shown: {"joined": torch.cat([t["a"], t["b"]])},
        torch.bfloat16,
        Latest(),
    )["joined"]

    assert isinstance(found, RowMap)
    assert torch.equal(found.rows(0, 10), torch.cat([a.tensor.bfloat16(), b.tensor.bfloat16()]))


def test_what_a_function_looks_at_is_as_narrow_as_its_probes():
    """A size that is compared with another tensor's stays comparable."""
    wanted = torch.empty(8, WIDTH, device="meta")

    def make(tensors, shown):
        same = tensors["a"].shape == shown(wanted).shape
        return {"made": tensors["a"] if same else tensors["a"].t()}

    found = derived(sources((8, WIDTH)), make, None, Latest())["made"]

    assert isinstance(found, RowMap)

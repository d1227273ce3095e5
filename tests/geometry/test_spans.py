"""Spans: cutting one dimension into ranges."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtile.errors import MemtileError, SplitsError
from memtile.geometry import Span, partition_uniform, spans_of

SIZES = st.integers(0, 10_000)
PARTS = st.integers(1, 300)
SPANS = st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda ends: Span(*sorted(ends)))


@pytest.mark.parametrize(
    ("num_items", "num_parts", "bounds"),
    [
        (10, 3, [0, 4, 7, 10]),
        (10, 4, [0, 3, 6, 8, 10]),
        (32, 5, [0, 7, 14, 20, 26, 32]),
        (7, 1, [0, 7]),
        (7, 7, [0, 1, 2, 3, 4, 5, 6, 7]),
        (0, 2, [0, 0, 0]),
        (2, 3, [0, 1, 2, 2]),
    ],
)
def test_partition_uniform_gives_the_bounds_of_the_contract(num_items, num_parts, bounds):
    """The bounds are a list from 0 to the number of items, the longer spans first."""
    assert partition_uniform(num_items, num_parts) == bounds


@given(num_items=SIZES, num_parts=PARTS)
def test_spans_differ_by_at_most_one_and_the_longer_come_first(num_items, num_parts):
    """Whatever the numbers, sizes differ by at most one and never grow along the way."""
    sizes = [span.size for span in spans_of(partition_uniform(num_items, num_parts))]

    assert len(sizes) == num_parts
    assert sum(sizes) == num_items
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("num_items", "num_parts"), [(4, 0), (4, -1), (-1, 2)])
def test_partition_uniform_refuses_what_cannot_be_cut(num_items, num_parts):
    """No part at all, or fewer than no items, is refused with both numbers and the way out."""
    with pytest.raises(SplitsError, match="pass num_parts >= 1 and num_items >= 0") as raised:
        partition_uniform(num_items, num_parts)

    assert f"num_items={num_items}, num_parts={num_parts}" in str(raised.value)
    assert isinstance(raised.value, (MemtileError, RuntimeError, ValueError))


@given(one=SPANS, other=SPANS)
def test_overlap_holds_the_indices_that_both_spans_hold(one, other):
    """An overlap is the intersection of the two ranges, None when it is empty."""
    common = set(range(one.start, one.stop)) & set(range(other.start, other.stop))

    shared = one.overlap(other)

    assert (set(range(shared.start, shared.stop)) if shared else set()) == common


def test_a_span_is_a_slice_and_can_be_counted_from_elsewhere():
    """`as_slice` selects the span's indices; `since` moves their origin."""
    span = Span(3, 7)

    assert list(range(10))[span.as_slice()] == [3, 4, 5, 6]
    assert span.since(2) == Span(1, 5)
    assert span.size == 4

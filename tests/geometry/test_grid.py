"""Grids: one weight cut in both dimensions."""

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtile.errors import SplitsError, TileShapeError
from memtile.geometry import Grid, Rect, Span

FEATURES = st.integers(1, 400)


def _shapes(out_sizes: list[int], in_sizes: list[int]) -> dict[tuple[int, int], tuple[int, int]]:
    return {
        (o, i): (rows, columns)
        for o, rows in enumerate(out_sizes)
        for i, columns in enumerate(in_sizes)
    }


@st.composite
def _grids(draw) -> Grid:
    sizes = st.lists(st.integers(1, 6), min_size=1, max_size=5)
    return Grid(*(tuple(accumulate(draw(sizes), initial=0)) for _ in range(2)))


def test_a_uniform_grid_has_the_spans_of_partition_uniform_in_both_dimensions():
    """Rows and columns are cut independently, each as even as possible."""
    grid = Grid.uniform(10, 32, out_splits=4, in_splits=5)

    assert grid.out_parts == (0, 3, 6, 8, 10)
    assert grid.in_parts == (0, 7, 14, 20, 26, 32)
    assert (grid.out_features, grid.in_features) == (10, 32)
    assert (grid.out_splits, grid.in_splits) == (4, 5)
    assert grid.rect(1, 3) == Rect(Span(3, 6), Span(20, 26))
    assert grid.rect(1, 3).shape == (3, 6)
    assert str(grid) == "4×5"


@given(out_features=FEATURES, in_features=FEATURES, data=st.data())
def test_tiles_cover_each_element_once(out_features, in_features, data):
    """The areas of the tiles add up to the weight's, and no two tiles share an element."""
    out_splits = data.draw(st.integers(1, min(out_features, 6)))
    in_splits = data.draw(st.integers(1, min(in_features, 6)))
    grid = Grid.uniform(out_features, in_features, out_splits, in_splits)

    rects = [grid.rect(*index) for index in grid.indices()]

    assert sum(rows * columns for rows, columns in (rect.shape for rect in rects)) == (
        out_features * in_features
    )
    assert all(one.overlap(other) is None for n, one in enumerate(rects) for other in rects[:n])


def test_indices_run_row_by_row():
    """Tiles are visited in the order in which a row of the output is summed."""
    assert list(Grid.uniform(5, 5, 2, 3).indices()) == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 1),
        (1, 2),
    ]


@given(out_features=FEATURES, in_features=FEATURES, max_elements=st.integers(1, 200_000))
def test_fewest_keeps_every_tile_within_the_limit(out_features, in_features, max_elements):
    """No tile of the grid holds more than `max_elements`."""
    grid = Grid.fewest(out_features, in_features, max_elements)

    rows, columns = grid.rect(0, 0).shape
    assert rows * columns <= max_elements


@given(out_features=FEATURES, in_features=FEATURES, max_elements=st.integers(1, 200_000))
def test_fewest_makes_no_split_that_the_limit_does_not_ask(out_features, in_features, max_elements):
    """With one row or one column of tiles fewer, a tile would break the limit."""
    grid = Grid.fewest(out_features, in_features, max_elements)

    def largest(out_splits: int, in_splits: int) -> int:
        rows, columns = (
            Grid.uniform(out_features, in_features, out_splits, in_splits).rect(0, 0).shape
        )
        return rows * columns

    if grid.out_splits > 1:
        assert largest(grid.out_splits - 1, grid.in_splits) > max_elements
    if grid.in_splits > 1:
        assert largest(grid.out_splits, grid.in_splits - 1) > max_elements


def test_fewest_cuts_rows_and_keeps_them_whole_where_they_fit():
    """Row tiles are preferred; columns are cut only when one row is too long by itself."""
    assert str(Grid.fewest(100, 30, max_elements=300)) == "10×1"
    assert str(Grid.fewest(100, 30, max_elements=30)) == "100×1"
    assert str(Grid.fewest(100, 30, max_elements=29)) == "100×2"
    assert str(Grid.fewest(100, 30, max_elements=3000)) == "1×1"


@pytest.mark.parametrize("max_elements", [0, -5])
def test_fewest_refuses_a_tile_that_can_hold_nothing(max_elements):
    """A limit below one element is refused with its value."""
    with pytest.raises(SplitsError, match=f"{max_elements} elements"):
        Grid.fewest(4, 4, max_elements)


@given(
    out_sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    in_sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
)
def test_a_grid_is_read_from_the_shapes_of_its_tiles(out_sizes, in_sizes):
    """Any spans, however uneven, are found again from the shapes alone."""
    grid = Grid.of_shapes(_shapes(out_sizes, in_sizes))

    assert [span.size for span in grid.out_spans] == out_sizes
    assert [span.size for span in grid.in_spans] == in_sizes


def test_the_uneven_spans_of_older_releases_are_read_as_they_are():
    """A last span with the whole remainder, as the original made before 0.10.1, is found."""
    assert Grid.of_shapes(_shapes([3, 3, 4], [2, 5])) == Grid((0, 3, 6, 10), (0, 2, 7))


def test_shapes_with_a_missing_tile_are_refused():
    """A grid with a hole names the missing tiles."""
    shapes = _shapes([2, 3], [4, 5])
    del shapes[1, 0]

    with pytest.raises(TileShapeError, match=r"\[\(1, 0\)\] of a 2×2 grid are missing"):
        Grid.of_shapes(shapes)


def test_shapes_that_do_not_line_up_are_refused():
    """A tile higher or wider than its row or column is named with its shape."""
    shapes = _shapes([2, 3], [4, 5]) | {(1, 1): (3, 6)}

    with pytest.raises(TileShapeError, match=r"tile \(1, 1\) of shape \(3, 6\)"):
        Grid.of_shapes(shapes)


@given(one=_grids(), data=st.data())
def test_tiles_of_another_grid_that_overlap_a_tile_cover_it_once(one, data):
    """Reading a tile's rectangle out of any other grid meets each of its elements once."""
    other = Grid.uniform(
        one.out_features,
        one.in_features,
        data.draw(st.integers(1, one.out_features)),
        data.draw(st.integers(1, one.in_features)),
    )
    target = other.rect(0, other.in_splits - 1)

    found = list(one.overlapping(target))

    seen = [
        (row, column)
        for _, shared in found
        for row in range(shared.out.start, shared.out.stop)
        for column in range(shared.into.start, shared.into.stop)
    ]
    assert len(seen) == len(set(seen)) == target.shape[0] * target.shape[1]
    assert all(one.rect(*index).overlap(target) == shared for index, shared in found)


def test_a_rectangle_counted_from_another_indexes_inside_it():
    """`since` and `index` select, in a tile, the part that another rectangle shares with it."""
    weight = [[10 * row + column for column in range(6)] for row in range(5)]
    tile, wanted = Rect(Span(1, 4), Span(2, 6)), Rect(Span(2, 5), Span(0, 4))

    shared = tile.overlap(wanted)

    rows, columns = shared.since(tile).index
    inside = [row[2:6] for row in weight[1:4]]
    assert [row[columns] for row in inside[rows]] == [[22, 23], [32, 33]]


@pytest.mark.parametrize(
    ("name", "splits", "bound"),
    [
        ("in_splits", 0, 6),
        ("in_splits", 7, 6),
        ("in_splits", -1, 6),
        ("out_splits", 0, 4),
        ("out_splits", 5, 4),
        ("out_splits", 2.0, 4),
        ("out_splits", "2", 4),
        ("in_splits", True, 6),
        ("in_splits", None, 6),
    ],
)
def test_splits_outside_their_range_are_refused(name, splits, bound):
    """The message holds the value, the bound and what to choose; it is a RuntimeError too."""
    with pytest.raises(SplitsError, match=f"{name}={splits!r}.*{bound}") as raised:
        Grid.uniform(4, 6, **{name: splits})

    assert isinstance(raised.value, RuntimeError)
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize("features", [0, -3, 2.0, "4", None, True])
def test_features_that_are_no_positive_whole_number_are_refused(features):
    """A weight without rows or columns, or with a fraction of one, is refused by name."""
    with pytest.raises(SplitsError, match="out_features"):
        Grid.uniform(features, 6)
    with pytest.raises(SplitsError, match="in_features"):
        Grid.uniform(6, features)


def test_whole_numbers_of_other_libraries_are_whole_numbers():
    """A number that is an index, such as numpy's, is taken for the int that it stands for."""

    class Whole:
        def __index__(self) -> int:
            return 3

    assert Grid.uniform(Whole(), 6, Whole(), 2) == Grid.uniform(3, 6, 3, 2)

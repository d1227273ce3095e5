"""Free room in a file: never handed out twice, joined when it comes back."""

from hypothesis import given
from hypothesis import strategies as st

from memtile.homes.segments import FreeRoom


def test_neighbours_are_joined():
    """Runs that come back in any order become one run again."""
    free = FreeRoom(30)
    starts = [free.take(10) for _ in range(3)]
    assert free.take(1) is None

    for start in (starts[1], starts[0], starts[2]):
        free.give(start, 10)

    assert starts == [0, 10, 20]
    assert free.runs == [(0, 30)]
    assert free.take(30) == 0


def test_the_first_that_fits_is_taken():
    """A hole at the beginning is filled before the room behind it."""
    free = FreeRoom(100)
    for size in (10, 5, 20):
        free.take(size)
    free.give(0, 10)

    assert free.take(11) == 35
    assert free.take(4) == 0
    assert free.take(6) == 4


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=60))
def test_taken_rooms_never_overlap(acts):
    """Whatever is taken and given back, rooms are apart and what is free adds up."""
    free, taken = FreeRoom(40), {}
    for take, number in acts:
        if take:
            start = free.take(number)
            if start is not None:
                taken[start] = number
        elif taken:
            start = sorted(taken)[number % len(taken)]
            free.give(start, taken.pop(start))

        used = [byte for start, size in taken.items() for byte in range(start, start + size)]
        assert len(used) == len(set(used))
        assert all(byte < 40 for byte in used)
        assert sum(stop - start for start, stop in free.runs) == 40 - len(used)
        assert (free.runs == [(0, 40)]) == (not used)

"""The prefetch order: what is needed after what is learnt, corrected and forgotten."""

from itertools import islice

from watched_home import WatchedHome

from memtile.homes import Allocation
from memtile.transfer.slab_ring import Itinerary
from memtile.transfer.slabs import group_of, key_of


def walk(itinerary: Itinerary, order: list[Allocation]) -> None:
    """A pass in this order."""
    itinerary.start()
    for allocation in order:
        itinerary.note(key_of((allocation,)))


def foreseen(itinerary: Itinerary, number: int = 9) -> list[str | None]:
    """Labels of what is predicted to come next."""
    groups = [group_of(key) for key in islice(itinerary.ahead(), number)]
    return [None if group is None else group[0].label for group in groups]


def test_nothing_is_foreseen_at_first():
    """Without any request nothing is predicted."""
    itinerary = Itinerary()
    itinerary.start()

    assert foreseen(itinerary) == []


def test_an_order_is_known_after_one_pass_and_ends_where_the_pass_ended():
    """The whole iteration is predicted in its order, and nothing after its end."""
    tiles, itinerary = WatchedHome().tiles(4), Itinerary()
    walk(itinerary, tiles)

    itinerary.start()

    assert foreseen(itinerary) == ["0", "1", "2", "3"]


def test_one_tile_there_and_back_is_told_apart_by_what_came_before():
    """In 0 1 2 2 1 0 each tile has two followers: the pair with the one before tells which."""
    (a, b, c), itinerary = WatchedHome().tiles(3), Itinerary()
    walk(itinerary, [a, b, c, c, b, a])

    itinerary.start()

    assert foreseen(itinerary) == ["0", "1", "2", "2", "1", "0"]


def test_a_wrong_guess_corrects_itself_by_the_next_pass():
    """Another order replaces the known one, from where they differ."""
    (a, b, c), itinerary = WatchedHome().tiles(3), Itinerary()
    walk(itinerary, [a, b, c])
    walk(itinerary, [a, c, b])

    itinerary.start()

    assert foreseen(itinerary) == ["0", "2", "1"]


def test_allocations_are_not_kept_alive_and_dead_ones_are_forgotten():
    """Groups that are new in every iteration, as gradients are, do not accumulate."""
    home, itinerary = WatchedHome(), Itinerary()
    for _ in range(50):
        walk(itinerary, home.tiles(3))

    assert len(itinerary._next) <= 2 * 3
    assert set(foreseen(itinerary)) <= {None}

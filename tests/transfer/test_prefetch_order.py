"""The prefetch order: what is needed after what is learnt, corrected and forgotten."""

from itertools import islice

from watched_home import WatchedHome

from memtile.homes import Allocation
from memtile.transfer.groups import group_of, key_of
from memtile.transfer.prefetch_order import PrefetchOrder


def path(prefetch_order: PrefetchOrder, order: list[Allocation]) -> None:
    """An iteration in this order."""
    prefetch_order.start()
    for allocation in order:
        prefetch_order.note(key_of((allocation,)))


def predicted(prefetch_order: PrefetchOrder, number: int = 9) -> list[str | None]:
    """Labels of what is predicted to come next."""
    groups = [group_of(key) for key in islice(prefetch_order.ahead(), number)]
    return [None if group is None else group[0].label for group in groups]


def test_nothing_is_predicted_at_first():
    """Without any request nothing is predicted."""
    prefetch_order = PrefetchOrder()
    prefetch_order.start()

    assert predicted(prefetch_order) == []


def test_an_order_is_known_after_one_iteration_and_ends_where_the_iteration_ended():
    """The whole iteration is predicted in its order, and nothing after its end."""
    tiles, prefetch_order = WatchedHome().tiles(4), PrefetchOrder()
    path(prefetch_order, tiles)

    prefetch_order.start()

    assert predicted(prefetch_order) == ["0", "1", "2", "3"]


def test_one_tile_there_and_back_is_told_apart_by_what_came_before():
    """In 0 1 2 2 1 0 each tile has two followers: the pair with the one before tells which."""
    (a, b, c), prefetch_order = WatchedHome().tiles(3), PrefetchOrder()
    path(prefetch_order, [a, b, c, c, b, a])

    prefetch_order.start()

    assert predicted(prefetch_order) == ["0", "1", "2", "2", "1", "0"]


def test_a_wrong_guess_corrects_itself_by_the_next_iteration():
    """Another order replaces the known one, from where they differ."""
    (a, b, c), prefetch_order = WatchedHome().tiles(3), PrefetchOrder()
    path(prefetch_order, [a, b, c])
    path(prefetch_order, [a, c, b])

    prefetch_order.start()

    assert predicted(prefetch_order) == ["0", "2", "1"]


def test_allocations_are_not_kept_alive_and_dead_ones_are_dropped():
    """Groups that are new in every iteration, as gradients are, do not accumulate."""
    home, prefetch_order = WatchedHome(), PrefetchOrder()
    for _ in range(50):
        path(prefetch_order, home.tiles(3))

    assert len(prefetch_order._next) <= 2 * 3
    assert set(predicted(prefetch_order)) <= {None}


def test_experts_do_not_disturb_the_order_around_them():
    """Prediction stops where experts come, which differ, and goes on after them."""
    (a, b, c), prefetch_order = WatchedHome().tiles(3), PrefetchOrder()
    for experts in (1, 3):
        path(prefetch_order, [a, b])
        for _ in range(experts):
            prefetch_order.note_experts()
        prefetch_order.note(key_of((c,)))

    path(prefetch_order, [a])
    assert predicted(prefetch_order) == ["1"]
    prefetch_order.note(key_of((b,)))
    prefetch_order.note_experts()
    prefetch_order.note_experts()
    assert predicted(prefetch_order) == ["2"]

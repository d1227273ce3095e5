"""The ring of slabs: reading ahead, fixed capacity, and no slab lost whatever goes wrong."""

import random

import pytest
import torch
from rings import FREE, path, quiet, spoil
from watched_home import WatchedHome

from memtile.homes import PAGE
from memtile.transfer import Holder

OTHER_ACTS = ["new iteration", "half change", "new tile"]

# Reading ahead


def test_what_comes_next_is_read_while_a_tile_is_worked_on(make_ring):
    """In the second iteration, tile 1 and tile 2 are on their way while tile 0 is leased."""
    home = WatchedHome()
    tiles, ring = home.tiles(5), make_ring()
    path(ring, tiles)
    ring.start()
    home.clear()

    with ring.acquire((tiles[0],)):
        home.begins("read", "1")
        home.begins("read", "2")
        assert sorted(home.labels()) == ["0", "1", "2"]


def test_nothing_is_read_ahead_in_an_unknown_order(make_ring):
    """A first iteration reads each tile once, when it is asked for."""
    home = WatchedHome()
    tiles = home.tiles(5)

    found = path(make_ring(), tiles)

    assert found == [0, 1, 2, 3, 4]
    assert home.labels() == ["0", "1", "2", "3", "4"]


def test_the_beginning_of_an_iteration_reads_nothing(make_ring):
    """The next request may be one of another home, so nothing is read before it."""
    home = WatchedHome()
    tiles, ring = home.tiles(5), make_ring()
    path(ring, tiles)
    quiet(ring)
    home.clear()

    ring.start()
    quiet(ring)

    assert home.labels() == []


def test_what_is_named_is_read_ahead_instead_of_what_is_known(make_ring):
    """`ahead` takes precedence over the prefetch order."""
    home = WatchedHome()
    tiles, ring = home.tiles(5), make_ring()
    path(ring, tiles)
    ring.start()
    home.clear()

    with ring.acquire((tiles[0],), ahead=[(tiles[4],), (tiles[3],), (tiles[2],)]):
        home.begins("read", "4")
        home.begins("read", "3")

    assert sorted(home.labels()) == ["0", "3", "4"]


def test_every_tile_is_right_in_any_order(make_ring):
    """Wrong guesses cost a wait, and never give another tile's values."""
    home = WatchedHome()
    tiles, ring = home.tiles(7), make_ring()
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        order = torch.randint(7, (9,), generator=generator).tolist()

        assert path(ring, [tiles[n] for n in order]) == order


def test_a_wrong_guess_corrects_itself(make_ring):
    """After one iteration in another order, that order is the one that is read ahead."""
    home = WatchedHome()
    tiles, ring = home.tiles(4), make_ring()
    path(ring, tiles)
    path(ring, tiles[::-1])
    ring.start()
    home.clear()

    with ring.acquire((tiles[3],)):
        home.begins("read", "2")
        home.begins("read", "1")

    assert "0" not in home.labels()  # it came after 3 in the order before


@pytest.mark.parametrize("number", [1, 2, 5])
def test_the_turn_from_forward_to_backward_reads_nothing_anew(make_ring, number):
    """The last tiles of the forward are the first of the backward: they are still there."""
    home = WatchedHome()
    tiles, ring = home.tiles(number), make_ring()
    there_and_back = tiles + tiles[::-1]
    for _ in range(2):
        path(ring, there_and_back)
    quiet(ring)
    home.clear()

    assert path(ring, there_and_back) == [*range(number), *reversed(range(number))]

    for label in ["4", "3"] if number == 5 else [str(n) for n in range(number)]:
        assert home.labels().count(label) == 1, home.labels()


# Capacity


@pytest.mark.parametrize("slabs", [1, 2, 3])
def test_capacity_does_not_grow_with_the_number_of_tiles(make_ring, slabs):
    """40 tiles use no more memory than the slabs have."""
    home = WatchedHome()
    tiles, ring = home.tiles(40, length=PAGE // 4 + 1), make_ring(slabs)
    for _ in range(2):
        path(ring, tiles + tiles[::-1])

    assert ring.held_bytes == slabs * 2 * PAGE


def test_a_slab_grows_for_a_larger_tile_and_serves_smaller_ones(make_ring):
    """Ragged tiles share slabs, each as large as the largest that it held."""
    home = WatchedHome()
    tiles = [home.tile(str(n), n, length) for n, length in enumerate([1, 5000, 3, 2049, 0])]
    ring = make_ring(1)

    for _ in range(2):
        ring.start()
        for n, allocation in enumerate(tiles):
            with ring.acquire((allocation,)) as lease:
                assert lease.tensors[0].shape == allocation.shape
                assert bool((lease.tensors[0] == n).all())

    assert ring.held_bytes == 5 * PAGE


def test_small_tiles_share_slabs_and_are_read_far_ahead(make_ring):
    """Beside a tile of 8 pages, as many of a page are on their way as two slabs hold."""
    home = WatchedHome()
    large = home.tile("large", 9, 8 * PAGE // 4)
    tiles, ring = home.tiles(30), make_ring(3)
    for _ in range(2):
        path(ring, [large, *tiles])
    quiet(ring)
    home.clear()
    ring.start()

    with ring.acquire((large,)):
        for tile in tiles[:16]:
            home.begins("read", tile.label)
        quiet_ahead = sorted(home.labels())
        assert ring.holders.count(Holder.WORKERS) == 1
    assert quiet_ahead == sorted(["large", *(str(n) for n in range(16))])
    assert path(ring, [large, *tiles]) == [9, *range(30)]
    assert ring.held_bytes == 3 * 8 * PAGE


def test_a_part_of_a_group_that_comes_before_it_is_not_read_twice(make_ring):
    """An MLP's tile is used together, and its weights one by one: all of that is known ahead."""
    home, ring = WatchedHome(), make_ring(3, least_bytes=8 * PAGE)
    tiles = home.tiles(6)
    first, second = tuple(tiles[:3]), tuple(tiles[3:])
    for _ in range(2):
        ring.start()
        home.clear()
        for group in (first, *((each,) for each in first), second, *((each,) for each in second)):
            with ring.acquire(group):
                pass

    assert sorted(home.labels()) == ["0", "1", "2", "3", "4", "5"]


def test_what_is_read_and_what_is_made_share_no_memory(make_ring):
    """Though both have room in a slab that nobody has used."""
    home, ring = WatchedHome(), make_ring(3, least_bytes=8 * PAGE)
    (read, made) = home.tiles(2)

    with ring.acquire((read,), made=(made,)) as lease:
        lease.tensors[1].fill_(5)
        assert lease.tensors[0].tolist() == [0, 0, 0]
        lease.store()
    ring.flush()

    assert [tile.tensor().tolist() for tile in (read, made)] == [[0] * 3, [5] * 3]


@pytest.mark.parametrize("slabs", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_done_each_tile_has_its_own_newest_values(make_ring, slabs, seed):
    """Ragged tiles are read, stored, half changed, written to at home, and abandoned."""
    home, ring, draw = WatchedHome(), make_ring(slabs), random.Random(seed)
    values = dict(enumerate([0.0] * 12))
    tiles = [home.tile(str(n), 0, draw.choice([1, 700, 2 * PAGE // 4, PAGE])) for n in values]
    for count in range(400):
        number, act = draw.randrange(12), draw.choice(["read"] * 5 + ["store"] * 3 + OTHER_ACTS)
        tile = tiles[number]
        if act == "new iteration":
            ring.flush()
            tile.tensor().fill_(count)
            values[number] = count
            ring.start()
        elif act == "half change":
            with pytest.raises(ZeroDivisionError):
                spoil(ring, tile, ZeroDivisionError)
        elif act == "new tile":
            tiles[number] = home.tile(str(number), count, draw.choice([3, PAGE]))
            values[number] = count
            ring.abandon(tile)
        else:
            with ring.acquire((tile,)) as lease:
                assert bool((lease.tensors[0] == values[number]).all()), (count, number)
                if act == "store":
                    values[number] = count
                    lease.tensors[0].fill_(count)
                    lease.store()
    ring.flush()

    assert [float(tile.tensor()[-1]) for tile in tiles] == list(values.values())


def test_a_group_of_several_tensors_is_one_slab(make_ring):
    """A weight and its moments, of any dtype, are read together, and some of them are written."""
    home = WatchedHome()
    first, second = home.tile("first", 1), home.allocate((2, 3), torch.float64)
    second.label = "second"
    second.tensor().fill_(2)
    ring = make_ring()

    with ring.acquire((first, second)) as lease:
        for tensor in lease.tensors:
            tensor.add_(10)
        lease.store(1)
    ring.flush()

    assert home.labels("write") == ["second"]
    assert first.tensor().tolist() == [1, 1, 1]
    assert second.tensor().tolist() == [[12] * 3] * 2


def test_two_leases_of_one_tile_share_a_slab_that_is_read_once(make_ring):
    """A tile that is leased again while it is leased is not read again."""
    home = WatchedHome()
    (tile,), ring = home.tiles(1), make_ring()

    with ring.acquire((tile,)) as one, ring.acquire((tile,)) as other:
        assert one.tensors[0].data_ptr() == other.tensors[0].data_ptr()

    assert home.labels() == ["0"]
    assert set(ring.holders) <= FREE


def test_what_was_read_for_one_iteration_is_not_used_in_the_next(make_ring):
    """A tile that was written to between two iterations is read anew, by both kinds of ring."""
    home = WatchedHome()
    tiles = home.tiles(2)
    for ring in (make_ring(), make_ring()):
        for value in (5.0, 6.0):
            tiles[0].tensor().fill_(value)

            assert path(ring, tiles)[0] == value


def test_a_tile_is_found_in_the_group_that_it_was_read_with(make_ring):
    """It is not read again; what is written there is what all later requests see."""
    home = WatchedHome()
    (first, second, third), ring = home.tiles(3), make_ring()
    with ring.acquire((first, second, third)):
        pass
    home.clear()

    with ring.acquire((second,), written=True, ahead=()) as lease:
        lease.tensors[0].fill_(7)
        lease.store()
    with ring.acquire((second, third)) as lease:
        found = [float(tensor[0]) for tensor in lease.tensors]
    ring.flush()

    assert found == [7, 2]
    assert home.labels() == []
    assert home.labels("write") == ["1"]
    assert [float(tile.tensor()[0]) for tile in (first, second, third)] == [0, 7, 2]
    with ring.acquire((second,)) as lease:
        assert float(lease.tensors[0][0]) == 7

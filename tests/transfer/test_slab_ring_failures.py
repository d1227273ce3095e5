"""Errors: no slab is lost, no wrong values are given, no thread waits for ever."""

import gc
import threading
import time
import weakref

import pytest
import torch
from rings import FREE, path, quiet, spoil, wait_until
from watched_home import PATIENCE_SECONDS, WatchedHome

from memtile.errors import HomeError, HomeIOError
from memtile.homes import PAGE, DiskHome, Ending, WorkerThreads, disk_io
from memtile.transfer import Holder, SlabRing, rings_of


def _dies(alive):
    """Whether a weakref's object is freed: the worker thread lets go a moment after its task."""
    end = time.monotonic() + PATIENCE_SECONDS
    while alive() is not None and time.monotonic() < end:
        gc.collect()
        time.sleep(0.01)
    return alive() is None


def test_a_failed_read_returns_the_slab_and_is_tried_again(make_ring):
    """An I/O error is raised where the tile is acquired; once the disk works the tile is right."""
    home = WatchedHome()
    tiles, ring = home.tiles(5), make_ring()
    path(ring, tiles)
    home.broken = {"read"}
    for _ in range(5):  # more often than there are slabs
        with pytest.raises(HomeIOError, match="the test wants it"):
            path(ring, tiles)
    quiet(ring)

    assert set(ring.holders) <= FREE
    home.broken = set()
    assert path(ring, tiles) == [0, 1, 2, 3, 4]


def test_a_failed_read_ahead_is_nobodys_error(make_ring):
    """A tile that could not be read ahead is read when it is asked for."""
    home = WatchedHome()
    tiles, ring = home.tiles(3), make_ring()
    path(ring, tiles)
    ring.start()
    with ring.acquire((tiles[0],)):
        pass
    ring.clear()
    quiet(ring)
    home.clear()

    with ring.acquire((tiles[0],)):
        home.broken = {"read"}
        quiet_but_workers = {Holder.WORKERS, Holder.NOBODY, Holder.IDLE}
        wait_until(ring, lambda: set(ring.holders) <= quiet_but_workers)
    home.broken = set()
    with ring.acquire((tiles[1],)) as lease:
        assert lease.tensors[0][0] == 1


def test_an_error_does_not_keep_the_home_alive():
    """A future keeps its exception, and so the allocation: the slab drops failed futures."""
    home = WatchedHome()
    tile, alive = home.tile("0", 0), weakref.ref(home)
    home.broken = {"read"}
    with pytest.raises(HomeIOError), rings_of(home).weights.acquire((tile,)):
        pass

    del tile, home

    assert _dies(alive)


@pytest.mark.parametrize("got", [0, PAGE])
def test_a_short_read_of_a_file_is_an_error(tmp_path, monkeypatch, got):
    """A file that ends too early raises, and no slab counts as read."""
    with DiskHome(tmp_path) as home:
        allocation = home.allocate((3 * PAGE,), torch.uint8)
        allocation.tensor().fill_(7)
        ring, real = rings_of(home).weights, disk_io.read_at
        pieces = iter([got])
        monkeypatch.setattr(disk_io, "read_at", lambda fd, b, o: real(fd, b[: next(pieces, 0)], o))
        for _ in range(2):
            with pytest.raises(HomeIOError), ring.acquire((allocation,)):
                pass
        monkeypatch.undo()

        with ring.acquire((allocation,)) as lease:
            assert bool((lease.tensors[0] == 7).all())
        assert set(ring.holders) <= FREE


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_an_exception_in_the_block_returns_the_slab_and_its_content_is_not_trusted(
    make_ring, error
):
    """What was half changed in a slab is read again, and no slab is lost, however often."""
    home = WatchedHome()
    tiles, ring = home.tiles(2), make_ring()
    for _ in range(5):
        with pytest.raises(error):
            spoil(ring, tiles[0], error)
    with ring.acquire((tiles[0],)) as lease:
        assert lease.tensors[0].tolist() == [0, 0, 0]

    assert set(ring.holders) <= FREE


def test_ctrl_c_while_a_tile_is_read_leaves_the_slab_to_its_readers(make_ring, monkeypatch):
    """The slab is not given to others while the read is under way, and is free afterwards."""
    home, go_on = WatchedHome(), threading.Event()
    tiles, ring = home.tiles(2), make_ring(1)
    home.before = lambda act, label: go_on.wait(PATIENCE_SECONDS)

    def interrupted(self: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Ending, "result", interrupted)
    with pytest.raises(KeyboardInterrupt), ring.acquire((tiles[0],)):
        pass
    monkeypatch.undo()

    assert ring.holders == [Holder.READERS]
    go_on.set()
    with ring.acquire((tiles[1],)) as lease:
        assert lease.tensors[0].tolist() == [1, 1, 1]
    assert ring.holders == [Holder.IDLE]


def test_ctrl_c_while_waiting_for_a_slab_takes_none(make_ring, monkeypatch):
    """A Ctrl-C in the wait leaves the ring as it was."""
    home = WatchedHome()
    tiles, ring = home.tiles(2), make_ring(1)

    class Interrupting:
        def __enter__(self) -> None:
            raise KeyboardInterrupt

        def __exit__(self, *raised: object) -> None:
            pass

    with ring.acquire((tiles[0],)):
        monkeypatch.setattr(ring._gates, "close_one", Interrupting)
        with pytest.raises(KeyboardInterrupt), ring.acquire((tiles[1],)):
            pass
        monkeypatch.undo()
        assert ring.holders == [Holder.WORKERS]
    assert ring.holders == [Holder.IDLE]


def test_reads_that_cannot_be_started_leave_nothing_that_passes_for_read():
    """Without threads every request raises, the second one too, and gives no wrong values."""
    home, workers = WatchedHome(), WorkerThreads(1, "memtile-test")
    (tile,), ring = home.tiles(1), SlabRing(workers, 2)
    workers.close()

    for _ in range(3):
        with pytest.raises(RuntimeError, match="closed"), ring.acquire((tile,)):
            pass

    assert ring.holders == [Holder.NOBODY] * 2


def test_a_failed_write_keeps_the_newest_values_in_its_slab(make_ring):
    """`flush` tries again and raises while it fails; the tile is read from its slab meanwhile."""
    home = WatchedHome()
    (tile,), ring = home.tiles(1), make_ring()
    home.broken = {"write"}
    with ring.acquire((tile,)) as lease:
        lease.tensors[0].fill_(5)
        lease.store()
    for act in (ring.flush, ring.start, ring.flush):
        with pytest.raises(HomeIOError, match="write of 0"):
            act()
    ring.clear()
    assert Holder.WRITERS in ring.holders
    with ring.acquire((tile,)) as lease:
        assert lease.tensors[0].tolist() == [5, 5, 5]
    assert tile.tensor().tolist() == [0, 0, 0]

    home.broken = set()
    ring.flush()

    assert tile.tensor().tolist() == [5, 5, 5]
    assert set(ring.holders) <= FREE


def test_slabs_that_cannot_be_written_make_others_raise_and_not_wait(make_ring):
    """With every slab unwritten, a request tries the write once more and raises its error."""
    home = WatchedHome()
    tiles, ring = home.tiles(3), make_ring(2)
    home.broken = {"write"}
    for tile in tiles[:2]:
        with ring.acquire((tile,)) as lease:
            lease.tensors[0].add_(10)
            lease.store()

    with pytest.raises(HomeIOError, match="write of"), ring.acquire((tiles[2],)):
        pass

    home.broken = set()
    with ring.acquire((tiles[2],)) as lease:
        assert lease.tensors[0].tolist() == [2, 2, 2]
    ring.flush()
    assert [tile.tensor()[0].item() for tile in tiles] == [10, 11, 2]


def test_an_exception_after_a_store_does_not_undo_it(make_ring):
    """What was stored is written."""
    home = WatchedHome()
    (tile,), ring = home.tiles(1), make_ring(1)
    with pytest.raises(RuntimeError, match="the test"):
        spoil(ring, tile, RuntimeError("the test wants it"), stores=True)

    ring.flush()

    assert tile.tensor().tolist() == [5, 5, 5]


def test_what_was_written_does_not_keep_the_home_alive():
    """A written gradient is released at once, not in the next iteration."""
    home = WatchedHome()
    (tile,), ring, alive = home.tiles(1), rings_of(home).gradients, weakref.ref(home)
    with ring.acquire((tile,)) as lease:
        lease.store()
    wait_until(ring, lambda: not any(part._unwritten for part in ring._slabs.parts()))

    del home, tile, lease

    assert _dies(alive)


def test_a_slab_is_not_refilled_while_it_is_written(make_ring):
    """Another tile waits for another slab, or for the writer."""
    home, go_on = WatchedHome(), threading.Event()
    tiles, ring = home.tiles(2), make_ring(2)
    home.before = lambda act, label: act == "write" and go_on.wait(PATIENCE_SECONDS)
    with ring.acquire((tiles[0],)) as lease:
        lease.tensors[0].fill_(5)
        lease.store()
    home.begins("write", "0")

    for _ in range(3):
        with ring.acquire((tiles[1],)) as lease:
            assert lease.tensors[0].tolist() == [1, 1, 1]
        ring.clear()

    assert ring.holders.count(Holder.WRITERS) == 1
    go_on.set()
    ring.flush()
    assert tiles[0].tensor().tolist() == [5, 5, 5]


# Threads, and homes that end


def test_many_threads_acquire_at_once(make_ring):
    """Every thread finds the tile that it asked for, with fewer slabs than threads."""
    home = WatchedHome()
    tiles, ring, wrong = home.tiles(7), make_ring(2), []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for n in torch.randint(7, (40,), generator=generator).tolist():
            with ring.acquire((tiles[n],)) as lease:
                if lease.tensors[0].tolist() != [n] * 3:
                    wrong.append(n)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)

    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    quiet(ring)
    assert set(ring.holders) <= FREE


def test_a_tile_that_is_cleared_away_while_it_is_leased_goes_on_being_right(make_ring):
    """An iteration that begins in another thread spoils the slab only for those who come later."""
    home = WatchedHome()
    (tile,), ring = home.tiles(1), make_ring()

    with ring.acquire((tile,)) as lease:
        ring.start()
        tile.tensor().fill_(8)
        assert lease.tensors[0].tolist() == [0, 0, 0]
        with ring.acquire((tile,)) as later:
            assert later.tensors[0].tolist() == [8, 8, 8]

    assert set(ring.holders) <= FREE


def test_a_closed_home_has_no_rings_and_no_threads():
    """Closing ends the threads and the slabs; asking for rings says that it is closed."""
    home = WatchedHome()
    (tile,) = home.tiles(1)
    with rings_of(home).weights.acquire((tile,)):
        pass

    home.close()

    with pytest.raises(HomeError, match="closed"):
        rings_of(home)


def test_rings_are_of_one_home_and_go_with_it():
    """Two homes share nothing; slabs and threads end with a home, without garbage collection."""
    one, other = WatchedHome(), WatchedHome()
    assert rings_of(one) is rings_of(one)
    assert rings_of(one) is not rings_of(other)
    tiles = one.tiles(5)
    path(rings_of(one).weights, tiles)
    quiet(rings_of(one).weights)
    alive = weakref.ref(rings_of(one).weights)

    gc.disable()
    try:
        del one, tiles
        for _ in range(200):  # a reader's thread drops its last piece just after it is done
            if alive() is None:
                break
            time.sleep(0.01)
        assert alive() is None
    finally:
        gc.enable()

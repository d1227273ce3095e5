"""Threads at one home: no deadlock, no wait for another thread's product, no lost gradient."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
from parked_layers import HOMES, home_called
from rings import path, quiet, take
from threads import PATIENCE_SECONDS, switching_often, together
from watched_home import WatchedHome

from memtile.layers import ParkedLinear
from memtile.transfer import ParkedSource, gradient_lock, rings_of

THREADS = 4


def test_two_slabs_are_taken_at_once(make_ring):
    """Threads that each need two of three slabs take turns, and find what they asked for."""
    home, ring = WatchedHome(), make_ring()
    tiles, wrong = home.tiles(THREADS), []

    def work(number):
        for turn in range(20):
            room = home.tile("made", -1)
            with ring.acquire((tiles[number],), made=(room,)) as lease:
                tile, made = lease.tensors
                made.copy_(tile + turn)
                lease.store(1)
            with ring.acquire((room,)) as lease:
                if lease.tensors[0].tolist() != [number + turn] * 3:
                    wrong.append((number, turn))

    with switching_often():
        together(*(lambda n=n: work(n) for n in range(THREADS)))

    assert wrong == []


def test_threads_that_take_turns_do_not_read_ahead(make_ring):
    """What one thread read ahead would make room for what another needs, before it is used."""
    home, ring, each = WatchedHome(), make_ring(), 6
    tiles = home.tiles(3 * each)

    def step(number, turn):
        own = [(tile,) for tile in tiles[number * each :][:each]]
        with ring.acquire(own[turn], written=True, ahead=own[turn + 1 :]) as lease:
            return lease.tensors[0][0].item()

    with ExitStack() as stack:
        threads = [stack.enter_context(ThreadPoolExecutor(1)) for _ in range(3)]
        for turn in range(each):
            for number, thread in enumerate(threads):
                assert thread.submit(step, number, turn).result() == number * each + turn

    first = 2  # were read ahead before there was a second thread
    assert len(home.labels("read")) <= 3 * each + first


def test_a_thread_that_goes_on_where_another_ended_is_read_ahead_for(make_ring):
    """Autograd runs the backward of a device in a thread of its own: one order over both."""
    home = WatchedHome()
    tiles, ring = home.tiles(7), make_ring()
    with ThreadPoolExecutor(1) as other:
        for _ in range(2):
            path(ring, tiles)
            other.submit(take, ring, tiles[::-1]).result()
        path(ring, tiles)
        quiet(ring)
        home.clear()

        def begin():
            take(ring, tiles[:-2:-1])
            with ring.acquire((tiles[-2],)):  # the third from the end is still in a slab
                home.begins("read", "3")
            return home.labels()

        assert "3" in other.submit(begin).result()


@pytest.mark.parametrize("sums", [False, True], ids=["first", "sum"])
@pytest.mark.parametrize("home", HOMES)
def test_gradients_are_formed_at_the_same_time(home, sums):
    """Two threads compute gradients of one parameter at the same time, and both are added."""
    tile = ParkedLinear(7, 5, bias=False, home=home_called(home))
    source, meeting = ParkedSource(tile.weight), threading.Barrier(2)
    if sums:
        with source.gradient() as out:
            out.fill_(1)

    def deliver():
        with source.gradient() as out:
            meeting.wait(PATIENCE_SECONDS)
            out.fill_(3)

    together(deliver, deliver)
    source.flush()

    assert tile.weight.grad.unique().tolist() == [7.0 if sums else 6.0]


def test_threads_that_are_the_first_share_rings_and_locks():
    """All threads get the same ring of a home, and the same lock of a parameter."""

    def ask(home, parameter, found):
        found.append((rings_of(home).weights, gradient_lock(parameter)))

    for _ in range(20):
        home, parameter, found = WatchedHome(), torch.zeros(1), []
        with switching_often():
            together(*[lambda asked=(home, parameter, found): ask(*asked)] * THREADS)

        assert len({id(ring) for ring, _ in found}) == len({id(lock) for _, lock in found}) == 1

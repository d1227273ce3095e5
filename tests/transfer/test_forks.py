"""A child forked at any moment reads its parent's tiles; it never hangs and changes nothing."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
from faulty_disk import redo_kernel_moves
from forked import child_says
from torch import nn

from memtile import DiskHome, tile
from memtile.errors import HomeError
from memtile.homes import aligned_buffer, allocation_of, disk_io
from memtile.transfer import iterations, rings_of
from memtile.transfer.parked import gradient_lock

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.fixture(params=["buffered", "direct"], autouse=True)
def _path(request, monkeypatch):
    """Reads go past the page cache, or through it."""
    free = 1 << 60 if request.param == "buffered" else 0
    monkeypatch.setattr("memtile.homes.limits.free_bytes", lambda: free)


def _called():
    """A parked model that has been called."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(13, 29), nn.Tanh(), nn.Linear(29, 7))
    net = tile(net, out_splits=4, home=DiskHome())
    net(_X)
    return net


_X = torch.arange(65.0).view(5, 13) / 65


def _home(model):
    return model[0].linears[0][0].home


def _weight(model):
    return model[0].linears[0][0].weight


def test_locks_that_other_threads_hold_are_free_in_the_child():
    """The child computes as its parent does and closes the home, whatever locks were held."""
    model = _called()
    expected, home, rings = model(_X), _home(model), rings_of(_home(model))
    held, done = threading.Event(), threading.Event()

    def hold_all():
        with ExitStack() as stack:
            of_rings = [ring._lock for ring in rings.all()]
            locks = [
                iterations.state.lock,
                gradient_lock(_weight(model)),
                home.transfers.lock,
                home._segments._lock,
                *of_rings,
            ]
            for lock in locks:
                stack.enter_context(lock)
            held.set()
            done.wait(60)

    def in_child():
        good = all(torch.equal(model(_X), expected) for _ in range(2))
        home.close()
        return good

    with ThreadPoolExecutor(1) as other:
        holder = other.submit(hold_all)
        held.wait(60)
        good = child_says(in_child)
        done.set()
        holder.result(60)

    assert good
    assert torch.equal(model(_X), expected)


def test_a_child_that_comes_during_a_forward(monkeypatch):
    """Forked while the parent's forward waits for a read: both processes give the right values."""
    model = _called()
    expected, home, parent = model(_X), _home(model), os.getpid()
    reading, go_on, real = threading.Event(), threading.Event(), disk_io.read_at

    def slow(fd, buffer, offset):
        if os.getpid() == parent:
            reading.set()
            go_on.wait(60)
        return real(fd, buffer, offset)

    monkeypatch.setattr(disk_io, "read_at", slow)
    redo_kernel_moves(monkeypatch)

    def in_child():
        good = torch.equal(model(_X), expected)
        with torch.no_grad():
            good = good and torch.equal(model(_X), expected)
        home.close()
        return good

    with ThreadPoolExecutor(1) as other:
        forward = other.submit(model, _X)
        reading.wait(60)
        good = child_says(in_child)
        go_on.set()

    assert good
    assert torch.equal(forward.result(), expected)
    forward.result().sum().backward()
    assert torch.equal(model(_X), expected)


def test_a_child_writes_no_tile_of_its_parents():
    """The child shares the file, so a write there raises HomeError."""
    model = _called()
    allocation, before = allocation_of(_weight(model)), _weight(model).detach().clone()

    def in_child():
        with pytest.raises(HomeError, match="a forked process may read its tiles, and neither wri"):
            allocation.write(aligned_buffer(allocation.room))
        return True

    assert child_says(in_child)
    assert torch.equal(_weight(model), before)


def test_a_fork_while_a_tile_is_worked_on_is_told():
    """The child has no values in its slabs: storing and releasing the tile raise HomeError."""
    model = _called()
    allocation = allocation_of(_weight(model))
    lease = rings_of(_home(model)).weights.acquire((allocation,))
    with lease as lent:

        def in_child():
            with pytest.raises(HomeError, match="was forked while a tile was worked on"):
                lent.store()
            with pytest.raises(HomeError, match="fork between two calls of the model"):
                lease.__exit__(None, None, None)
            return True

        assert child_says(in_child)
        assert torch.equal(lent.tensors[0], _weight(model))


def test_a_buffer_for_the_disk_is_not_shared_with_a_child():
    """A read from disk into a shared page could end up in the other process."""
    buffer = aligned_buffer(3 * 4096).fill_(7)

    assert child_says(lambda: not buffer.any())
    assert buffer.eq(7).all()

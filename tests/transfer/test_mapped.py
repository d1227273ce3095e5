"""Tiles of a file that fits into the page cache are worked on there: nothing is read or written."""

import errno
import os
import threading

import pytest
import torch
from forked import child_says
from small_training import batches, in_home, loss_of, mapped_home, optimizer_for, small, train
from torch import nn

import memtile
from memtile.errors import HomeError, HomeIOError
from memtile.geometry import HUGE_PAGE
from memtile.homes import PAGE, DiskHome, allocate_copy, allocation_of, disk_io
from memtile.homes.mapped_pages import _POPULATE_READ, _POPULATE_WRITE, MappedWindow
from memtile.transfer import rings_of
from memtile.transfer.slab_ring import _MappedLease

MIB = 1 << 20


@pytest.fixture
def in_slabs():
    """Replaces the fixture of the folder: files that fit are mapped here."""


def _mapped_bytes():
    """Bytes of files that are in this process's memory."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssFile"))
    return int(line.split()[1]) << 10


def _refuse_to_populate(patch, number):
    real = MappedWindow._advise

    def advise(room, advice):
        if advice in (_POPULATE_READ, _POPULATE_WRITE):
            raise OSError(number, os.strerror(number))
        real(room, advice)

    patch.setattr(MappedWindow, "_advise", advise)


@pytest.mark.parametrize("mode", ["classic", "in_backward"])
def test_nothing_is_read_or_written(mode):
    """Training moves no bytes and has no slabs; gradients and state lie in the home."""
    home = mapped_home()
    model = in_home(small(), home)
    optimizer, before = optimizer_for(model, mode=mode), home.traffic
    loss_of(model, batches(1)[0]).backward()
    if mode == "classic":
        assert allocation_of(model.up.tile(0, 0).weight.grad).home is home
    optimizer.step()

    assert home.traffic == before
    assert all(ring.held_bytes == 0 for ring in rings_of(home).all())
    state = optimizer.state[model.up.tile(0, 0).weight]
    assert {allocation_of(state[key]).home for key in ("exp_avg", "exp_avg_sq")} == {home}


@pytest.mark.parametrize("kept", [0, 16 * MIB])
def test_pages_are_dropped_behind(tmp_path, monkeypatch, kept):
    """Of 64 MiB of tiles that train, few are in memory beside what the home keeps of them."""
    home, model, optimizer = _of_32_tiles(tmp_path)
    home.mapped_bytes = kept
    most, x, real = 0, torch.randn(2, 4096), _MappedLease.__exit__

    def note(lease, *raised):
        nonlocal most
        most = max(most, _mapped_bytes())
        real(lease, *raised)

    monkeypatch.setattr(_MappedLease, "__exit__", note)
    for _ in range(2):
        before = _mapped_bytes()
        model(x).sum().backward()
        optimizer.step()

    assert home.is_mapped
    assert most - before < kept + 16 * MIB


def test_pages_stay_where_no_budget_asks_for_them(tmp_path, monkeypatch):
    """Without a plan the kernel is called for each huge page in the first step, and never again."""
    home, model, optimizer = _of_32_tiles(tmp_path)
    advised, x = [], torch.randn(2, 4096)
    real = MappedWindow._advise
    monkeypatch.setattr(
        MappedWindow, "_advise", lambda room, advice: (advised.append(advice), real(room, advice))
    )
    counts = []
    for _ in range(2):
        model(x).sum().backward()
        optimizer.step()
        counts.append(len(advised))
        advised.clear()

    assert home.is_mapped
    assert counts[0] >= 3 * 64 * MIB // HUGE_PAGE
    assert counts[1] == 0


def _of_32_tiles(folder):
    home = DiskHome(folder)
    home._is_overwritten = True
    model = memtile.tile(nn.Sequential(nn.Linear(4096, 4096, bias=False)), out_splits=32, home=home)
    optimizer = memtile.TileOptimizer(
        model, torch.optim.AdamW, mode="in_backward", lr=1e-3, fused=True
    )
    return home, model, optimizer


def test_a_file_that_outgrows_memory_is_streamed_from_then_on(tmp_path, monkeypatch):
    """From there on tiles come into slabs, with the same bits, and never go back."""
    free = 1 << 60
    monkeypatch.setattr("memtile.homes.limits.free_bytes", lambda: free)
    expected = in_home(small(), "host")
    train(expected, optimizer_for(expected), batches(3))
    home = DiskHome(tmp_path)
    home._is_overwritten = True
    model = in_home(small(), home)
    assert home.is_mapped

    free = 0
    optimizer = optimizer_for(model)
    home.allocate((4 * MIB,), torch.uint8)
    assert not home.is_mapped
    free = 1 << 60
    home.allocate((16 * MIB,), torch.uint8)
    train(model, optimizer, batches(3))

    assert not home.is_mapped
    pairs = zip(model.parameters(), expected.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_a_disk_that_cannot_be_read_is_an_error(monkeypatch):
    """Pages that cannot be read raise HomeIOError before a product touches them."""
    model = in_home(small(), mapped_home())

    with monkeypatch.context() as patch:
        _refuse_to_populate(patch, errno.EIO)
        with pytest.raises(HomeIOError, match="see the system's log"):
            loss_of(model, batches(1)[0])
    assert loss_of(model, batches(1)[0]).isfinite()


def test_an_old_kernel_maps_pages_as_they_are_used(monkeypatch):
    """Where madvise refuses the advice (Linux before 5.14) tiles are used all the same."""
    model = in_home(small(), mapped_home())
    expected = loss_of(model, batches(1)[0])
    _refuse_to_populate(monkeypatch, errno.EINVAL)

    assert torch.equal(loss_of(model, batches(1)[0]), expected)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_reads_and_changes_nothing():
    """A child reads the tiles; its step is refused, and its parent's tiles stay as they are."""
    home = mapped_home()
    model = in_home(small(), home)
    optimizer = optimizer_for(model)
    train(model, optimizer, batches(1))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    loss = loss_of(model, batches(1)[0])

    def reads_and_is_refused():
        with pytest.raises(HomeError, match="belongs to process"):
            train(model, optimizer, batches(1))
        return torch.equal(loss_of(model, batches(1)[0]), loss)

    assert child_says(reads_and_is_refused)
    assert all(map(torch.equal, model.parameters(), before))


def test_making_pages_of_a_room_writes_to_no_other(tmp_path, monkeypatch):
    """What another thread parks while a new room gets its pages is kept."""
    home = DiskHome(tmp_path)
    home._is_overwritten = True
    held, real, parked = home.hold([PAGE] * 2), disk_io.drain, []

    def park():
        with held.used_by_this_thread():
            parked.append(allocate_copy(home, torch.ones(PAGE // 4)))

    other = threading.Thread(target=park)

    def drain(fd, piece, offset):
        if other.ident is None:  # at the first write only
            other.start()
            other.join(timeout=0.2)  # it may wait until the pages are made
        real(fd, piece, offset)

    monkeypatch.setattr(disk_io, "drain", drain)
    with held.used_by_this_thread():
        home.allocate((PAGE // 4,), torch.float32)
    other.join()

    assert home.is_mapped
    assert torch.equal(parked[0], torch.ones(PAGE // 4))


def test_pages_are_made_huge(tmp_path, monkeypatch):
    """New rooms are written to once, each huge page of the file as a whole; old ones never."""
    home = DiskHome(tmp_path)
    home._is_overwritten = True
    written, real = [], disk_io.drain

    def drain(fd, piece, offset):
        written.append((offset, offset + len(piece)))
        real(fd, piece, offset)

    monkeypatch.setattr(disk_io, "drain", drain)
    rooms = [home.allocate((size,), torch.uint8) for size in (5 * MIB, PAGE, MIB, 3 * MIB + 1)]
    rooms[1] = None  # its room is taken again
    again = home.allocate((PAGE,), torch.uint8)

    inside = [start // HUGE_PAGE == (stop - 1) // HUGE_PAGE for start, stop in written]
    assert home.is_mapped
    assert all(inside)
    assert sum(stop - start == HUGE_PAGE for start, stop in written) >= 3
    for allocation in (*rooms[:1], *rooms[2:], again):
        covering = [
            (start, stop)
            for start, stop in written
            if start < allocation.offset + allocation.room and allocation.offset < stop
        ]
        assert sum(stop - start for start, stop in covering) >= allocation.room
    assert len(set(written)) == len(written)

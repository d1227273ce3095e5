"""Direct reads and writes by the kernel: right, whole, and told of, whatever the kernel says."""

import errno
import gc
import os
import threading
import time
import weakref

import pytest
import torch

import memtile
from memtile.errors import HomeIOError
from memtile.homes import PAGE, DiskHome, Ending, aligned_buffer, disk_io, kernel_aio
from memtile.homes.disk import DIRECT
from memtile.transfer import Holder, rings_of

SUBMIT = kernel_aio._SUBMIT


@pytest.fixture
def home(monkeypatch, tmp_path):
    """A home whose tiles are read and written past the page cache."""
    monkeypatch.setattr("memtile.homes.disk.page_cache_fit", lambda size: (False, "a test"))
    with DiskHome(tmp_path) as home:
        if home.path != DIRECT or kernel_aio.kernel_queue() is None:
            pytest.skip("no direct I/O, or no io_submit, here")
        yield home


def moved(home, allocations, memory, *, writes):
    """The ending of a move of these rooms, which was started."""
    ending = Ending()
    assert home.start_moves(list(zip(allocations, memory, strict=True)), writes, ending)
    return ending


def parked(home, count=3):
    """Allocations of a few pages, and memory with their bytes, written."""
    allocations = [home.allocate([PAGE * (n + 1)], torch.uint8) for n in range(count)]
    memory = [aligned_buffer(each.room).random_() for each in allocations]
    moved(home, allocations, memory, writes=True).result()
    return allocations, memory


def check_contents(home):
    """Whether what is written is what is read, by the kernel's moves."""
    allocations, memory = parked(home)
    read = [aligned_buffer(each.numel()) for each in memory]
    moved(home, allocations, read, writes=False).result()
    for each, written, allocation in zip(read, memory, allocations, strict=True):
        assert torch.equal(each, written)
        assert torch.equal(allocation.tensor(), written)
    total = sum(each.numel() for each in memory)
    assert (home.traffic.read_bytes, home.traffic.written_bytes) == (total, total)


def test_what_is_written_is_read(home):
    """By both ways to a home's bytes, and it counts as traffic."""
    check_contents(home)


def refuse(which, *arguments):
    """A kernel that has no room for a move."""
    return -errno.EAGAIN


def take_one(real):
    """A kernel that has room for one move."""

    def call(which, context, count, array):
        return real(which, context, type(count)(1), array)

    return call


@pytest.mark.parametrize("kind", ["refuses all", "takes one", "moves a part", "fails"])
def test_what_the_kernel_does_not_move_is_moved_all_the_same(home, monkeypatch, kind):
    """By the thread that started it, or by the one that is told of the end."""
    real = kernel_aio._call
    submit = {"refuses all": refuse, "takes one": take_one(real)}.get(kind, real)
    result = {"moves a part": PAGE // 2, "fails": -errno.EIO}.get(kind)
    end = kernel_aio._UnderWay.end

    def call(which, *arguments):
        return (submit if which == SUBMIT else real)(which, *arguments)

    def ended(self, number, found):
        end(self, number, found if result is None else result)

    monkeypatch.setattr(kernel_aio, "_call", call)
    monkeypatch.setattr(kernel_aio._UnderWay, "end", ended)

    check_contents(home)


@pytest.mark.parametrize("act", ["read", "write"])
def test_an_error_is_of_the_ending(home, monkeypatch, act):
    """Of the disk, as it is when a thread reads and writes; the home goes on."""
    allocations, memory = parked(home)
    real = kernel_aio._call

    def call(which, *arguments):
        return (refuse if which == SUBMIT else real)(which, *arguments)

    def failing(*given):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(kernel_aio, "_call", call)
        patch.setattr(disk_io, f"{act}_at", failing)
        failed = moved(home, allocations, memory, writes=act == "write")
        with pytest.raises(HomeIOError, match=f"{act} of"):
            failed.result()

    moved(home, allocations, memory, writes=False).result()


@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt, TimeoutError])
def test_after_an_error_of_a_signals_handler_every_move_ends(home, monkeypatch, taken, error):
    """Whether the kernel had taken them before it came or not; none is under way twice."""
    allocations, memory = parked(home)
    real, ending = kernel_aio._call, Ending()

    def interrupted(which, *arguments):
        if which != SUBMIT:
            return real(which, *arguments)
        if taken:
            real(which, *arguments)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(kernel_aio, "_call", interrupted)
        with pytest.raises(error):
            home.start_moves(list(zip(allocations, memory, strict=True)), False, ending)

    ending.result()
    moved(home, allocations, memory, writes=False).result()


def test_an_error_before_the_kernel_is_asked_ends_every_move(home, monkeypatch):
    """Also of moves that have no request yet."""
    allocations, memory = parked(home)
    add, ending, calls = kernel_aio._UnderWay.add, Ending(), iter(range(9))

    def interrupted(*given):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return add(*given)

    with monkeypatch.context() as patch:
        patch.setattr(kernel_aio._UnderWay, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            home.start_moves(list(zip(allocations, memory, strict=True)), False, ending)

    ending.result()
    moved(home, allocations, memory, writes=False).result()


@pytest.mark.parametrize("act", ["read", "write"])
def test_a_ctrl_c_in_what_the_kernel_refused_comes_at_once(home, monkeypatch, act):
    """Nobody may ever wait for what was read ahead; every move has ended nevertheless."""
    allocations, memory = parked(home)
    real, ending, calls = kernel_aio._call, Ending(), []

    def interrupted(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return len(given[1])

    with monkeypatch.context() as patch:
        patch.setattr(
            kernel_aio, "_call", lambda which, *a: refuse(which) if which == SUBMIT else real(*a)
        )
        patch.setattr(disk_io, f"{act}_at", interrupted)
        with pytest.raises(KeyboardInterrupt):
            home.start_moves(list(zip(allocations, memory, strict=True)), act == "write", ending)

    assert len(calls) == len(allocations)
    assert ending.is_done
    moved(home, allocations, memory, writes=False).result()


def test_a_slab_that_is_being_written_is_kept_from_others(home, monkeypatch):
    """After a Ctrl-C between the start of a write and the next line."""
    (allocation, *_), _ = parked(home)
    ring, real, waiting = rings_of(home).weights, home.start_moves, kernel_aio.kernel_queue()
    written = threading.Event()

    def interrupted(*given):
        real(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(home, "start_moves", interrupted)
        patch.setattr(kernel_aio._UnderWay, "end", lambda *given: written.set())  # nobody is told
        with ring.acquire(made=(allocation,)) as lease, pytest.raises(KeyboardInterrupt):
            lease.store()
        assert written.wait(10)

    assert Holder.WRITERS in ring.holders
    (number,) = waiting._under_way._moves
    waiting._under_way.end(number, 0)
    ring.flush()
    assert Holder.WRITERS not in ring.holders


def test_a_slab_is_free_after_a_read_that_did_not_start(home, monkeypatch):
    """A Ctrl-C before the kernel was asked leaves nothing that is waited for."""
    (allocation, *_), memory = parked(home)
    ring = rings_of(home).weights

    def interrupted(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(home, "start_moves", interrupted)
        with pytest.raises(KeyboardInterrupt), ring.acquire((allocation,)):
            pass

    assert set(ring.holders) == {Holder.NOBODY}
    with ring.acquire((allocation,)) as lease:
        assert torch.equal(lease.tensors[0], memory[0])


def test_what_has_ended_keeps_no_memory(home):
    """Nor its home, also before the garbage collector comes: a slab that grows frees the old."""
    allocations, memory = parked(home)
    kept = [weakref.ref(each) for each in (*allocations, *memory)]
    gc.disable()
    try:
        moved(home, allocations, memory, writes=False).result()
        del allocations, memory
        until = time.monotonic() + 5  # the queue's thread may be in its last lines
        while any(each() is not None for each in kept) and time.monotonic() < until:
            time.sleep(0.001)
        assert [each() for each in kept] == [None] * 6
    finally:
        gc.enable()


def test_a_home_that_is_closed_waits_for_its_moves(home):
    """And no later one is told of its events."""
    allocations, memory = parked(home)
    endings = [moved(home, allocations, memory, writes=True) for _ in range(20)]
    home.close()

    assert home.transfers.gate() is None
    assert [ending.result() for ending in endings] == [None] * 20


def test_a_processor_without_known_numbers_has_no_queue(monkeypatch):
    """Nor has a process that its administrator allows none: threads read and write then."""
    monkeypatch.setattr(kernel_aio, "_NUMBERS", {})

    assert kernel_aio._queue_of.__wrapped__(os.getpid()) is None


def trained(home):
    """The weights after some steps of a small model that is parked there."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(40, 64), torch.nn.Tanh(), torch.nn.Linear(64, 40))
    memtile.tile(model, max_tile_bytes=4096, home=home)
    optimizer = memtile.TileOptimizer(model, torch.optim.AdamW, mode="in_backward", lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(5, 40)).square().mean().backward()
        optimizer.step()
    return dict(memtile.dense_state_dict(model))


@pytest.mark.parametrize("by", ["the kernel", "threads"])
def test_training_gives_the_same_bits(home, monkeypatch, tmp_path, by):
    """One home after another, with and without io_submit."""
    if by == "threads":
        monkeypatch.setattr("memtile.homes.kernel_moves.kernel_queue", lambda: None)
    expected = trained(memtile.HostHome())
    for _ in range(10):
        with DiskHome(tmp_path) as other:
            found = trained(other)
            assert other.path == DIRECT
            assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_moves_that_overlap_are_in_lanes_of_their_own(home, tmp_path):
    """So that a trace's viewer shows each of them."""
    allocations, memory = parked(home)
    with memtile.observe() as observation:
        moved(home, allocations, memory, writes=False).result()

    lanes = [event.thread for event in observation.events]
    assert sorted(lanes) == [-3, -2, -1]
    observation.save(tmp_path / "trace.json")
    assert '"kernel 1"' in (tmp_path / "trace.json").read_text()

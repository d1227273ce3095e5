"""`park_activations`: when pieces are moved, what stays in memory, and what happens to errors."""

import errno
import gc
import os
import threading

import pytest
import torch
from faulty_disk import FaultyDisk
from forked import child_says
from rings import quiet, saved_is_written
from saving_blocks import SMALL, WIDTH, Blocks, equal, kept, step
from threads import together
from torch import nn
from watched_home import WatchedHome

import memtile
from memtile.errors import HomeError, HomeFullError, HomeIOError
from memtile.homes import DiskHome, HostHome
from memtile.testing import peak_allocated_bytes
from memtile.transfer import SLABS, Holder, rings_of

KIB = 1 << 10


def file_bytes(home):
    return os.fstat(home._file.fd).st_size


def chain(length, rows=64, width=256):
    """A loss behind so many products, each of which keeps its own 64 KiB input."""
    x = torch.ones(rows, width, requires_grad=True)
    y = x
    for _ in range(length):
        y = (y * 1.0).sin()  # keeps what the product made
    return x, y.sum()


@pytest.fixture
def watched():
    with WatchedHome() as home:
        yield memtile.park_activations(home, smallest_bytes=KIB)


def test_writes_do_not_stop_the_forward(watched):
    """While a disk writes nothing, forward goes on for as long as there are slabs."""
    go_on = threading.Event()
    watched.home.before = lambda act, label: go_on.wait(30)
    with watched:
        x, loss = chain(SLABS)
    ring = rings_of(watched.home).activations

    assert ring.holders == [Holder.WRITERS] * SLABS
    go_on.set()
    loss.backward()
    assert x.grad is not None


def test_a_dropped_graph_frees_its_slabs_at_once(watched):
    """What it saved is not waited for: the next forward goes on though the disk still writes."""
    go_on = threading.Event()
    watched.home.before = lambda act, label: go_on.wait(30)
    with watched:
        _, loss = chain(SLABS)
    ring = rings_of(watched.home).activations
    assert ring.holders == [Holder.WRITERS] * SLABS
    del loss

    assert ring.holders == [Holder.NOBODY] * SLABS
    with watched:
        x, loss = chain(SLABS)
    go_on.set()
    loss.backward()
    assert torch.equal(x.grad, derivative(SLABS))


def derivative(length):
    x, loss = chain(length)
    loss.backward()
    return x.grad


def test_bytes_on_their_way_are_bounded(watched):
    """However much is saved, there are only so many slabs, each of the largest piece."""
    with watched:
        _, loss = chain(12)
    loss.backward()

    assert rings_of(watched.home).activations.held_bytes == SLABS * 64 * KIB


def test_backward_reads_each_piece_once_and_ahead(watched):
    """In the reverse order of saving: when a node has run, the read for the next has begun."""
    home, pieces = watched.home, 9
    for _ in range(2):  # by the reverse order, and then by what was learnt
        home.clear()
        with watched:
            losses = [kept(torch.randn(64 + n, 256) * 1, x=leaf(n, home))[0] for n in range(pieces)]
        saved_is_written(home)
        sum(losses).backward()

        assert home.labels("write") == [label(n) for n in range(pieces)]
        read = home.labels("read")
        assert read == [label(n) for n in reversed(range(pieces)) if label(n) in read]
        assert pieces - SLABS <= len(read) <= pieces


def label(number):
    return f"activation float32 ({64 + number}, 256)"


def leaf(number, home):
    """Its gradient is there when the node of piece `number` has run, and before the next one's."""
    made = torch.ones(1, requires_grad=True)
    if 0 < number < 5:  # later ones may be in slabs still
        made.register_post_accumulate_grad_hook(lambda _: home.begins("read", label(number - 1)))
    return made


def test_a_learnt_order_is_read_without_detours(watched):
    """A node that needs tensors in the order of saving: the second backward reads none twice."""

    def reads():
        watched.home.clear()
        with watched:
            losses = [kept(*(torch.randn(64, 256) * 1 for _ in range(4)))[0] for _ in range(3)]
        sum(losses).backward()
        quiet(rings_of(watched.home).activations)
        return len(watched.home.labels("read"))

    first, second = reads(), reads()
    assert second <= 12 <= first


def test_what_several_nodes_need_is_read_once(watched):
    """A tensor that was saved by four products is in memory until the last of them has run."""
    x = torch.randn(64, 256, requires_grad=True) * 1
    weights = [nn.Parameter(torch.randn(256, 2)) for _ in range(4)]
    with watched:
        products = [x @ weight for weight in weights]
        _, later = chain(SLABS + 1)
    del x
    watched.home.clear()
    (sum(products).sum() + later).backward()
    quiet(rings_of(watched.home).activations)

    assert watched.home.labels("read").count("activation float32 (64, 256)") <= SLABS + 2
    assert all(weight.grad is not None for weight in weights)


def test_the_room_is_used_again():
    """The file does not grow after the first step: with a backward, without one, after an error."""
    model = Blocks()
    parked = memtile.park_activations("disk", smallest_bytes=SMALL)
    step(model, parked)
    size = file_bytes(parked.home)

    for _ in range(3):
        step(model, parked)
        with parked:
            loss = model(torch.randn(2, 37, WIDTH))
        del loss
        with pytest.raises(RuntimeError, match="size"), parked:
            model(torch.randn(2, 37, WIDTH)) + torch.ones(3) @ torch.ones(4)
        gc.collect()
    assert file_bytes(parked.home) == size


def test_a_graph_may_be_used_again():
    """Backward twice through a retained graph, and a backward of a backward."""

    def gradients(context):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh())
        x = torch.randn(20, 40, requires_grad=True)
        with context:
            loss = model(x).sum()
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        first.square().sum().backward()
        return [x.grad, *(p.grad for p in model.parameters())]

    parked = memtile.park_activations("disk", smallest_bytes=KIB)
    assert equal(gradients(parked), gradients(torch.enable_grad()))
    assert parked.home.traffic.written_bytes > 0


def test_peak_memory_is_that_of_slabs_and_one_layer():
    """Tensors in memory: one layer's, and what is held; all else is in the home.

    Each of 24 layers keeps 2 MiB (a product's input, and a sine's). Plain autograd holds them all.
    """
    layers, nbytes = 24, 1 << 20
    parked = memtile.park_activations("disk")

    def run(context):
        def both():
            with context:
                _, loss = chain(layers, rows=512, width=512)
            loss.backward()

        return peak_allocated_bytes(both)

    plain, ours = run(torch.enable_grad()), run(parked)
    assert plain >= layers * nbytes
    # x, its gradient, a product, its sine, what a gradient is made of; a piece from the home.
    assert ours <= 7 * nbytes
    assert rings_of(parked.home).activations.held_bytes == SLABS * nbytes


def test_observe_shows_what_is_moved():
    """Reads and writes by name, as of tiles."""
    parked = memtile.park_activations("disk", smallest_bytes=KIB)
    with memtile.observe() as seen, parked:
        _, loss = chain(9)
        loss.backward()

    for kind in ("read", "write"):
        names = {event.name for event in seen.events if event.kind == kind}
        assert names == {"activation float32 (64, 256)"}


# Errors


@pytest.mark.parametrize("act", ["read", "write"])
def test_a_failing_disk_is_raised_by_name(monkeypatch, act):
    """From forward or backward; with the disk mended, the next step is right."""
    disk, model = FaultyDisk(monkeypatch), Blocks()
    expected = step(model)
    parked = memtile.park_activations("disk", smallest_bytes=SMALL)
    disk.fail(act, 2)
    with pytest.raises(HomeIOError, match=rf"{act} of .* failed"):
        step(model, parked)

    disk.mend()
    assert equal(step(model, parked), expected)


def test_a_write_that_fails_once_is_tried_again(monkeypatch):
    """Nothing is lost of it."""
    disk, model = FaultyDisk(monkeypatch), Blocks()
    expected = step(model)
    parked = memtile.park_activations("disk", smallest_bytes=SMALL)
    disk.fail("write", 2, times=1)

    assert equal(step(model, parked), expected)


def test_a_full_disk_is_raised_by_name(monkeypatch):
    """In forward; when there is room again, the next step is right."""
    model = Blocks()
    expected = step(model)
    parked = memtile.park_activations("disk", smallest_bytes=SMALL)
    size = file_bytes(parked.home)

    def full(fd, offset, length):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(HomeFullError, match="make room, or give another folder"):
            step(model, parked)
    assert file_bytes(parked.home) == size
    assert equal(step(model, parked), expected)


def test_threads_may_park_in_one_home_at_once():
    """Each has its own gradients; none waits for another's slabs for ever."""
    parked = memtile.park_activations("disk", smallest_bytes=SMALL)
    # Dropout would draw from the generator of the process, in any order.
    models = [Blocks().eval() for _ in range(4)]
    inputs = [torch.randn(2, 37, WIDTH) for _ in models]

    def train(model, x):
        model(x).backward()
        expected = [p.grad.clone() for p in model.parameters()]
        for _ in range(3):
            with parked:
                loss = model(x)
            model.zero_grad()
            loss.backward()
            assert equal([p.grad for p in model.parameters()], expected)

    pairs = zip(models, inputs, strict=True)
    together(*(lambda model=model, x=x: train(model, x) for model, x in pairs))


@pytest.mark.parametrize("make_home", [HostHome, DiskHome])
def test_backward_in_a_fork_is_refused(make_home):
    """A child finds zeros in slabs that were not yet written."""
    parked = memtile.park_activations(make_home(), smallest_bytes=KIB)
    with parked:
        x, loss = chain(3)

    def refused():
        with pytest.raises(HomeError, match="run forward and backward in one process"):
            loss.backward()
        return True

    assert child_says(refused)
    loss.backward()
    assert x.grad is not None

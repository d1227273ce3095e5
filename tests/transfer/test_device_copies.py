"""Copies on a stream of a device, with streams that copy as late as they may."""

import gc
import weakref

import pytest
import torch
from saving_blocks import SMALL, Blocks, equal, kept, step
from torch import Tensor
from torch.overrides import TorchFunctionMode

import memtile
from memtile.homes import HostHome
from memtile.transfer import device_copies, saved_pieces
from memtile.transfer.device_copies import DeviceCopies


class LateStream:
    """Does what was given to it only when somebody waits for it."""

    def __init__(self):
        self.queue, self.done, self.waited_for = [], 0, []

    def wait_stream(self, other):
        self.waited_for.append(other)

    def wait_event(self, event):
        event.synchronize()

    def record_event(self):
        return LateEvent(self, self.done + len(self.queue))


class LateEvent:
    def __init__(self, stream, after):
        self.stream, self.after = stream, after

    def query(self):
        return self.stream.done >= self.after

    def synchronize(self):
        while not self.query():
            self.stream.queue.pop(0)()
            self.stream.done += 1


class Queueing(TorchFunctionMode):
    """Gives copies to a stream."""

    def __init__(self, stream):
        super().__init__()
        self.stream = stream

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not Tensor.copy_:
            return func(*args, **(kwargs or {}))
        assert kwargs == {"non_blocking": True}
        self.stream.queue.append(lambda: args[0].copy_(args[1]))
        return args[0]


class FakeCuda:
    """What `DeviceCopies` uses of `torch.cuda`, for the CPU's memory."""

    def __init__(self):
        self.current, self.streams = LateStream(), []

    def Stream(self, device):
        self.streams.append(LateStream())
        return self.streams[-1]

    def current_stream(self, device):
        return self.current

    def stream(self, stream):
        return Queueing(stream)


@pytest.fixture
def cuda(monkeypatch):
    """Streams for memory of the CPU, which `park_activations` then treats as a device's."""
    fake, recorded = FakeCuda(), []
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: recorded.append(tensor))
    monkeypatch.setattr(saved_pieces, "DeviceCopies", lambda device: DeviceCopies(device, fake))
    monkeypatch.setattr(saved_pieces.SavedPieces, "_is_streamed", lambda self, device: True)
    fake.recorded = recorded
    return fake


def stored(copies, value):
    allocation = HostHome().allocate((5000,), torch.uint8)
    copies.store(torch.full((5000,), value, dtype=torch.uint8), allocation)
    return allocation


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradients_have_the_same_bits(cuda, reentrant):
    """However late copies are made: each is waited for before its values are used."""
    model = Blocks(reentrant)
    parked = memtile.park_activations("host", smallest_bytes=SMALL, model=model)

    for seed in range(2):
        assert equal(step(model, parked, seed=seed), step(model, seed=seed))
    (stream,) = cuda.streams
    assert stream.done > 0
    assert stream.waited_for == [cuda.current] * (stream.done + len(stream.queue))


def test_what_is_modified_after_it_was_saved_comes_back_as_it_was(cuda):
    """A kernel that writes in place may run before the copy."""
    x = torch.randn(50, 50) * 1
    with memtile.park_activations("host", smallest_bytes=SMALL):
        loss, found = kept(x)
    before = x.clone()
    x.zero_()
    loss.backward()

    assert equal(found, [before])


def test_what_comes_next_is_on_its_way(cuda):
    """When a node asks for its piece, the copies of the next two have been started."""
    parked = memtile.park_activations("host", smallest_bytes=SMALL)
    asked = []
    with parked:
        losses = []
        for _ in range(6):
            x = torch.ones(1, requires_grad=True)
            x.register_post_accumulate_grad_hook(lambda _: asked.append(started(cuda)))
            losses.append(kept(torch.randn(50, 50) * 1, x=x)[0])
    assert started(cuda) == 6
    sum(losses).backward()

    assert asked == [9, 10, 11, 12, 12, 12]


def started(cuda):
    (stream,) = cuda.streams
    return stream.done + len(stream.queue)


def test_host_memory_is_kept_until_it_was_copied(cuda):
    """An allocation that nobody else has stays for its copy, and goes after it."""
    copies = DeviceCopies(torch.device("cpu"), cuda)
    gone = weakref.ref(stored(copies, 7))
    gc.collect()
    assert gone() is not None

    flat, event = copies.load(gone())
    copies.wait(event)
    stored(copies, 8)
    gc.collect()
    assert flat.unique().tolist() == [7]
    assert gone() is None


def test_copies_under_way_are_bounded(cuda):
    """The oldest is waited for; the device's allocator is told of the memory of each."""
    copies = DeviceCopies(torch.device("cpu"), cuda)
    allocations = [stored(copies, value) for value in range(30)]
    (stream,) = cuda.streams

    assert len(stream.queue) == device_copies.COPIES_UNDER_WAY
    assert len(cuda.recorded) == 30
    del copies  # waits for what is under way
    gc.collect()
    assert not stream.queue
    assert [a.tensor().unique().tolist() for a in allocations] == [[n] for n in range(30)]

"""A signal's handler that raises, a Ctrl-C say, at every moment at which Python may call it.

Python calls handlers where a function begins and after a call (CPython 3.11: RESUME, CALL). There,
and nowhere else, a profile function is called too: one that raises stands for a handler that does.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from itertools import count
from types import FrameType

import pytest
import torch
from torch import nn

import memtile
from memtile.homes import DiskHome, kernel_aio
from memtile.transfer import Holder, rings_of

PATIENCE_SECONDS = 120
FINALIZERS = {"_drop", "_remove", "remove"}  # what they raise nobody hears: Python drops it
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Handled(Exception):
    """What the handler raises."""


def raises_at(number: int, act: Callable[[], object]) -> bool:
    """Act, and raise at the moment of this number; whether there were so many."""
    moments = count(1)

    def handle(frame: FrameType, event: str, argument: object) -> None:
        if frame.f_code.co_name in FINALIZERS:
            return
        if event in ("call", "c_return") and next(moments) == number:
            sys.setprofile(None)
            raise Handled

    sys.setprofile(handle)
    try:
        act()
    except Handled:
        return True
    finally:
        sys.setprofile(None)
        torch.set_grad_enabled(True)  # torch's own contexts may not have ended
    return next(moments) > number  # it was raised where nobody can hear it: in a finalizer


def in_time(act: Callable[[], object]) -> None:
    """Act in a thread, and fail where it waits for ever."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive(), "it waits for ever"
    if errors:
        raise errors[0]


@pytest.fixture(params=["the kernel", "threads"])
def home(request, monkeypatch, tmp_path) -> Iterator[DiskHome]:
    """A home whose tiles are read and written past the page cache."""
    monkeypatch.setattr("memtile.homes.disk.page_cache_fit", lambda size: (False, "a test"))
    if request.param == "threads":
        monkeypatch.setattr("memtile.homes.kernel_moves.kernel_queue", lambda: None)
    elif kernel_aio.kernel_queue() is None:
        pytest.skip("no io_submit here")
    with DiskHome(tmp_path) as home:
        yield home
    queue = kernel_aio.kernel_queue()
    assert queue is None or not queue._under_way.any()  # the end of the process waits for these


def test_a_tile_can_be_worked_on_again_whenever_a_handler_raises(home):
    """No lock, no slab and no read or write is lost, and no value; the home can be closed."""
    tiles = [home.allocate((1000,), torch.float32) for _ in range(5)]
    for tile in tiles:
        tile.tensor().zero_()
    ring = rings_of(home).weights

    def visit() -> None:
        for tile in tiles[:2]:
            with ring.acquire((tile,), written=True, ahead=[(each,) for each in tiles]) as lease:
                values = lease.tensors[0]
                values.copy_(values + 1)
                lease.store()

    def at_every_moment() -> None:
        visit()
        for number in count(1):
            was_reached = raises_at(number, visit)
            ring.start()
            found = [set(each.tensor().tolist()) for each in tiles]
            assert all(len(values) == 1 for values in found), number
            if not was_reached:
                break
        assert number > 200
        visit()
        ring.flush()

    in_time(at_every_moment)

    in_time(home.close)
    assert Holder.WRITERS not in ring.holders


def test_a_model_goes_on_whenever_a_handler_raises(home):
    """In forward and backward: the next ones give the same loss and gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 40))
    memtile.tile(model, max_tile_bytes=6 << 10, home=home)
    x = torch.randn(5, 40)

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    def now_and_then() -> None:
        expected = step()
        for number in count(1, 11):
            was_reached = raises_at(number, step)
            for ours, theirs in zip(step(), expected, strict=True):
                assert torch.equal(ours, theirs), number
            if not was_reached:
                break
        assert number > 500

    in_time(now_and_then)

"""`observe`: what is recorded of a step, in whatever way it is entered and left."""

import math
import sys
import threading
import time
from collections.abc import Callable

import pytest
import torch
from parked_layers import small_model

import memtile
from memtile import DiskHome, observing
from memtile.errors import ArgumentError
from memtile.homes import disk_io
from memtile.observing import recording
from memtile.observing.recording import (
    BACKWARD,
    COMPUTE,
    FORWARD,
    READ,
    STEP,
    WAIT_FOR_READ,
    WAITS,
    WRITE,
)


class Training:
    """A parked model, and one step of it."""

    def __init__(self, mode: str = "in_backward", **cut: int) -> None:
        self.home = DiskHome()
        self.model = memtile.tile(
            small_model(), **(cut or {"out_splits": 3, "in_splits": 2}), home=self.home
        )
        self.optimizer = memtile.TileOptimizer(self.model, torch.optim.AdamW, mode=mode, lr=1e-3)
        self.x = torch.randn(5, 13)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(self.x).square().mean().backward()
        self.optimizer.step()


@pytest.fixture(params=["in_backward", "classic"])
def training(request) -> Training:
    """Gives a training whose first step is done."""
    made = Training(request.param)
    made.step()
    return made


def amounts(seen: observing.Observation, kind: str) -> int:
    return sum(event.amount for event in seen.events if event.kind == kind)


def test_the_bytes_are_those_that_the_home_moved(training):
    """Reads and writes of a step add up to what the home counts."""
    before = training.home.traffic

    with memtile.observe() as seen:
        training.step()

    after = training.home.traffic
    assert amounts(seen, READ) == after.read_bytes - before.read_bytes > 0
    assert amounts(seen, WRITE) == after.written_bytes - before.written_bytes > 0


@pytest.mark.parametrize("cut", [{"out_splits": 3, "in_splits": 2}, {"out_splits": 1}])
def test_each_tile_is_seen_by_its_name(cut):
    """A forward, a backward and an optimizer's step of each tile; events do not leave the block."""
    training = Training(**cut)
    training.step()

    with memtile.observe() as seen:
        training.step()

    weights = {name for name, p in training.model.named_parameters() if name.endswith("weight")}
    for kind in (FORWARD, BACKWARD, STEP):
        assert weights == {s.name for s in seen.events if s.kind == kind and "weight" in s.name}
    end = seen.begun_ns + round(seen.seconds * 1e9)
    assert all(seen.begun_ns <= s.begun_ns <= s.ended_ns <= end for s in seen.events)


def test_the_table_adds_up_to_the_time(training):
    """Compute, waits and what is outside of tiles are the seconds observed, in one thread."""
    with memtile.observe() as seen:
        training.step()

    rows = [row for row in seen._rows() if not row.name.startswith("meanwhile")]
    assert {row.name for row in rows} <= {*COMPUTE, *WAITS, "outside of tiles"}
    assert math.isclose(sum(row.seconds for row in rows), seen.seconds)
    assert all(row.seconds >= 0 for row in rows)


def test_a_wait_is_of_the_tile_that_was_not_there(monkeypatch):
    """A slow disk: the wait has the tile's name, and counts in the sums that are always kept."""
    training = Training(out_splits=2)
    real = disk_io.read_at

    def slow(fd: int, buffer: memoryview, offset: int) -> int:
        time.sleep(0.1)  # longer than a thread may be kept from running
        return real(fd, buffer, offset)

    monkeypatch.setattr(disk_io, "read_at", slow)
    waited, moving = observing.totals.waited_ns, observing.totals.moving_ns
    with torch.no_grad(), memtile.observe() as seen:
        training.model(training.x)

    waits = [event for event in seen.events if event.kind == WAIT_FOR_READ]
    assert waits[0].name == "0.linears.0.0.weight"
    assert "waited longest for: " in str(seen)
    assert observing.totals.waited_ns - waited > recording.SHORTEST_WAIT_NS
    assert observing.totals.moving_ns > moving


def calls(act: Callable[[], object]) -> list[str]:
    """The files of the Python functions that this thread calls."""
    found: list[str] = []

    def note(frame, event, argument):
        if event == "call":
            found.append(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        act()
    finally:
        sys.setprofile(None)
    return found


def test_without_it_nothing_is_called(training):
    """Off, a step calls no function of `observing`, before a block as after it; inside it does."""
    own = observing.__path__[0]
    before = calls(training.step)
    with memtile.observe():
        inside = calls(training.step)
    after = calls(training.step)

    assert not [file for file in before + after if file.startswith(own)]
    assert [file for file in inside if file.startswith(own)]


def test_a_read_takes_as_many_calls_as_before():
    """Off, one read of a home takes the same number of Python calls before and after a block."""
    home = DiskHome()
    allocation = home.allocate((1024,), torch.float32)
    buffer = memtile.homes.aligned_buffer(4096)

    def read() -> None:
        allocation.read(buffer)

    before = len(calls(read))
    with memtile.observe() as seen:
        inside = len(calls(read))

    assert len(calls(read)) == before < inside
    assert [event.name for event in seen.events] == ["float32 (1024,)"]


def test_blocks_in_blocks_see_what_is_inside_each(training):
    """The outer one records all, the inner one its own part, and afterwards nobody anything."""
    with memtile.observe() as outer:
        training.step()
        with memtile.observe() as inner:
            training.step()

    assert 0 < len(inner.events) < len(outer.events)
    assert min(event.begun_ns for event in inner.events) >= inner.begun_ns
    assert recording.active == ()


def test_threads_observe_at_once(training):
    """Two threads each record the one step that is made while both are inside."""
    inside, done = threading.Barrier(3), threading.Event()
    seen = []

    def look() -> None:
        with memtile.observe() as mine:
            inside.wait(60)
            done.wait(60)
        seen.append(mine)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    inside.wait(60)
    training.step()
    done.set()
    for thread in threads:
        thread.join(60)

    assert [each.events for each in seen] == [seen[0].events] * 2
    assert seen[0].events
    assert recording.active == ()


def test_an_exception_leaves_what_was_recorded(training):
    """The error comes out as it is, the block is over, and its events are there."""
    training.model[1].register_backward_hook(lambda *given: 1 / 0)

    with pytest.raises(ZeroDivisionError), memtile.observe() as seen:
        training.step()

    assert recording.active == ()
    assert {FORWARD, READ} <= {event.kind for event in seen.events}


def test_a_block_can_be_read_from_inside(training):
    """Table and events are of what has ended so far."""
    with memtile.observe() as seen:
        training.step()
        early = len(seen.events)
        assert "forward" in seen.table()
        training.step()

    assert 0 < early < len(seen.events)


def test_before_the_block_nothing_is_observed(tmp_path):
    """Table and length say so, where the table had the age of the machine; saving is refused."""
    seen = memtile.observe()

    assert seen.seconds == 0
    assert "0.000" in str(seen)
    assert "nothing was observed yet: with memtile.observe() as seen" in str(seen)
    assert repr(seen) == "<Observation of 0 events in 0.000 s>"
    for name in ("step.json", "step.png"):
        with pytest.raises(ArgumentError, match="nothing was observed yet"):
            seen.save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_more_than_the_limit_is_counted_and_not_kept(training):
    """The first events are kept, the table says how many are missing."""
    with memtile.observe(max_events=7) as seen:
        training.step()

    assert len(seen.events) == 7
    assert f"{seen.dropped} later events are missing" in str(seen)
    assert seen.dropped > 0


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "7"])
def test_a_limit_is_a_whole_number(limit):
    """Anything else is refused before the block."""
    with pytest.raises(ArgumentError, match="max_events="):
        memtile.observe(limit)


def test_an_observation_is_made_once():
    """Entering it again would mix two times."""
    seen = memtile.observe()
    with seen:
        pass

    with pytest.raises(ArgumentError, match=r"call memtile\.observe\(\) again"):
        seen.__enter__()


def test_a_home_in_memory_shows_compute_alone():
    """Nothing is read and nothing waited for where tiles are worked on in place."""
    model = memtile.tile(small_model(), out_splits=3, home="host")

    with memtile.observe() as seen:
        model(torch.randn(5, 13)).sum().backward()

    assert {event.kind for event in seen.events} == {FORWARD, BACKWARD}

"""The end of reads and writes: it comes once, with the first error, whatever was left out."""

import threading
from concurrent.futures import CancelledError

import pytest

from memtile.homes import Ending, Gates, HostHome, Traffic, WorkerThreads
from memtile.homes.transfers import Transfer


@pytest.fixture
def workers():
    """Two threads, which are ended."""
    workers = WorkerThreads(2, "memtile-test")
    yield workers
    workers.join()


def failing():
    """An act that fails."""
    raise ValueError("the test wants it")


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_it_comes_once_all_acts_are_done(workers, parts):
    """And `then` is called once."""
    done, told = [], []
    ending = Ending(lambda: told.append(len(done)))
    workers.start(ending, [lambda: done.append(1)] * parts)
    ending.result()

    assert told == [parts]
    assert ending.is_done
    assert not ending.has_failed


def test_the_first_error_is_raised_and_the_other_acts_are_done(workers):
    """To everyone who waits, as often as they wait."""
    done = []
    ending = Ending()
    workers.start(ending, [failing, lambda: done.append(1), failing])

    for _ in range(2):
        with pytest.raises(ValueError, match="the test wants it"):
            ending.result()
    assert done == [1]


def test_what_was_cancelled_before_it_began_has_ended_at_once():
    """Also where no thread has ever heard of it; acts are not done later."""
    told = []
    ending = Ending(lambda: told.append(1))
    ending.add([failing])

    ending.cancel()
    ending.work()

    assert told == [1]
    with pytest.raises(CancelledError):
        ending.result()


def test_what_was_begun_goes_on_when_the_rest_is_cancelled(workers):
    """The end comes after it, and says that something was left out."""
    began, go_on, done = threading.Event(), threading.Event(), []

    def first():
        began.set()
        go_on.wait(30)
        done.append(1)

    ending = Ending()
    workers.start(ending, [first])
    began.wait(30)
    ending.add([failing])

    ending.cancel()

    assert not ending.is_done
    go_on.set()
    with pytest.raises(CancelledError):
        ending.result()
    assert done == [1]


def test_a_thread_goes_on_after_an_error_in_what_is_called_at_the_end(caplog):
    """The error is logged, and the next reads are made."""
    workers, last = WorkerThreads(1, "memtile-test"), Ending()
    first = Ending(failing)
    for ending in (first, last):
        workers.start(ending, [lambda: None])

    last.result()
    workers.join()

    assert first.is_done
    assert "the test wants it" in caplog.text


def test_closed_threads_refuse_what_is_started_later(workers):
    """And do what was started before."""
    ending = Ending()
    workers.start(ending, [lambda: None])
    workers.close()

    ending.result()
    with pytest.raises(RuntimeError, match="closed"):
        workers.start(Ending(), [failing])


def test_all_who_wait_at_a_gate_are_woken():
    """A gate that was closed later stays closed."""
    gates = Gates()
    first, second = gates.close_one(), gates.close_one()

    gates.open_all()
    third = gates.close_one()

    assert not first.locked()
    assert not second.locked()
    assert third.locked()


def test_a_home_is_closed_once_its_last_read_ends_though_another_was_lost():
    """A Ctrl-C may lose the end of one: it is over when nothing refers to it."""
    home, lost, last = HostHome(), Transfer(), Transfer()
    for transfer in (lost, last):
        home.begin_transfer(transfer)
    del transfer, lost

    closing = threading.Thread(target=home.close, daemon=True)
    closing.start()
    closing.join(0.1)
    assert not home.closed
    home.transfers.end(last, Traffic(1, 0))
    closing.join(30)

    assert home.closed
    assert home.traffic == Traffic(1, 0)

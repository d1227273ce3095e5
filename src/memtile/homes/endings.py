"""The end of work that other threads or the kernel do, whatever a signal's handler raises.

`concurrent.futures`, `threading.Condition` and `contextlib` enter locks in functions of Python. A
Ctrl-C between two of their lines leaves the lock to a thread that is gone from there, and whoever
needs it next waits for ever: 1 of 400 that came in a forward did (direct I/O). In `with lock` alone
no handler is called between the lock and the block.
"""

import atexit
import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from functools import lru_cache
from queue import SimpleQueue
from typing import Final

_log = logging.getLogger("memtile.homes")

_SECONDS_AT_EXIT: Final = 10


class Gates:
    """What threads wait at until something that a lock guards has changed."""

    def __init__(self) -> None:
        self._closed: list[threading.Lock] = []

    def close_one(self) -> threading.Lock:
        """A lock that the next `open_all` frees. Called under the guarding lock, entered after it.

        To enter it inside would keep others from making the change.
        """
        gate = _closed_gate()
        self._closed.append(gate)
        return gate

    def open_all(self) -> None:
        """Wake all that wait; from any thread."""
        with suppress(IndexError):  # others may be waking them too
            while True:
                self._closed.pop().release()


class Ending:
    """The end of some reads or writes that others make.

    Args:
        then: is called once it has come, in the thread that brings it.

    Attributes:
        was_begun: whether any of it was begun.
        is_done: whether it has come.
        error: what was raised first; CancelledError where some of it was left out.
    """

    def __init__(self, then: Callable[[], None] = lambda: None) -> None:
        self.was_begun = self.is_done = False
        self.error: BaseException | None = None
        self._then, self._gate = then, _closed_gate()
        self._lock = threading.RLock()
        self._acts: deque[Callable[[], None]] = deque()  # that nobody has begun
        self._under_way = 0  # of the acts

    @property
    def has_failed(self) -> bool:
        """Whether it has come with an error."""
        return self.is_done and self.error is not None

    def finish(self, error: BaseException | None = None) -> None:
        """It has come; a second call does nothing."""
        with self._lock:
            is_first = not self.is_done
            if is_first:
                self.error = self.error or error
                self.is_done = True
                self._gate.release()
        if is_first:
            self._then()

    def add(self, acts: Iterable[Callable[[], None]]) -> None:
        """What `work` is to do, and after which it has come."""
        with self._lock:
            self._acts.extend(acts)

    def work(self) -> None:
        """Do acts, as long as there are any that nobody has begun."""
        while (act := self._next()) is not None:
            error = error_of(act)
            del act  # it keeps memory and homes
            with self._lock:
                self._under_way -= 1
                self.error = self.error or error
                is_last = not (self._under_way or self._acts)
            del error
            if is_last:
                self.finish()
        del self  # an error's traceback keeps this frame, which would keep the error

    def _next(self) -> Callable[[], None] | None:
        """An act, which begins now."""
        with self._lock:
            if not self._acts:
                return None
            self.was_begun = True
            self._under_way += 1
            return self._acts.popleft()

    def cancel(self) -> None:
        """Leave out what nobody has begun; what was begun goes on, and ends by itself."""
        with self._lock:
            left_out = bool(self._acts) or not self.was_begun
            self._acts.clear()
            if left_out and self.error is None and not self.is_done:
                self.error = CancelledError()
            is_last = left_out and not self._under_way
        if is_last:
            self.finish()

    def wait(self) -> None:
        """Return once it has come, well or not."""
        if not self.is_done:
            with self._gate:
                pass

    def result(self) -> None:
        """`wait`, and raise the error, if any."""
        self.wait()
        if self.error is not None:
            try:
                raise self.error
            finally:
                del self  # its traceback would keep what keeps it


class WorkerThreads:
    """Some threads that do the acts of `Ending`s, in turn; they are made when first needed."""

    def __init__(self, number: int, name: str) -> None:
        self._jobs = SimpleQueue[Ending | None]()
        self._number = number
        self._names = [f"{name}_{each}" for each in range(number)]
        self._threads: list[threading.Thread] = []
        self._is_closed = False
        self._stop = weakref.finalize(self, _stop, self._jobs, number)
        self._stop.atexit = False
        _alive.add(self)
        _watch_exit()

    def start(self, job: Ending, acts: Sequence[Callable[[], None]]) -> None:
        """Have threads do the acts, after which the job has ended.

        Raises:
            RuntimeError: they are closed, or no thread can be started.
        """
        if self._is_closed:
            raise RuntimeError("these threads are closed: nothing can be read or written")
        job.add(acts)
        for _ in range(min(len(acts), self._number)):
            if self._names:
                thread = threading.Thread(
                    target=_work, args=(self._jobs,), name=self._names.pop(), daemon=True
                )
                self._threads.append(thread)
                thread.start()
            self._jobs.put(job)

    def close(self) -> None:
        """End the threads once they have done what was started; nobody waits for that."""
        self._is_closed = True
        self._stop()

    def join(self) -> None:
        """`close`, and wait some seconds for the end."""
        self.close()
        for thread in self._threads:
            thread.join(_SECONDS_AT_EXIT / self._number)


_alive: weakref.WeakSet[WorkerThreads] = weakref.WeakSet()


@lru_cache
def _watch_exit() -> None:
    """Have no thread fill memory that is freed while the interpreter ends."""
    atexit.register(_join_all)


def _join_all() -> None:
    for threads in list(_alive):
        threads.join()


def _work(jobs: "SimpleQueue[Ending | None]") -> None:
    while (job := jobs.get()) is not None:
        try:
            job.work()
        except Exception:  # of what is called at the end; the thread has other jobs
            _log.exception("the end of a read or write")
        del job


def _stop(jobs: "SimpleQueue[Ending | None]", number: int) -> None:
    for _ in range(number):
        jobs.put(None)


def error_of(act: Callable[[], None]) -> BaseException | None:
    """What it raises, to be raised where the end of it is waited for."""
    try:
        act()
    except BaseException as error:
        return error
    return None


def _closed_gate() -> threading.Lock:
    gate = threading.Lock()
    gate.acquire()
    return gate

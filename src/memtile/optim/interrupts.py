"""Ctrl-C during a step: it waits until the step is whole, a second one does not."""

import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType

from torch.autograd import Variable

SignalHandler = Callable[[int, FrameType | None], object]


class Deferral:
    """SIGINT's handler for as long as an update is under way: it remembers the first signal."""

    def __init__(self, before: SignalHandler, is_under_way: Callable[[], bool]) -> None:
        self._before, self._is_under_way = before, is_under_way
        self._came = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """A signal: it waits, unless one waits already or the update was given up."""
        if self._came or not self._is_under_way():
            self.stand_down()
            self._before(number, frame)
        self._came = True

    def end(self) -> None:
        """The update is whole: what waited is raised now."""
        self.stand_down()
        if self._came:
            self._came = False
            self._before(signal.SIGINT, None)

    def stand_down(self) -> None:
        """Leave the signal to whom it was left before, in the thread that may."""
        current: object = signal.getsignal(signal.SIGINT)
        if current is self and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._before)


def _begin(is_under_way: Callable[[], bool]) -> Deferral | None:
    """A deferral where signals can be had: in the main thread, with a handler to call later."""
    if threading.current_thread() is not threading.main_thread():
        return None
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or isinstance(before, Deferral):
        return None
    deferral = Deferral(before, is_under_way)
    signal.signal(signal.SIGINT, deferral)
    return deferral


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside, Ctrl-C waits for the end, so that what is done here is done as a whole."""
    deferral = _begin(lambda: True)
    try:
        yield
    finally:
        if deferral is not None:
            deferral.end()


class _Task:
    """What the engine holds for one backward; it is dropped with it, also where that fails."""


def uninterrupted_backward() -> None:
    """The same from now to the end of the backward that is running.

    A backward that ends with an exception leaves the signal to whom it was left before. Of nested
    backwards (reentrant checkpointing) it is the one that is running now.
    """
    task = _Task()
    running = weakref.ref(task)
    deferral = _begin(lambda: running() is not None)
    if deferral is not None:
        weakref.finalize(task, deferral.stand_down).atexit = False
        Variable._execution_engine.queue_callback(partial(_end_last, task, deferral))


def _end_last(task: _Task, deferral: Deferral) -> None:
    """After all other callbacks, since the engine leaves out those that follow an exception."""
    Variable._execution_engine.queue_callback(partial(_end, task, deferral))


def _end(task: _Task, deferral: Deferral) -> None:
    deferral.end()

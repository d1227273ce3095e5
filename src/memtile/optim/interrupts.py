"""Delays Ctrl-C until the step under way is complete; a second Ctrl-C is not delayed."""

import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType

import torch
from torch.autograd import Variable

SignalHandler = Callable[[int, FrameType | None], object]


class Deferral:
    """SIGINT's handler while an update is under way: it remembers the first signal."""

    def __init__(self, before: SignalHandler, is_under_way: Callable[[], bool]) -> None:
        self._before, self._is_under_way = before, is_under_way
        self._came = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Remember the signal, unless one waits already or the update was given up."""
        if self._came or not self._is_under_way():
            self.restore_handler()
            self._before(number, frame)
        self._came = True

    def end(self) -> None:
        """The update is whole: handle the signal that waited."""
        self.restore_handler()
        if self._came:
            self._came = False
            self._before(signal.SIGINT, None)

    def restore_handler(self) -> None:
        """Set the handler that was there before, where this thread may."""
        current: object = signal.getsignal(signal.SIGINT)
        if current is self and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._before)


def _begin(is_under_way: Callable[[], bool]) -> Deferral | None:
    """A deferral in the main thread, where there is a handler to call later."""
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
    """Inside, Ctrl-C waits for the end of the block."""
    deferral = _begin(lambda: True)
    try:
        yield
    finally:
        if deferral is not None:
            deferral.end()


class _Latest(threading.local):
    """What one thread did last."""

    task = -1  # autograd's number of the backward in which Ctrl-C was made to wait


_latest = _Latest()


class _Task:
    """Held by autograd's callbacks only, so freed at the end of a backward, failed or not."""


def uninterrupted_backward() -> None:
    """From now to the end of the running backward Ctrl-C waits.

    A backward that fails puts the handler from before in place. Of nested backwards (reentrant
    checkpointing) the innermost counts.
    """
    number = torch._C._current_graph_task_id()
    if number == _latest.task:
        return  # each parameter asks
    _latest.task = number
    task = _Task()
    running = weakref.ref(task)
    deferral = _begin(lambda: running() is not None)
    if deferral is not None:
        weakref.finalize(task, deferral.restore_handler).atexit = False
        queue = Variable._execution_engine.queue_callback
        # Queued by a callback, `_end` runs after all others: autograd skips those after an error.
        queue(partial(queue, partial(_end, task, deferral)))


def _end(task: _Task, deferral: Deferral) -> None:
    deferral.end()

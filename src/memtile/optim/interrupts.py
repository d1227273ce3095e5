"""Ctrl-C during a step: it waits until the step is whole, a second one does not."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from torch.autograd import Variable

Handler = Callable[[int, FrameType | None], object]


class Deferral:
    """SIGINT's handler for as long as an update is under way: it remembers the first signal."""

    def __init__(self, before: Handler, is_under_way: Callable[[], bool]) -> None:
        self._before, self._is_under_way = before, is_under_way
        self._came = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """A signal: it waits, unless one waits already or the update was given up."""
        if self._came or not self._is_under_way():
            self._stand_down()
            self._before(number, frame)
        self._came = True

    def end(self) -> None:
        """The update is whole: what waited is raised now."""
        self._stand_down()
        if self._came:
            self._came = False
            self._before(signal.SIGINT, None)

    def _stand_down(self) -> None:
        current: object = signal.getsignal(signal.SIGINT)
        if current is self:
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


def uninterrupted_backward() -> None:
    """The same from now to the end of the backward that is running.

    Where that ends with an exception, the next Ctrl-C finds no backward under way and is raised.
    """
    deferral = _begin(lambda: torch._C._current_graph_task_id() != -1)
    if deferral is not None:
        Variable._execution_engine.queue_callback(deferral.end)

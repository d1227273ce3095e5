"""Several threads at once: all of them end in time, or the test says where they stand."""

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

PATIENCE_SECONDS = 120  # a hang becomes a failure; nothing that passes waits so long


@contextmanager
def switching_often() -> Iterator[None]:
    """Inside, threads take turns after a few operations, so that they meet in every order."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def together(*acts: Callable[[], object], patience: float = PATIENCE_SECONDS) -> None:
    """Run each act in a thread of its own, and return when all have ended.

    The first exception of one is raised. Threads that do not end fail the test, with their stacks.
    """
    errors: list[BaseException] = []
    begun = threading.Barrier(len(acts))

    def run(act: Callable[[], object]) -> None:
        try:
            begun.wait(patience)
            act()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(act,), daemon=True) for act in acts]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + patience
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    hanging = [f"{thread.name} hangs:\n{_stack(thread)}" for thread in threads if thread.is_alive()]
    if errors:
        raise errors[0]
    if hanging:
        pytest.fail("\n".join(hanging))


def _stack(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    return "it has ended" if frame is None else "".join(traceback.format_stack(frame))

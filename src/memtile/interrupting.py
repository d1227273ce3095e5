"""Ctrl-C while the command `memtile` is still importing: one line, and no traceback.

torch takes seconds to import, and its compiled parts turn a KeyboardInterrupt into whatever error
they have. So a handler ends the process; nothing has begun then. In any other process that imports
memtile nothing is changed.
"""

import os
import signal
import sys
import threading
from itertools import pairwise


def interrupts_are_errors() -> None:
    """Have Ctrl-C raise KeyboardInterrupt again: the command begins."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_command() -> bool:
    """Whether this process was started as `memtile` or `python -m memtile.cli`."""
    named = os.path.basename(sys.argv[0]) if getattr(sys, "argv", None) else ""
    return named == "memtile" or ("-m", "memtile.cli") in pairwise(sys.orig_argv)


def _end(number: int, frame: object) -> None:
    os.write(2, b"memtile: Interrupted.\n")
    os._exit(130)  # the shell's code for it


if (
    _is_command()
    and threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler  # it may be ignored
):
    signal.signal(signal.SIGINT, _end)

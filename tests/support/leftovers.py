"""What a test may not leave behind: reader threads, a home's descriptors, its files."""

import gc
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

FOLDERS = {Path("/var/tmp"), Path(tempfile.gettempdir())}


def check_nothing_is_left() -> Iterator[None]:
    """To be made a fixture: fails a test that leaves something of memtile's behind."""
    threads, descriptors, files = _threads(), _descriptors(), _files()
    yield
    for _ in range(10):
        if _threads() <= threads and _descriptors() <= descriptors:
            break
        gc.collect()  # again: what is being read still keeps its home
        time.sleep(0.02)
        for thread in _threads() - threads:
            thread.join(0.2)

    assert _threads() <= threads
    assert _descriptors() <= descriptors
    assert _files() <= files


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("memtile")}


def _descriptors() -> int:
    """How many are open of files without a name, as a home's is."""
    return sum("(deleted)" in target for target in _targets())


def _targets() -> Iterator[str]:
    for number in os.listdir("/proc/self/fd"):
        try:
            yield os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:  # the listing's own
            continue


def _files() -> set[Path]:
    return {path for folder in FOLDERS for path in folder.glob("tiles.memtile*")}

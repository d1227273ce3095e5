"""What every test starts from: a promise in words, one thread, and the same random numbers."""

import gc
import os

# One thread, also in processes that tests start: with tensors this small, threads only wait for one
# another (a third of the speed on a busy machine).
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuses tests without a docstring: it is the promise that the test keeps."""
    silent = [item.nodeid for item in items if not getattr(item, "obj", item).__doc__]
    if silent:
        raise pytest.UsageError(f"tests without a docstring: {', '.join(silent)}")


def pytest_collection_finish() -> None:
    """Spares the garbage collector what was imported: it is as large as all that tests make.

    It comes more rarely too: with Python's own thresholds a tenth of the time is its own.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


@pytest.fixture
def in_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has tiles of disk homes worked on in slabs, as those too large for the page cache are.

    They are as large as the largest tile, as with a plan: a small model would stay in one of 4 MiB.
    """
    monkeypatch.setattr("memtile.homes.filesystems._OVERWRITING", frozenset())
    monkeypatch.setattr("memtile.homes.home.SLAB_BYTES", 0)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Makes each test draw the same numbers, whichever tests ran before it."""
    torch.manual_seed(20260101)

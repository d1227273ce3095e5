"""What every test of the transfers runs under."""

from collections.abc import Iterator

import pytest
from leftovers import check_nothing_is_left
from rings import MakeRing

from memtile.homes import WorkerThreads
from memtile.transfer import SlabRing


@pytest.fixture(autouse=True)
def _in_slabs(in_slabs: None) -> None:
    """Tiles are read and written: small files would be worked on in the page cache."""


nothing_is_left = pytest.fixture(autouse=True)(check_nothing_is_left)


@pytest.fixture
def make_ring() -> Iterator[MakeRing]:
    """Makes rings that share four threads."""
    workers = WorkerThreads(4, "memtile-test")
    yield lambda slabs=3, **options: SlabRing(workers, slabs, **options)
    workers.join()

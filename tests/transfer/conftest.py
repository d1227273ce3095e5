"""What every test of the transfers runs under."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from ferries import MakeFerry
from leftovers import check_nothing_is_left

from memtile.transfer import Ferry

nothing_is_left = pytest.fixture(autouse=True)(check_nothing_is_left)


@pytest.fixture
def make_ferry() -> Iterator[MakeFerry]:
    """Makes ferries that share four threads."""
    with ThreadPoolExecutor(4, thread_name_prefix="memtile-test") as executor:
        yield lambda slabs=3, **options: Ferry(executor, slabs, **options)

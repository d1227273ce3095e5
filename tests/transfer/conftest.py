"""What every test of the transfers runs under."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from ferries import MakeFerry
from leftovers import check_nothing_is_left

from memtile.transfer import Ferry

nothing_is_left = pytest.fixture(autouse=True)(check_nothing_is_left)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """One thread: the products here are so small that threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_ferry() -> Iterator[MakeFerry]:
    """Makes ferries that share four threads."""
    with ThreadPoolExecutor(4, thread_name_prefix="memtile-test") as executor:
        yield lambda slabs=3, **options: Ferry(executor, slabs, **options)

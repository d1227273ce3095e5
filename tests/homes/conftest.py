"""What every test of the homes runs under."""

import pytest
from leftovers import check_nothing_is_left

nothing_is_left = pytest.fixture(autouse=True)(check_nothing_is_left)

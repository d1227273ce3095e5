"""What is left free of a budget."""

import pytest

from memtile.costmodel.budget import margin, needed, usable

MIB = 1 << 20


def test_of_what_a_run_fits_in_12_mib_and_a_sixteenth_are_left_free():
    """The margin covers what is not counted."""
    assert margin(64 * MIB) == 12 * MIB
    assert margin(1600 * MIB) == 100 * MIB


@pytest.mark.parametrize("nbytes", [1, 1000, 5 * MIB, 24 * MIB, 25 * MIB, 170 * MIB, 999 * MIB])
def test_the_least_budget_is_what_may_just_be_used(nbytes):
    """The budget that a message asks for is enough, and more only by rounding."""
    asked = needed(nbytes)

    assert usable(asked) >= nbytes
    assert usable(asked - 2) <= nbytes


def test_more_budget_is_never_less_to_use():
    """It does so also where the rule of the margin changes."""
    sizes = [usable(nbytes) for nbytes in range(1, 300 * MIB, 99_991)]

    assert sizes == sorted(sizes)

"""The float64 yardstick: what it measures, what it fails, what it refuses to compare."""

import math

import pytest
import torch

from memtile.errors import ArgumentError, MemtileError
from memtile.testing import assert_as_accurate, error_ratio, rms_error

TRUTH = torch.tensor([1.0, -2.0, 4.0, 0.0], dtype=torch.float64)


def off_by(error: float) -> torch.Tensor:
    """The truth, with an rms error of that size."""
    return TRUTH + error * torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)


def test_the_error_is_the_root_mean_square_in_float64():
    """Each element counts alike, a 16-bit value is widened before it is compared."""
    assert rms_error(off_by(0.5), TRUTH) == 0.5
    assert rms_error(TRUTH.to(torch.bfloat16), TRUTH) == 0.0
    assert rms_error(TRUTH[:0], TRUTH[:0]) == 0.0
    third = torch.tensor([1 / 3], dtype=torch.float64)
    assert rms_error(third.to(torch.bfloat16), third) == pytest.approx(1 / 1536)


def test_the_ratio_is_in_units_of_the_dense_error():
    """Twice the dense error is 2.0; an exact dense result leaves room for an exact one only."""
    assert error_ratio(off_by(0.5), off_by(0.25), TRUTH) == 2.0
    assert error_ratio(TRUTH, off_by(0.25), TRUTH) == 0.0
    assert error_ratio(TRUTH, TRUTH, TRUTH) == 0.0
    assert error_ratio(off_by(1e-9), TRUTH, TRUTH) == math.inf


def test_a_result_within_the_factor_passes():
    """The bound itself is allowed."""
    assert_as_accurate(off_by(0.5), off_by(0.5), TRUTH, 1.0)
    assert_as_accurate(off_by(0.5), off_by(0.25), TRUTH, 2.0)
    assert_as_accurate(TRUTH, TRUTH, TRUTH, 1.0)


def test_a_result_beyond_the_factor_fails_with_the_figures():
    """The message holds both errors, their ratio, the bound and how much was compared."""
    with pytest.raises(AssertionError) as raised:
        assert_as_accurate(off_by(0.5), off_by(0.25), TRUTH, 1.5)

    for figure in ("5.000e-01", "2.500e-01", "2.000 ×", "1.5 ×", "4 elements"):
        assert figure in str(raised.value)


@pytest.mark.parametrize("dense_error", [0.0, 0.25])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_no_number_fails(wrong, dense_error):
    """NaN and infinity are never accurate, not even beside an exact dense result."""
    ours = TRUTH.clone()
    ours[1] = wrong

    with pytest.raises(AssertionError):
        assert_as_accurate(ours, off_by(dense_error), TRUTH, 1e300)


def test_shapes_that_differ_are_refused():
    """Broadcasting would compare elements that have nothing to do with each other."""
    with pytest.raises(ArgumentError, match=r"\(4, 1\).*\(4,\)") as raised:
        rms_error(TRUTH.unsqueeze(1), TRUTH)

    assert isinstance(raised.value, MemtileError)
    assert isinstance(raised.value, ValueError)


def test_a_truth_that_is_not_float64_is_refused():
    """A float32 truth has the error that it should judge."""
    with pytest.raises(ArgumentError, match="it must be float64"):
        assert_as_accurate(TRUTH, TRUTH, TRUTH.float(), 2.0)

"""Accuracy against float64: a result's error is compared with the dense layer's in the same dtype.

A fixed tolerance does not fit sums: their rounding grows with the number of terms and depends on
the dtype. So the truth is computed in float64 from the same (rounded) inputs, and a result's error
may be at most a factor larger than the dense layer's. Both errors are root mean squares; for a
ratio that is steady to a few percent, compare 16k elements or more.
"""

import math

import torch
from torch import Tensor

from memtile.errors import ArgumentError


def rms_error(value: Tensor, truth64: Tensor) -> float:
    """The root mean square of `value - truth64`, computed in float64; 0.0 without elements.

    Args:
        value: the result to judge, of any dtype.
        truth64: what it should be, in float64 and of the same shape.

    Raises:
        ArgumentError: the shapes differ, or the truth is not float64.
    """
    if truth64.dtype != torch.float64:
        raise ArgumentError(
            f"the truth is {truth64.dtype}: it must be float64, computed from float64 copies of "
            "the inputs; a result cast to float64 afterwards keeps its rounding"
        )
    if value.shape != truth64.shape:
        raise ArgumentError(
            f"the value is {tuple(value.shape)}, the truth {tuple(truth64.shape)}: broadcasting "
            "them would compare unrelated elements; give both one shape"
        )
    if not value.numel():
        return 0.0
    return math.sqrt((value.detach().to(torch.float64) - truth64.detach()).square().mean().item())


def error_ratio(ours: Tensor, dense: Tensor, truth64: Tensor) -> float:
    """The error of `ours` divided by that of `dense`.

    Where `dense` is exact it is 0.0 when `ours` is exact too and infinity when it is not; where
    `ours` holds NaN it is NaN.
    """
    ours_error, dense_error = rms_error(ours, truth64), rms_error(dense, truth64)
    if dense_error == 0.0:
        return ours_error if ours_error == 0.0 or math.isnan(ours_error) else math.inf
    return ours_error / dense_error


def assert_as_accurate(ours: Tensor, dense: Tensor, truth64: Tensor, factor: float) -> None:
    """Fail unless `rms(ours - truth64) <= factor * rms(dense - truth64)`.

    Args:
        ours: the result to judge.
        dense: what the dense layer gives in the same dtype from the same inputs.
        truth64: what float64 gives from the same inputs.
        factor: how many times the dense error is allowed. Where `dense` is exact, `ours` must be.

    Raises:
        AssertionError: the error is larger, or not a number.
        ArgumentError: the shapes differ, or the truth is not float64.
    """
    ratio = error_ratio(ours, dense, truth64)
    if not ratio <= factor:  # not the reverse comparison: NaN must fail
        raise AssertionError(
            f"rms error {rms_error(ours, truth64):.3e} is {ratio:.3f} × the dense layer's "
            f"{rms_error(dense, truth64):.3e} over {truth64.numel()} elements, at most "
            f"{factor} × is allowed ({ours.dtype} against {dense.dtype})"
        )

"""Measurements for tests: accuracy against float64, peak memory, largest allocation."""

from memtile.testing.accuracy import assert_as_accurate, error_ratio, rms_error
from memtile.testing.memory import LargestAllocation, PeakMemory, peak_allocated_bytes

__all__ = [
    "LargestAllocation",
    "PeakMemory",
    "assert_as_accurate",
    "error_ratio",
    "peak_allocated_bytes",
    "rms_error",
]

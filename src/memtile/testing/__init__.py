"""Measurements for tests and demos: accuracy against float64, peak memory, largest allocation.

Shipped for people who check claims of their own. Linux only where the kernel is asked.
"""

from memtile.testing.accuracy import assert_as_accurate, error_ratio, rms_error
from memtile.testing.allocations import peak_allocated_bytes
from memtile.testing.memory import LargestAllocation, PeakMemory

__all__ = [
    "LargestAllocation",
    "PeakMemory",
    "assert_as_accurate",
    "error_ratio",
    "peak_allocated_bytes",
    "rms_error",
]

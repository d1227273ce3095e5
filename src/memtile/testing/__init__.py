"""Measurements for tests and demos, and the contract tests that every home must pass.

Accuracy against float64, peak memory, largest allocation: shipped for people who check claims of
their own, or write a home of their own. Linux only where the kernel is asked.
"""

from memtile.testing.accuracy import assert_as_accurate, error_ratio, rms_error
from memtile.testing.allocations import peak_allocated_bytes
from memtile.testing.home_contract import HomeContract
from memtile.testing.home_machine import home_state_machine
from memtile.testing.memory import LargestAllocation, PeakMemory
from memtile.testing.read_only_contract import ReadOnlyHomeContract

__all__ = [
    "HomeContract",
    "LargestAllocation",
    "PeakMemory",
    "ReadOnlyHomeContract",
    "assert_as_accurate",
    "error_ratio",
    "home_state_machine",
    "peak_allocated_bytes",
    "rms_error",
]

"""What figures were taken on, how they spread, and files that are read cold."""

import os
import platform
import statistics
from collections.abc import Iterable
from pathlib import Path

import torch

import memtile


def machine(**more: object) -> dict[str, object]:
    """The machine and versions, with `more` of them."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    named = (line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name"))
    return {
        "cpu": next(named, platform.processor()),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "memtile": memtile.__version__,
        "python": platform.python_version(),
        **more,
    }


def spread(values: list[float]) -> float:
    """Half the distance between the quartiles, as a part of the median."""
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / 2 / middle


def drop_cached(files: Iterable[Path]) -> None:
    """Drop files from the page cache."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)

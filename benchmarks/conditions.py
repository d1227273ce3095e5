"""What figures were taken on, how they spread, and files that are read cold."""

import os
import platform
import statistics
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import memtile
from memtile.homes import aligned_buffer


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


def cores_are_near(nbytes: int = 512 << 10) -> bool:
    """Whether two threads are faster than one on a tensor in their caches.

    A virtual machine's cores may be moved to where they share no cache, for seconds or minutes: its
    bandwidth to memory is then larger, and threads that work on each other's data are slower.
    """
    data = torch.ones(nbytes // 4)
    threads, taken = torch.get_num_threads(), list[float]()
    for number in (1, 2):
        torch.set_num_threads(number)
        taken.append(min(_seconds_of_multiplying(data) for _ in range(3)))
    torch.set_num_threads(threads)
    return taken[1] < 0.92 * taken[0]


def _seconds_of_multiplying(data: torch.Tensor) -> float:
    begun = time.perf_counter()
    for _ in range(200):
        data.mul_(1.0)
    return time.perf_counter() - begun


def drop_cached(files: Iterable[Path]) -> None:
    """Drop files from the page cache."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def raw_read_rate(files: Iterable[Path], piece: int = 4 << 20, threads: int = 4) -> float:
    """Bytes a second of direct reads of these files, by several threads that do nothing else.

    Into huge pages, as memtile's are: into others it is up to half as much (`aligned_buffer`).
    """
    fds = [os.open(file, os.O_RDONLY | os.O_DIRECT) for file in files]
    jobs = [(fd, start) for fd in fds for start in range(0, os.fstat(fd).st_size, piece)]
    buffers = [aligned_buffer(piece).fill_(1) for _ in range(threads)]
    idle = [memoryview(buffer.numpy()) for buffer in buffers]

    def read(job: tuple[int, int]) -> int:
        buffer = idle.pop()
        try:
            return os.preadv(job[0], [buffer], job[1])
        finally:
            idle.append(buffer)

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        nbytes = sum(pool.map(read, jobs))
    taken = time.perf_counter() - started
    for fd in fds:
        os.close(fd)
    return nbytes / taken

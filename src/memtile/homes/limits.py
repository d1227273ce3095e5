"""How much memory and processor time the system gives this process: by /proc and its cgroups."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

_MEMINFO = Path("/proc/meminfo")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")
_NEWER: Final = ("memory.max", "memory.current", "")  # limit, usage, prefix in memory.stat
_OLDER: Final = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
_NO_LIMIT: Final = 1 << 62  # version 1 has no word for it, only a number larger than any memory


def free_bytes() -> int | None:
    """Bytes of memory that are free or easily freed; None where the system does not tell.

    The least of Linux's `MemAvailable` and what is left under the limit of each memory cgroup
    (version 1 or 2) that this process is in. Cached files count as free: they are given up first.
    """
    known = [*_available(), *_left_in_cgroups()]
    return max(0, min(known)) if known else None


def memory_limit() -> int | None:
    """Bytes that memory cgroups let this process and others in them hold; None: no limit."""
    found = []
    for group, is_newer in _cgroups("memory"):
        limit = lines_of(group / (_NEWER if is_newer else _OLDER)[0])
        found += [int(word) for word in limit[:1] if word != "max" and int(word) < _NO_LIMIT]
    return min(found, default=None)


def processor_limit() -> float | None:
    """The number of processors whose time CPU cgroups give this process; None: no limit."""
    found = []
    for group, is_newer in _cgroups("cpu"):
        names = ("cpu.max",) if is_newer else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        words = [word for name in names for line in lines_of(group / name) for word in line.split()]
        if len(words) == 2 and words[0] not in ("max", "-1"):
            found.append(int(words[0]) / int(words[1]))
    return min(found, default=None)


def fits_page_cache(nbytes: int) -> bool:
    """Whether a file of so many bytes fits into half of the free memory, as cached files."""
    return page_cache_fit(nbytes)[0]


def page_cache_fit(nbytes: int) -> tuple[bool, str]:
    """The same, and the reason in words."""
    free = free_bytes()
    fits = free is not None and nbytes <= free // 2
    words = "fit" if fits else "do not fit"
    return fits, f"its {nbytes} bytes {words} into half of {free} bytes of free memory"


def _available() -> Iterator[int]:
    for line in lines_of(_MEMINFO):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024  # proc(5): in kB, which are KiB


def _left_in_cgroups() -> Iterator[int]:
    for group, is_newer in _cgroups("memory"):
        yield from _left_in(group, *(_NEWER if is_newer else _OLDER))


def _cgroups(controller: str) -> Iterator[tuple[Path, bool]]:
    """The folder of each group that this process is in, and whether it is of version 2."""
    for line in lines_of(_OWN_CGROUPS):
        number, controllers, path = line.split(":", 2)
        if number != "0" and controller not in controllers.split(","):
            continue
        root = _CGROUPS if number == "0" else _CGROUPS / controller
        inner = root / path.lstrip("/")  # may not exist in a container: its parents may
        for group in [inner, *inner.parents[: len(inner.parts) - len(root.parts)]]:
            yield group, number == "0"


def _left_in(group: Path, limit: str, usage: str, prefix: str) -> Iterator[int]:
    bound, used = lines_of(group / limit), lines_of(group / usage)
    if not bound or not used or bound[0] == "max":
        return
    counts = dict(line.split() for line in lines_of(group / "memory.stat"))
    cached = sum(int(counts.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    yield int(bound[0]) - (int(used[0]) - cached)


def lines_of(path: Path) -> list[str]:
    """The lines of a file; none where it cannot be read."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []

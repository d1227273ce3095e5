"""How much memory this process may still use, by the system's free memory and its cgroups."""

from collections.abc import Iterator
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")


def free_bytes() -> int | None:
    """Bytes of memory that are free or easily freed; None where the system does not tell.

    The least of Linux's `MemAvailable` and what is left under the limit of each memory cgroup
    (version 1 or 2) that this process is in. Cached files count as free: they are given up first.
    """
    known = [*_available(), *_left_in_cgroups()]
    return max(0, min(known)) if known else None


def fits_page_cache(nbytes: int) -> bool:
    """Whether a file of so many bytes fits into half of the free memory, as cached files."""
    free = free_bytes()
    return free is not None and nbytes <= free // 2


def _available() -> Iterator[int]:
    for line in _lines(_MEMINFO):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024  # proc(5): in kB, which are KiB


def _left_in_cgroups() -> Iterator[int]:
    for line in _lines(_OWN_CGROUPS):
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, names = _CGROUPS, ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            root = _CGROUPS / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        inner = root / path.lstrip("/")  # may not exist in a container: its parents may
        for group in [inner, *inner.parents[: len(inner.parts) - len(root.parts)]]:
            yield from _left_in(group, *names)


def _left_in(group: Path, limit: str, usage: str, prefix: str) -> Iterator[int]:
    bound, used = _lines(group / limit), _lines(group / usage)
    if not bound or not used or bound[0] == "max":
        return
    counts = dict(line.split() for line in _lines(group / "memory.stat"))
    cached = sum(int(counts.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    yield int(bound[0]) - (int(used[0]) - cached)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []

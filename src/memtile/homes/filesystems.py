"""Which folders a home's file can be in: those on a disk that may be written to."""

import os
import tempfile
from pathlib import Path
from typing import Final, NamedTuple

from memtile.errors import ArgumentError, HomeError

_MOUNTS = Path("/proc/self/mountinfo")
_IN_MEMORY: Final = frozenset({"tmpfs", "ramfs", "devtmpfs"})
_OF_THE_KERNEL: Final = frozenset({"proc", "sysfs", "cgroup", "cgroup2", "debugfs", "securityfs"})


class _Mount(NamedTuple):
    device: str
    point: Path
    kind: str


def usable_folder(folder: str | os.PathLike[str] | None) -> Path:
    """The folder as an absolute path, or the first usable default.

    Args:
        folder: where; None: the first that is usable of $TMPDIR, /var/tmp, the system's folder for
            temporary files and the working directory.

    Raises:
        ArgumentError: it is no path at all.
        HomeError: it is not a folder, may not be written to, or lies in memory.
    """
    given: object = folder  # callers without types give anything
    if given is not None and (not isinstance(given, str | os.PathLike) or not os.fspath(given)):
        raise ArgumentError(
            f"folder={folder!r} is no folder; give the path of one on a disk, or None for the "
            "first usable default"
        )
    refused = []
    for path in _defaults() if folder is None else [Path(folder).absolute()]:
        reason = why_unusable(path)
        if not reason:
            return path
        refused.append(f"{path}: {reason}")
    if folder is not None:
        raise HomeError(f"a home in {refused[0]}; give a folder on a disk")
    raise HomeError(
        f"no folder for a home was given and no default is usable ({'; '.join(refused)}); give a "
        "folder on a disk"
    )


def why_unusable(folder: Path) -> str | None:
    """Why a home cannot be in the folder; None where it can."""
    if not folder.exists():
        return "there is no such folder"
    if not folder.is_dir():
        return "it is not a folder"
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        return "its filesystem is read-only"
    if not os.access(folder, os.W_OK | os.X_OK):
        return "it may not be written to"
    kind = filesystem_of(folder)
    if kind in _OF_THE_KERNEL:
        return f"it is {kind}, which holds no files of ours"
    if kind in _IN_MEMORY:
        return f"it is {kind}, which is memory: tiles there would fill what they should spare"
    return None


def filesystem_of(folder: Path) -> str:
    """The kind of filesystem that the folder is on, such as "ext4"; "" where that is unknown.

    It is looked up by device, and where no mount has the folder's device (btrfs subvolumes, some
    overlays) by the longest mount point above it.
    """
    real = folder.resolve()
    number = real.stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    above = [mount for mount in _mounts() if real.is_relative_to(mount.point)]
    same = [mount for mount in above if mount.device == device]
    # Of mounts on one point the last hides the others, and max takes the first of equal ones.
    last_first = reversed(same or above)
    longest = max(last_first, key=lambda mount: len(mount.point.parts), default=None)
    return longest.kind if longest else ""


def _mounts() -> list[_Mount]:
    """proc(5): id, parent, device, root, point, options, optional fields, "-", kind, more."""
    try:
        lines = _MOUNTS.read_text().splitlines()
    except OSError:
        return []
    mounts = []
    for line in lines:
        before, _, after = line.partition(" - ")
        device, _, point = before.split()[2:5]
        mounts.append(_Mount(device, Path(_unescaped(point)), after.split()[0]))
    return mounts


def _unescaped(point: str) -> str:
    """Spaces, tabs, line ends and backslashes are in octal there."""
    return point.encode("latin-1", "backslashreplace").decode("unicode_escape")


def _defaults() -> list[Path]:
    chosen = os.environ.get("TMPDIR")
    places = [chosen] if chosen else []
    return [Path(place).absolute() for place in (*places, "/var/tmp", tempfile.gettempdir(), ".")]

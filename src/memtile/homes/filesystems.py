"""Which folders a home's file can be in: those on a disk that may be written to."""

import contextlib
import ctypes
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Final

from memtile.errors import ArgumentError, HomeError

_MOUNTS = Path("/proc/self/mountinfo")
_OCTAL: Final = re.compile(r"\\([0-7]{3})")  # a space in the name of a folder is \040 there
_IN_MEMORY: Final = {0x01021994: "tmpfs", 0x858458F6: "ramfs"}  # linux/magic.h
_OVERWRITING: Final = frozenset({"ext2", "ext3", "ext4", "xfs"})
_OF_THE_KERNEL: Final = {
    0x9FA0: "proc",
    0x62656572: "sysfs",
    0x27E0EB: "cgroup",
    0x63677270: "cgroup2",
    0x64626720: "debugfs",
    0x73636673: "securityfs",
}


def usable_folder(folder: str | os.PathLike[str] | None) -> Path:
    """The folder as an absolute path; None: the first default that is usable (see `DiskHome`).

    ArgumentError where it is no path at all, HomeError where `why_unusable` has a reason.
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
    kind = filesystem_type(folder)
    if kind in _OF_THE_KERNEL:
        return f"it is {_OF_THE_KERNEL[kind]}, which holds no files of ours"
    if kind in _IN_MEMORY:
        name = _IN_MEMORY[kind]
        return f"it is {name}, which is memory: tiles there would fill what they should spare"
    return None


def filesystem_type(folder: Path) -> int | None:
    """Linux's number for the kind of filesystem (statfs(2)); None where it is unknown."""
    if sys.platform != "linux":
        return None
    found = (ctypes.c_long * 32)()  # longer than the struct, whose first field is the type
    failed = ctypes.CDLL(None).statfs(os.fsencode(folder), found)
    return None if failed else found[0] & 0xFFFFFFFF


def overwrites_in_place(folder: Path) -> bool:
    """Whether writing to a mapped page whose blocks are allocated is known to need no new ones.

    Elsewhere a full disk would end the process (SIGBUS).
    """
    return filesystem_name(folder) in _OVERWRITING


def filesystem_name(folder: Path) -> str | None:
    """What Linux calls the filesystem of a folder, such as "ext4"; None where it does not tell."""
    best, name = -1, None
    path = folder.resolve()
    with contextlib.suppress(OSError):
        for line in _MOUNTS.read_text(errors="surrogateescape").splitlines():
            before, _, after = line.partition(" - ")  # proc(5): mountinfo
            place = Path(_OCTAL.sub(lambda found: chr(int(found[1], 8)), before.split()[4]))
            if len(place.parts) >= best and path.is_relative_to(place):  # of two, the later is seen
                best, name = len(place.parts), after.split()[0]
    return name


def _defaults() -> list[Path]:
    chosen = os.environ.get("TMPDIR")
    places = [chosen] if chosen else []
    return [Path(place).absolute() for place in (*places, "/var/tmp", tempfile.gettempdir(), ".")]

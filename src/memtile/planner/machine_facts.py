"""What the system says of this machine: a folder for homes, memory, processors, libraries."""

import os
import platform
import resource
import sys
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import torch

from memtile.errors import HomeError, MemtileError
from memtile.homes import (
    LiveFile,
    filesystem_name,
    free_bytes,
    memory_limit,
    processor_limit,
    usable_folder,
    why_unusable,
)
from memtile.planner.moving_rates import NEEDED_ROOM
from memtile.planner.saved_rates import processor

_PACKAGES: Final = ("memtile", "torch", "safetensors", "transformers", "peft", "deepspeed")
_LIMITS: Final = (
    ("RLIMIT_AS", "address space (ulimit -v)"),
    ("RLIMIT_FSIZE", "the size of files (ulimit -f)"),
)


@dataclass(frozen=True)
class FolderFacts:
    """A folder that homes may be in; sizes are those of its disk, in bytes."""

    path: str | None  # None: no folder was given, and no default is usable
    why_unusable: str | None  # as a sentence's end; None: homes can be there
    filesystem: str | None  # such as "ext4"; None: unknown
    direct: bool  # whether direct I/O works
    free_bytes: int
    total_bytes: int

    @classmethod
    def of(cls, given: Path | None) -> "FolderFacts":
        """The facts of a folder that exists, or of the first usable default."""
        try:
            path = usable_folder(None) if given is None else given.absolute()
        except HomeError as error:
            return cls(None, str(error), None, False, 0, 0)
        disk = os.statvfs(path)
        free, total = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
        reason, direct = _tried(path, free)
        return cls(str(path), reason, filesystem_name(path), direct, free, total)


@dataclass(frozen=True)
class SystemFacts:
    """Memory in bytes, processors, libraries; None where the system does not tell."""

    memory_bytes: int | None
    free_bytes: int | None  # also below the limits
    limit_bytes: int | None  # of memory cgroups; None: no limit
    resource_limits: dict[str, int]  # bytes of each limit of this process that there is
    processor: str
    processors: int  # that this process may run on
    quota: float | None  # how many CPU cgroups give it the time of; None: all
    threads: int  # of torch
    load: float | None  # processes that ran or waited to, the mean of the last minute
    accelerator: str | None
    accelerator_bytes: int | None
    versions: dict[str, str | None]  # None: not installed

    @property
    def usable_processors(self) -> float:
        """How many processors' time it has."""
        return min(self.processors, self.quota or self.processors)

    @property
    def is_busy(self) -> bool:
        """Whether others used more than half of them before anything was measured."""
        return self.load is not None and self.load > self.usable_processors / 2

    @classmethod
    def here(cls) -> "SystemFacts":
        """Those of this machine and process."""
        there = torch.accelerator.is_available()
        accelerator = torch.accelerator.current_accelerator() if there else None
        is_cuda = accelerator is not None and accelerator.type == "cuda"
        named = torch.cuda.get_device_properties() if is_cuda else None
        return cls(
            memory_bytes=_memory_bytes(),
            free_bytes=free_bytes(),
            limit_bytes=memory_limit(),
            resource_limits=_resource_limits(),
            processor=processor().partition(": ")[2] or processor(),
            processors=_processors(),
            quota=processor_limit(),
            threads=torch.get_num_threads(),
            load=_load(),
            accelerator=named.name if named else str(accelerator) if accelerator else None,
            accelerator_bytes=named.total_memory if named else None,
            versions={
                "Python": platform.python_version(),
                **{name: _version(name) for name in _PACKAGES},
                platform.system(): platform.release(),
            },
        )


def _tried(folder: Path, free: int) -> tuple[str | None, bool]:
    """Why a home cannot be in the folder, and whether direct I/O works there."""
    if sys.platform != "linux":
        return f"homes on disk need Linux, and this is {platform.system()}", False
    reason = why_unusable(folder)
    if reason is None and free < NEEDED_ROOM:
        reason = f"{free >> 20} MiB are free there, and a home is tried with {NEEDED_ROOM >> 20}"
    if reason is not None:
        return reason, False
    try:
        with closing(LiveFile(folder)) as file:
            return None, file.direct_fd is not None
    except MemtileError as error:
        return getattr(error, "strerror", None) or str(error), False


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def _resource_limits() -> dict[str, int]:
    found = {words: resource.getrlimit(getattr(resource, name))[0] for name, words in _LIMITS}
    return {words: limit for words, limit in found.items() if limit != resource.RLIM_INFINITY}


def _load() -> float | None:
    try:
        return os.getloadavg()[0]
    except OSError:
        return None


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

"""Which filesystems a home can be on."""

import os
from pathlib import Path

import pytest

from memtile.homes import filesystems

SHARED_MEMORY = Path("/dev/shm")


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="this system has no /dev/shm")
def test_memory_is_refused_also_through_a_link(tmp_path):
    """A folder in a tmpfs is memory, by whatever path it is named."""
    (tmp_path / "link").symlink_to(SHARED_MEMORY)

    for folder in (SHARED_MEMORY, tmp_path / "link"):
        assert "it is tmpfs, which is memory" in filesystems.why_unusable(folder)


@pytest.mark.parametrize(
    ("number", "kind"), [*filesystems._IN_MEMORY.items(), *filesystems._OF_THE_KERNEL.items()]
)
def test_what_keeps_no_files_is_refused_by_name(tmp_path, monkeypatch, number, kind):
    """Filesystems in memory, and those by which the kernel shows itself."""
    monkeypatch.setattr(filesystems, "filesystem_type", lambda folder: number)

    assert f"it is {kind}, which" in filesystems.why_unusable(tmp_path)


def test_the_kernel_tells_the_type(tmp_path):
    """/proc is known for what it is, and an ordinary folder for something else."""
    assert filesystems._OF_THE_KERNEL[filesystems.filesystem_type(Path("/proc"))] == "proc"
    assert filesystems.filesystem_type(tmp_path) not in filesystems._OF_THE_KERNEL


def test_an_unknown_filesystem_is_not_refused(tmp_path, monkeypatch):
    """Where the system does not tell its kind, a folder is taken for a disk."""
    assert filesystems.filesystem_type(tmp_path / "missing") is None
    monkeypatch.setattr(filesystems, "filesystem_type", lambda folder: None)

    assert filesystems.why_unusable(tmp_path) is None


def test_a_read_only_filesystem_is_told_as_such(tmp_path, monkeypatch):
    """What keeps a home out of it is the filesystem, not the folder's permissions."""
    real = os.statvfs(tmp_path)
    read_only = os.statvfs_result((*real[:8], real.f_flag | os.ST_RDONLY, real.f_namemax))
    monkeypatch.setattr(os, "statvfs", lambda folder: read_only)

    assert filesystems.why_unusable(tmp_path) == "its filesystem is read-only"


def test_the_innermost_mount_names_the_filesystem(tmp_path, monkeypatch):
    """Of several that hold the folder the innermost, of two at one place the later."""
    mounts, inner = tmp_path / "mountinfo", tmp_path / "a b"
    (inner / "c").mkdir(parents=True)
    lines = ["1 0 8:1 / / rw - ext4 /dev/a rw", "2 1 8:2 / /elsewhere rw - btrfs /dev/b rw"]
    lines += [
        f"3 1 8:3 / {str(inner).replace(' ', chr(92) + '040')} rw,noatime shared:1 - {kind} x"
        for kind in ("xfs", "nfs4")
    ]
    mounts.write_text("\n".join(lines))
    monkeypatch.setattr(filesystems, "_MOUNTS", mounts)

    assert filesystems.filesystem_name(inner / "c") == "nfs4"
    assert filesystems.filesystem_name(tmp_path) == "ext4"


def test_without_proc_the_filesystem_has_no_name(tmp_path, monkeypatch):
    """None, and no error."""
    monkeypatch.setattr(filesystems, "_MOUNTS", tmp_path / "missing")

    assert filesystems.filesystem_name(tmp_path) is None

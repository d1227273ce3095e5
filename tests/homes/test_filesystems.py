"""Which filesystem a folder is on."""

import os
from pathlib import Path

import pytest

from memtile.homes import filesystems


@pytest.fixture
def mounts(tmp_path, monkeypatch):
    """Writes another mountinfo; each mount is its point, kind and device."""

    def write(*lines):
        rows = [
            f"{n} 1 {device or '0:0'} / {point} rw shared:1 master:2 - {kind} src rw"
            for n, (point, kind, device) in enumerate(lines)
        ]
        (tmp_path / "mountinfo").write_text("\n".join(rows))
        monkeypatch.setattr(filesystems, "_MOUNTS", tmp_path / "mountinfo")

    return write


def test_the_longest_mount_point_counts(tmp_path, mounts):
    """A folder is on the innermost mount above it, not on one whose name only begins alike."""
    mounts(("/", "ext4", None), (tmp_path, "xfs", None), (f"{tmp_path}/in", "tmpfs", None))
    (tmp_path / "inside").mkdir()

    assert filesystems.filesystem_of(tmp_path / "inside") == "xfs"


def test_a_mount_hides_an_earlier_one(tmp_path, mounts):
    """Of two mounts on one point the later counts."""
    mounts((tmp_path, "ext4", None), (tmp_path, "ramfs", None))

    assert filesystems.filesystem_of(tmp_path) == "ramfs"
    assert "ramfs" in filesystems.why_unusable(tmp_path)


def test_the_device_counts_before_the_path(tmp_path, mounts):
    """A mount of the folder's own device is believed before a longer path of another."""
    number = os.stat(tmp_path).st_dev
    mounts(
        ("/", "ext4", f"{os.major(number)}:{os.minor(number)}"),
        (tmp_path, "tmpfs", "0:99"),
    )

    assert filesystems.filesystem_of(tmp_path) == "ext4"


def test_names_with_spaces_are_understood(tmp_path, mounts):
    """Mount points stand there with octal escapes."""
    folder = tmp_path / "a b\\c"
    folder.mkdir()
    mounts(
        ("/", "ext4", None),
        (str(folder).replace("\\", "\\134").replace(" ", "\\040"), "tmpfs", None),
    )

    assert filesystems.filesystem_of(folder) == "tmpfs"


def test_a_link_is_followed(tmp_path, mounts):
    """A link to a folder in memory is in memory."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    mounts(("/", "ext4", None), (tmp_path / "real", "tmpfs", None))

    assert filesystems.filesystem_of(tmp_path / "link") == "tmpfs"


def test_an_unknown_filesystem_is_not_refused(tmp_path, monkeypatch):
    """Where the system does not tell its mounts, a folder is taken for a disk."""
    monkeypatch.setattr(filesystems, "_MOUNTS", Path("/nowhere"))

    assert filesystems.filesystem_of(tmp_path) == ""
    assert filesystems.why_unusable(tmp_path) is None


def test_a_read_only_filesystem_is_told_as_such(tmp_path, monkeypatch):
    """What keeps a home out of it is the filesystem, not the folder's permissions."""
    real = os.statvfs(tmp_path)
    read_only = os.statvfs_result((*real[:8], real.f_flag | os.ST_RDONLY, real.f_namemax))
    monkeypatch.setattr(os, "statvfs", lambda folder: read_only)

    assert filesystems.why_unusable(tmp_path) == "its filesystem is read-only"

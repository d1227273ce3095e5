"""A home on disk: its folder, its I/O path, errors of the disk, and what it leaves behind."""

import errno
import gc
import logging
import mmap
import os
import resource
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from memtile.errors import HomeError, HomeFullError, HomeIOError, UnsupportedPlatformError
from memtile.homes import PAGE, DiskHome, aligned_buffer, allocate_copy, allocation_of, disk_io

_MIB = 1 << 20


def _open_files() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def _file_bytes(home: DiskHome) -> int:
    return os.fstat(home._file.fd).st_size


def _refuse(monkeypatch, error: int, *refused: int) -> None:
    """The filesystem refuses to open with one of these flags."""
    real = os.open

    def refusing(path, flags, *rest, **names):
        if any(flags & flag == flag for flag in refused):
            raise OSError(error, os.strerror(error))
        return real(path, flags, *rest, **names)

    monkeypatch.setattr(os, "open", refusing)


# Where it is


def test_a_folder_in_memory_is_refused():
    """A tmpfs is memory, so a home there is refused, and the message says why."""
    if not Path("/dev/shm").is_dir():
        pytest.skip("there is no /dev/shm here")

    with pytest.raises(HomeError, match="tmpfs, which is memory"):
        DiskHome("/dev/shm")


def test_a_missing_folder_and_a_file_are_refused(tmp_path):
    """A folder that is not there, or is a file, is refused with its name."""
    (tmp_path / "file").write_text("")

    with pytest.raises(HomeError, match=r"nowhere: there is no such folder"):
        DiskHome(tmp_path / "nowhere")
    with pytest.raises(HomeError, match=r"file: it is not a folder"):
        DiskHome(tmp_path / "file")


def test_a_folder_that_may_not_be_written_to_is_refused(tmp_path, monkeypatch):
    """A folder without write permission is refused, whether seen before or at opening."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(HomeError, match="may not be written to"):
        DiskHome(tmp_path)
    monkeypatch.undo()

    _refuse(monkeypatch, errno.EACCES, os.O_TMPFILE, os.O_CREAT)
    with pytest.raises(HomeError, match="Permission denied"):
        DiskHome(tmp_path)


def test_without_a_folder_tmpdir_comes_first(tmp_path, monkeypatch):
    """$TMPDIR is the first default, and is passed over where it is memory."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with DiskHome() as home:
        assert home.folder == tmp_path

    monkeypatch.setenv("TMPDIR", "/dev/shm")
    with DiskHome() as home:
        assert home.folder != Path("/dev/shm")


def test_without_any_usable_folder_all_are_named(monkeypatch, tmp_path):
    """Where no default is usable, the message names each with its reason."""
    missing = [tmp_path / "one", tmp_path / "two"]
    monkeypatch.setattr("memtile.homes.filesystems._defaults", lambda: missing)

    with pytest.raises(HomeError, match=r"one: there is no such folder; .*two: there is no such"):
        DiskHome()


def test_another_system_is_refused(monkeypatch, tmp_path):
    """Anywhere but on Linux, the error says so and names the way out."""
    monkeypatch.setattr(sys, "platform", "darwin")

    with pytest.raises(UnsupportedPlatformError, match="HostHome"):
        DiskHome(tmp_path)


def test_a_live_home_has_no_name(tmp_path):
    """Nothing is seen in the folder while a home is open, nor after."""
    home = DiskHome(tmp_path)
    allocate_copy(home, torch.ones(5000))

    assert os.listdir(tmp_path) == []
    del home
    gc.collect()
    assert os.listdir(tmp_path) == []


def test_a_home_is_never_kept(tmp_path):
    """There is no way to keep its file: checkpoints do that."""
    with pytest.raises(TypeError, match="keep"):
        DiskHome(tmp_path, keep=True)


def test_without_nameless_files_the_name_is_gone_at_once(tmp_path, monkeypatch):
    """Where the filesystem has no O_TMPFILE the file is unlinked as soon as it is open."""
    _refuse(monkeypatch, errno.EOPNOTSUPP, os.O_TMPFILE)

    with DiskHome(tmp_path) as home:
        parked = allocate_copy(home, torch.arange(5000))

        assert os.listdir(tmp_path) == []
        assert torch.equal(parked, torch.arange(5000))


def _refuse_maps(monkeypatch, error: int) -> None:
    """No file can be mapped; anonymous memory can."""
    real = mmap.mmap

    def refusing(fd, *rest, **names):
        if fd == -1:
            return real(fd, *rest, **names)
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(mmap, "mmap", refusing)


@pytest.mark.parametrize("direct", [False, True])
def test_a_filesystem_that_maps_nothing_is_refused(tmp_path, monkeypatch, direct):
    """FUSE and network disks may have no shared maps: told when the home is made, by name."""
    before = _open_files()
    _refuse_maps(monkeypatch, errno.ENODEV)
    if not direct:
        _refuse(monkeypatch, errno.EINVAL, os.O_DIRECT)

    with pytest.raises(HomeError, match=r"No such device.*FUSE.*give a folder on a local disk"):
        DiskHome(tmp_path)

    monkeypatch.undo()
    assert _open_files() == before
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (errno.EROFS, "read-only filesystem: give a folder on one that may be written to"),
        (errno.EMFILE, "raise the limit of open files"),
        (errno.EACCES, "change its permissions"),
    ],
    ids=errno.errorcode.get,
)
def test_what_cannot_be_made_is_told_the_way_out(tmp_path, monkeypatch, error, advice):
    """What the system said, and what helps against that."""
    _refuse(monkeypatch, error, os.O_TMPFILE, os.O_CREAT)

    with pytest.raises(HomeError, match=rf"cannot be made \({os.strerror(error)}\).*{advice}"):
        DiskHome(tmp_path)


# Room


def test_room_is_used_again(tmp_path):
    """Parking and dropping again and again leaves the file as long as it was."""
    with DiskHome(tmp_path) as home:
        home.hold([4 * _MIB])
        before = _file_bytes(home)
        for turn in range(8):
            kept = [allocate_copy(home, torch.full((n + 1, 20_000), turn)) for n in range(5)]
            del kept

        assert _file_bytes(home) == before


def test_the_file_grows_in_few_steps(tmp_path):
    """Each map costs a file descriptor, so growing doubles the file instead of adding a tile."""
    before = _open_files()
    with DiskHome(tmp_path) as home:
        allocations = [home.allocate((_MIB // 4,), torch.uint8) for _ in range(128)]

        assert len({allocation.address for allocation in allocations}) == 128
        assert _open_files() - before < 12


def _full_from_now(monkeypatch) -> None:
    def full(fd, offset, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)


def _room_left(home: DiskHome) -> int:
    """Allocations of one page that still fit where the disk is full; they are gone again."""
    allocations = []
    try:
        while True:
            allocations.append(home.allocate((PAGE,), torch.uint8))
    except HomeFullError:
        return len(allocations)


def test_held_room_is_nobody_elses(tmp_path, monkeypatch):
    """What others take leaves it alone; it is the owner's again and again, then everybody's."""
    with DiskHome(tmp_path) as home:
        held = home.hold([PAGE, 2 * PAGE, PAGE])
        _full_from_now(monkeypatch)
        free = _room_left(home)

        for _ in range(3):
            with held.used_by_this_thread():
                mine = [home.allocate((pages * PAGE,), torch.uint8) for pages in (2, 1, 1)]
            others = [home.allocate((PAGE,), torch.uint8) for _ in range(free)]
            with pytest.raises(HomeFullError):
                home.allocate((PAGE,), torch.uint8)
            assert len({allocation.address for allocation in [*mine, *others]}) == free + 3
            del mine, others
            assert _room_left(home) == free
        with held.used_by_this_thread():
            last = home.allocate((PAGE,), torch.uint8)
        del held
        assert _room_left(home) == free + 3
        del last
        assert _room_left(home) == free + 4


def test_room_that_cannot_be_held_changes_nothing(tmp_path, monkeypatch):
    """Refused as a whole: all that was free is free, and what was held is held."""
    with DiskHome(tmp_path) as home:
        held = home.hold([PAGE])
        _full_from_now(monkeypatch)
        free = _room_left(home)

        with pytest.raises(HomeFullError, match=f"{8 << 20} more bytes needed"):
            home.hold([PAGE, 8 << 20, PAGE])

        assert _room_left(home) == free
        with held.used_by_this_thread():
            assert home.allocate((PAGE,), torch.uint8).address


def test_room_is_held_for_the_thread_that_uses_it(tmp_path, monkeypatch):
    """What another thread parks meanwhile takes nothing of it."""
    with DiskHome(tmp_path) as home, ThreadPoolExecutor(1) as other:
        held = home.hold([PAGE])
        _full_from_now(monkeypatch)

        with held.used_by_this_thread():
            allocations = other.submit(_room_left, home).result()
            mine = home.allocate((PAGE,), torch.uint8)

        assert _room_left(home) == allocations
        del mine
        assert _room_left(home) == allocations


def test_every_byte_is_allocated_before_it_is_mapped(tmp_path):
    """Writing a mapped hole of a full disk is a SIGBUS, so the file has no holes."""
    with DiskHome(tmp_path) as home:
        home.hold([5 * _MIB])

        assert os.fstat(home._file.fd).st_blocks * 512 >= _file_bytes(home)


def test_a_full_disk_is_an_error_and_changes_nothing(tmp_path, monkeypatch):
    """Without room the error tells needed and free bytes; afterwards the home is as it was."""
    with DiskHome(tmp_path) as home:
        parked = allocate_copy(home, torch.ones(1000))
        before = _file_bytes(home)

        def full(fd, offset, size):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(HomeFullError, match=rf"{9 * _MIB} more bytes needed, \d+ bytes are fr"):
            home.allocate((9 * _MIB,), torch.uint8)
        with pytest.raises(HomeFullError) as raised:
            home.hold([9 * _MIB])
        monkeypatch.undo()

        assert raised.value.errno == errno.ENOSPC
        assert _file_bytes(home) == before
        assert bool((parked == 1).all())
        assert home.allocate((9 * _MIB,), torch.uint8).address


def test_an_almost_full_disk_takes_what_is_needed(tmp_path, monkeypatch):
    """Where there is no room to grow ahead, exactly what is needed still fits."""
    with DiskHome(tmp_path) as home:
        home.hold([8 * _MIB])
        kept = home.allocate((8 * _MIB,), torch.uint8)
        real = os.posix_fallocate

        def nearly_full(fd, offset, size):
            if size > 2 * PAGE:
                raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
            real(fd, offset, size)

        monkeypatch.setattr(os, "posix_fallocate", nearly_full)

        assert home.allocate((2 * PAGE,), torch.uint8).address != kept.address


def test_a_limit_on_file_size_is_an_error(tmp_path):
    """The kernel's own refusal (RLIMIT_FSIZE) is HomeFullError; what was parked stays."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with DiskHome(tmp_path) as home:
        parked = allocate_copy(home, torch.arange(1000))
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 * _MIB, hard))
        try:
            with pytest.raises(HomeFullError, match="File too large"):
                home.allocate((8 * _MIB,), torch.uint8)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

        assert torch.equal(parked, torch.arange(1000))


def test_a_map_that_is_refused_is_an_error_and_changes_nothing(tmp_path, monkeypatch):
    """Where the system maps no more, the file shrinks back and the error says which limits."""
    with DiskHome(tmp_path) as home:
        before = _file_bytes(home)

        for error, ours in ((errno.ENOMEM, HomeFullError), (errno.ENODEV, HomeError)):
            _refuse_maps(monkeypatch, error)
            with pytest.raises(ours, match="could not be mapped"):
                home.allocate((10,), torch.uint8)
            monkeypatch.undo()

        assert _file_bytes(home) == before


def test_evict_takes_the_pages_out_of_this_process(tmp_path):
    """What a tensor brought into resident memory is out again after `evict`."""

    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))

    with DiskHome(tmp_path) as home:
        parked = allocate_copy(home, torch.ones(4 * _MIB))
        parked.add_(1)
        before = resident()

        allocation_of(parked).evict()

        assert before - resident() > 12 * _MIB
        assert bool((parked == 2).all())


def test_parking_a_copy_brings_no_pages_into_this_process(tmp_path):
    """Values are written past the mapping: only a piece's buffer is ever resident."""
    with DiskHome(tmp_path) as home:
        parked = allocate_copy(home, torch.ones(4 * _MIB))

        assert home.traffic.written_bytes == parked.nbytes


# Reads and writes


@pytest.fixture(params=["page cache", "direct"])
def home(request, tmp_path, monkeypatch):
    free = 1 << 60 if request.param == "page cache" else 0
    monkeypatch.setattr("memtile.homes.limits.free_bytes", lambda: free)
    with DiskHome(tmp_path) as home:
        if home.path != request.param:
            pytest.skip("the folder's filesystem has no direct I/O")
        yield home


def test_partial_reads_and_writes_are_continued(home, monkeypatch):
    """A system call that moves less than it was asked is followed by another."""
    reads, writes = disk_io.read_at, disk_io.write_at
    monkeypatch.setattr(disk_io, "read_at", lambda fd, b, o: reads(fd, b[:PAGE], o))
    monkeypatch.setattr(disk_io, "write_at", lambda fd, b, o: writes(fd, b[:PAGE], o))
    values = torch.arange(5000)

    parked = allocate_copy(home, values)
    allocation_of(parked).read(buffer := aligned_buffer(parked.nbytes))

    assert torch.equal(buffer[: parked.nbytes].view(torch.int64), values)
    assert torch.equal(parked, values)


def test_a_read_that_ends_early_is_an_error(home, monkeypatch):
    """A file that ends before the tile does is HomeIOError, naming the bytes; nothing is stuck."""
    parked = allocate_copy(home, torch.arange(5000))
    allocation, real = allocation_of(parked), disk_io.read_at
    buffer = aligned_buffer(allocation.room)

    def ending(fd, piece, offset):
        return real(fd, piece[:PAGE], offset) if len(piece) == allocation.room else 0

    monkeypatch.setattr(disk_io, "read_at", ending)
    with pytest.raises(HomeIOError, match=rf"read of {allocation.room} bytes .* after {PAGE};"):
        allocation.read(buffer)
    monkeypatch.undo()

    allocation.read(buffer)
    assert torch.equal(buffer[: allocation.nbytes].view(torch.int64), torch.arange(5000))


@pytest.mark.parametrize("act", ["read", "write"])
def test_an_error_of_the_disk_is_told(home, monkeypatch, act):
    """EIO becomes HomeIOError with its errno and cause, is not counted, and the home goes on."""
    parked = allocate_copy(home, torch.arange(5000))
    allocation, before = allocation_of(parked), home.traffic
    buffer = aligned_buffer(allocation.room)
    allocation.read(buffer)

    def failing(fd, piece, offset):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(disk_io, f"{act}_at", failing)
    with pytest.raises(HomeIOError, match=f"{act} of {allocation.room} bytes") as raised:
        getattr(allocation, act)(buffer)
    monkeypatch.undo()

    assert raised.value.errno == errno.EIO
    assert isinstance(raised.value.__cause__, OSError)
    assert home.traffic.written_bytes == before.written_bytes
    assert home.traffic.read_bytes == allocation.room
    allocation.write(buffer)
    assert torch.equal(parked, torch.arange(5000))


def test_closing_waits_for_what_is_being_read(home, monkeypatch):
    """A read under way ends before its file is closed and the descriptor given to another."""
    parked = allocate_copy(home, torch.arange(5000))
    allocation, real = allocation_of(parked), disk_io.read_at
    buffer = aligned_buffer(allocation.room)
    reading, go_on = threading.Event(), threading.Event()

    def slow(fd, piece, offset):
        reading.set()
        assert go_on.wait(60)
        return real(fd, piece, offset)

    monkeypatch.setattr(disk_io, "read_at", slow)
    reader = threading.Thread(target=allocation.read, args=(buffer,))
    closer = threading.Thread(target=home.close)
    reader.start()
    assert reading.wait(60)
    closer.start()
    assert not home.closed
    go_on.set()
    reader.join()
    closer.join()

    assert home.closed
    assert torch.equal(buffer[: allocation.nbytes].view(torch.int64), torch.arange(5000))


# The path


def test_a_file_that_outgrows_free_memory_is_read_direct(tmp_path, monkeypatch, caplog):
    """The page cache serves while the file fits into half of free memory; each change is logged."""
    monkeypatch.setattr("memtile.homes.limits.free_bytes", lambda: 8 * _MIB)
    with caplog.at_level(logging.INFO, "memtile.homes"), DiskHome(tmp_path) as home:
        if home._file.direct_fd is None:
            pytest.skip("the folder's filesystem has no direct I/O")
        assert home.path == "page cache"
        small = allocate_copy(home, torch.ones(1000))
        assert home.path == "page cache"
        large = allocate_copy(home, torch.ones(2 * _MIB))

        assert home.path == "direct"
        for parked in (small, large):
            allocation_of(parked).read(buffer := aligned_buffer(parked.nbytes))
            assert torch.equal(buffer[: parked.nbytes].view(torch.float32), parked)
    words = [record.getMessage() for record in caplog.records]
    assert len(words) == 2
    assert "by page cache: its 4096 bytes fit" in words[0]
    assert "by direct: its" in words[1]
    assert "do not fit into half of 8388608 bytes" in words[1]


def test_an_unknown_amount_of_memory_is_not_guessed_at(tmp_path, monkeypatch):
    """Where the system does not tell what is free, reads go direct."""
    monkeypatch.setattr("memtile.homes.limits.free_bytes", lambda: None)
    with DiskHome(tmp_path) as home:
        if home._file.direct_fd is None:
            pytest.skip("the folder's filesystem has no direct I/O")

        assert home.path == "direct"


@pytest.mark.parametrize("why", ["refused", "unreadable", "stale reads", "stale map"])
def test_without_coherent_direct_io_the_page_cache_serves(tmp_path, monkeypatch, caplog, why):
    """Where O_DIRECT is refused, or disagrees with the map, it is not used; the log says so."""
    monkeypatch.setattr("memtile.homes.limits.free_bytes", lambda: 0)
    real = disk_io.read_at

    def stale(fd, piece, offset):
        got = real(fd, piece, offset)
        piece[0] ^= 1
        return got

    def unreadable(fd, piece, offset):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    if why == "refused":
        _refuse(monkeypatch, errno.EINVAL, os.O_DIRECT)
    elif why == "stale map":
        monkeypatch.setattr(disk_io, "write_at", lambda fd, piece, offset: len(piece))
    else:
        monkeypatch.setattr(disk_io, "read_at", stale if why == "stale reads" else unreadable)
    before = _open_files()

    with caplog.at_level(logging.INFO, "memtile.homes"), DiskHome(tmp_path) as home:
        assert home.path == "buffered"
        assert _open_files() == before + 1
    assert "direct I/O is refused here, or does not agree" in caplog.text


# What is left


def test_nothing_stays_open(tmp_path):
    """Closed or only dropped, a home leaves no descriptor, thread or file."""
    before, threads = _open_files(), threading.active_count()
    for close in (False, True):
        home = DiskHome(tmp_path / ".")
        parked = allocate_copy(home, torch.ones(5000))
        if close:
            home.close()
        del home, parked

        assert _open_files() == before, close
    assert threading.active_count() == threads
    assert os.listdir(tmp_path) == []


def test_a_home_that_cannot_be_opened_leaves_nothing(tmp_path, monkeypatch):
    """A disk that is full at opening is HomeFullError, with nothing left open."""
    before = _open_files()

    def full(fd, offset, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(HomeFullError):
        DiskHome(tmp_path)

    assert _open_files() == before


def test_a_filesystem_that_cannot_allocate_is_told(tmp_path, monkeypatch):
    """Another error than a full disk is HomeIOError."""

    def failing(fd, offset, size):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "posix_fallocate", failing)
    with pytest.raises(HomeIOError, match="cannot grow"):
        DiskHome(tmp_path)

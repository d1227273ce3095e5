"""Files that appear whole or not at all: written under a partial name, synced, renamed."""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from memtile.checkpoints.opening import PARTIAL
from memtile.errors import CheckpointWriteError, way_out

# Some network filesystems have no locks: there nobody can be kept out.
_NO_LOCKS: Final = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS})


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Nobody else writes checkpoints into the folder meanwhile; it is made where it is missing.

    Raises:
        CheckpointWriteError: somebody does, or the folder cannot be used.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointWriteError(
                errno.EBUSY,
                f"another run is writing into {folder}; wait for it, or give another folder",
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise cannot_write(folder, error) from error
        yield
    finally:
        os.close(fd)


@contextmanager
def new_file(target: Path) -> Iterator[tuple[int, Path]]:
    """A file beside its target: descriptor and partial path; removed where the block raises.

    It is on the disk when the block ends; `rename` gives it its name.

    Raises:
        CheckpointWriteError: the system could not; nothing is left behind.
    """
    partial = target.with_name(f"{target.name}{PARTIAL}{secrets.token_hex(4)}")
    try:
        target.parent.mkdir(exist_ok=True)
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            yield fd, partial
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        discard(partial)
        raise cannot_write(target, error) from error
    except BaseException:
        discard(partial)
        raise


def write_text(target: Path, text: str) -> None:
    """Replace a small file at once.

    Raises:
        CheckpointWriteError: the system could not; what was there is as it was.
    """
    put(target, text.encode())


def put(target: Path, content: bytes | Path) -> None:
    """Replace a small file at once, by these bytes or by those of another file.

    Raises:
        CheckpointWriteError: the system could not; what was there is as it was.
    """
    with new_file(target) as (fd, partial), os.fdopen(os.dup(fd), "wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            with content.open("rb") as source:
                shutil.copyfileobj(source, file)
    rename(partial, target)


def rename(partial: Path, target: Path) -> None:
    """Give a complete file or folder its name, in place of one that has it, for good.

    Raises:
        CheckpointWriteError: the system could not; a partial file is removed.
    """
    try:
        os.rename(partial, target)
    except OSError as error:
        discard(partial)
        raise cannot_write(target, error) from error
    sync_folder(target.parent)


def discard(partial: Path) -> None:
    """Remove a file, where the system lets it."""
    with contextlib.suppress(OSError):
        partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    with contextlib.suppress(OSError):  # some network filesystems cannot; the names are there
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def cannot_write(place: Path, error: OSError) -> CheckpointWriteError:
    """What to say of a place that cannot be written to."""
    if isinstance(error, CheckpointWriteError):
        return error
    return CheckpointWriteError(
        error.errno,
        f"{place} could not be written ({error.strerror or error}); what was there before is as it "
        f"was: {way_out(error)}",
    )

"""Files that are never seen half-written: written under a partial name, synced and renamed."""

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

# Some network filesystems have no locks: there another writer cannot be noticed.
_NO_LOCKS: Final = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS})


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Lock a folder, made where it is missing; CheckpointWriteError where another run holds it.

    Folders that it made are removed where the block raises and left nothing in them.
    """
    missing = [each for each in (folder, *folder.parents) if not os.path.exists(each)]
    with _locked(folder):
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):  # not empty
                for each in missing:
                    each.rmdir()
            raise


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
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
    """A new file beside its target: its descriptor and partial path, to be renamed afterwards.

    It is synced when the block ends, and removed where the block raises; an OSError becomes a
    CheckpointWriteError.
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
    except BaseException as error:
        discard(partial)
        if isinstance(error, OSError):
            raise cannot_write(target, error) from error
        raise


def replace_file(target: Path, content: str | bytes | Path) -> None:
    """Replace a small file by this content or by a copy of another file, at once."""
    with new_file(target) as (fd, partial), os.fdopen(os.dup(fd), "wb") as file:
        if isinstance(content, Path):
            with content.open("rb") as source:
                shutil.copyfileobj(source, file)
        else:
            file.write(content.encode() if isinstance(content, str) else content)
    rename(partial, target)


def rename(partial: Path, target: Path) -> None:
    """Give a complete file or folder its name, and sync; where that fails the file is removed."""
    try:
        os.rename(partial, target)
    except OSError as error:
        discard(partial)
        raise cannot_write(target, error) from error
    sync_folder(target.parent)


def discard(partial: Path) -> None:
    """Remove a file where that is possible."""
    with contextlib.suppress(OSError):
        partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder to the disk."""
    with contextlib.suppress(OSError):  # some network filesystems cannot
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def cannot_write(place: Path, error: OSError) -> CheckpointWriteError:
    """The error for a path that could not be written to."""
    if isinstance(error, CheckpointWriteError):
        return error
    return CheckpointWriteError(
        error.errno,
        f"{place} could not be written ({error.strerror or error}); what was there before is as it "
        f"was: {way_out(error)}",
    )

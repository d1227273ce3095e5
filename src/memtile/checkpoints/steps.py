"""A folder of training checkpoints, one folder for each saved step; the newest is always whole.

A step is written under a partial name and renamed when it is complete. An older one gets a partial
name again before it is removed. So a `kill -9` leaves no incomplete folder with a step's name.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from memtile.checkpoints.opening import PARTIAL, as_path
from memtile.checkpoints.publishing import cannot_write, rename, sole_writer, sync_folder
from memtile.errors import CheckpointWriteError

RECORD: Final = "training.json"

_NAME: Final = re.compile(r"step-(?P<step>\d{8,})(\.(?P<again>\d+))?")
_held: set[tuple[int, int, int]] = set()  # process id, device and inode of `training_folder`s


@dataclass(frozen=True, order=True)
class SavedStep:
    """One checkpoint of a folder."""

    step: int  # steps that were done
    again: int  # how many times the same step had been saved before
    path: Path


def saved_steps(folder: Path) -> list[SavedStep]:
    """The complete checkpoints, the newest last."""
    try:
        paths = list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = []
    for path in paths:
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append(SavedStep(int(match["step"]), int(match["again"] or 0), path))
    return sorted(found)


def leftovers(folder: Path) -> list[Path]:
    """Folders that killed runs left half-written or half-removed."""
    if not folder.is_dir():
        return []
    parts = ((path, path.name.partition(PARTIAL)) for path in folder.iterdir())
    return [path for path, (name, mark, _) in parts if mark and _NAME.fullmatch(name)]


@contextmanager
def training_folder(folder: "str | os.PathLike[str]") -> Iterator[Path]:
    """Lock a folder of training checkpoints, so that no other process saves into it.

    The folder is made where it is missing. This process's `save_training` works inside. Without
    this, each `save_training` locks the folder only while it writes.

    Raises:
        ArgumentError: the folder is no path.
        CheckpointWriteError: another run holds the folder, or it cannot be used.
    """
    place = as_path("folder", folder)
    with sole_writer(place):
        key = _key(place)
        _held.add(key)
        try:
            yield place
        finally:
            _held.discard(key)


@contextmanager
def new_step(
    folder: Path, step: int, keep: int, record: str = RECORD
) -> Iterator[tuple[Path, Path]]:
    """A new checkpoint: the folder to write into, and its name after the block.

    Where the block raises, nothing of it is left. Afterwards the newest `keep` steps stay, and all
    folders without the file `record`, which are of another format.
    """
    is_held = folder.is_dir() and _key(folder) in _held
    with nullcontext() if is_held else sole_writer(folder):
        sync_folder(folder.parent)
        for path in leftovers(folder):
            shutil.rmtree(path, ignore_errors=True)
        target = _target(folder, step)
        partial = _partial_name(target)
        try:
            try:
                partial.mkdir()
            except OSError as error:
                raise cannot_write(partial, error) from error
            yield partial, target
            sync_folder(partial)
            rename(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _remove_older(folder, keep, record)


def _key(folder: Path) -> tuple[int, int, int]:
    found = folder.stat()
    return os.getpid(), found.st_dev, found.st_ino


def _target(folder: Path, step: int) -> Path:
    newest = next(reversed(saved_steps(folder)), None)
    name = f"step-{step:08}"
    if newest is None or newest.step < step:
        return folder / name
    if newest.step > step:
        raise CheckpointWriteError(
            errno.EEXIST,
            f"{folder} holds step {newest.step}, newer than step {step} that was to be saved: it "
            "is not of this run; resume from it, remove it, or give another folder",
        )
    return folder / f"{name}.{newest.again + 1}"


def _remove_older(folder: Path, keep: int, record: str) -> None:
    """Remove all but the newest steps; a folder that cannot be removed stays."""
    found = saved_steps(folder)
    kept = {saved.step: saved for saved in found}  # the last of each step
    newest = [kept[step] for step in sorted(kept)[-keep:]]
    with contextlib.suppress(OSError):
        for saved in found:
            if saved not in newest and (saved.path / record).exists():
                going = _partial_name(saved.path)
                saved.path.rename(going)
                shutil.rmtree(going, ignore_errors=True)


def _partial_name(target: Path) -> Path:
    return target.with_name(f"{target.name}{PARTIAL}{secrets.token_hex(4)}")

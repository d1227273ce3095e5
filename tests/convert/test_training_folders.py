"""The folder of a run: what stays in it, who may write there, and what a failing disk leaves."""

import errno
import fcntl
import os
import stat

import pytest
import torch
from resumable import a_run

from memtile.checkpoints import steps, training_folder
from memtile.errors import CheckpointWriteError, NotFiniteError
from memtile.homes import disk_io


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def names_of(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_stay(tmp_path):
    """As many as `keep` says; the rest, and what killed runs left, is removed."""
    run = a_run()
    (tmp_path / "step-00000000.partial-0a1b2c3d").mkdir()
    (tmp_path / "step-00000001").mkdir()  # somebody's own: it has no record
    (tmp_path / "notes.txt").write_text("mine")

    for step in (2, 3, 100_000_000, 100_000_001):
        run.done = step
        run.save(tmp_path, keep=2)

    kept = ["step-00000001", "step-100000000", "step-100000001"]
    assert names_of(tmp_path) == ["notes.txt", *kept]
    assert run.resume(tmp_path).step == 100_000_001


@pytest.mark.parametrize("writes", [False, True])
def test_an_interrupted_run_leaves_no_empty_folder(tmp_path, writes):
    """The folders that it made are gone again, unless something was written into them."""
    folder = tmp_path / "out" / "training"

    def run():
        with training_folder(folder):
            if writes:
                (folder.parent / "log").write_text("step 1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert (tmp_path / "out").exists() == writes
    assert not folder.exists()


def test_a_step_may_be_saved_again(tmp_path):
    """A step that is saved again is replaced, once the new one is complete."""
    run = a_run()
    for number in range(3):
        path = run.save(tmp_path, position=number, keep=2)

    assert names_of(tmp_path) == [path.name] == ["step-00000000.2"]
    assert run.resume(tmp_path).position == 2


def test_a_newer_step_is_not_overwritten(tmp_path):
    """Another run's folder is refused, and stays as it is."""
    run = a_run()
    run.done = 5
    path = run.save(tmp_path)
    run.done = 4

    with pytest.raises(CheckpointWriteError, match="holds step 5, newer than step 4"):
        run.save(tmp_path)
    assert names_of(tmp_path) == [path.name]


def test_two_runs_do_not_share_a_folder(tmp_path):
    """`training_folder` keeps other runs out; the run's own saves inside it work."""
    run = a_run()
    holder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    with pytest.raises(CheckpointWriteError, match="another run is writing into"):
        run.save(tmp_path)
    with (
        pytest.raises(CheckpointWriteError, match="another run is writing into"),
        training_folder(tmp_path),
    ):
        pass
    os.close(holder)

    with training_folder(tmp_path):
        run.save(tmp_path)
        with (
            pytest.raises(CheckpointWriteError, match="another run is writing into"),
            training_folder(tmp_path),
        ):
            pass
    assert not steps._held
    run.done = 1
    assert run.save(tmp_path).is_dir()


class Failing:
    """The n-th system call fails once, counted from 1."""

    def __init__(self, real, number, code):
        self.real, self.number, self.code = real, number, code
        self.count, self.syncs = 0, real is os.fsync

    def __call__(self, *args, **options):
        is_folder = self.syncs and stat.S_ISDIR(os.fstat(args[0]).st_mode)
        self.count += not is_folder  # a filesystem may be unable to sync a folder
        if self.count == self.number and not is_folder:
            raise OSError(self.code, os.strerror(self.code))
        return self.real(*args, **options)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize(
    ("owner", "name", "numbers"),
    [
        (os, "posix_fallocate", [1, 2, 3]),
        (os, "fsync", [1, 2, 3, 4]),
        (os, "rename", [1, 2, 3, 4, 5]),
        (disk_io, "write_at", [1, 2, 9]),
        (os, "mkdir", [2]),
    ],
    ids=["posix_fallocate", "fsync", "rename", "write_at", "mkdir"],
)
def test_a_disk_that_fails_loses_nothing(tmp_path, monkeypatch, owner, name, numbers, code):
    """Whichever call fails, the old checkpoint stays, nothing else is left, a later save works."""
    run = a_run()
    run.train(1)
    run.save(tmp_path)
    before = {path: path.read_bytes() for path in files_of(tmp_path)}
    run.train(1)
    for number in numbers:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, Failing(getattr(owner, name), number, code))
            with pytest.raises(CheckpointWriteError) as raised:
                run.save(tmp_path)
        assert raised.value.errno == code
        assert {path: path.read_bytes() for path in files_of(tmp_path)} == before
        assert len(names_of(tmp_path)) == 1

    assert run.save(tmp_path).name == "step-00000002"
    assert run.resume(tmp_path).step == 2


def test_what_is_no_folder_is_refused(tmp_path):
    """A file where the folder should be."""
    (tmp_path / "file").write_text("mine")

    with pytest.raises(CheckpointWriteError, match="could not be written"):
        a_run().save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_ctrl_c_while_saving_loses_nothing(tmp_path, monkeypatch):
    """After Ctrl-C the new checkpoint is removed and the old one complete."""
    run = a_run()
    run.save(tmp_path)
    run.done = 1
    monkeypatch.setattr(disk_io, "drain", _interrupted)

    with pytest.raises(KeyboardInterrupt):
        run.save(tmp_path)
    assert names_of(tmp_path) == ["step-00000000"]


def _interrupted(*args):
    raise KeyboardInterrupt


@pytest.mark.parametrize("what", ["weight", "moment"])
@pytest.mark.parametrize("trainable_only", [False, True])
def test_what_is_not_finite_takes_no_checkpoints_place(tmp_path, what, trainable_only):
    """A run that went wrong keeps its last good state, unless the caller says otherwise."""
    run = a_run()
    run.train(1)
    path = run.save(tmp_path, trainable_only=trainable_only)
    before = {file: file.read_bytes() for file in files_of(path)}
    run.train(1)
    parameter = next(p for p in run.model.parameters() if p.requires_grad and p.dim() == 2)
    tensor = parameter if what == "weight" else run.optimizer.state[parameter]["exp_avg_sq"]
    with torch.no_grad():
        tensor[1, 2] = float("inf")

    with pytest.raises(NotFiniteError, match="is not finite; a run cannot go on from it"):
        run.save(tmp_path, trainable_only=trainable_only)

    assert {file: file.read_bytes() for file in files_of(tmp_path)} == before
    run.save(tmp_path, trainable_only=trainable_only, check_finite=False)
    assert len(names_of(tmp_path)) == 1


def test_buffers_and_frozen_weights_may_be_infinite(tmp_path):
    """Only what is trained is looked at: masks are infinite, and a base comes as it is."""
    run = a_run()
    run.model.register_buffer("mask", torch.full((3,), float("-inf")))
    run.model.frozen.weight[0, 0] = float("nan")

    path = run.save(tmp_path)

    assert (path / "model.safetensors").exists()

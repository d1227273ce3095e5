"""A checkpoint is written completely, or the old one stays."""

import errno
import json
import os
import re
import threading

import pytest
import torch
from faulty_disk import FaultyDisk
from processes import killed
from safetensors.torch import load_file
from safetensors_files import outgoing_of, ragged_tensors, same_tensors, write_without_end

from memtile.checkpoints import Checkpoint, Outgoing, sole_writer, write_checkpoint
from memtile.errors import ArgumentError, CheckpointError, CheckpointWriteError

SHARDED = 150  # bytes of a shard


def read(folder):
    """All tensors of the checkpoint in a folder, verified."""
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.check_sums() == len(checkpoint)
    return {name: stored.read() for name, stored in checkpoint.items()}


def listing(folder):
    """Names in a folder, without marks."""
    return sorted(re.sub("-[0-9a-f]{8}-", "-", path.name) for path in folder.iterdir())


@pytest.mark.parametrize("max_shard_bytes", [1, SHARDED, 10**9])
def test_what_is_written_is_what_safetensors_reads(tmp_path, max_shard_bytes):
    """One file or many: every tensor comes back, by us and by the library."""
    tensors = ragged_tensors()

    write_checkpoint(tmp_path / "new", outgoing_of(tensors), max_shard_bytes=max_shard_bytes)

    files = (tmp_path / "new").glob("*.safetensors")
    theirs = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert same_tensors(read(tmp_path / "new"), tensors)
    assert same_tensors(theirs, tensors)


def test_shards_are_named_as_transformers_names_them(tmp_path):
    """Files hold no more than the limit, unless one tensor does; the index names the place of each.

    Its total is the bytes of all tensors.
    """
    tensors = ragged_tensors()
    write_checkpoint(tmp_path, outgoing_of(tensors), max_shard_bytes=SHARDED)

    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())

    files = sorted(set(index["weight_map"].values()))
    assert files == [
        f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)
    ]
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in tensors.values())}
    for file in files:
        held = load_file(tmp_path / file)
        assert sum(t.nbytes for t in held.values()) <= SHARDED or len(held) == 1
        assert all(index["weight_map"][name] == file for name in held)


@pytest.mark.parametrize("first", [SHARDED, 10**9])
@pytest.mark.parametrize("second", [SHARDED, 2 * SHARDED, 10**9])
def test_a_new_checkpoint_takes_the_place_of_the_old(tmp_path, first, second):
    """However the two are sharded, the old one is removed, and other files are kept."""
    (tmp_path / "mine.safetensors").write_bytes(b"mine")
    (tmp_path / "model.safetensors.partial-0a1b2c3d").write_bytes(b"half")
    (tmp_path / "config.json").write_text("old")
    write_checkpoint(tmp_path, outgoing_of(ragged_tensors(1)), max_shard_bytes=first)
    new = ragged_tensors(2)

    texts = {"config.json": b"new"}
    write_checkpoint(tmp_path, outgoing_of(new), max_shard_bytes=second, beside=texts)

    assert same_tensors(read(tmp_path), new)
    alone = tmp_path / "alone"
    write_checkpoint(alone, outgoing_of(new), max_shard_bytes=second)
    assert listing(tmp_path) == sorted(
        [*listing(alone), "mine.safetensors", "config.json", "alone"]
    )
    assert (tmp_path / "config.json").read_text() == "new"


def test_files_beside_are_copied_as_they_are(tmp_path):
    """Files beside the tensors are copied byte for byte, from memory or a file."""
    raw = bytes(range(256)) + b"\r\n"
    source = tmp_path / "source"
    source.write_bytes(raw)
    beside = {"tokenizer.model": source, "config.json": raw, "templates/tool.jinja": source}

    write_checkpoint(tmp_path / "new", outgoing_of({"a": torch.ones(2)}), beside=beside)

    assert all((tmp_path / "new" / name).read_bytes() == raw for name in beside)


def test_no_header_is_larger_than_others_read(tmp_path, monkeypatch):
    """Names that would make a header too long are split over more files."""
    monkeypatch.setattr("memtile.checkpoints.header.MAX_HEADER_BYTES", 3000)
    names = [f'layers."{number}".ümläute.weight' for number in range(40)]
    tensors = {name: torch.full((3, 2), number) for number, name in enumerate(names)}

    write_checkpoint(tmp_path, outgoing_of(tensors))

    files = sorted(tmp_path.glob("*.safetensors"))
    lengths = [int.from_bytes(file.read_bytes()[:8], "little") for file in files]
    assert len(files) > 1
    assert all(1500 < length <= 3000 for length in lengths[:-1])
    assert same_tensors({k: v for file in files for k, v in load_file(file).items()}, tensors)
    assert same_tensors(read(tmp_path), tensors)


def test_a_name_that_no_header_has_room_for_is_refused(tmp_path, monkeypatch):
    """A name too long for a header is refused before anything is written."""
    monkeypatch.setattr("memtile.checkpoints.header.MAX_HEADER_BYTES", 3000)

    with pytest.raises(CheckpointError, match=r"the name 'x{40}'… has 2000 characters"):
        write_checkpoint(tmp_path / "new", outgoing_of({"x" * 2000: torch.ones(1)}))

    assert not (tmp_path / "new").exists()


def test_nothing_is_in_memory_but_a_piece(tmp_path):
    """Each piece is written before the next is asked for."""
    alive = []

    def pieces():
        for number in range(3):
            assert not alive, "the last piece is still held"
            piece = torch.full((5,), float(number))
            alive.append(number)
            yield piece
            alive.pop()

    write_checkpoint(tmp_path, [Outgoing("a", torch.float32, torch.Size([15]), pieces)])

    assert torch.equal(read(tmp_path)["a"], torch.arange(3.0).repeat_interleave(5))


@pytest.mark.parametrize(
    ("tensors", "size", "kind"),
    [
        (
            [*outgoing_of({"a": torch.ones(1)}), *outgoing_of({"a": torch.ones(1)})],
            9,
            CheckpointError,
        ),
        (outgoing_of({"a": torch.ones(1, dtype=torch.complex128)}), 9, CheckpointError),
        (outgoing_of({"a": torch.ones(1)}), 0, ArgumentError),
    ],
)
def test_what_cannot_be_written_is_refused_before(tmp_path, tensors, size, kind):
    """Invalid arguments are refused before the folder is made."""
    with pytest.raises(kind):
        write_checkpoint(tmp_path / "new", tensors, max_shard_bytes=size)

    assert not (tmp_path / "new").exists()


def no_room(*args):
    """A disk that is full."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def faults(monkeypatch):
    """Ways in which writing fails, by their names."""

    def writes(number):
        FaultyDisk(monkeypatch).fail("write", number)

    def renames(number):
        real, left = os.rename, iter(range(number))
        monkeypatch.setattr(os, "rename", lambda *a: real(*a) if next(left, None) else no_room())

    return {
        "full": lambda: monkeypatch.setattr(os, "posix_fallocate", no_room),
        "first write": lambda: writes(0),
        "a later write": lambda: writes(5),
        "syncing": lambda: monkeypatch.setattr(os, "fsync", no_room),
        "first rename": lambda: monkeypatch.setattr(os, "rename", no_room),
        "a later rename": lambda: renames(3),
    }


# One file is renamed once.
KINDS = [
    (f, n) for f in faults(None) for n in (SHARDED, 10**9) if f != "a later rename" or n == SHARDED
]


@pytest.mark.parametrize(("fault", "new"), KINDS)
@pytest.mark.parametrize("old", [SHARDED, 10**9])
def test_a_failure_leaves_the_old_checkpoint_and_nothing_else(
    tmp_path, monkeypatch, fault, new, old
):
    """A full or failing disk at any point: the old tensors are there, and no file more."""
    before = ragged_tensors(1)
    write_checkpoint(tmp_path, outgoing_of(before), max_shard_bytes=old)
    files = listing(tmp_path)

    with monkeypatch.context() as patched:
        faults(patched)[fault]()
        with pytest.raises(CheckpointWriteError, match="what was there before is as it was"):
            write_checkpoint(tmp_path, outgoing_of(ragged_tensors(2)), max_shard_bytes=new)

    assert same_tensors(read(tmp_path), before)
    assert listing(tmp_path) == files


@pytest.mark.parametrize("old", [SHARDED, 10**9])
@pytest.mark.parametrize("new", [SHARDED, 10**9])
def test_an_interrupt_at_any_rename_leaves_one_whole_checkpoint(tmp_path, monkeypatch, old, new):
    """A Ctrl-C before or after any rename leaves the old or the new checkpoint, complete."""
    before, after = ragged_tensors(1), ragged_tensors(2)
    real, seen = os.rename, []

    for number in range(14):
        for late in (False, True):
            folder = tmp_path / f"{number}-{late}"
            write_checkpoint(folder, outgoing_of(before), max_shard_bytes=old)
            calls = iter(range(100))

            def interrupted(one, other, calls=calls, number=number, late=late):
                at = next(calls) == number
                if at and not late:
                    raise KeyboardInterrupt
                real(one, other)
                if at:
                    raise KeyboardInterrupt

            with monkeypatch.context() as patched:
                patched.setattr(os, "rename", interrupted)
                try:
                    write_checkpoint(folder, outgoing_of(after), max_shard_bytes=new)
                except KeyboardInterrupt:
                    found = read(folder)
                    seen.append(same_tensors(found, after))
                    assert seen[-1] or same_tensors(found, before)

    # One file goes first where both are there, and it is removed after the last rename.
    assert set(seen) == ({False} if (old, new) == (10**9, SHARDED) else {True, False})


def test_two_writers_do_not_meet(tmp_path):
    """The second is refused while the first writes, and may write afterwards."""
    with sole_writer(tmp_path):
        with pytest.raises(CheckpointWriteError, match="another run is writing into"):
            write_checkpoint(tmp_path, outgoing_of(ragged_tensors()))
        assert list(tmp_path.iterdir()) == []

    write_checkpoint(tmp_path, outgoing_of(ragged_tensors()))
    assert same_tensors(read(tmp_path), ragged_tensors())


def test_threads_that_write_into_one_folder_leave_one_of_their_checkpoints(tmp_path):
    """Of two processes the second is refused, and the folder is always a complete checkpoint."""
    refused = []

    def write(seed):
        try:
            write_checkpoint(tmp_path, outgoing_of(ragged_tensors(seed)), max_shard_bytes=SHARDED)
        except CheckpointWriteError:
            refused.append(seed)

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    found = read(tmp_path)
    winners = set(range(4)) - set(refused)
    assert any(same_tensors(found, ragged_tensors(seed)) for seed in winners)


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    """A folder that cannot be made gives an error that says so."""
    (tmp_path / "file").write_text("")

    with pytest.raises(CheckpointWriteError, match="could not be written"):
        write_checkpoint(tmp_path / "file", outgoing_of(ragged_tensors()))


@pytest.mark.parametrize(
    ("number", "way_out"),
    [
        (errno.EROFS, "on a read-only filesystem: give a folder on one that may be written to"),
        (errno.EACCES, "it may not be written to: change its permissions"),
        (errno.EPERM, "it may not be written to: change its permissions"),
        (errno.ENOSPC, "make room, or give another folder"),
        (errno.EDQUOT, "make room within the quota"),
        (errno.EIO, "the disk or its connection is at fault"),
        (errno.ENAMETOOLONG, "as it was: give another folder"),
    ],
)
def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch, number, way_out):
    """Each reason has its own way out in the message, and the folder stays as it was."""
    before = ragged_tensors(1)
    write_checkpoint(tmp_path, outgoing_of(before))
    real = os.open

    def read_only(path, flags, *rest, **more):  # root may write anywhere, so modes tell nothing
        if flags & os.O_CREAT:
            raise OSError(number, os.strerror(number))
        return real(path, flags, *rest, **more)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", read_only)
        with pytest.raises(CheckpointWriteError, match=way_out) as raised:
            write_checkpoint(tmp_path, outgoing_of(ragged_tensors(2)))
        assert os.strerror(number) in str(raised.value)

    assert same_tensors(read(tmp_path), before)


def test_every_flipped_bit_of_data_is_noticed(tmp_path):
    """The checksums find each damaged bit, and name the tensor."""
    write_checkpoint(tmp_path, outgoing_of({"a": torch.arange(3.0), "b": torch.arange(2)}))
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()

    for bit in range(28 * 8):
        damaged = bytearray(whole)
        damaged[-1 - bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"the bytes of '(a|b)' are not those"):
            Checkpoint.open(tmp_path).check_sums()


def test_a_killed_writer_leaves_the_old_or_the_new_checkpoint(tmp_path):
    """After kill -9 at any moment the folder is one of the two checkpoints, complete."""
    write_checkpoint(tmp_path, outgoing_of(ragged_tensors(0)))
    done = 0
    for turn in range(10):
        sent = killed(
            write_without_end, tmp_path, done, after=1 + turn, seconds=0.0007 * turn
        )  # later and later in its work, anywhere within a write
        done = sent[-1]

        found = read(tmp_path)

        fits = [seed for seed in (done, done + 1) if same_tensors(found, ragged_tensors(seed))]
        assert len(fits) == 1, (turn, done)
        done = fits[0]

    write_checkpoint(tmp_path, outgoing_of(ragged_tensors(7)))
    assert listing(tmp_path) == ["model.safetensors"]

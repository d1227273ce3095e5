"""A checkpoint in a folder is found, or the error says why not."""

import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file
from safetensors_files import outgoing_of, ragged_tensors, same_tensors

from memtile.checkpoints import Checkpoint, write_checkpoint
from memtile.errors import CheckpointError


def sharded(folder):
    """Two shards and their index."""
    tensors = ragged_tensors()
    names = sorted(tensors)
    parts = {"s-1.safetensors": names[:5], "s-2.safetensors": names[5:]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    places = {name: file for file, held in parts.items() for name in held}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return tensors, index


def values(checkpoint):
    """All tensors of a checkpoint."""
    return {name: stored.read() for name, stored in checkpoint.items()}


def test_a_folder_a_file_and_an_index_are_opened(tmp_path):
    """Shards are found through their index, whether the folder or the index is given."""
    tensors, index = sharded(tmp_path)

    assert same_tensors(values(Checkpoint.open(tmp_path)), tensors)
    assert same_tensors(values(Checkpoint.open(str(index))), tensors)
    assert set(values(Checkpoint.open(tmp_path / "s-1.safetensors"))) < set(tensors)
    sizes = {name: stored.nbytes for name, stored in Checkpoint.open(tmp_path).items()}
    assert sizes == {name: tensor.nbytes for name, tensor in tensors.items()}


def test_parts_of_a_tensor_are_read(tmp_path):
    """Elements, rows and pieces of bytes are those of the tensor."""
    tensors = {"m": torch.randn(1000, 1500), "v": torch.randn(7), "scalar": torch.tensor(3.0)}
    save_file(tensors, tmp_path / "other.safetensors")

    found = Checkpoint.open(tmp_path)

    assert torch.equal(found["m"].elements(1499, 1502), tensors["m"].view(-1)[1499:1502])
    assert torch.equal(found["m"].rows(3, 5), tensors["m"][3:5])
    for name, tensor in tensors.items():
        raw = torch.cat([piece.clone() for piece in found[name].raw()])
        assert torch.equal(raw.view(tensor.dtype), tensor.view(-1))
    assert len(list(found["m"].raw())) == 2


@pytest.mark.parametrize(
    ("prepare", "why"),
    [
        (lambda folder: None, "no .safetensors file; give a folder"),
        (lambda folder: (folder / "pytorch_model.bin").write_bytes(b""), "never loaded"),
        (lambda folder: (folder / "model.Q8_0.gguf").write_bytes(b""), "gguf_file=name"),
        (
            lambda folder: (folder / "model.safetensors.partial-12ab34cd").write_bytes(b""),
            "half-written",
        ),
        (
            lambda folder: [(folder / f"{n}.safetensors").write_bytes(b"") for n in "ab"],
            "holds 2 checkpoints, a.safetensors",
        ),
        (
            lambda folder: (folder / "model-00001-of-00002.safetensors").write_bytes(b""),
            "a shard, and no index",
        ),
    ],
)
def test_a_folder_without_one_whole_checkpoint_is_refused(tmp_path, prepare, why):
    """Each kind of folder without one whole checkpoint is refused by name."""
    prepare(tmp_path)

    with pytest.raises(CheckpointError, match=why):
        Checkpoint.open(tmp_path)


def test_a_missing_path_is_refused(tmp_path):
    """A path that does not exist is refused."""
    with pytest.raises(CheckpointError, match="does not exist"):
        Checkpoint.open(tmp_path / "nowhere")


def test_a_name_of_the_hub_gets_a_way_out():
    """Nothing is downloaded: the message says how."""
    with pytest.raises(CheckpointError, match="hf download org/name --local-dir name"):
        Checkpoint.open("org/name")


def test_a_pickle_is_never_loaded(tmp_path):
    """A file that runs code when it is unpickled is refused and runs none."""

    class Evil:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    (tmp_path / "model.bin").write_bytes(pickle.dumps(Evil()))
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Evil()))

    with pytest.raises(CheckpointError, match="may be a pickle"):
        Checkpoint.open(tmp_path / "model.bin")
    with pytest.raises(CheckpointError, match=r"is a pickle"):
        Checkpoint.open(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_an_index_that_names_a_missing_shard_is_refused(tmp_path):
    """A missing shard is named."""
    _, index = sharded(tmp_path)
    (tmp_path / "s-2.safetensors").unlink()

    with pytest.raises(CheckpointError, match=r"names s-2\.safetensors, which is not there"):
        Checkpoint.open(index)


def test_an_index_of_other_shards_is_refused(tmp_path):
    """A tensor that its shard does not hold is named."""
    _, index = sharded(tmp_path)
    places = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**places, "stranger": "s-1.safetensors"}}))

    with pytest.raises(CheckpointError, match="'stranger', and it does not"):
        Checkpoint.open(index)


@pytest.mark.parametrize(
    "name", ["../s-1.safetensors", "/etc/passwd", "sub/s-1.safetensors", "..", ".", ""]
)
def test_an_index_cannot_lead_elsewhere(tmp_path, name):
    """A shard outside the index's own folder is refused and not opened."""
    folder = tmp_path / "sub"
    folder.mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "s-1.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))

    with pytest.raises(CheckpointError):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 100_000),
        '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}',
    ],
)
def test_an_index_without_meaning_is_refused(tmp_path, text):
    """An invalid index is refused."""
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)

    with pytest.raises(CheckpointError, match="is no index of a checkpoint"):
        Checkpoint.open(tmp_path)


def test_a_file_that_is_written_to_is_noticed(tmp_path):
    """A file with another time or length than when it was opened is refused."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2)}, path)
    (file,) = Checkpoint.open(path).files
    file.check_unchanged()

    with path.open("ab") as end:
        end.write(b"x")

    with pytest.raises(CheckpointError, match="was written to while it was in use"):
        file.check_unchanged()


def test_a_file_that_was_replaced_is_read_as_it_was(tmp_path):
    """A file that was replaced is read as it was when it was opened."""
    path, new = tmp_path / "model.safetensors", tmp_path / "new"
    save_file({"a": torch.ones(2)}, path)
    found = Checkpoint.open(path)
    save_file({"a": torch.zeros(2)}, new)

    new.rename(path)

    found.files[0].check_unchanged()
    assert torch.equal(found["a"].read(), torch.ones(2))


def test_several_sources_are_one_checkpoint(tmp_path):
    """Several sources give all their tensors; a name in two of them is refused."""
    tensors = ragged_tensors()
    names = list(tensors)
    one, two, again = (tmp_path / f"{part}.safetensors" for part in ("one", "two", "again"))
    for file, chosen in ((one, names[:3]), (two, names[3:]), (again, names[2:3])):
        save_file({name: tensors[name] for name in chosen}, file)

    found = Checkpoint.of([one, str(two)])

    assert same_tensors({name: stored.read() for name, stored in found.items()}, tensors)
    assert found.where == f"{one} and {two}"
    with pytest.raises(CheckpointError, match=rf"{names[2]} is in .*one\S+ and in .*again"):
        Checkpoint.of([one, again])
    with pytest.raises(CheckpointError, match="names no source"):
        Checkpoint.of([])


def open_files():
    """How many files of the test's folder this process has open."""
    links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if exists(fd)]
    return sum(link.endswith(".safetensors") for link in links)


def exists(fd):
    """Whether a descriptor is still there: listing them opens one."""
    return os.path.lexists(f"/proc/self/fd/{fd}")


def test_files_are_open_while_they_are_used(tmp_path, monkeypatch):
    """Of many shards only a few are open at once, and none once they are garbage."""
    monkeypatch.setattr("memtile.checkpoints.stored.MOST_OPEN", 3)
    tensors = {f"t{number}": torch.arange(number, number + 5) for number in range(9)}
    write_checkpoint(tmp_path, outgoing_of(tensors), max_shard_bytes=1)

    found = Checkpoint.open(tmp_path)

    assert len(found.files) == 9
    assert open_files() == 3
    assert same_tensors(values(found), tensors)
    assert found.check_sums() == 9
    assert open_files() == 3
    del found
    assert open_files() == 0


def test_a_file_that_was_closed_and_replaced_is_refused(tmp_path, monkeypatch):
    """A file that must be opened again is read only if it is the same and unchanged."""
    monkeypatch.setattr("memtile.checkpoints.stored.MOST_OPEN", 1)
    tensors = {name: torch.ones(3) for name in "abc"}
    write_checkpoint(tmp_path, outgoing_of(tensors), max_shard_bytes=1)
    found = Checkpoint.open(tmp_path)
    first, second, _ = (tensor.file for tensor in found.values())
    save_file({"a": torch.zeros(3)}, tmp_path / "new")

    (tmp_path / "new").rename(first.path)
    os.utime(second.path, ns=(1, 1))

    first.check_unchanged()  # its own bytes are nobody's any more
    with pytest.raises(CheckpointError, match="was replaced or removed while it was in use"):
        found["a"].read()
    with pytest.raises(CheckpointError, match="was written to while it was in use"):
        second.check_unchanged()
    with pytest.raises(CheckpointError, match="was written to while it was in use"):
        found["b"].read()
    first.path.unlink()
    with pytest.raises(CheckpointError, match="was replaced or removed while it was in use"):
        found["a"].read()


def test_threads_share_the_few_open_files(tmp_path, monkeypatch):
    """A file that one thread reads is not closed by another that opens more."""
    monkeypatch.setattr("memtile.checkpoints.stored.MOST_OPEN", 2)
    tensors = {f"t{number}": torch.full((2000,), number) for number in range(8)}
    write_checkpoint(tmp_path, outgoing_of(tensors), max_shard_bytes=1)
    found = Checkpoint.open(tmp_path)

    def read(turn):
        order = sorted(tensors, key=lambda name: hash((name, turn)))
        return all(torch.equal(found[name].read(), tensors[name]) for name in order * 5)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(read, range(8)))

"""save_checkpoint writes what the untiled model would have, tile by tile."""

import errno
import os
import re

import pytest
import torch
import transformers
from processes import killed
from safetensors.torch import load_file
from safetensors_files import same_tensors
from small_models import KINDS, WRITERS, build
from stored_models import dense_values, net, save_without_end
from torch import nn
from torch.nn.utils import prune

import memtile
from memtile.checkpoints import Checkpoint
from memtile.errors import ArgumentError, CannotTileError, CheckpointError, CheckpointWriteError
from memtile.testing import LargestAllocation

transformers.utils.logging.disable_progress_bar()


def parked(model, folder):
    """The same model with its tiles on disk, columns too."""
    return memtile.tile(model, out_splits=3, in_splits=2, home=memtile.DiskHome(folder))


@pytest.mark.parametrize("wrong", [None, 5, "", b"out", ["out"]])
def test_what_is_no_path_is_refused(wrong, tmp_path, monkeypatch):
    """Saving and loading refuse it by its name; the working directory, which "" is, stays empty."""
    monkeypatch.chdir(tmp_path)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    for use in (
        lambda: memtile.save_checkpoint(model, wrong),
        lambda: memtile.save_training(wrong, model, optimizer, step=1),
        lambda: memtile.resume_training(wrong, model, optimizer),
        lambda: memtile.convert.has_training(wrong),
        lambda: memtile.convert.convert_checkpoint("in", wrong),
        lambda: memtile.checkpoints.training_folder(wrong).__enter__(),
        lambda: memtile.load_checkpoint(model, [wrong]),
    ):
        with pytest.raises(ArgumentError, match=rf"={re.escape(repr(wrong))} is no path; give"):
            use()
    if wrong != ["out"]:
        with pytest.raises(ArgumentError, match="is no path; give that of a folder or a"):
            memtile.load_checkpoint(model, wrong)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", WRITERS)
def test_transformers_loads_what_is_saved(kind, tmp_path):
    """from_pretrained finds every tensor, nothing more, and the bits of the model."""
    model = parked(build(kind), tmp_path)
    memtile.save_checkpoint(model, tmp_path / "saved", max_shard_bytes=20_000)
    auto = transformers.AutoModelForSeq2SeqLM if kind == "t5" else transformers.AutoModelForCausalLM

    found, told = auto.from_pretrained(tmp_path / "saved", output_loading_info=True)

    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert type(found) is type(model)
    assert same_tensors(dict(found.state_dict()), dense_values(model))


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_folder_is_the_one_that_save_pretrained_writes(kind, dtype, tmp_path):
    """Names, bits, config.json and generation_config.json are those of plain transformers."""
    build(kind).to(dtype).save_pretrained(tmp_path / "theirs")

    memtile.save_checkpoint(parked(build(kind).to(dtype), tmp_path), tmp_path / "ours")

    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert {p.name for p in ours.iterdir()} == {p.name for p in theirs.iterdir()}
    for path in theirs.glob("*.json"):
        assert (ours / path.name).read_text() == path.read_text()
    name = "model.safetensors"
    assert same_tensors(load_file(ours / name), load_file(theirs / name))


@pytest.mark.parametrize("home", [None, "host", "disk"])
@pytest.mark.parametrize("in_splits", [1, 2])
def test_a_plain_model_is_saved_from_anywhere(home, in_splits, tmp_path):
    """Buffers and ties, rows and columns, in memory or on disk: once, under the first name."""
    dense, model = net(), net()
    home = memtile.DiskHome(tmp_path) if home == "disk" else home

    memtile.save_checkpoint(
        memtile.tile(model, out_splits=3, in_splits=in_splits, home=home), tmp_path / "saved"
    )

    expected = dict(dense.state_dict())
    del expected["3.weight"]
    assert same_tensors(load_file(tmp_path / "saved" / "model.safetensors"), expected)
    assert Checkpoint.open(tmp_path / "saved").check_sums() == len(expected)


def test_an_untiled_model_is_saved_too(tmp_path):
    """A model without tiles is saved too."""
    model = net(tied=False)

    memtile.save_checkpoint(model, tmp_path)

    assert same_tensors(load_file(tmp_path / "model.safetensors"), dict(model.state_dict()))


def test_a_tensor_is_never_in_memory_as_a_whole(tmp_path):
    """No single piece of memory exceeds a few MiB, for rows and for columns."""
    for in_splits in (1, 2):
        model = nn.Sequential(nn.Linear(3000, 2000))
        home = memtile.DiskHome(tmp_path)
        memtile.tile(model, out_splits=3, in_splits=in_splits, home=home)

        with LargestAllocation() as largest:
            memtile.save_checkpoint(model, tmp_path / "saved")

        assert largest.nbytes <= 4 << 20


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2"])
def test_what_was_trained_is_saved(kind, tmp_path):
    """Weights that are still being written to their home are in the file."""
    model = parked(build(kind), tmp_path)
    before = dense_values(model)
    optimizer = memtile.TileOptimizer(model, torch.optim.SGD, mode="in_backward", lr=0.1)
    ids = torch.arange(3, 10).view(1, -1)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()

    memtile.save_checkpoint(model, tmp_path / "saved")

    saved = load_file(tmp_path / "saved" / "model.safetensors")
    after = dense_values(model)
    assert all(torch.equal(saved[name], after[name]) for name in saved)
    assert any(not torch.equal(saved[name], before[name]) for name in saved)


def spoiled(how):
    """A model that has no dense checkpoint, for this reason."""
    model = memtile.tile(net(tied=False), out_splits=3)
    tile = model[2].linears[0][0]
    if how == "computed":
        prune.l1_unstructured(tile, "weight", amount=0.5)
    if how == "meta":
        model[1].to("meta")
    if how == "dtypes":
        tile.double()
    if how == "extra state":
        model.append(type("Own", (nn.Identity,), {"get_extra_state": lambda self: 3})())
    if how == "sparse":
        model[1].running_mean = torch.ones(6).to_sparse()
    return model


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("computed", "2: tile .* computes its weight"),
        ("meta", "1.weight is on the meta device"),
        ("dtypes", "2.weight are torch.float32 and torch.float64"),
        ("extra state", "4 has extra state"),
        ("sparse", "1.running_mean is sparse"),
    ],
)
def test_a_model_without_a_dense_checkpoint_is_refused(how, why, tmp_path):
    """The tensor or layer is named, and what was there is as it was."""
    memtile.save_checkpoint(net(), tmp_path)
    before = load_file(tmp_path / "model.safetensors")

    with pytest.raises((CannotTileError, CheckpointError), match=why):
        memtile.save_checkpoint(spoiled(how), tmp_path)

    assert same_tensors(load_file(tmp_path / "model.safetensors"), before)


def test_what_is_no_model_is_refused(tmp_path):
    """A state dict in place of a model is refused."""
    with pytest.raises(ArgumentError, match="the model is a OrderedDict"):
        memtile.save_checkpoint(net().state_dict(), tmp_path)


def test_a_full_disk_leaves_the_old_checkpoint_and_the_model(tmp_path, monkeypatch):
    """Neither the folder nor the model is changed, and saving works once there is room."""
    model = parked(net(1), tmp_path)
    memtile.save_checkpoint(net(), tmp_path / "saved")
    values = dense_values(model)

    def no_room(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", no_room)
        with pytest.raises(CheckpointWriteError, match="No space left"):
            memtile.save_checkpoint(model, tmp_path / "saved")

    expected = {name: value for name, value in dense_values(net()).items() if name != "3.weight"}
    assert same_tensors(load_file(tmp_path / "saved" / "model.safetensors"), expected)
    assert same_tensors(dense_values(model), values)
    memtile.save_checkpoint(model, tmp_path / "saved")
    assert torch.equal(
        load_file(tmp_path / "saved" / "model.safetensors")["2.weight"], values["2.weight"]
    )


def test_a_model_is_saved_over_the_files_that_it_was_loaded_from(tmp_path):
    """The old shards stay readable for who has them open, and the new ones take their place."""
    memtile.save_checkpoint(net(1), tmp_path, max_shard_bytes=100)
    model = memtile.tile(net(2), out_splits=3)
    memtile.load_checkpoint(model, tmp_path)

    memtile.save_checkpoint(model, tmp_path, max_shard_bytes=100)

    again = net(3)
    memtile.load_checkpoint(again, tmp_path)
    assert same_tensors(dense_values(again), dense_values(net(1)))


def test_a_process_that_is_killed_while_saving_leaves_a_whole_checkpoint(tmp_path):
    """kill -9 at ten moments: what is loaded is wholly the last model that was saved, or the next.

    Nothing that a killed writer left behind keeps the next one from saving.
    """
    memtile.save_checkpoint(net(0), tmp_path / "saved")
    done = 0
    for turn in range(10):
        sent = killed(
            save_without_end,
            *(tmp_path / "saved", done, tmp_path),
            after=1 + turn % 3,
            seconds=0.002 * turn,  # anywhere within a save
        )
        done = sent[-1]
        model = memtile.tile(net(99), out_splits=2)

        memtile.load_checkpoint(model, tmp_path / "saved")

        found = dense_values(model)
        fits = [n for n in (done, done + 1) if same_tensors(found, dense_values(net(n)))]
        assert len(fits) == 1, (turn, done)
        done = fits[0]


def test_every_kind_of_model_is_among_them():
    """The kinds that are written here are all that generate text."""
    assert {*WRITERS, "vit"} == set(KINDS)

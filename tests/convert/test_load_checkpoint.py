"""load_checkpoint reads every form of names into any model, all of it or nothing."""

import json
import os

import pytest
import torch
import transformers
from cases import in_pairs
from faulty_disk import FaultyDisk
from safetensors_files import same_tensors
from small_models import KINDS, WRITERS, build
from stored_models import as_dtype, dense_values, net, scrambled, write
from torch import nn
from torch.nn.utils import prune

import memtile
from memtile.convert import IncompatibleKeys
from memtile.errors import ArgumentError, CannotTileError, CheckpointError, MemtileError

transformers.utils.logging.disable_progress_bar()

MODELS = ["dense", "rows", "columns", "host", "disk"]
FORMS = ["dense", "tiles", "other tiles"]


def shaped(model, how, folder):
    """The model: dense, tiled, or parked."""
    if how == "rows":
        return memtile.tile(model, out_splits=3)
    if how == "columns":
        return memtile.tile(model, out_splits=2, in_splits=3)
    if how in ("host", "disk"):
        home = memtile.DiskHome(folder) if how == "disk" else "host"
        return memtile.tile(model, out_splits=2, in_splits=2, home=home)
    return model


def file_of(model, form, path):
    """A file of the model's values in one of the forms."""
    if form == "tiles":
        model = memtile.tile(model, out_splits=2, in_splits=2)
    if form == "other tiles":
        model = memtile.tile(model, out_splits=3, in_splits=5)
    return write(model.state_dict(), path)


@pytest.mark.parametrize(("kind", "how", "form"), in_pairs(KINDS, MODELS, FORMS))
def test_every_form_is_read_into_every_model(kind, how, form, tmp_path):
    """Dense names and tiles of this and another grid, in every kind of model, bit for bit.

    Each kind in each home, and each of both with every form.
    """
    expected = dense_values(build(kind))
    path = file_of(build(kind), form, tmp_path / "any.safetensors")
    model = shaped(scrambled(build(kind)), how, tmp_path)

    told = memtile.load_checkpoint(model, path)

    assert same_tensors(dense_values(model), expected)
    assert told == IncompatibleKeys((), ())


@pytest.mark.parametrize("ours", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("theirs", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", MODELS)
def test_dtypes_are_converted(ours, theirs, how, tmp_path):
    """A checkpoint of any floating-point dtype is read into a model of another."""
    expected = as_dtype(as_dtype(dense_values(net()), theirs), ours)
    path = write(as_dtype(dense_values(net()), theirs), tmp_path / "model.safetensors")
    model = shaped(scrambled(net().to(ours)), how, tmp_path)

    memtile.load_checkpoint(model, path)

    assert same_tensors(dense_values(model), expected)


@pytest.mark.parametrize("kept", ["0.weight", "3.weight"])
@pytest.mark.parametrize("how", MODELS)
def test_one_name_of_a_tie_is_enough(kept, how, tmp_path):
    """Whichever of the tied names the checkpoint has, the tie is loaded and stays a tie."""
    expected = dense_values(net())
    state = {k: v for k, v in expected.items() if k not in ("0.weight", "3.weight")}
    path = write({**state, kept: expected[kept]}, tmp_path / "model.safetensors")
    model = shaped(scrambled(net()), how, tmp_path)

    memtile.load_checkpoint(model, path)

    assert same_tensors(dense_values(model), expected)
    assert len(list(model.parameters())) == len(list(shaped(net(), how, tmp_path).parameters()))


def test_a_tie_with_two_values_is_refused(tmp_path):
    """A checkpoint of an untied model does not lose one of its two weights in silence."""
    path = write(dense_values(net(tied=False)), tmp_path / "model.safetensors")
    model, before = net(2), dense_values(net(2))

    with pytest.raises(CheckpointError, match=r"0\.weight: the model ties it to 3\.weight"):
        memtile.load_checkpoint(model, path)
    assert same_tensors(dense_values(model), before)


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2"])
@pytest.mark.parametrize("form", FORMS)
def test_the_prefix_of_the_base_may_be_there_or_not(kind, form, tmp_path):
    """A checkpoint of the base goes into the whole model, and that of the whole into the base."""
    whole = build(kind)
    prefix = f"{whole.base_model_prefix}."
    with_it = {k: v for k, v in dense_values(whole).items() if k.startswith(prefix)}
    write({k.removeprefix(prefix): v for k, v in with_it.items()}, tmp_path / "without.safetensors")
    write(with_it, tmp_path / "with.safetensors")
    target, base = scrambled(build(kind)), scrambled(build(kind).base_model)

    memtile.load_checkpoint(
        memtile.tile(target, out_splits=2), tmp_path / "without.safetensors", strict=False
    )
    memtile.load_checkpoint(memtile.tile(base, out_splits=2), tmp_path / "with.safetensors")

    found = dense_values(target)
    assert all(torch.equal(found[name], value) for name, value in with_it.items())
    assert same_tensors({prefix + k: v for k, v in dense_values(base).items()}, with_it)


def test_what_the_library_ignores_is_not_unexpected(tmp_path):
    """Old masks in a GPT-2 checkpoint, and buffers that are computed, mean nothing."""
    state = dense_values(build("gpt2"))
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    path = write(state, tmp_path / "model.safetensors")

    told = memtile.load_checkpoint(build("gpt2"), path)

    assert told.unexpected == ()


@pytest.mark.parametrize("kind", WRITERS)
def test_what_transformers_saved_is_loaded(kind, tmp_path):
    """A sharded folder of save_pretrained, ties left out, gives the model's own bits."""
    expected = dense_values(build(kind))
    build(kind).save_pretrained(tmp_path / "theirs", max_shard_size=20_000)
    model = memtile.tile(scrambled(build(kind)), out_splits=3, home=memtile.DiskHome(tmp_path))

    memtile.load_checkpoint(model, tmp_path / "theirs")

    assert same_tensors(dense_values(model), expected)


def without(name):
    """The state of the small net lacking a name."""
    return {k: v for k, v in dense_values(net()).items() if k != name}


def bad_files(folder):
    """Checkpoints that are not of the small net, by what is wrong."""
    values = dense_values(net())
    tiles = {k: v.clone() for k, v in memtile.tile(net(), out_splits=3).state_dict().items()}
    lost = {k: v for k, v in tiles.items() if k != "2.linears.1.0.weight"}
    mixed = {**tiles, "2.linears.1.0.weight": tiles["2.linears.1.0.weight"].double()}
    cut = {k: v for k, v in tiles.items() if not k.startswith("2.linears") or "weight" in k}
    cut |= {"2.linears.0.0.bias": torch.ones(4), "2.linears.1.0.bias": torch.ones(5)}
    states = {
        "missing": without("2.bias"),
        "missing buffer": without("1.running_mean"),
        "unexpected": {**values, "stranger": torch.ones(2)},
        "shape": {**values, "2.weight": torch.ones(9, 7)},
        "dtype": {**values, "2.weight": torch.ones(9, 6, dtype=torch.int8)},
        "lost tile": lost,
        "two dtypes": mixed,
        "two grids": cut,
        "both": {**tiles, "2.weight": values["2.weight"]},
    }
    return {name: write(state, folder / name / "m.safetensors") for name, state in states.items()}


WRONG = {
    "missing": r"it has no 2\.bias",
    "missing buffer": r"it has no 1\.running_mean",
    "unexpected": r"it has stranger, which the model has not.*strict=False",
    "shape": r"2\.weight: the checkpoint's is \(9, 7\), the model's \(9, 6\)",
    "dtype": r"2\.weight: the checkpoint's is torch\.int8",
    "lost tile": r"2\.weight: tiles \[\(1, 0\)\] of a 3×1 grid are missing",
    "two dtypes": r"2\.weight: the tiles are torch\.float32 and torch\.float64",
    "two grids": r"2\.bias: its tiles are cut at rows \(0, 4, 9\), those of its weight at",
    "both": r"2\.weight: the checkpoint holds it twice",
}


@pytest.mark.parametrize("how", MODELS)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_foreign_checkpoint_changes_nothing(wrong, how, tmp_path):
    """The tensor is named, and every value of the model is as it was."""
    model = shaped(net(2), how, tmp_path)
    before = dense_values(model)

    with pytest.raises(CheckpointError, match=WRONG[wrong]):
        memtile.load_checkpoint(model, bad_files(tmp_path)[wrong])
    assert same_tensors(dense_values(model), before)


def test_what_does_not_fit_can_be_left_out(tmp_path):
    """strict=False loads the rest, and tells what was missing and what was not expected."""
    model = net(2)
    expected = {**dense_values(net()), "2.bias": dense_values(model)["2.bias"]}
    path = write({**without("2.bias"), "stranger": torch.ones(2)}, tmp_path / "m.safetensors")

    told = memtile.load_checkpoint(model, path, strict=False)

    assert told == IncompatibleKeys(missing=("2.bias",), unexpected=("stranger",))
    assert same_tensors(dense_values(model), expected)


@pytest.mark.parametrize("how", MODELS)
def test_damaged_data_changes_nothing(how, tmp_path):
    """A bit that flipped in the last tensor is noticed before the first is written."""
    memtile.save_checkpoint(net(), tmp_path / "saved")
    path = tmp_path / "saved" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 4
    path.write_bytes(raw)
    model = shaped(net(2), how, tmp_path)
    before = dense_values(model)

    with pytest.raises(CheckpointError, match="are not those that were written"):
        memtile.load_checkpoint(model, path)
    assert same_tensors(dense_values(model), before)


@pytest.mark.parametrize("act", ["read", "write"])
def test_a_disk_that_fails_half_way_is_said(act, tmp_path, monkeypatch):
    """An I/O error in the middle is an error; loading again gives the whole checkpoint."""
    memtile.save_checkpoint(net(), tmp_path / "saved")
    model = memtile.tile(net(2), out_splits=3, home=memtile.DiskHome(tmp_path))

    with monkeypatch.context() as patched:
        FaultyDisk(patched).fail(act, 3)
        with pytest.raises(MemtileError):
            memtile.load_checkpoint(model, tmp_path / "saved")

    memtile.load_checkpoint(model, tmp_path / "saved")
    assert same_tensors(dense_values(model), dense_values(net()))


def test_a_file_that_changes_meanwhile_is_said(tmp_path, monkeypatch):
    """A writer that does not replace files but rewrites them is noticed."""
    path = write(dense_values(net()), tmp_path / "model.safetensors")
    model = net(2)
    monkeypatch.setattr("memtile.convert.materializing.bring_in", lambda *_: os.utime(path, (1, 1)))

    with pytest.raises(CheckpointError, match="was written to while it was in use"):
        memtile.load_checkpoint(model, path)


def test_a_tile_that_computes_its_weight_is_refused(tmp_path):
    """A tile that computes its weight is refused: values written to it would be lost."""
    model = memtile.tile(net(), out_splits=3)
    prune.l1_unstructured(model[2].linears[0][0], "weight", amount=0.5)

    with pytest.raises(CannotTileError, match=r"2: tile .* computes its weight"):
        memtile.load_checkpoint(model, write(dense_values(net()), tmp_path / "m.safetensors"))


def test_what_is_no_model_is_refused(tmp_path):
    """What is no module is refused, with its type."""
    with pytest.raises(ArgumentError, match="the model is a str"):
        memtile.load_checkpoint("model", tmp_path)


def test_a_model_with_modules_called_linears_keeps_its_names(tmp_path):
    """Dense names that look like those of tiles are dense names."""
    torch.manual_seed(0)
    model = nn.Module()
    model.linears = nn.ModuleList([nn.ModuleList([nn.Linear(3, 2)])])
    path = write(model.state_dict(), tmp_path / "m.safetensors")
    expected = dense_values(model)

    memtile.load_checkpoint(scrambled(model), path)

    assert same_tensors(dense_values(model), expected)


def test_backward_after_loading_is_refused_where_it_would_be_wrong(tmp_path):
    """A load between forward and backward is noticed by autograd as any other in-place write."""
    path = write(dense_values(net()), tmp_path / "m.safetensors")
    model = shaped(net(2), "disk", tmp_path)
    loss = model[3](model[0](torch.tensor([1, 2]))).sum()

    memtile.load_checkpoint(model, path)

    with pytest.raises(RuntimeError, match="modified"):
        loss.backward()


def quantized(folder, how):
    """The small net's folder with one weight in float8, or a config that says how all are kept."""
    state = dense_values(net())
    if how == "float8":
        state["2.weight"] = (state["2.weight"] * 400).to(torch.float8_e4m3fn)
        state["2.weight_scale_inv"] = torch.tensor([1 / 400])
    write(state, folder / "model.safetensors")
    if how != "float8":
        method = {"quantization_config": {"quant_method": "gptq"}}
        config = method if how == "config" else {"text_config": method}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("how", ["float8", "config", "inner config"])
def test_quantized_weights_are_refused_in_any_case(how, strict, tmp_path):
    """Values without their scales are never taken for weights; the model is as it was."""
    folder, model = quantized(tmp_path, how), net(2)
    before = dense_values(model)

    with pytest.raises(CheckpointError, match=r"quantized.*applies no scales: give the folder of"):
        memtile.load_checkpoint(model, folder, strict=strict)
    with pytest.raises(CheckpointError, match="quantized"):
        memtile.tile(memtile.empty_model(net), out_splits=3, checkpoint=folder)
    assert same_tensors(dense_values(model), before)


def test_float8_goes_into_a_model_of_float8(tmp_path):
    """A model with float8 weights of its own gets the bits."""
    linear = nn.Linear(4, 3, bias=False).to(torch.float8_e4m3fn)
    path = write(linear.state_dict(), tmp_path / "m.safetensors")
    other = nn.Linear(4, 3, bias=False).to(torch.float8_e4m3fn)

    memtile.load_checkpoint(other, path)

    assert torch.equal(other.weight.view(torch.uint8), linear.weight.view(torch.uint8))

"""home="checkpoint": tiles stay in the unmodified files; they compute, and are never trained."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors_files import same_tensors
from small_models import KINDS, build, inputs
from stored_models import dense_values, net, write
from torch import nn

import memtile
from memtile.checkpoints import CheckpointHome
from memtile.errors import ArgumentError, CheckpointError, HomeError
from memtile.homes import DiskHome, allocation_of

transformers.utils.logging.disable_progress_bar()


def in_place(kind, folder, **options):
    """A model whose tiles lie in the checkpoint of this kind of model."""
    whole = build(kind) if isinstance(kind, str) else kind()
    memtile.save_checkpoint(whole, folder, max_shard_bytes=20_000)
    model = memtile.empty_model(lambda: build(kind) if isinstance(kind, str) else kind())
    options = options or {"out_splits": 3}
    return memtile.tile(model.eval(), **options, home="checkpoint", checkpoint=folder)


def homes_of(model):
    """The class of the home of each parameter, by name."""
    return {n: type(allocation_of(p).home) for n, p in model.named_parameters() if allocation_of(p)}


def digests(folder):
    """What the files of a folder hold."""
    return {p.name: hashlib.sha256(p.read_bytes()).digest() for p in folder.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_the_model_in_memory(kind, tmp_path):
    """Values and outputs are bit-identical; only tiles that are no rows of their file move."""
    model, truth = in_place(kind, tmp_path), memtile.tile(build(kind).eval(), out_splits=3)

    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(**inputs(kind)).logits, truth(**inputs(kind)).logits)
    assert same_tensors(dense_values(model), dense_values(build(kind)))
    copied = {name for name, home in homes_of(model).items() if home is DiskHome}
    assert all("c_" in name for name in copied)
    assert bool(copied) == (kind == "gpt2")


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2"])
def test_it_generates_the_tokens_of_transformers(kind, tmp_path):
    """Greedy generation, straight from the files, gives what the plain model gives."""
    model, ids = in_place(kind, tmp_path), inputs(kind)["input_ids"][:1]
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}

    ours = model.generate(ids, **options)

    assert torch.equal(ours, plain.generate(ids, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_than_the_files_is_copied(dtype, tmp_path):
    """Tiles that must be converted go to a home on disk, and are right."""
    memtile.save_checkpoint(net(), tmp_path)
    model = memtile.empty_model(lambda: net().to(dtype))

    memtile.tile(model, out_splits=3, home="checkpoint", checkpoint=tmp_path)

    assert set(homes_of(model).values()) == {DiskHome}
    assert same_tensors(dense_values(model), dense_values(net().to(dtype)))


def test_columns_and_tile_names_are_copied(tmp_path):
    """Tiles of columns, and tiles of a checkpoint in tiles, are copied."""
    columns = in_place(net, tmp_path / "dense", out_splits=2, in_splits=3)
    tiled = memtile.tile(net(), out_splits=3)
    write(tiled.state_dict(), tmp_path / "tiles" / "model.safetensors")
    model = memtile.empty_model(net)
    memtile.tile(model, out_splits=3, home="checkpoint", checkpoint=tmp_path / "tiles")

    assert set(homes_of(columns).values()) == {DiskHome, CheckpointHome}
    assert set(homes_of(model).values()) == {DiskHome}
    for each in (columns, model):
        assert same_tensors(dense_values(each), dense_values(net()))


def test_the_files_are_never_written_to(tmp_path):
    """After inference, writes to weights, saving elsewhere: every byte is the same."""
    model = in_place("llama", tmp_path / "saved")
    before = digests(tmp_path / "saved")

    model(**inputs("llama"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    model(**inputs("llama"))
    memtile.save_checkpoint(model, tmp_path / "other")

    assert digests(tmp_path / "saved") == before


@pytest.mark.parametrize("through_data", [True, False])
def test_a_write_to_a_weight_is_seen_by_the_next_forward(through_data, tmp_path):
    """After an in-place change, through .data too, forward uses the new values."""
    model, truth = in_place(net, tmp_path), memtile.tile(net().eval(), out_splits=3)
    x = torch.randn(5, 6)
    with torch.no_grad():
        model[2](x)
        for each in (model, truth):
            weight = each[2].linears[1][0].weight
            (weight.data if through_data else weight)[1, 2] = 5

        assert torch.equal(model[2](x), truth[2](x))
    assert same_tensors(dense_values(model), dense_values(truth))


@pytest.mark.parametrize("mode", ["classic", "in_backward"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_refuses_what_cannot_be_written(mode, optimizer, tmp_path):
    """Making the optimizer raises, and the message names both ways out."""
    model = in_place(net, tmp_path)

    with pytest.raises(HomeError, match=r"requires_grad_\(False\), or tile with home="):
        memtile.TileOptimizer(model, optimizer, mode=mode, lr=0.1)


def test_backward_into_a_weight_in_the_files_is_refused(tmp_path):
    """With a foreign optimizer the error comes with the first gradient; no value is changed."""
    model = in_place(net, tmp_path)

    with pytest.raises(HomeError, match="can only be read"):
        model[2](torch.randn(5, 6)).sum().backward()
    assert same_tensors(dense_values(model), dense_values(net()))


def test_a_frozen_base_in_the_files_lets_the_rest_train(tmp_path):
    """Gradients flow through frozen tiles; the rest is trained as over any home."""
    results = []
    home = memtile.DiskHome(tmp_path)
    for model in (in_place(net, tmp_path), memtile.tile(net().eval(), out_splits=3, home=home)):
        model.requires_grad_(False)
        adapter = nn.Linear(6, 6)
        with torch.no_grad():
            adapter.weight.copy_(torch.eye(6))
            adapter.bias.zero_()
        whole = nn.Sequential(adapter, model[2])
        optimizer = memtile.TileOptimizer(whole, torch.optim.AdamW, lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            whole(torch.arange(12.0).view(2, 6)).square().sum().backward()
            optimizer.step()
        results.append([p.detach().clone() for p in adapter.parameters()])

    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_file_that_is_rewritten_is_noticed_by_the_next_forward(tmp_path):
    """Nothing is computed with a mixture of two checkpoints."""
    model = in_place(net, tmp_path)
    x = torch.randn(5, 6)
    with torch.no_grad():
        model[2](x)
        os.utime(tmp_path / "model.safetensors", (1, 1))

        with pytest.raises(CheckpointError, match="was written to while it was in use"):
            model[2](x)


def test_a_model_in_the_files_is_saved_over_them(tmp_path):
    """Saving replaces files; the model keeps reading those that it has open."""
    model = in_place(net, tmp_path)
    with torch.no_grad():
        model[2].linears[0][0].weight.fill_(2)
    expected = dense_values(model)

    memtile.save_checkpoint(model, tmp_path)

    again = net(5)
    memtile.load_checkpoint(again, tmp_path)
    assert same_tensors(dense_values(again), expected)
    assert same_tensors(dense_values(model), expected)


def test_a_checkpoint_is_not_loaded_into_another_ones_files(tmp_path):
    """It is refused before anything is changed."""
    model = in_place(net, tmp_path / "one")
    memtile.save_checkpoint(net(2), tmp_path / "two")

    with pytest.raises(HomeError, match="lies in a checkpoint's own files"):
        memtile.load_checkpoint(model, tmp_path / "two")
    assert same_tensors(dense_values(model), dense_values(net()))


def test_it_can_be_untiled(tmp_path):
    """The dense model is in memory, and trains."""
    model = memtile.untile(in_place(net, tmp_path))

    assert same_tensors(dict(model.state_dict()), dict(net().state_dict()))
    assert homes_of(model) == {}


def test_the_home_needs_a_checkpoint():
    """home="checkpoint" without a checkpoint is refused."""
    with pytest.raises(ArgumentError, match="give its folder too"):
        memtile.tile(net(), out_splits=3, home="checkpoint")


BIG = """
import sys, torch, memtile
from pathlib import Path
from memtile.checkpoints import Outgoing, write_checkpoint
from memtile.testing import PeakMemory
from torch import nn
folder, WIDTH, LAYERS = Path(sys.argv[1]), 2048, 16
make = lambda: nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
row = torch.arange(WIDTH, dtype=torch.float32) / WIDTH**2
write_checkpoint(folder, [
    Outgoing(f"{n}.weight", torch.float32, torch.Size([WIDTH, WIDTH]),
             lambda: (row for line in range(WIDTH)))
    for n in range(LAYERS)])
torch.nn.functional.linear(torch.ones(4, 64), torch.ones(64, 64))
with PeakMemory() as peak, torch.no_grad():
    model = memtile.tile(memtile.empty_model(make), out_splits=16, home="checkpoint",
                         checkpoint=folder)
    for _ in range(2):
        out = model(torch.ones(4, WIDTH))
print(peak.nbytes)
"""


def test_inference_from_the_files_takes_a_few_tiles_of_memory(tmp_path):
    """256 MiB of weights in their files: forward takes a quarter of that at most."""
    environment = {**os.environ, "PYTHONPATH": str(Path(memtile.__file__).parent.parent)}
    command = [sys.executable, "-c", BIG, str(tmp_path)]

    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, timeout=300
    )

    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 64 << 20

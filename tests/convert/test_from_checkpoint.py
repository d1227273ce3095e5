"""tile(model, checkpoint=folder): a model without values gets them where its tiles live."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from cases import in_pairs
from faulty_disk import FaultyDisk
from given_rates import RATES
from safetensors_files import same_tensors
from small_models import KINDS, build, inputs
from stored_models import as_dtype, dense_values, net, write
from torch import nn

import memtile
from memtile.errors import ArgumentError, CheckpointError, HomeFullError, HomeIOError, MemtileError
from memtile.homes import allocation_of

transformers.utils.logging.disable_progress_bar()

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HOMES = [None, "device", "host", "disk"]
GRIDS = [{"out_splits": 3}, {"out_splits": 2, "in_splits": 3}]


def home_in(folder, home):
    """A home of this kind."""
    return memtile.DiskHome(folder) if home == "disk" else home


def everything_is_real(model):
    """Whether no parameter and no buffer is on the meta device."""
    tensors = [*model.parameters(), *model.buffers()]
    return not any(tensor.is_meta for tensor in tensors)


@pytest.mark.parametrize(("kind", "home", "grid"), in_pairs(KINDS, HOMES, GRIDS))
def test_an_empty_model_becomes_the_tiled_one(kind, home, grid, tmp_path):
    """Values, names, ties, buffers and outputs are those of the model tiled from memory.

    Each kind in each home, and each of both in both grids.
    """
    whole = build(kind).eval()
    write(whole.state_dict(), tmp_path / "saved" / "model.safetensors")
    expected = dense_values(whole)
    truth = memtile.tile(whole, **grid)
    model = memtile.empty_model(lambda: build(kind).eval())

    memtile.tile(model, **grid, home=home_in(tmp_path, home), checkpoint=tmp_path / "saved")

    assert everything_is_real(model)
    assert same_tensors(dense_values(model), expected)
    assert [name for name, _ in model.named_parameters()] == [
        n for n, _ in truth.named_parameters()
    ]
    batch = inputs(kind)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, truth(**batch).logits)


# Of t5 in float16, and of gpt-oss in 16 bits, transformers keeps parts in float32.
LOADED = [(kind, dtype) for kind in ("llama-tied", "gpt2", "t5") for dtype in DTYPES]


@pytest.mark.parametrize(("kind", "dtype"), LOADED)
def test_it_is_what_from_pretrained_gives(kind, dtype, tmp_path):
    """From a sharded folder of plain transformers: the same bits, and the same greedy tokens."""
    build(kind).to(dtype).save_pretrained(tmp_path / "saved", max_shard_size=20_000)
    auto = transformers.AutoModelForSeq2SeqLM if kind == "t5" else transformers.AutoModelForCausalLM
    theirs = auto.from_pretrained(tmp_path / "saved")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "saved")
    model = memtile.empty_model(lambda: auto.from_config(config, dtype=dtype))

    memtile.tile(
        model.eval(), out_splits=1, home=memtile.DiskHome(tmp_path), checkpoint=tmp_path / "saved"
    )

    assert same_tensors(dense_values(model), dict(theirs.state_dict()))
    ids = inputs(kind)["input_ids"][:1]
    options = {"max_new_tokens": 6, "do_sample": False}
    mask = torch.ones_like(ids)
    ours = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(ours, theirs.generate(ids, attention_mask=mask, **options))


def test_the_models_dtype_is_kept(tmp_path):
    """A float32 checkpoint streams into a bfloat16 model."""
    path = write(net().state_dict(), tmp_path / "model.safetensors")
    model = memtile.empty_model(lambda: net().bfloat16())

    memtile.tile(model, out_splits=3, home=memtile.DiskHome(tmp_path), checkpoint=path)

    assert same_tensors(dense_values(model), as_dtype(dense_values(net()), torch.bfloat16))


def test_frozen_stays_frozen_and_tied_stays_tied(tmp_path):
    """requires_grad, attributes on parameters, mode and ties are those of the empty model."""
    path = write(net().state_dict(), tmp_path / "model.safetensors")
    model = memtile.empty_model(net).eval()
    model[2].weight.requires_grad_(False)
    model[2].weight.mark = "mine"

    memtile.tile(model, out_splits=3, home=memtile.DiskHome(tmp_path), checkpoint=path)

    assert not any(tile.requires_grad for tile in model[2].tile_parameters("weight").values())
    assert {tile.mark for tile in model[2].tile_parameters("weight").values()} == {"mine"}
    assert model[2].bias.requires_grad
    assert not model.training
    tied = (model[0].tile_parameters("weight"), model[3].tile_parameters("weight"))
    assert all(tied[0][index] is tied[1][index] for index in tied[0])


def test_it_trains(tmp_path):
    """A model that was filled from a checkpoint trains as one that was tiled in memory."""
    path = write(net().state_dict(), tmp_path / "model.safetensors")
    ids, results = torch.tensor([1, 2, 5, 12]), []
    for empty in (True, False):
        model = memtile.empty_model(net) if empty else net()
        home = memtile.DiskHome(tmp_path)
        memtile.tile(model, out_splits=3, home=home, checkpoint=path if empty else None)
        optimizer = memtile.TileOptimizer(model, torch.optim.AdamW, lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model[3](model[1](model[0](ids))).square().sum().backward()
            optimizer.step()
        results.append(dense_values(model))

    assert same_tensors(*results)


@pytest.mark.parametrize("budget", ["12 MiB", "1 GiB"])
def test_a_plan_is_carried_out_from_a_checkpoint(budget, tmp_path):
    """What a plan parks is streamed to its home; what it leaves resident is in memory."""
    sizes = {"hidden_size": 256, "intermediate_size": 700, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2000}
    config = transformers.LlamaConfig(**sizes, **heads)
    torch.manual_seed(0)
    whole = transformers.LlamaForCausalLM(config)
    memtile.save_checkpoint(whole, tmp_path / "saved")
    model = memtile.empty_model(lambda: transformers.LlamaForCausalLM(config))
    plan = memtile.plan(
        model, budget=budget, tokens=8, optimizer=None, home=f"disk:{tmp_path}", rates=RATES
    )

    memtile.tile(model, plan, checkpoint=tmp_path / "saved")

    assert bool(plan.parked_layers) == (budget == "12 MiB")
    assert everything_is_real(model)
    assert same_tensors(dense_values(model), dense_values(whole))


def shape_of(model):
    """Names, classes and devices of a model's parameters, without values."""
    modules = [(name, type(module)) for name, module in model.named_modules()]
    tensors = [(n, p.shape, p.dtype, p.is_meta) for n, p in model.named_parameters()]
    return modules, tensors


def wrong(how, folder):
    """A checkpoint that is not the small net's, for this reason."""
    state = dict(net().state_dict())
    if how == "missing":
        del state["2.bias"]
    if how == "foreign":
        state = dict(nn.Linear(3, 4).state_dict())
    if how == "shape":
        state["2.weight"] = torch.ones(9, 7)
    if how != "no folder":
        write(state, folder / "model.safetensors")
    if how == "damaged":
        memtile.save_checkpoint(net(), folder)
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    return folder


@pytest.mark.parametrize("how", ["missing", "foreign", "shape", "no folder", "damaged"])
@pytest.mark.parametrize("home", HOMES)
def test_a_checkpoint_that_does_not_fit_changes_nothing(how, home, tmp_path):
    """It is refused before anything is cut; the model is dense, on meta, with its own objects."""
    model = memtile.empty_model(net)
    before, parameters = shape_of(model), list(model.parameters())

    with pytest.raises(CheckpointError):
        memtile.tile(
            model,
            out_splits=3,
            home=home_in(tmp_path, home),
            checkpoint=wrong(how, tmp_path / "saved"),
        )
    assert shape_of(model) == before
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))


@pytest.mark.parametrize("act", ["read", "write"])
def test_an_error_half_way_leaves_the_model_dense_and_empty(act, tmp_path, monkeypatch):
    """The model is on meta again, ties included, and a second try is right."""
    path = write(net().state_dict(), tmp_path / "model.safetensors")
    model = memtile.empty_model(net)
    before, home = shape_of(model), memtile.DiskHome(tmp_path)

    with monkeypatch.context() as patched:
        faulty = FaultyDisk(patched)
        faulty.fail(act, 5 if act == "read" else 2)
        with pytest.raises((CheckpointError, HomeIOError)):
            memtile.tile(model, out_splits=3, home=home, checkpoint=path)

    assert shape_of(model) == before
    assert model[3].weight is model[0].weight
    memtile.tile(model, out_splits=3, home=home, checkpoint=path)
    assert same_tensors(dense_values(model), dense_values(net()))


def test_a_home_without_room_changes_nothing(tmp_path, monkeypatch):
    """Room is reserved before the model is cut."""
    path = write(net().state_dict(), tmp_path / "model.safetensors")
    model, home = memtile.empty_model(net), memtile.DiskHome(tmp_path)
    before = shape_of(model)

    def full(nbytes):
        raise HomeFullError(28, "full")

    monkeypatch.setattr(home, "hold", full)
    with pytest.raises(HomeFullError):
        memtile.tile(model, out_splits=3, home=home, checkpoint=path)
    assert shape_of(model) == before


def test_a_model_with_values_is_refused(tmp_path):
    """They would be overwritten in part if something failed; load_checkpoint is the way out."""
    path = write(net().state_dict(), tmp_path / "model.safetensors")

    with pytest.raises(ArgumentError, match=r"0\.weight has values already.*load_checkpoint"):
        memtile.tile(net(), out_splits=3, checkpoint=path)


def test_a_buffer_on_meta_is_refused_by_name(tmp_path):
    """torch.device("meta") loses the values of buffers; no checkpoint has them."""
    write(build("llama").state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = build("llama")

    with pytest.raises(CheckpointError, match=r"the buffer model\.rotary_emb.*empty_model"):
        memtile.tile(model, out_splits=3, checkpoint=tmp_path)


def test_a_copy_of_a_model_from_a_checkpoint_is_whole(tmp_path):
    """A deep copy has values of its own."""
    path = write(net().state_dict(), tmp_path / "model.safetensors")
    model = memtile.tile(memtile.empty_model(net), out_splits=3, checkpoint=path)

    assert same_tensors(dense_values(copy.deepcopy(model)), dense_values(model))


def test_every_parked_tile_is_at_home_and_has_its_name(tmp_path):
    """An allocation is labelled with its parameter's name, for messages."""
    path = write(net().state_dict(), tmp_path / "model.safetensors")
    home = memtile.DiskHome(tmp_path)
    model = memtile.tile(memtile.empty_model(net), out_splits=3, home=home, checkpoint=path)

    for layer in (model[0], model[2]):
        for tile in layer.tile_parameters("weight").values():
            assert allocation_of(tile).home is home
            assert allocation_of(tile).label in dict(model.named_parameters())


BIG = """
import os, sys, torch, memtile
from pathlib import Path
from memtile.checkpoints import Outgoing, write_checkpoint
from memtile.testing import PeakMemory
from torch import nn
folder = Path(sys.argv[1])
WIDTH, LAYERS = 2048, 16
make = lambda: nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
row = torch.arange(WIDTH, dtype=torch.float32)
write_checkpoint(folder, [
    Outgoing(f"{n}.weight", torch.float32, torch.Size([WIDTH, WIDTH]),
             lambda n=n: (row + n * WIDTH + line for line in range(WIDTH)))
    for n in range(LAYERS)])

def peak_of(splits):
    memtile.tile(memtile.empty_model(lambda: nn.Sequential(nn.Linear(8, 8))), out_splits=1,
                 home=memtile.DiskHome(folder))
    with PeakMemory() as peak:
        model = memtile.empty_model(make)
        memtile.tile(model, out_splits=16, in_splits=splits, home=memtile.DiskHome(folder),
                     checkpoint=folder)
    with torch.no_grad():
        found = model[3].linears[1][0].weight[0]
        assert torch.equal(found, (row + 3 * WIDTH + 128)[:WIDTH // splits])
    return peak.nbytes

for splits in (1, 2):
    if not os.fork():
        print(peak_of(splits), flush=True)
        os._exit(0)
    os.wait()
"""


def test_the_peak_is_a_few_pieces_and_not_the_model(tmp_path):
    """256 MiB of weights go from their checkpoint to a home on disk within a quarter of it.

    Into one column of tiles and into two, each in a fork of one process.
    """
    command = [sys.executable, "-c", BIG, str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment(), timeout=300
    )
    peaks = [int(word) for word in done.stdout.split()]

    assert len(peaks) == 2, done.stderr[-2000:]
    assert max(peaks) < 64 << 20


def environment():
    """What a process needs to find memtile."""
    return {**os.environ, "PYTHONPATH": str(Path(memtile.__file__).parent.parent)}


def test_nothing_but_memtile_errors_is_raised_for_a_path_that_is_none(tmp_path):
    """A file that is no checkpoint is refused as such."""
    (tmp_path / "weights.safetensors").write_text("nonsense")

    with pytest.raises(MemtileError):
        memtile.tile(memtile.empty_model(net), out_splits=3, checkpoint=tmp_path)

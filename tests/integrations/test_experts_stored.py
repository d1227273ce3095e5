"""Stacks of experts in checkpoints and saved runs, under the model's own names."""

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from safetensors.torch import load_file, save_file
from small_experts import experts_model, experts_of, tokens

import memtile
from memtile.convert import convert_checkpoint
from memtile.errors import CheckpointError
from memtile.homes import is_parked

OPTIONS = {"lr": 1e-2, "weight_decay": 0.1}


def trained(model, optimizer, seeds):
    """Some steps in which every expert is hit."""
    for seed in seeds:
        ids = tokens(batch=2, length=41, seed=seed)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same(model, expected):
    found = {name: value.clone() for name, value in memtile.dense_state_dict(model)}
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.fixture
def folder(tmp_path):
    """What `save_checkpoint` writes of a tiled model."""
    model = memtile.tile(experts_model("gpt-oss"), out_splits=7, home="host")
    memtile.save_checkpoint(model, tmp_path / "model")
    return tmp_path / "model"


def test_a_tiled_models_checkpoint_is_the_dense_ones(folder):
    """The model's own names, stacks with three dimensions, the same bits."""
    found, expected = load_file(folder / "model.safetensors"), experts_model("gpt-oss").state_dict()

    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("sizes", [{}, {"out_splits": 2}, {"out_splits": 11, "home": "host"}])
def test_a_checkpoint_fills_dense_and_tiled_models(folder, sizes):
    """Any grid, and none."""
    model = experts_model("gpt-oss")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.3)
    if sizes:
        memtile.tile(model, **sizes)

    memtile.load_checkpoint(model, folder)

    assert_same(model, experts_model("gpt-oss").state_dict())


def test_a_checkpoint_of_tiles_fills_any_grid(tmp_path):
    """A file with the names of another grid's tiles, into tiles and into the dense model."""
    model = memtile.tile(experts_model("gpt-oss"), out_splits=7)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    for sizes in ({}, {"out_splits": 15, "home": "host"}):
        other = experts_model("gpt-oss")
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        if sizes:
            memtile.tile(other, **sizes)

        memtile.load_checkpoint(other, tmp_path / "model.safetensors")

        assert_same(other, experts_model("gpt-oss").state_dict())


def saved_tiles(folder, name, **sizes):
    """A file with the names of a model's tiles, and the config beside it."""
    model = memtile.tile(experts_model(name), **sizes)
    folder.mkdir()
    model.config.save_pretrained(folder)
    save_file({k: v.clone() for k, v in model.state_dict().items()}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("gpt-oss", {"out_splits": 7}), ("qwen3", {"out_splits": 2}), ("jetmoe", {"home": "host"})],
)
def test_tiles_of_experts_are_joined_without_a_model(tmp_path, name, sizes):
    """Of any grid, by the config beside them: the dense tensors, bit for bit."""
    saved_tiles(tmp_path / "tiles", name, **sizes)

    joined = convert_checkpoint(tmp_path / "tiles", tmp_path / "dense")

    expected = experts_model(name).state_dict()
    found = load_file(tmp_path / "dense" / "model.safetensors")
    assert all(torch.equal(found[key], expected[key]) for key in expected if key in found)
    assert expected.keys() - found.keys() <= {"lm_head.weight"}
    stacks = {key for key in expected if expected[key].dim() == 3}
    assert stacks <= {*joined} | {f"{layer}.weight" for layer in joined}


def test_the_config_must_be_that_of_the_tiles(tmp_path):
    """Without one nobody knows how many experts there are, and another model's is refused."""
    saved_tiles(tmp_path / "tiles", "qwen3", out_splits=2)
    experts_model("gpt-oss").config.save_pretrained(tmp_path / "tiles")
    with pytest.raises(CheckpointError, match=r"down_proj: the tiles .*no stack of the"):
        convert_checkpoint(tmp_path / "tiles", tmp_path / "dense")

    (tmp_path / "tiles" / "config.json").unlink()

    with pytest.raises(CheckpointError, match=r"put the model's config\.json beside"):
        convert_checkpoint(tmp_path / "tiles", tmp_path / "dense")


@pytest.mark.parametrize("home", [None, "host", "checkpoint"])
def test_an_empty_model_is_tiled_from_its_folder(folder, home):
    """Also with experts that stay in the checkpoint's own files."""
    empty = memtile.empty_model(lambda: experts_model("gpt-oss"))
    model = memtile.tile(empty, out_splits=11, home=home, checkpoint=folder)
    stack = experts_of(model).gate_up_proj

    assert_same(model, experts_model("gpt-oss").state_dict())
    assert all(is_parked(tile.weight) == (home is not None) for tile in stack.stacks)
    if home == "checkpoint":
        assert {type(tile.home).__name__ for tile in stack.stacks} == {"CheckpointHome"}
    torch.testing.assert_close(
        model.eval()(input_ids=tokens()).logits,
        experts_model("gpt-oss").eval()(input_ids=tokens()).logits,
    )


@pytest.mark.parametrize("sizes", [{"out_splits": 2}, {"out_splits": 11, "home": "host"}])
def test_a_run_goes_on_where_it_was_saved(tmp_path, sizes):
    """Parameters after a resume, in another grid, are those of a run without a break."""
    whole = memtile.tile(experts_model("gpt-oss"), out_splits=7, home="host")
    optimizer = memtile.TileOptimizer(whole, torch.optim.AdamW, **OPTIONS)
    trained(whole, optimizer, range(2))
    memtile.save_training(tmp_path / "run", whole, optimizer, step=2)
    trained(whole, optimizer, range(2, 4))

    second = memtile.tile(experts_model("gpt-oss"), **sizes)
    other = memtile.TileOptimizer(second, torch.optim.AdamW, **OPTIONS)
    memtile.resume_training(tmp_path / "run", second, other)
    trained(second, other, range(2, 4))

    ours, theirs = dict(memtile.dense_state_dict(second)), dict(memtile.dense_state_dict(whole))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)


def test_the_trainer_resumes_from_lists_of_experts(tmp_path):
    """It gives `load_state_dict` what `save_pretrained` wrote, the names of the hub's files."""
    model = memtile.tile(experts_model("mixtral"), out_splits=3, home="host")
    expected = experts_model("mixtral").state_dict()
    model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.3)
    arguments = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)

    transformers.Trainer(model, arguments)._load_from_checkpoint(str(tmp_path / "model"))

    assert_same(model, expected)


def test_a_state_dict_that_lacks_an_expert_is_refused(tmp_path):
    """Strict or not: its stack would be another."""
    model = memtile.tile(experts_model("mixtral"), out_splits=3)
    model.save_pretrained(tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    del found[next(name for name in found if "experts.2." in name)]

    for strict in (True, False):
        with pytest.raises(RuntimeError, match="experts"):
            model.load_state_dict(found, strict=strict)

    assert_same(model, experts_model("mixtral").state_dict())

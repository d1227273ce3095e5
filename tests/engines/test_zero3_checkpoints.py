"""Training saved under ZeRO-3 resumes under another engine, world size and grid, and back."""

from importlib.util import find_spec

import pytest
import torch
from engine_cases import Net
from torch.optim import AdamW
from zero3_checkpoints_worker import (
    HALF,
    SIXTEEN,
    WAYS,
    Scaled,
    optimizer_of,
    spawn,
    train,
    train_scaled,
)

from memtile.engines.distributed_checkpoints import load

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed here"),
]


@pytest.fixture(scope="module", params=[2, 1, 4])
def outcome(request, tmp_path_factory):
    return spawn(request.param, tmp_path_factory.mktemp("zero3"))


@pytest.fixture(scope="module")
def dense():
    """Parameters of each way after all steps in one process, in float64 and in float32."""
    found = {}
    for name, way in WAYS.items():
        for dtype in (torch.float64, torch.float32):
            model = Net(way.case, dtype)
            optimizer = optimizer_of(model)
            train(model, optimizer, 0)
            train(model, optimizer, HALF)
            found[name, dtype] = model.state_dict()
    return found


@pytest.mark.parametrize("name", WAYS)
def test_training_goes_on_in_another_grid_and_engine(outcome, dense, name):
    """Into ZeRO-3, from ZeRO-3, from FSDP2, and from one plain process.

    Values are as near to an unbroken float64 run as an unbroken float32 one is, times 4.
    """
    for found in outcome.found[name].values():
        assert_near(found, dense, name)


@pytest.mark.parametrize("name", WAYS)
def test_training_goes_on_under_fsdp2(outcome, dense, name):
    """The same, from ZeRO-3 into FSDP2 with another grid."""
    model, _ = plain(WAYS[name])
    load(outcome.folder / f"{name} zero3 fsdp2", model)

    assert_near(model.state_dict(), dense, name)


@pytest.mark.parametrize("name", WAYS)
def test_training_goes_on_in_one_plain_process(outcome, dense, name):
    """The same, with torch's AdamW over the untiled model."""
    model, optimizer = plain(WAYS[name])
    resumed = load(outcome.folder / f"{name} zero3", model, optimizer)
    train(model, optimizer, resumed.step)

    assert_near(model.state_dict(), dense, name)


def test_masters_and_moments_come_back_to_the_bit(outcome):
    """In 16 bits resuming is exact, and the masters are what is saved of the model."""
    folders = ("16 bits whole", "16 bits gone on", "16 bits")
    (whole, kept), (broken, again), (half, _) = (read(outcome.folder / each) for each in folders)
    rounded = {key: value.bfloat16() for key, value in half.state_dict().items()}

    assert_same(broken.state_dict(), whole.state_dict())
    assert_same_state(again, kept)
    assert_same(rounded, outcome.found["16 bits"])
    assert any((half.state_dict()[key] != value).any() for key, value in rounded.items())


def test_masters_of_a_tile_optimizer_are_taken_over(outcome):
    """They are loaded in place of the model's rounded values."""
    model, _ = read(outcome.folder / "16 bits taken")

    assert_same(torch.load(outcome.folder / "masters.pt"), dict(model.named_parameters()))


@pytest.mark.parametrize(("source", "steps"), [("scaled new", 3), ("scaled alone", 6)])
def test_the_smallest_parameter_and_no_state_come_back(outcome, source, steps):
    """A parameter of one element, which other ranks have no part of; state before any step."""
    truth, model = Scaled().double(), Scaled()
    stepped, optimizer = (AdamW(each.parameters(), lr=1e-2) for each in (truth, model))
    for _ in range(steps // 3):
        train_scaled(truth, stepped)
    load(outcome.folder / f"{source} zero3", model, optimizer)

    for key, value in truth.state_dict().items():
        assert (outcome.found[source][key] - value).norm() <= 1e-6 * value.norm(), key
    for ours, theirs in zip(model.parameters(), truth.parameters(), strict=True):
        assert optimizer.state[ours]["step"] == steps
        for key in ("exp_avg", "exp_avg_sq"):
            found, expected = optimizer.state[ours][key], stepped.state[theirs][key]
            assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("torch's", "give engine.optimizer"),
        ("uneven", "counts the steps of both as one"),
        ("on NVMe", "engine.save_checkpoint"),
        ("DeepSpeed's", "engine.save_checkpoint"),
    ],
)
def test_what_has_no_dense_form_is_refused_on_every_rank(outcome, what, words):
    """Every rank raises before anything is written or changed."""
    assert all(words in told[what] for told in outcome.told)
    assert not (outcome.folder / "refused").exists()


def plain(way):
    """An untiled model in 32 bits and its optimizer, with other values than were saved."""
    model = Net(way.case, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    return model, optimizer_of(model)


def read(folder):
    """What was saved in 16 bits."""
    model, optimizer = plain(SIXTEEN)
    load(folder, model, optimizer)
    return model, optimizer


def distance(found, truth):
    return sum((found[key] - truth[key]).norm().item() ** 2 for key in truth) ** 0.5


def assert_near(found, dense, name):
    truth, rounded = dense[name, torch.float64], dense[name, torch.float32]
    assert distance(found, truth) <= 4 * distance(rounded, truth)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert torch.equal(value, expected[key]), key


def assert_same_state(found, expected):
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for key, state in ours["state"].items():
        assert_same(state, theirs["state"][key])

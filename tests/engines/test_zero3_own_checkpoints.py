"""DeepSpeed's own checkpoints of tiles: what resumes from them, and at which world size."""

from importlib.util import find_spec

import pytest
import torch
from engine_cases import Net, distance, train
from zero3_own_checkpoints_worker import CASES, ELSEWHERE, spawn, spawn_elsewhere

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed here"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def saved(folder):
    """What two ranks have saved, resumed and read."""
    return spawn(folder)


@pytest.fixture(scope="module")
def elsewhere(folder, saved):
    """What one rank has resumed of it."""
    return spawn_elsewhere(folder)


def same(found, expected):
    """Whether two states are equal to the bit."""
    return found.keys() == expected.keys() and all(
        torch.equal(found[key], expected[key]) for key in expected
    )


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_is_the_one_without_a_break(saved, name):
    """A run equals its half, saved, and the rest by another model: to the bit, on each rank."""
    for rank in saved[name]:
        assert same(rank["resumed"], rank["whole"])
        assert not same(rank["half"], rank["whole"])


@pytest.mark.parametrize("name", CASES)
def test_the_consolidated_weights_are_read_by_any_grid(saved, name):
    """`zero_to_fp32` gives tiles by name; a model of another grid reads them."""
    for rank in saved[name]:
        assert same(rank["consolidated"], rank["half"])


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_universal_checkpoint_resumes_at_another_world_size(elsewhere, name):
    """As near to the float64 run as dense float32 is, times 4; frozen tiles are there already."""
    found, _ = elsewhere
    states = {}
    for dtype in (torch.float64, torch.float32):
        model = Net(CASES[name], dtype)
        train(model, CASES[name])
        states[dtype] = model.state_dict()
    truth = states[torch.float64]

    assert distance(found[name], truth) <= 4 * distance(states[torch.float32], truth)


def test_another_world_size_is_refused_without_conversion(elsewhere):
    """DeepSpeed raises: it cannot resume from parts of other sizes."""
    _, told = elsewhere

    assert told.keys() == set(ELSEWHERE)
    assert "world size of 2 but the current world size is 1" in told["ragged"]

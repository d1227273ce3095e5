"""Tiles with DeepSpeed's own Adam for the CPU, which is compiled once, in about a minute."""

import pytest
import torch
from compiled_ops import compile_once, state_of
from engine_cases import Net, distance, train
from zero3_cpu_adam_worker import CASES, spawn

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    state = state_of("CPUAdamBuilder")
    if state == "impossible":
        pytest.skip("DeepSpeed's CPU Adam cannot be compiled here")
    if state == "possible":
        compile_once("CPUAdamBuilder")
    return spawn(tmp_path_factory.mktemp("adam"))


@pytest.mark.parametrize("name", CASES)
def test_tiles_train_as_deepspeed_does_without_them(outcome, name):
    """Offloaded to the CPU: no further from the float64 run than the untiled one, times 2."""
    found, whole = outcome[name]
    model = Net(CASES[name], torch.float64)
    train(model, CASES[name])
    truth = model.state_dict()

    assert distance(found, truth) <= 2 * distance(whole, truth)


def test_one_tile_is_deepspeeds_own_run(outcome):
    """To the bit: what differs with more tiles is the order in which they are summed."""
    found, whole = outcome["one tile"]

    assert all(torch.equal(found[key], whole[key]) for key in whole)

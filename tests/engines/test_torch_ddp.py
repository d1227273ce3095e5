"""Parked tiles on several ranks: gradients are averaged in each rank's own home."""

import re

import pytest
import torch
import torch.distributed as dist
from averaging_worker import CASES, EXPERTS, Net, spawn, train
from routed_layers import routed

import memtile
from memtile.engines.torch_ddp import GradientAverager
from memtile.errors import EngineError, OptimizerError


@pytest.fixture(scope="module")
def ranks():
    return spawn()


@pytest.fixture
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", CASES)
def test_ranks_train_as_one_process_does(ranks, name):
    """Both end with the parameters of the dense run over whole batches, rank 0's at the start."""
    dense = Net()
    train(dense, CASES[name])

    for found, *_ in ranks:
        for key, value in dense.state_dict().items():
            assert (found[name][0][key] - value).norm() <= 1e-11 * value.norm(), key


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_train_as_in_one_process(ranks, name):
    """Of which each rank's tokens hit others, some none at all."""
    dense = EXPERTS[name].model()
    train(dense, EXPERTS[name])

    for *_, found in ranks:
        for key, value in dense.state_dict().items():
            assert (found[name][0][key] - value).norm() <= 1e-11 * value.norm(), key


def test_gradients_of_experts_without_tokens_are_not_sent(ranks):
    """Some of 16 experts get no token on either rank: fewer reductions than parameters."""
    assert all(found["in backward"][1] < 1 for *_, found in ranks)


@pytest.mark.parametrize("name", CASES)
def test_each_gradient_is_reduced_once_for_each_averaged_backward(ranks, name):
    """Once for a tied tile too, which is used twice."""
    case = CASES[name]
    backwards = 1 if case.syncs_once else case.parts

    assert all(found[name][1] == backwards for found, *_ in ranks)


def test_other_grids_on_other_ranks_are_refused_on_both(ranks):
    """Both ranks raise before anything is sent."""
    assert all("make the same model" in refused for _, refused, *_ in ranks)


def test_a_gradient_of_another_parameter_on_the_other_rank_is_refused_on_both(ranks):
    """Their sum would be the gradient of neither parameter."""
    told = r"rank 0 .*averages the gradient of 0\..* while rank 1 averages the gradient of 1\."

    assert all(re.match(told, way) for _, _, way, _ in ranks), ranks[0][2]


def test_without_a_process_group_the_way_to_one_is_said():
    """A script that was started as one process is told to use torchrun."""
    with pytest.raises(EngineError, match="torchrun"):
        GradientAverager(Net())


def test_an_optimizer_that_would_step_first_is_refused(alone):
    """Hooks run in the order of their registration, so it would step before averaging."""
    model = memtile.tile(Net(), out_splits=2)
    optimizer = memtile.TileOptimizer(model, torch.optim.AdamW, mode="in_backward")

    with pytest.raises(OptimizerError, match="make the GradientAverager first"):
        GradientAverager(model)
    del optimizer


def test_a_model_without_values_is_refused(alone):
    """A model on the meta device has no values to send."""
    with pytest.raises(EngineError, match="meta"):
        GradientAverager(Net().to("meta"))


def test_a_layer_that_uses_some_of_its_tiles_is_refused(alone):
    """Ranks have gradients of different tiles, so they would wait for each other."""
    with pytest.raises(EngineError, match="experts, a TiledExperts, uses some of its tiles only"):
        GradientAverager(routed("host"))


def test_it_can_be_taken_away(alone):
    """After `remove()` gradients are this rank's own."""
    model, calls = Net(), []
    averaging = GradientAverager(model)
    averaging._average = calls.append
    averaging.remove()
    model(torch.tensor([[1, 2]])).backward()

    assert model.up.weight.grad is not None
    assert not model.up.weight._post_accumulate_grad_hooks


def test_gradients_are_averaged_once(alone):
    """A second averager of the same model raises, until the first is removed."""
    model = Net()
    averaging = GradientAverager(model)

    with pytest.raises(EngineError, match="averaged already"):
        GradientAverager(model)
    averaging.remove()
    GradientAverager(model)

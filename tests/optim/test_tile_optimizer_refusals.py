"""Optimizers that would train something else than their model, or twice."""

import pytest
import torch
from torch import nn

import memtile
from memtile.errors import OptimizerError


def model():
    torch.manual_seed(0)
    return memtile.tile(
        nn.Sequential(nn.Linear(11, 17), nn.Linear(17, 3)), out_splits=2, home="host"
    )


def test_parameters_of_another_model_are_refused():
    """Parameters that are not the model's, for example from before tiling, are refused."""
    with pytest.raises(OptimizerError, match="not of this Sequential"):
        memtile.TileOptimizer(model(), torch.optim.SGD, params=nn.Linear(3, 3).parameters(), lr=0.1)


@pytest.mark.parametrize("mode", ["classic", "in_backward"])
def test_a_second_optimizer_beside_one_that_steps_in_backward_is_refused(mode):
    """A second optimizer beside an in-backward one is refused until the first is dropped."""
    ours = model()
    first = memtile.TileOptimizer(ours, torch.optim.SGD, mode="in_backward", lr=0.1)

    with pytest.raises(OptimizerError, match="del optimizer"):
        memtile.TileOptimizer(ours, torch.optim.SGD, mode=mode, lr=0.1)

    del first
    memtile.TileOptimizer(ours, torch.optim.SGD, mode=mode, lr=0.1)


def test_an_optimizer_of_parameters_that_were_replaced_refuses_to_step():
    """An optimizer from before tiling or untiling raises in `step` instead of training nothing."""
    ours = nn.Sequential(nn.Linear(11, 17), nn.Linear(17, 3))
    early = memtile.TileOptimizer(ours, torch.optim.SGD, lr=0.1)
    memtile.tile(ours, out_splits=2, home="host")
    ours(torch.ones(2, 11)).sum().backward()

    with pytest.raises(OptimizerError, match=r"after memtile\.tile"):
        early.step()


def test_parameters_without_values_are_refused():
    """A model on the meta device is refused; the message says how to load values."""
    empty = memtile.empty_model(lambda: nn.Sequential(nn.Linear(11, 17), nn.Linear(17, 3)))

    with pytest.raises(OptimizerError, match="load_checkpoint"):
        memtile.TileOptimizer(empty, torch.optim.SGD, lr=0.1)

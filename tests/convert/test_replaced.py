"""An optimizer that was made before its model's parameters were replaced: told when it steps."""

import warnings
from collections import OrderedDict
from importlib import import_module

import pytest
import torch
from torch import nn

import memtile
from memtile.convert import replaced
from memtile.errors import OptimizerError, ReplacedParametersWarning

BY = ["memtile.tile", "memtile.untile", "memtile.load_checkpoint"]


def _net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3), nn.LayerNorm(3))


def _prepared(by: str, folder):
    """A model, and a function that replaces its parameters."""
    if by == "memtile.tile":
        model = _net()
        return model, lambda: memtile.tile(model, out_splits=2)
    if by == "memtile.untile":
        model = memtile.tile(_net(), out_splits=2)
        return model, lambda: memtile.untile(model)
    memtile.save_checkpoint(_net(), folder)
    model = memtile.empty_model(_net)
    return model, lambda: memtile.load_checkpoint(model, folder)


def _step(model, optimizer) -> None:
    model(torch.ones(2, 7)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("by", BY)
def test_a_plain_optimizer_that_was_made_before_is_told_once(by, tmp_path):
    """An optimizer of replaced parameters warns at its first step, once, and then steps."""
    model, act = _prepared(by, tmp_path)
    held = len(list(model.parameters())) - (0 if by == BY[2] else 2)  # LayerNorm's stay
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    act()

    with pytest.warns(ReplacedParametersWarning, match=f"SGD holds {held} parameters that {by} re"):
        _step(model, optimizer)

    _step(model, optimizer)


def test_under_a_scheduler_and_a_closure_too():
    """It warns whatever is wrapped around a step, or given to it."""
    model = _net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    memtile.tile(model, out_splits=2)

    with pytest.warns(ReplacedParametersWarning, match="SGD holds 4 parameters"):
        optimizer.step(lambda: model(torch.ones(2, 7)).sum())
    scheduler.step()


def test_who_only_holds_replaced_parameters_is_told_nothing():
    """A list of old parameters, or an old optimizer that never steps, causes no warning."""
    model = _net()
    old, listed = torch.optim.SGD(model.parameters(), lr=0.1), list(model.parameters())
    memtile.tile(model, out_splits=2)
    optimizer = memtile.TileOptimizer(model, torch.optim.SGD, lr=0.1)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _step(model, optimizer)
        _step(model, torch.optim.SGD(model.parameters(), lr=0.1))

    assert old.param_groups[0]["params"][0] is listed[0]


def test_a_tile_optimizer_refuses_by_itself():
    """A `TileOptimizer` of old parameters raises, and does not warn besides."""
    model = _net()
    optimizer = memtile.TileOptimizer(model, torch.optim.SGD, lr=0.1)
    memtile.tile(model, out_splits=2)

    with pytest.raises(OptimizerError, match=r"make it after memtile\.tile"):
        _step(model, optimizer)


def test_torch_is_left_alone_where_nothing_was_held(monkeypatch):
    """No hook on the steps of all optimizers, unless a replaced parameter is still there."""
    hooks: OrderedDict[int, object] = OrderedDict()
    module = import_module("torch.optim.optimizer")
    monkeypatch.setattr(module, "_global_optimizer_pre_hooks", hooks)
    monkeypatch.setattr(replaced, "_hook", None)
    model = memtile.untile(memtile.tile(_net(), out_splits=2))
    assert not hooks

    held = list(model.parameters())
    memtile.untile(memtile.tile(model, out_splits=2))

    assert len(hooks) == 1
    assert len(held) == 6

"""State that does not fit is refused, and leaves everything as it was."""

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from small_training import (
    HOMES,
    MODES,
    batches,
    in_home,
    loss_of,
    optimizer_for,
    same,
    small,
    train,
    values,
)
from torch import nn, optim

from memtile.errors import OptimizerError


@pytest.fixture(params=HOMES)
def home(request):
    """The name of a home."""
    return request.param


def _trained(home):
    model = in_home(small(), home)
    optimizer = optimizer_for(model)
    train(model, optimizer, batches(1))
    return model, optimizer


def _state_of(model: nn.Module, **options: Any) -> dict[str, Any]:
    optimizer = optim.AdamW(model.parameters(), **options)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


@functools.cache
def _wrong_states() -> dict[str, Any]:
    """By what is wrong, the state dict and the words that say it."""
    right = _state_of(small(), lr=0.3)
    misshapen, transposed = copy.deepcopy(right), copy.deepcopy(right)
    misshapen["state"][7]["exp_avg_sq"] = torch.zeros(4, 4)
    transposed["state"][1]["exp_avg"] = transposed["state"][1]["exp_avg"].t()
    fewer = {**right, "param_groups": [{**right["param_groups"][0], "params": [0, 1, 2]}]}
    two = {**right, "param_groups": right["param_groups"] * 2}
    return {
        "another model": (_state_of(nn.Linear(5, 5)), "of another model, or its groups"),
        "a shape": (misshapen, r"down.weight: the state dict's exp_avg_sq is \(4, 4\)"),
        "transposed": (transposed, r"up.weight: the state dict's exp_avg is \(9, 13\)"),
        "fewer parameters": (fewer, r"has \[3\] parameters in its groups, the dense model \[9\]"),
        "more groups": (two, r"has \[9, 9\] parameters in its groups"),
        "no state dict": ({"model": 1}, "state"),
        "tiles of its own": (_tiles_state(), "parameters in its groups"),
    }


def _tiles_state() -> dict[str, Any]:
    model = in_home(small(), "device")
    return optim.AdamW(model.parameters()).state_dict()


@pytest.mark.parametrize(
    ("home", "wrong"),
    [*(("disk", wrong) for wrong in _wrong_states()), *((home, "a shape") for home in HOMES[:-1])],
)
def test_what_does_not_fit_is_refused(home, wrong):
    """The error names what does not fit; weights, state and options stay, and training goes on."""
    state, words = _wrong_states()[wrong]
    (model, optimizer), (reference, reference_optimizer) = _trained(home), _trained(home)

    with pytest.raises(OptimizerError, match=words):
        optimizer.load_state_dict(state)

    assert optimizer.param_groups[0]["lr"] == 0.01
    assert same(values(model), values(reference))
    assert train(model, optimizer, batches(2)) == train(reference, reference_optimizer, batches(2))
    assert same(values(model), values(reference))


def test_a_full_home_changes_nothing_at_loading(monkeypatch):
    """No room for loaded moments: HomeFullError, and the state is the one before."""
    (model, optimizer), (reference, reference_optimizer) = _trained("disk"), _trained("disk")
    state, calls = _state_of(small(), lr=0.3), []

    def full(home, tensor):
        calls.append(tensor)
        if len(calls) > 3:
            raise OSError("no room")
        return tensor.clone()

    monkeypatch.setattr("memtile.optim.dense_state.allocate_copy", full)
    with pytest.raises(OSError, match="no room"):
        optimizer.load_state_dict(state)
    monkeypatch.undo()

    assert optimizer.param_groups[0]["lr"] == 0.01
    assert train(model, optimizer, batches(2)) == train(reference, reference_optimizer, batches(2))


def test_groups_that_split_a_weight_have_no_state_dict(home):
    """Tiles of a weight in two groups train; the dense state dict is refused by names."""
    model = in_home(small(), home)
    parameters = list(model.parameters())
    chosen = model.up.tile(1, 0).weight
    rest = [p for p in parameters if p is not chosen]
    groups = [{"params": rest}, {"params": [chosen], "lr": 0.1}]
    optimizer = optimizer_for(model, params=groups)
    train(model, optimizer, batches(1))
    before = values(model)

    with pytest.raises(OptimizerError, match=r"group 0 holds some tiles of up\.weight and not all"):
        optimizer.state_dict()
    with pytest.raises(OptimizerError, match=r"put all tiles of a weight into one group"):
        optimizer.load_state_dict(_state_of(small()))

    assert same(values(model), before)
    assert len(optimizer.state) == len(parameters)


def test_weights_of_which_some_tiles_were_never_stepped(home):
    """A weight with frozen tiles has no dense state yet: refused by its name."""
    model = in_home(small(), home)
    model.up.tile(1, 0).weight.requires_grad_(False)
    optimizer = optimizer_for(model)
    assert optimizer.state_dict()["state"] == {}
    loss_of(model, batches(1)[0]).backward()
    optimizer.step()

    with pytest.raises(OptimizerError, match=r"up\.weight: 3 of its 4 tiles have been stepped"):
        optimizer.state_dict()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make_copy", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_copy_is_refused(mode, make_copy):
    """Copying and pickling raise with the way out, and training goes on."""
    model, (ids,) = in_home(small(), "disk"), batches(1)
    optimizer = optimizer_for(model, mode=mode)

    with pytest.raises(OptimizerError, match=r"cannot be copied or pickled.*optimizer.state_dict"):
        make_copy(optimizer)

    train(model, optimizer, [ids])
    assert optimizer.state_dict()["state"]

"""Weights in 16 bits: masters in float32 beside the moments, or none where none are wanted."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_training import (
    HOMES,
    MODES,
    batches,
    disk_of,
    in_home,
    loss_of,
    optimizer_for,
    same,
    small,
    train,
    values,
)
from torch import Tensor, nn, optim

from memtile.homes import allocation_of

STEPS = 3
OPTIONS = {"lr": 0.01, "weight_decay": 0.1}


@pytest.fixture(params=HOMES)
def home(request):
    """The name of a home."""
    return request.param


class ByHand:
    """Plain torch over the same parameters: copies of them, float32 ones as masters."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.ours = list(model.parameters())
        self.masters = [nn.Parameter(p.detach().to(dtype, copy=True)) for p in self.ours]
        self.optimizer = optim.AdamW(self.masters, **OPTIONS)

    def step(self) -> None:
        """Step the copies with the gradients that the model's parameters have now."""
        for ours, master in zip(self.ours, self.masters, strict=True):
            master.grad = ours.grad.to(master.dtype, copy=True)
        self.optimizer.step()

    def agrees(self) -> bool:
        """Whether the model's parameters are the copies, rounded."""
        pairs = zip(self.ours, self.masters, strict=True)
        return all(torch.equal(ours, master.to(ours.dtype)) for ours, master in pairs)


def _follow(
    model: nn.Module, optimizer: Any, by_hand: ByHand, between: Callable[[], object] = lambda: None
) -> None:
    for ids in batches(STEPS):
        loss_of(model, ids).backward()
        by_hand.step()
        optimizer.step()
        optimizer.zero_grad()
        assert by_hand.agrees()
        between()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_masters_are_float32(home, dtype):
    """Each step is torch's on a float32 copy of the weights, which are that copy, rounded."""
    model = in_home(small(dtype), home)
    optimizer = optimizer_for(model, **OPTIONS)

    _follow(model, optimizer, ByHand(model, torch.float32))

    weight = model.up.tile(1, 1).weight
    assert {k: v.dtype for k, v in optimizer.state[weight].items() if v.dim()} == dict.fromkeys(
        ("exp_avg", "exp_avg_sq", "master"), torch.float32
    )
    if home in ("mapped", "disk"):
        assert allocation_of(optimizer.state[weight]["master"]).home is disk_of(model)


def test_without_masters_it_is_plain_16_bit_training(home):
    """masters=False: each step is torch's on the bfloat16 weights, with moments in bfloat16."""
    model = in_home(small(torch.bfloat16), home)
    optimizer = optimizer_for(model, masters=False, **OPTIONS)

    _follow(model, optimizer, ByHand(model, torch.bfloat16))

    state = optimizer.state[model.up.tile(1, 1).weight]
    assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert state["exp_avg"].dtype == torch.bfloat16


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_every_home_gives_the_same_bits(mode, masters):
    """bfloat16 training is the same in every home, with and without masters."""
    runs = []
    for home in HOMES:
        model = in_home(small(torch.bfloat16), home)
        optimizer = optimizer_for(model, mode=mode, masters=masters)
        runs.append((train(model, optimizer, batches(STEPS)), values(model)))

    assert all(losses == runs[0][0] and same(ours, runs[0][1]) for losses, ours in runs)
    assert not same(runs[0][1], values(small(torch.bfloat16)))


@pytest.mark.parametrize("masters", [False, True])
def test_both_modes_give_the_same_bits_of_tiles_used_once(home, masters):
    """A gradient that is formed at once is rounded once in both modes, so all is equal."""
    dense = nn.Sequential(nn.Embedding(23, 10), nn.Linear(10, 13), nn.Tanh(), nn.Linear(13, 23))
    runs = []
    for mode in MODES:
        model = in_home(dense.bfloat16(), home)
        optimizer = optimizer_for(model, mode=mode, masters=masters)
        runs.append((train(model, optimizer, batches(STEPS)), values(model)))

    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])


@pytest.mark.parametrize("mode", MODES)
def test_float32_parameters_among_them_have_no_master(mode):
    """A norm kept in float32 is stepped as it is, beside bfloat16 tiles."""
    dense = nn.Sequential(nn.Embedding(23, 10), nn.Linear(10, 23)).bfloat16()
    dense[1].float()
    dense.insert(1, _ToFloat())
    model = in_home(dense, "disk")
    optimizer = optimizer_for(model, mode=mode)

    train(model, optimizer, batches(STEPS))

    wide = [p for p, state in optimizer.state.items() if "master" not in state]
    assert {p.dtype for p in wide} == {torch.float32}
    assert len(wide) < len(optimizer.state)


class _ToFloat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def _changed(values: Tensor) -> Tensor:
    """Half of the values doubled: those were written, the others were not."""
    changed = values.detach().clone()
    changed.view(-1)[::2] *= 2
    return changed


@pytest.mark.parametrize("way", ["data", "in place", "load_state_dict"])
def test_values_written_behind_its_back_are_obeyed(home, way):
    """The next step uses values that were written; the others keep their master's bits."""
    model = in_home(small(torch.bfloat16), home)
    optimizer, by_hand = optimizer_for(model, **OPTIONS), ByHand(model, torch.float32)

    def write() -> None:
        new = [_changed(parameter) for parameter in model.parameters()]
        with torch.no_grad():
            for value, ours, master in zip(new, by_hand.ours, by_hand.masters, strict=True):
                written = value != ours
                master[written] = value[written].float()
                if way == "data":
                    ours.data.copy_(value)
                elif way == "in place":
                    ours.copy_(value)
        if way == "load_state_dict":
            names = [name for name, _ in model.named_parameters()]
            model.load_state_dict(dict(zip(names, new, strict=True)), strict=False)

    _follow(model, optimizer, by_hand, write)

    assert len(by_hand.masters) == len(optimizer.state)


def test_values_that_are_not_numbers_are_obeyed(home):
    """NaN and infinity, written to a weight that has a master, stay where they were written."""
    model = in_home(small(torch.bfloat16), home)
    optimizer = optimizer_for(model, torch.optim.SGD, lr=0.1)
    train(model, optimizer, batches(1))
    weight = model.up.tile(0, 0).weight
    weight.data[0, 0], weight.data[1, 1] = float("nan"), float("inf")
    weight.grad = torch.ones_like(weight)

    optimizer.step()

    assert weight[0, 0].isnan()
    assert weight[1, 1].isinf()
    assert weight.isfinite().sum() == weight.numel() - 2


def test_masters_survive_the_state_dict(home):
    """Saved and loaded, also by deep copy, a run goes on bit for bit: the state has masters."""
    ids, model = batches(2 * STEPS), in_home(small(torch.bfloat16), home)
    optimizer = optimizer_for(model)
    train(model, optimizer, ids[:STEPS])
    weights, state = values(model), copy.deepcopy(optimizer.state_dict())
    again = in_home(small(torch.bfloat16), home)
    again.load_state_dict(weights)
    optimizer_again = optimizer_for(again)

    optimizer_again.load_state_dict(state)

    assert state["state"][1]["master"].shape == (13, 9)
    assert state["state"][1]["master"].dtype == torch.float32
    assert train(again, optimizer_again, ids[STEPS:]) == train(model, optimizer, ids[STEPS:])
    assert same(values(again), values(model))


@pytest.mark.parametrize("masters", [False, True])
def test_a_plain_16_bit_run_is_taken_over_and_given_back(home, masters):
    """Loaded bfloat16 moments are cast to the stepped dtype; plain torch loads the result."""
    dense = small(torch.bfloat16)
    plain = optim.AdamW(dense.parameters(), **OPTIONS)
    train(dense, plain, batches(1))
    model = in_home(dense, home)
    optimizer = optimizer_for(model, masters=masters, **OPTIONS)

    optimizer.load_state_dict(plain.state_dict())
    train(model, optimizer, batches(2))

    moment = optimizer.state[model.up.tile(0, 0).weight]["exp_avg"]
    assert moment.dtype == (torch.float32 if masters else torch.bfloat16)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    dense.load_state_dict(values(model))
    assert train(dense, plain, batches(2, seed=4)) == pytest.approx(
        train(model, optimizer, batches(2, seed=4)), rel=0.02
    )


def test_masters_may_be_turned_off_later(home):
    """An optimizer without masters loads a state dict with them, and leaves them out."""
    model = in_home(small(torch.bfloat16), home)
    optimizer = optimizer_for(model)
    train(model, optimizer, batches(1))
    without = optimizer_for(model, masters=False)

    without.load_state_dict(optimizer.state_dict())
    train(model, without, batches(1))

    assert not any("master" in state for state in without.state.values())

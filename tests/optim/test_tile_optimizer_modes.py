"""Stepping in backward: the bits of classic mode, no gradients, and nothing done twice."""

import gc
import weakref
from contextlib import suppress

import pytest
import torch
from small_training import (
    HOMES,
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
from torch import nn

from memtile import DiskHome, TiledLinear
from memtile.errors import OptimizerError
from memtile.homes import allocation_of


@pytest.fixture(params=HOMES)
def home(request):
    """The name of a home."""
    return request.param


@pytest.mark.parametrize("max_splits", [1, 3])
def test_it_equals_classic_mode_bit_for_bit(home, max_splits):
    """Tied tiles and a module called twice are stepped once, with their whole gradient."""
    runs = []
    for mode in ("classic", "in_backward"):
        model = in_home(small(), home, {"out_splits": max_splits})
        optimizer = optimizer_for(model, mode=mode)
        runs.append((train(model, optimizer, batches(3)), values(model), optimizer.state_dict()))

    (losses, ours, state), (theirs_losses, theirs, theirs_state) = runs
    assert losses == theirs_losses
    assert same(ours, theirs)
    assert all(
        torch.equal(entry[key], theirs_state["state"][number][key])
        for number, entry in state["state"].items()
        for key in entry
    )


def test_gradients_are_gone_after_backward(home):
    """After a backward no parameter has a gradient, and every trained one is stepped already."""
    model = in_home(small(), home)
    before = [parameter.detach().clone() for parameter in model.parameters()]

    optimizer = optimizer_for(model, mode="in_backward")
    loss_of(model, batches(1)[0]).backward()

    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(map(torch.equal, model.parameters(), before))
    assert len(optimizer.state) == len(before)


def test_step_steps_nothing_twice(home):
    """`step()` after a backward changes neither weights nor state."""
    model = in_home(small(), home)
    optimizer = optimizer_for(model, mode="in_backward")
    loss_of(model, batches(1)[0]).backward()
    before = values(model)

    optimizer.step()
    optimizer.step()

    assert same(values(model), before)
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}


def test_schedulers_count_its_steps(home):
    """A scheduler sees the call of `step()`, does not warn, and the next backward uses its lr."""
    runs = []
    for mode in ("classic", "in_backward"):
        model = in_home(small(), home)
        optimizer = optimizer_for(model, mode=mode)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        train(model, optimizer, batches(3), scheduler.step)
        runs.append((values(model), optimizer.param_groups[0]["lr"]))

    assert same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1] == 0.01 / 8


def test_a_second_backward_is_refused(home):
    """A second backward raises and changes no weight; after `step()` training goes on."""
    model, (first, second, third) = in_home(small(), home), batches(3)
    optimizer = optimizer_for(model, mode="in_backward")
    loss_of(model, first).backward()
    before = values(model)

    with pytest.raises(OptimizerError, match=r"call step\(\) after each backward, or use mode='cl"):
        loss_of(model, second).backward()

    assert same(values(model), before)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
    loss_of(model, third).backward()
    optimizer.step()
    assert not same(values(model), before)


def test_after_a_refused_backward_training_goes_on_as_if_it_had_not_been(home):
    """With `step()` after the refusal, the run goes on bit for bit as an undisturbed one."""
    runs = []
    for disturbed in (False, True):
        model = in_home(small(), home)
        optimizer = optimizer_for(model, mode="in_backward")
        for ids in batches(3):
            loss_of(model, ids).backward()
            if disturbed:
                with suppress(OptimizerError):
                    loss_of(model, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(values(model))

    assert same(*runs)


def test_zero_grad_gives_a_backward_up(home):
    """After `zero_grad()` another backward is allowed without `step()` between."""
    model, (first, second) = in_home(small(), home), batches(2)
    optimizer = optimizer_for(model, mode="in_backward")
    loss_of(model, first).backward()

    optimizer.zero_grad()
    loss_of(model, second).backward()

    assert {int(state["step"]) for state in optimizer.state.values()} == {2}


def test_clipping_is_refused(home):
    """Clipping raises, by `TileOptimizer` and by torch, and the message says what to do."""
    model = in_home(small(), home)
    optimizer = optimizer_for(model, mode="in_backward")
    loss_of(model, batches(1)[0]).backward()

    with pytest.raises(OptimizerError, match="use mode='classic'"):
        optimizer.clip_grad_norm_(1.0)
    with pytest.raises(OptimizerError, match=r"22 of these parameters.*use mode='classic'"):
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(23, 10), nn.Linear(10, 23, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids))


@pytest.mark.parametrize("tied", [False, True])
def test_only_sums_of_tied_tiles_go_home(tied):
    """Each tile is written once a step, without its gradient; one that is used twice, twice."""
    dense = _Tied() if tied else nn.Sequential(nn.Embedding(23, 10), nn.Linear(10, 23))
    model = in_home(dense, "disk", {"out_splits": 3})
    room = sum(
        allocation.room for allocation in map(allocation_of, model.parameters()) if allocation
    )
    optimizer = optimizer_for(model, torch.optim.SGD, mode="in_backward", lr=0.1)
    before = disk_of(model).traffic.written_bytes

    train(model, optimizer, batches(2))

    assert disk_of(model).traffic.written_bytes - before == 2 * room * (2 if tied else 1)


def test_classic_gradients_are_at_home():
    """Classic mode: each parked tile's gradient is in the tile's home, until `zero_grad()`."""
    model = in_home(small(), "disk")
    optimizer = optimizer_for(model)

    loss_of(model, batches(1)[0]).backward()

    for parameter in model.parameters():
        allocation = allocation_of(parameter)
        assert allocation is None or allocation_of(parameter.grad).home is allocation.home
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_dropped_optimizer_takes_its_hooks_along(home):
    """After the optimizer is dropped, backward leaves gradients and changes no weight."""
    model, ids = in_home(small(), home), batches(1)[0]
    optimizer = optimizer_for(model, mode="in_backward")
    train(model, optimizer, [ids])
    reference = weakref.ref(optimizer)
    before = values(model)

    del optimizer
    gc.collect()
    loss_of(model, ids).backward()

    assert reference() is None
    assert same(values(model), before)
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    if home == "disk":
        assert all(allocation_of(tile.weight.grad) for _, tile in model.up.tiles())


def test_an_exception_in_the_constructor_leaves_no_hooks():
    """An optimizer that could not be made leaves the model's gradients as they were."""
    model = in_home(small(), "disk")

    with pytest.raises(OptimizerError):
        optimizer_for(model, torch.optim.AdamW, mode="in_backward", lr=-1.0)

    loss_of(model, batches(1)[0]).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_gradients_that_others_put_are_stepped_by_step(home):
    """In backward mode, `step()` steps parameters that still have a gradient, and drops it."""
    model = in_home(small(), home)
    optimizer = optimizer_for(model, torch.optim.SGD, mode="in_backward", lr=1.0)
    parameter = model.up.tile(0, 0).weight
    before = parameter.detach().clone()
    parameter.grad = torch.ones_like(parameter)

    optimizer.step()

    assert torch.equal(parameter.detach(), before - 1)
    assert parameter.grad is None


def test_a_layer_alone_is_a_model():
    """A parked layer made without `tile` is trained the same in both modes."""
    runs = []
    for mode in ("classic", "in_backward"):
        torch.manual_seed(0)
        layer = TiledLinear(7, 5, out_splits=2, in_splits=2, home=DiskHome())
        optimizer = optimizer_for(layer, mode=mode)
        for _ in range(3):
            layer(torch.linspace(-1, 1, 21).view(3, 7)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(values(layer))

    assert same(*runs)

"""A parameter that is stepped a few rows at a time comes out as one that is stepped whole."""

from typing import Any

import pytest
import torch
from faulty_disk import FaultyDisk, Watched
from small_training import (
    HOMES,
    MODES,
    Lion,
    batches,
    in_home,
    loss_of,
    optimizer_for,
    same,
    small,
    train,
    values,
)
from torch import optim

from memtile.errors import HomeIOError, OptimizerError
from memtile.homes import allocation_of
from memtile.optim import stepping

STEPS = 3
FEW = 24  # elements: two to four rows of a tile, and a ragged rest


class Late(optim.Optimizer):
    """Makes its moment in its second step."""

    def __init__(self, params: Any, lr: float = 0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                state["count"] = state.get("count", 0) + 1
                if state["count"] > 1:
                    state.setdefault("total", torch.zeros_like(p)).add_(p.grad)
                p.sub_(state.get("total", p.grad), alpha=group["lr"])


class Own(optim.Optimizer):
    """Calls its moment what we call the float32 values of 16-bit parameters."""

    def __init__(self, params: Any, lr: float = 0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                total = self.state[p].setdefault("master", torch.zeros_like(p))
                p.sub_(total.add_(p.grad), alpha=group["lr"])


OPTIMIZERS = [
    (optim.AdamW, {"lr": 0.01, "amsgrad": True}),
    (optim.AdamW, {"lr": 0.01, "fused": True}),
    (optim.ASGD, {"lr": 0.01}),
    (optim.Adagrad, {"lr": 0.05, "initial_accumulator_value": 0.1}),
    (Lion, {"lr": 0.002}),
    (Late, {}),
    (Own, {}),
]


def _id(case: object) -> str:
    return case.__name__ if isinstance(case, type) else ""


@pytest.fixture
def few_rows(monkeypatch):
    """Lets a parameter be stepped some rows at a time."""
    monkeypatch.setattr(stepping, "CHUNK_ELEMENTS", FEW)


def _trained(home, optimizer_class, mode, dtype=torch.float32, **options):
    model = in_home(small(dtype), home)
    optimizer = optimizer_for(model, optimizer_class, mode=mode, **options)
    return train(model, optimizer, batches(STEPS)), values(model), optimizer


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("optimizer_class", "options"), OPTIMIZERS, ids=_id)
def test_rows_give_the_losses_of_plain_torch(few_rows, optimizer_class, options, mode):
    """By rows, in every home the same bits, and the losses of plain torch."""
    plain = small()
    expected = train(plain, optimizer_class(plain.parameters(), **options), batches(STEPS))

    runs = [_trained(home, optimizer_class, mode, **options) for home in HOMES]

    assert all(losses == runs[0][0] and same(ours, runs[0][1]) for losses, ours, _ in runs)
    assert runs[0][0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("masters", [False, True])
def test_rows_of_16_bits(few_rows, masters):
    """By rows, bfloat16 weights and their masters are the same in every home."""
    runs = [
        _trained(home, optim.AdamW, "classic", torch.bfloat16, masters=masters) for home in HOMES
    ]

    assert all(losses == runs[0][0] and same(ours, runs[0][1]) for losses, ours, _ in runs)


def test_state_is_kept_whole(few_rows):
    """State tensors have the parameter's shape and home, and counters count steps, not rows."""
    _, _, optimizer = _trained("disk", Late, "classic")

    for parameter, state in optimizer.state.items():
        allocation = allocation_of(parameter)
        assert state["count"] == STEPS
        assert state["total"].shape == parameter.shape
        assert allocation is None or allocation_of(state["total"]).home is allocation.home


def test_a_whole_parameter_is_stepped_in_so_many_parts(few_rows, monkeypatch):
    """The optimizer gets no more rows at once than allowed, and each row once."""
    model, parts = in_home(small(), "disk"), []
    optimizer = optimizer_for(model, Watched, lr=0.01)
    train(model, optimizer, batches(1))
    loss_of(model, batches(1)[0]).backward()
    monkeypatch.setattr(Watched, "before", staticmethod(lambda p: parts.append(p.numel())))

    optimizer.step()

    assert max(parts) <= FEW
    assert sum(parts) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("act", ["read", "write"])
def test_a_step_by_rows_that_the_disk_ended_goes_on(few_rows, monkeypatch, act):
    """`step()` again after an I/O error gives the undisturbed bits, no row stepped twice."""
    disk = FaultyDisk(monkeypatch)
    (model, optimizer), (reference, reference_optimizer) = (
        (each, optimizer_for(each)) for each in (in_home(small(), "disk") for _ in range(2))
    )
    for each in (model, reference):
        loss_of(each, batches(1)[0]).backward()
    reference_optimizer.step()

    disk.fail(act, 6)
    with pytest.raises(HomeIOError):
        optimizer.step()
    disk.mend()
    optimizer.step()

    assert same(values(model), values(reference))


def test_the_name_of_the_masters_is_taken(few_rows):
    """An optimizer with its own entry of that name is refused for 16 bits with masters."""
    model = in_home(small(torch.bfloat16), "disk")

    with pytest.raises(OptimizerError, match=r"Own keeps 'master' itself, .* pass masters=False"):
        optimizer_for(model, Own)

    train(model, optimizer_for(model, Own, masters=False), batches(2))

"""Training gives the same bits wherever tiles live, and the losses of plain torch."""

import copy
from typing import Any

import pytest
import torch
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
from torch import nn, optim

OPTIMIZERS: list[tuple[type[optim.Optimizer], dict[str, Any]]] = [
    (optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (optim.Adam, {"lr": 0.01}),
    (optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    (optim.AdamW, {"lr": 0.01, "fused": True}),
    (optim.NAdam, {"lr": 0.01}),
    (optim.RAdam, {"lr": 0.01}),
    (optim.Adagrad, {"lr": 0.05, "initial_accumulator_value": 0.1}),
    (optim.RMSprop, {"lr": 0.001, "momentum": 0.9, "centered": True}),
    (Lion, {"lr": 0.002}),
]
STEPS = 3


def _id(case: object) -> str:
    if isinstance(case, type):
        return case.__name__
    return "fused" if isinstance(case, dict) and "fused" in case else ""


def _trained(dense: nn.Module, home: str, optimizer_class: Any, mode: str, **options: Any) -> Any:
    model = in_home(dense, home)
    optimizer = optimizer_for(model, optimizer_class, mode=mode, **options)
    losses = train(model, optimizer, batches(STEPS))
    return losses, values(model)


def _plain(dense: nn.Module, optimizer_class: Any, **options: Any) -> tuple[nn.Module, list[float]]:
    model = copy.deepcopy(dense)
    optimizer = optimizer_class([p for p in model.parameters() if p.requires_grad], **options)
    return model, train(model, optimizer, batches(STEPS))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("optimizer_class", "options"), OPTIMIZERS, ids=_id)
def test_every_home_gives_the_same_bits(optimizer_class, options, mode):
    """Losses and weights are those of tiles in memory, bit for bit; losses those of plain torch."""
    dense = small()

    runs = [_trained(dense, home, optimizer_class, mode, **options) for home in HOMES]
    _, plain = _plain(dense, optimizer_class, **options)

    assert all(losses == runs[0][0] and same(ours, runs[0][1]) for losses, ours in runs)
    assert runs[0][0] == pytest.approx(plain, rel=1e-5)
    assert not same(runs[0][1], values(dense))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grid", [(1, 1), (1, 3), (4, 1)], ids=str)
def test_grids_of_one_tile_row_and_column(grid, mode):
    """The grid of one tile, of one row and of one column train as plain torch does, in any home."""
    dense, splits = small(), dict(zip(("out_splits", "in_splits"), grid, strict=True))

    runs = []
    for home in HOMES:
        model = in_home(dense, home, splits)
        losses = train(model, optimizer_for(model, mode=mode), batches(STEPS))
        runs.append((losses, values(model)))
    _, plain = _plain(dense, optim.AdamW, lr=0.01)

    assert all(losses == runs[0][0] and same(ours, runs[0][1]) for losses, ours in runs)
    assert runs[0][0] == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("path", ["buffered", "direct"])
@pytest.mark.parametrize("mode", MODES)
def test_both_paths_to_the_disk_give_the_same_bits(mode, path, monkeypatch):
    """Read and written past the page cache or through it: the weights are the same."""
    _, expected = _trained(small(), "device", optim.AdamW, mode)
    free = 1 << 60 if path == "buffered" else 0
    monkeypatch.setattr("memtile.homes.limits.free_bytes", lambda: free)
    model = in_home(small(), "disk")
    (home,) = {tile.home for _, tile in model.up.tiles()}
    if home.path != path:
        pytest.skip("the folder's filesystem has no direct I/O")

    train(model, optimizer_for(model, mode=mode), batches(STEPS))

    assert same(values(model), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(reentrant, mode):
    """Activation checkpointing, of both kinds, recomputes the same values in every home."""
    _, expected = _trained(small(), "device", optim.AdamW, mode)

    for home in HOMES:
        losses, ours = _trained(small(reentrant=reentrant), home, optim.AdamW, mode)

        assert same(ours, expected)
        assert len(losses) == STEPS


def _freeze_some(model: nn.Module) -> list[nn.Parameter]:
    frozen = [model.up.tile(0, 1).weight, model.twice.tile(1, 0).weight]
    frozen.append(model.embed.tile(1, 0).weight)
    for parameter in frozen:
        parameter.requires_grad_(False)
    return frozen


@pytest.mark.parametrize("mode", MODES)
def test_frozen_tiles_stay(mode):
    """Tiles that need no gradient keep their values and get no state; the others train the same."""
    runs = []
    for home in HOMES:
        model = in_home(small(), home)
        frozen = _freeze_some(model)
        before = [parameter.detach().clone() for parameter in frozen]
        optimizer = optimizer_for(model, optim.AdamW, mode=mode, weight_decay=0.1)
        losses = train(model, optimizer, batches(STEPS))
        runs.append((losses, values(model)))

        assert all(map(torch.equal, frozen, before))
        assert not any(parameter in optimizer.state for parameter in frozen)
    assert all(losses == runs[0][0] and same(ours, runs[0][1]) for losses, ours in runs)


def test_two_backwards_accumulate():
    """Classic mode: gradients of two batches add up at home as they do in memory."""
    ids, runs, plain_model = batches(6), [], small()
    plain = optim.AdamW(plain_model.parameters(), lr=0.01)

    def steps(model: nn.Module, optimizer: optim.Optimizer) -> list[float]:
        losses = []
        for pair in zip(ids[::2], ids[1::2], strict=True):
            for each in pair:
                loss = loss_of(model, each)
                loss.backward()
                losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        return losses

    for home in HOMES:
        model = in_home(small(), home)
        runs.append((steps(model, optimizer_for(model)), values(model)))

    assert all(losses == runs[0][0] and same(ours, runs[0][1]) for losses, ours in runs)
    assert runs[0][0] == pytest.approx(steps(plain_model, plain), rel=1e-5)


def test_two_graphs_that_are_alive_at_once():
    """Two forwards before one backward through both: the sums are those of tiles in memory."""
    runs, (first, second) = [], batches(2)

    for mode in MODES:
        for home in HOMES:
            model = in_home(small(), home)
            optimizer = optimizer_for(model, mode=mode)
            (loss_of(model, first) + loss_of(model, second)).backward()
            optimizer.step()
            runs.append(values(model))

    assert all(same(ours, runs[0]) for ours in runs)


def _look(model: nn.Module) -> None:
    """Evaluation, and a loop such as generation is: one more id each time."""
    model.eval()
    with torch.no_grad():
        loss_of(model, batches(1, seed=9)[0])
        ids = torch.tensor([[1, 2]])
        for _ in range(4):
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
    with torch.inference_mode():
        model(ids)
    model.train()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("home", HOMES)
def test_looking_at_the_model_between_steps_changes_nothing(home, mode):
    """Evaluation and generation between steps leave training as it is, bit for bit."""
    losses, expected = _trained(small(), home, optim.AdamW, mode)
    model = in_home(small(), home)

    ours = train(model, optimizer_for(model, mode=mode), batches(STEPS), lambda: _look(model))

    assert ours == losses
    assert same(values(model), expected)


def test_a_look_between_forward_and_backward_changes_nothing():
    """Evaluation after the forward of a training step does not disturb its backward."""
    runs = []
    for look in (False, True):
        model = in_home(small(), "disk")
        optimizer = optimizer_for(model)
        for ids in batches(STEPS):
            loss = loss_of(model, ids)
            if look:
                _look(model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(values(model))

    assert same(*runs)


@pytest.mark.parametrize("mode", MODES)
def test_untiled_models_are_stepped_too(mode):
    """A model without tiles is stepped bit for bit as plain torch does it."""
    dense = small()
    expected, losses = _plain(dense, optim.AdamW, lr=0.01)

    ours = train(dense, optimizer_for(dense, mode=mode), batches(STEPS))

    assert ours == losses
    assert same(values(dense), values(expected))

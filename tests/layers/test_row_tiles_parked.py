"""Row tiles of modules whose weights are parked: gradients go home, hooks are called once."""

import copy

import pytest
import torch
from leftovers import check_nothing_is_left
from parked_layers import HOMES, home_called
from row_models import Mlp, assert_close, batch, gradients
from torch import nn

import memtile
from memtile.homes import is_parked

nothing_is_left = pytest.fixture(autouse=True)(check_nothing_is_left)
at_homes = pytest.mark.parametrize("home", HOMES)


@pytest.fixture(params=["mapped", "slabs"], autouse=True)
def form(request, monkeypatch):
    """Disk homes worked on in place, and through slabs."""
    if request.param == "slabs":
        monkeypatch.setattr("memtile.homes.filesystems._OVERWRITING", frozenset())


def models(home: str, rows: int = 4) -> tuple[nn.Module, nn.Module]:
    """A model of two, and the same parked, each of its parts over row tiles."""
    plain = nn.Sequential(Mlp(), Mlp())
    parked = memtile.tile(copy.deepcopy(plain), out_splits=3, home=home_called(home))
    for part in parked:
        memtile.tile_rows(part, rows=rows)
    return plain, parked


def dense_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients by the dense names; `untile` keeps them."""
    memtile.untile(model)
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@at_homes
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_of_the_dense_model_and_at_home(home, frozen):
    """Over two backwards that accumulate; also where the input is frozen."""
    plain, parked = models(home)
    x = batch(3, 5).requires_grad_(not frozen)
    for model in (plain, parked):
        for _ in range(2):
            model(x).square().sum().backward()
    weights = [p for p in parked.parameters() if is_parked(p)]
    assert len(weights) == 18
    assert home != "disk" or all(is_parked(p.grad) for p in weights)

    found = dense_gradients(parked)
    assert_close(list(found.values()), [p.grad for p in plain.parameters()])


@at_homes
def test_hooks_are_called_once_after_the_last_row_tile(home):
    """With the whole gradient."""
    plain, parked = models(home)
    seen = {}
    for name, parameter in parked.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: seen.setdefault(name, []).append(p.grad.clone())
        )
    x = batch(3, 5)
    for model in (plain, parked):
        model(x).square().sum().backward()

    assert {len(found) for found in seen.values()} == {1}
    assert len(seen) == len(list(parked.parameters()))
    for name, parameter in parked.named_parameters():
        assert torch.equal(seen[name][0], parameter.grad)
    assert_close(list(dense_gradients(parked).values()), [p.grad for p in plain.parameters()])


@at_homes
@pytest.mark.parametrize("mode", ["classic", "in_backward"])
def test_it_trains_as_the_dense_model_does(home, mode):
    """Three steps of AdamW, also where each tile is stepped in backward."""
    plain, parked = models(home)
    losses = []
    for model in (plain, parked):
        if model is plain:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        else:
            optimizer = memtile.TileOptimizer(model, torch.optim.AdamW, lr=1e-2, mode=mode)
        losses.append([])
        for _ in range(3):
            loss = model(batch(3, 5)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())

    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    memtile.untile(parked)
    for ours, theirs in zip(parked.parameters(), plain.parameters(), strict=True):
        assert (ours - theirs).norm() <= 1e-9 * theirs.norm()


def test_gradients_that_are_asked_for_or_hooked_are_returned():
    """`autograd.grad` with respect to parked weights, and a tensor hook, which sees the sum."""
    plain, parked = models("disk")
    x, hooked = batch(3, 5), parked[0].up.tile(0, 0).weight
    ours = gradients(parked(x), x, hooked, parked[1].down.tile(1, 0).weight)
    y = plain(x)
    theirs = gradients(y, x, plain[0].up.weight, plain[1].down.weight)
    assert_close(ours, [theirs[0], theirs[1][:10], theirs[2][5:9]])
    assert all(p.grad is None for p in parked.parameters())

    called = []
    hooked.register_hook(lambda grad: called.append(1) or 2 * grad)
    (first,) = gradients(parked(x), hooked)
    assert_close([first], [2 * ours[1]])
    assert called == [1]


def test_a_weight_that_is_used_outside_too_has_the_whole_gradient():
    """In a tied use without row tiles, and in an operation that knows no homes."""
    plain, parked = models("disk")
    x = batch(3, 5)
    parked.add_module("again", parked[0].up)
    for model, up in ((plain, plain[0].up), (parked, parked[0].up)):
        loss = model[0](x).square().sum() + up(x).square().sum()
        weights = [up.weight] if model is plain else [t.weight for _, t in up.tiles()]
        for weight in weights:
            scaled = memtile.tile_rows(lambda x, w=weight: x * w.sum(), rows=4)
            loss = loss + scaled(x).sum()
        loss.backward()
    del parked.again

    found = dense_gradients(parked)
    assert_close([found["0.up.weight"]], [plain[0].up.weight.grad])


def test_inside_a_checkpoint_and_inside_row_tiles():
    """Nested in either, gradients are right and at home."""
    plain, parked = models("disk", rows=2)
    memtile.tile_rows(parked, rows=6)
    x = batch(3, 5)
    plain(x).square().sum().backward()
    y = torch.utils.checkpoint.checkpoint(parked, x, use_reentrant=False)
    y.square().sum().backward()

    assert all(is_parked(p.grad) for p in parked.parameters() if is_parked(p))
    assert_close(list(dense_gradients(parked).values()), [p.grad for p in plain.parameters()])

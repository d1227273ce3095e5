"""Graphs through parked tiles: hooked, frozen, shared, used twice, freed, recomputed."""

import copy
import gc
import weakref

import pytest
import torch
from leftovers import check_nothing_is_left
from parked_layers import (
    HOMES,
    assert_same_bits,
    gradients_of,
    parked_pair,
    resident_and_parked,
    small_model,
    weights_of,
)
from paths import GRIDS, assert_same, grid_id
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import memtile
from memtile.errors import ParkedError
from memtile.homes import DiskHome

nothing_is_left = pytest.fixture(autouse=True)(check_nothing_is_left)
in_every_grid = pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
ALL = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def batch(*lead: int, seed: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    """An input that requires grad."""
    generator = torch.Generator().manual_seed(seed)
    lead = lead or (5,)
    return torch.randn(*lead, 13, generator=generator, dtype=dtype).requires_grad_()


def test_a_tensor_hook_sees_the_gradient_and_may_change_it():
    """`p.register_hook` on a parked weight fires once, with the gradient, and is obeyed."""
    resident, parked = resident_and_parked()
    for model in (resident, parked):
        model.seen = []
        for p in model.parameters():
            p.register_hook(lambda g, seen=model.seen: (seen.append(g.clone()), g * 3)[1])
        for _ in range(2):
            model(batch(dtype=torch.float32)).square().sum().backward()

    assert_same_bits(gradients_of(parked), gradients_of(resident))
    for ours, theirs in zip(parked.seen, resident.seen, strict=True):
        assert_same_bits(ours, theirs)


class UsedTwice(nn.Module):
    """One linear, called two times in a row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(13, 13)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.linear(x)))


@pytest.mark.parametrize("make", [small_model, UsedTwice])
@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
def test_post_accumulate_hooks_are_called_once_with_the_whole_gradient(make, grid):
    """Once in a backward, after the last use of the tile, with the sum over all uses."""
    model = make()
    results = []
    for home in ("device", DiskHome()):
        tiled = memtile.tile(copy.deepcopy(model), out_splits=grid[0], in_splits=grid[1], home=home)
        calls: list[tuple[str, Tensor]] = []
        for name, p in tiled.named_parameters():

            def note(p: Tensor, name: str = name, calls: list = calls) -> None:
                calls.append((name, p.grad.clone()))

            p.register_post_accumulate_grad_hook(note)
        for _ in range(2):
            tiled.zero_grad()
            calls.clear()
            tiled(batch(dtype=torch.float32)).square().sum().backward()

            assert sorted(n for n, _ in calls) == sorted(n for n, _ in tiled.named_parameters())
            assert_same_bits(dict(calls), gradients_of(tiled))
        results.append(dict(calls))

    assert_same_bits(results[1], results[0])


def test_tiles_are_accumulated_and_hooked_one_after_the_other():
    """Each tile's hook runs right after its own backward, so a layer's gradient never exists."""
    _, layer = parked_pair((4, 1))
    alive: list[int] = []
    weights = list(weights_of(layer).values())

    def drop(p: Tensor) -> None:
        alive.append(sum(q.grad is not None for q in weights))
        p.grad = None

    for p in weights:
        p.register_post_accumulate_grad_hook(drop)
    layer(batch()).sum().backward()
    weights.clear()  # or hook and parameter keep each other

    assert alive == [1, 1, 1, 1]


# What is frozen, shared, repeated


@in_every_grid
@pytest.mark.parametrize("frozen", ["weights", "input", "all", "biases", "one tile"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_is_right(grid, frozen):
    """Frozen weights still pass the gradient on to the input, as adapters need."""
    dense, layer = parked_pair(grid)
    x = batch().detach().requires_grad_(frozen not in ("input", "all"))
    for name, p in layer.named_parameters():
        off = frozen == "all" or (frozen == "weights" and "weight" in name)
        p.requires_grad_(not (off or (frozen == "biases" and "bias" in name)))
    if frozen == "one tile":
        layer.tile(0, 0).weight.requires_grad_(False)
    theirs = x.detach().clone().requires_grad_()
    y = layer(x)
    dense(theirs).square().sum().backward()

    assert y.requires_grad == (frozen != "all")
    if frozen == "all":
        return
    y.square().sum().backward()
    for p in layer.parameters():
        assert (p.grad is None) == (not p.requires_grad)
    if x.requires_grad:
        assert_same(x.grad, theirs.grad)
    for index, p in layer.tile_parameters("weight").items():
        if p.requires_grad:
            assert_same(p.grad, dense.weight.grad[layer.grid.rect(*index).index])


def test_gradients_accumulate_over_backwards():
    """Three backwards without zero_grad add up at home; a gradient that was given is added to."""
    dense, layer = parked_pair((3, 2))
    given = layer.tile(1, 0).weight
    given.grad = torch.ones_like(given)
    for seed in range(3):
        for module in (layer, dense):
            module(batch(seed=seed)).square().sum().backward()

    expected = dense.weight.grad.clone()
    expected[layer.grid.rect(1, 0).index] += 1
    assert_same(layer.weight.grad + 0, expected)


def test_a_retained_graph_gives_the_same_gradients_twice():
    """`retain_graph=True`, then again: the sum is twice the gradient, for parked and resident."""
    resident, parked = resident_and_parked()
    for model in (resident, parked):
        loss = model(batch(dtype=torch.float32)).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()

    assert_same_bits(gradients_of(parked), gradients_of(resident))


def test_a_graph_that_is_freed_says_so():
    """A second backward without `retain_graph` raises torch's own error."""
    _, layer = parked_pair((3, 2))
    loss = layer(batch()).square().sum()
    loss.backward()

    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_graph_that_is_older_than_a_later_forward_is_right():
    """Backward through two graphs in either order, together, or with an evaluation between."""
    resident, parked = resident_and_parked()
    for order in ([0, 1], [1, 0]):
        for model in (resident, parked):
            model.zero_grad()
            losses = [model(batch(seed=s, dtype=torch.float32)).sum() for s in range(2)]
            with torch.no_grad():
                model(batch(dtype=torch.float32))
            for number in order:
                losses[number].backward()
            sum(model(batch(seed=s, dtype=torch.float32)).sum() for s in range(2)).backward()

        assert_same_bits(gradients_of(parked), gradients_of(resident))


@pytest.mark.parametrize("home", HOMES)
def test_a_tile_that_is_cast_between_forward_and_backward_raises(home):
    """Gradients of another dtype than the forward's are not made silently."""
    _, layer = parked_pair((2, 1), home)
    y = layer(batch()).square().sum()
    layer.float()

    with pytest.raises(ParkedError, match="modified between its forward"):
        y.backward()

    layer.double()(batch()).square().sum().backward()
    assert layer.weight.grad.dtype == torch.float64


@in_every_grid
@pytest.mark.parametrize("home", HOMES)
def test_a_tile_written_between_forward_and_backward_raises(grid, home):
    """Its gradients would be wrong; the message says what to do, and a new pass is right."""
    dense, layer = parked_pair(grid, home)
    x = batch()
    y = layer(x).square().sum()
    with torch.no_grad():
        layer.tile(grid[0] - 1, 0).weight.mul_(2)

    with pytest.raises(ParkedError, match=r"modified between its forward .* run backward before"):
        y.backward()

    layer.zero_grad()
    x.grad = None
    layer.copy_params_from(dense)
    layer(x).square().sum().backward()
    expected = x.grad.clone()
    x.grad = None
    dense(x).square().sum().backward()
    assert_same(expected, x.grad)


def test_a_backward_that_broke_off_does_not_keep_the_home_alive():
    """Gradients that were on their way home then are no reason to keep it."""
    home = DiskHome()
    model, alive = memtile.tile(small_model(), out_splits=3, home=home), weakref.ref(home)
    y = model(batch(dtype=torch.float32)).sum()
    with torch.no_grad():
        model[0].tile(0, 0).weight.zero_()
    with pytest.raises(ParkedError):
        y.backward()

    memtile.transfer.rings_of(home).gradients.flush()
    del model, y, home
    gc.collect()

    assert alive() is None


def test_a_frozen_tile_that_was_written_raises_too():
    """The input's gradient goes through it, whether or not it is trained itself."""
    _, layer = parked_pair((3, 1))
    layer.requires_grad_(False)
    y = layer(batch()).sum()
    with torch.no_grad():
        layer.tile(0, 0).weight.zero_()

    with pytest.raises(ParkedError):
        y.backward()


class Tied(nn.Module):
    """An embedding whose rows are the head's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(23, 13), nn.Linear(13, 23, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(ids)))


@pytest.mark.parametrize("out_splits", [1, 4])
def test_a_tied_embedding_and_head_sum_both_uses(out_splits):
    """Over two backwards, with the hooks once in each, as with resident tiles."""
    ids = torch.tensor([[0, 22, 5], [7, 7, 11]])
    results = []
    for home in ("device", "host", DiskHome()):
        model = memtile.tile(Tied(), out_splits=out_splits, home=home)
        assert model.head.tile(0, 0).weight is model.embedding.tile(0, 0).weight
        calls: list[int] = []
        for number, p in enumerate(model.parameters()):
            p.register_post_accumulate_grad_hook(lambda p, n=number, c=calls: c.append(n))
        for _ in range(2):
            model(ids).square().sum().backward()
        assert sorted(calls) == sorted(2 * list(range(out_splits)))
        results.append(gradients_of(model))
    dense = Tied()
    for _ in range(2):
        dense(ids).square().sum().backward()

    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])
    whole = torch.cat(list(results[2].values()))
    torch.testing.assert_close(whole, dense.head.weight.grad)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_recomputation_gives_the_same_gradients(use_reentrant, frozen):
    """Activation checkpointing of each block, twice over, with weights trained or frozen."""
    resident, parked = resident_and_parked()
    results = []
    for model in (resident, parked):
        for name, p in model.named_parameters():
            p.requires_grad_(not frozen or "bias" in name)
        for _ in range(2):
            x = batch(dtype=torch.float32)
            y = checkpoint(model[:2], x, use_reentrant=use_reentrant)
            y = checkpoint(model[2], y, use_reentrant=use_reentrant)
            y.square().sum().backward()
        results.append({"x": x.grad, **gradients_of(model)})

    assert_same_bits(results[1], results[0])


@in_every_grid
def test_no_weight_is_kept_in_the_graph(grid):
    """Of a tile only its slice of the input is saved; no weight, no slab, no copy of one."""
    _, layer = parked_pair(grid)
    saved: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(batch(5))

    assert saved
    assert all(shape[0] == 5 for shape in saved), saved
    y.sum().backward()

"""A stack of experts in row tiles: grids, products, names, what its owner gives back."""

import copy
import pickle

import pytest
import torch
from torch import nn

from memtile.errors import CannotTileError, HandleError, SplitsError, TileShapeError
from memtile.geometry import Grid
from memtile.homes import HostHome, is_parked
from memtile.layers import StackOwner, StackTile, TiledStack

EXPERTS, ROWS, COLUMNS = 5, 6, 4
SPLITS = [1, 2, 4, 5, 6, 15, 30]


class Experts(nn.Module):
    """Adds up the products of all rows with all experts."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.up = nn.Parameter(torch.randn(EXPERTS, ROWS, COLUMNS, generator=generator))
        self.bias = nn.Parameter(torch.randn(EXPERTS, ROWS, generator=generator))
        self.down = nn.Parameter(torch.randn(EXPERTS, COLUMNS, ROWS, generator=generator))

    def forward(self, x):
        return torch.einsum("nk,emk->nm", x, self.up) + self.bias.sum(0)


class OnTiles(StackOwner):
    """The same with the first stack in tiles."""

    def forward(self, x):
        counts = [x.shape[0]] * EXPERTS
        y = self.up(x.repeat(EXPERTS, 1), counts)
        return y.view(EXPERTS, x.shape[0], -1).sum(0) + self.bias.sum(0)


def stacked(splits=5, transposed=False, home=None):
    """A seeded dense stack, and its tiles."""
    torch.manual_seed(2)
    dense = nn.Parameter(torch.randn(EXPERTS, ROWS, COLUMNS, dtype=torch.float64))
    grid = Grid.split_stack(EXPERTS, ROWS, COLUMNS, splits)
    return dense, TiledStack.from_stack(dense, grid, transposed, home=home)


def product(dense, x, counts, transposed, first=0):
    """The products of grouped rows, in ordinary operations."""
    matrices = dense if transposed else dense.mT
    parts = zip(x.split(counts), matrices[first:], strict=False)
    return torch.cat([rows @ matrix for rows, matrix in parts])


@pytest.mark.parametrize(
    ("splits", "sizes"),
    [
        (1, [30]),
        (2, [18, 12]),
        (4, [12, 6, 6, 6]),
        (5, [6] * 5),
        (6, [3, 3] * 5),
        (11, [2, 2, 2] * 5),
        (30, [1] * 30),
    ],
)
def test_bounds_fall_between_experts_or_within_one(splits, sizes):
    """Up to E tiles are whole experts; more are equal parts of each."""
    grid = Grid.split_stack(EXPERTS, ROWS, COLUMNS, splits)

    assert [span.size for span in grid.out_spans] == sizes
    assert grid.in_parts == (0, COLUMNS)


@pytest.mark.parametrize(
    ("elements", "sizes"),
    [
        (1000, [30]),
        (72, [18, 12]),
        (71, [12, 12, 6]),
        (47, [6] * 5),
        (23, [3, 3] * 5),
        (12, [3, 3] * 5),
        (11, [2, 2, 2] * 5),
        (1, [1] * 30),
    ],
)
def test_tiles_hold_as_many_whole_experts_as_fit(elements, sizes):
    """Or equal parts of one, at least a row."""
    grid = Grid.of_stack(EXPERTS, ROWS, COLUMNS, elements)

    assert [span.size for span in grid.out_spans] == sizes


@pytest.mark.parametrize("splits", [0, 31, 2.0])
def test_impossible_numbers_of_tiles_are_refused(splits):
    """Fewer than one, more than rows, no whole number."""
    with pytest.raises(SplitsError):
        Grid.split_stack(EXPERTS, ROWS, COLUMNS, splits)


@pytest.mark.parametrize(
    "grid",
    [
        Grid((0, 4, 30), (0, COLUMNS)),
        Grid((0, 9, 30), (0, COLUMNS)),
        Grid((0, 30), (0, 2, COLUMNS)),
        Grid((0, 24), (0, COLUMNS)),
    ],
)
def test_a_grid_across_experts_is_refused(grid):
    """A tile that holds one expert and a part of another, columns, another size."""
    with pytest.raises(TileShapeError, match="cuts no stack of 5 experts of 6×4"):
        TiledStack(EXPERTS, ROWS, COLUMNS, grid=grid)


@pytest.mark.parametrize("counts", [[3, 1, 2, 1, 4], [0, 5, 0, 0, 1], [0, 0, 0, 0, 7]])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("parks", [False, True])
@pytest.mark.parametrize("splits", SPLITS)
def test_products_and_gradients_are_the_dense_stacks(splits, parks, transposed, counts):
    """At every kind of grid; tiles without rows have no gradient."""
    dense, stack = stacked(splits, transposed, HostHome() if parks else None)
    x = torch.randn(sum(counts), ROWS if transposed else COLUMNS, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()

    y, expected = stack(ours, counts), product(dense, theirs, counts, transposed)
    grad = torch.randn_like(expected)
    y.backward(grad)
    expected.backward(grad)

    assert torch.allclose(y, expected)
    assert torch.allclose(ours.grad, theirs.grad)
    assert torch.allclose(stack.dense_gradient("weight"), dense.grad)
    for span, numbers in stack.units:
        rows = sum(counts[span.start : span.stop])
        assert all((stack.stacks[n].weight.grad is not None) == (rows > 0) for n in numbers)


def test_some_experts_alone_can_be_worked_on():
    """From the first one on that is given, as whole tiles."""
    dense, stack = stacked(splits=4)
    x = torch.randn(7, COLUMNS, dtype=torch.float64)

    assert torch.allclose(stack(x, [3, 4], first=3), product(dense, x, [3, 4], False, 3))


def test_hooks_on_tiles_are_called_without_rows():
    """An engine brings a tile in for its call, and may count on every rank to make it."""
    _, stack = stacked()
    seen = []
    for tile in stack.stacks:
        tile.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))

    stack(torch.randn(3, COLUMNS, dtype=torch.float64), [0, 3, 0, 0, 0])

    assert seen == [0, 3, 0, 0, 0]


@pytest.mark.parametrize("saved", SPLITS)
@pytest.mark.parametrize("splits", SPLITS)
def test_tiles_of_any_grid_load(saved, splits):
    """A state dict of another grid's tiles, and the dense tensor."""
    dense, source = stacked(saved)
    for state in (source.state_dict(), {"weight": dense.detach()}):
        target = TiledStack(
            EXPERTS, ROWS, COLUMNS, grid=Grid.split_stack(EXPERTS, ROWS, COLUMNS, splits)
        ).double()

        target.load_state_dict(state)

        assert torch.equal(target.dense_tensor("weight"), dense)


def test_a_parked_stacks_tiles_are_in_its_home():
    """Each tile's weight; a copy of the stack has them in memory."""
    home = HostHome()
    dense, stack = stacked(splits=7, home=home)

    with pytest.warns(UserWarning, match="ordinary layer in memory"):
        second = copy.deepcopy(stack)

    assert all(is_parked(tile.weight) and tile.home is home for tile in stack.stacks)
    assert not any(is_parked(tile.weight) for tile in second.stacks)
    assert torch.equal(second.dense_tensor("weight"), dense)


def owner():
    """A module with its first stack in tiles."""
    module = Experts()
    grid = Grid.split_stack(EXPERTS, ROWS, COLUMNS, 2)
    OnTiles.put_stack(module, "up", TiledStack.from_stack(module.up, grid, False))
    return module


def test_an_owner_is_still_of_its_class():
    """Its forward is the one on tiles, and its state dict has the tiles' names."""
    module, x = owner(), torch.ones(3, COLUMNS)

    assert isinstance(module, Experts)
    torch.testing.assert_close(module(x), Experts()(x))
    assert set(module.state_dict()) == {"bias", "down", "up.stacks.0.weight", "up.stacks.1.weight"}


def test_an_owner_gets_its_parameter_back():
    """Its class, the order of its parameters, and no trace of the stack."""
    module, expected = owner(), Experts()

    module.restore_stack("up", module.up.dense_parameter("weight"))

    assert type(module) is Experts
    assert module.__dict__.keys() == expected.__dict__.keys()
    assert list(module.state_dict()) == list(expected.state_dict())
    assert torch.equal(module.up, expected.up)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_an_owner_can_be_copied_and_pickled(copied):
    """Though its class is made while the program runs."""
    module, x = owner(), torch.ones(3, COLUMNS)

    second = copied(module)

    assert type(second) is type(module)
    assert torch.equal(second(x), module(x))
    second.restore_stack("up", second.up.dense_parameter("weight"))
    assert type(second) is Experts


@pytest.mark.parametrize("strict", [True, False])
def test_an_owner_loads_dense_names(strict):
    """A stack's dense name is its parameter's; a stack of another shape is refused by name."""
    module, state = owner(), Experts().state_dict()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()

    module.load_state_dict(state, strict=strict)

    assert torch.equal(module.up.dense_tensor("weight"), state["up"])
    with pytest.raises(RuntimeError, match=r"\(4, 6, 4\), the layer's \(5, 6, 4\)"):
        module.load_state_dict({**state, "up": state["up"][:4]}, strict=strict)


def test_what_would_be_lost_is_refused():
    """Writes to the assembled stack; a dense parameter of tiles of which some are frozen."""
    _, stack = stacked()

    with pytest.raises(HandleError):
        stack.weight.zero_()
    stack.stacks[0].weight.requires_grad_(False)
    with pytest.raises(CannotTileError):
        stack.dense_parameter("weight")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("counts", [(3, 0, 2), (0, 0, 0)])
def test_a_hooked_tile_keeps_no_view_of_its_weight(transposed, counts):
    """Its values and gradients are those of a plain one; ZeRO-3 frees what nothing else holds."""
    torch.manual_seed(0)
    shape = (5, 7) if transposed else (7, 5)
    tile = StackTile(3, 3 * shape[0], shape[1], transposed, dtype=torch.float64)
    nn.init.normal_(tile.weight)
    x = torch.randn(sum(counts), 5, dtype=torch.float64, requires_grad=True)
    expected = tile(x, counts)
    gradients = torch.autograd.grad(expected.square().sum(), (x, tile.weight))
    saved = []

    tile.register_forward_hook(lambda *_: None)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        found = tile(x, counts)

    torch.testing.assert_close(found, expected)
    ours = torch.autograd.grad(found.square().sum(), (x, tile.weight))
    torch.testing.assert_close(ours, gradients)
    held = tile.weight.untyped_storage().data_ptr()
    assert all(each.untyped_storage().data_ptr() != held for each in saved)
    assert torch.autograd.gradcheck(lambda x, _: tile(x, counts), (x, tile.weight))
    assert torch.autograd.gradgradcheck(lambda x, _: tile(x, counts), (x, tile.weight))

"""Layers of an MLP without its intermediate activation: tiled, parked, called as modules, ranks."""

import copy
import weakref
from typing import Any

import pytest
import torch
from leftovers import check_nothing_is_left
from parked_layers import HOMES, assert_same_bits, home_called
from paths import assert_same, nothing
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from watched_home import WatchedHome

import memtile
from memtile import TiledLinear
from memtile.errors import HomeIOError, ParkedError
from memtile.geometry import Grid
from memtile.homes import allocation_of, resolve_home

nothing_is_left = pytest.fixture(autouse=True)(check_nothing_is_left)
WIDTH, INNER, OUT = 13, 29, 11
PLACES: list[Any] = [None, *HOMES]


def batch(*lead: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """An input that requires grad."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(*(lead or (2, 4)), WIDTH, generator=generator, dtype=torch.float64)
    return x.to(dtype).requires_grad_()


class Dense(nn.Module):
    """A gated MLP by plain torch."""

    def __init__(self, bias: bool = True, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        options: dict[str, Any] = {"bias": bias, "dtype": dtype}
        self.gate, self.up = (nn.Linear(WIDTH, INNER, **options) for _ in range(2))
        self.down = nn.Linear(INNER, OUT, **options)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return y


def tiled(dense: Dense, splits: int, home: Any = None, **options: Any) -> memtile.TiledMLP:
    """The same, its layers in tiles, resident or in a home."""
    where = (
        None
        if home is None
        else resolve_home(home_called(home) if isinstance(home, str) else home, "cpu")
    )
    layers = []
    for name, layer in dense.named_children():
        cut = {"in_splits": splits} if name == "down" else {"out_splits": splits}
        grid = Grid.uniform(layer.out_features, layer.in_features, **cut)
        layers.append(TiledLinear.from_dense(layer, grid, home=where))
    return memtile.TiledMLP(*layers, **{"block_rows": 3, "block_features": 4, **options})


def tiles_of(mlp: memtile.TiledMLP) -> list[list[nn.Module]]:
    """Gate, up and down tile of each part of the intermediate dimension."""
    layers = [mlp.gate, mlp.up, mlp.down]
    return [list(each) for each in zip(*([t for _, t in x.tiles()] for x in layers), strict=True)]


def assert_trains_like(mlp: Any, dense: Dense, x: Tensor | None = None) -> None:
    """Output, and gradients of input, weights and biases, are the dense MLP's."""
    ours, theirs = (batch(), batch()) if x is None else (x, x.detach().clone().requires_grad_())
    y, truth = mlp(ours), dense(theirs)
    upstream = torch.randn(truth.shape, dtype=torch.float64)

    y.backward(upstream)
    truth.backward(upstream)

    assert_same(y, truth)
    assert_same(ours.grad, theirs.grad)
    for name, layer in dense.named_children():
        for own, parameter in layer.named_parameters():
            assert_same(getattr(mlp, name).dense_gradient(own), parameter.grad)


@pytest.mark.parametrize("splits", [1, 4, INNER])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("home", PLACES)
def test_tiled_layers_train_like_dense_ones(home: Any, bias: bool, splits: int):
    """Resident and in every home, output and gradients in float64."""
    dense = Dense(bias)
    assert_trains_like(tiled(dense, splits, home), dense)


def hooked(mlp: memtile.TiledMLP) -> memtile.TiledMLP:
    for tiles in tiles_of(mlp):
        tiles[0].register_forward_hook(nothing)
    return mlp


def hooked_as_a_whole(mlp: memtile.TiledMLP) -> memtile.TiledMLP:
    mlp.up.register_forward_hook(nothing)
    return mlp


def gathered(mlp: memtile.TiledMLP) -> memtile.TiledMLP:
    """As under an engine that gathers each tile when it is called."""
    for tiles in tiles_of(mlp):
        for tile in tiles:
            tile.register_forward_pre_hook(of_engine)
    return mlp


def of_engine(module: nn.Module, inputs: Any) -> None:
    calls.append(id(module))
    if broken and len(calls) == 4:
        raise ZeroDivisionError


of_engine.__module__ = "memtile.engines.of_a_test"
calls: list[int] = []
broken: list[bool] = []


def sharing_biases(mlp: memtile.TiledMLP) -> memtile.TiledMLP:
    for layer in (mlp.gate, mlp.up, mlp.down):
        bias = nn.Parameter(torch.as_tensor(layer.bias + 0).detach())
        for _, tile in layer.tiles():
            tile.bias = None
        layer.keep_bias(bias)
    return mlp


@pytest.mark.parametrize("home", [None, "disk"])
@pytest.mark.parametrize(
    "changes",
    [
        [hooked],
        [hooked_as_a_whole],
        [sharing_biases],
        [sharing_biases, hooked],
        [gathered],
        [sharing_biases, gathered],
    ],
)
def test_layers_that_are_more_than_their_weights(changes: Any, home: Any):
    """Tiles or layers with hooks are called, and biases that layers keep whole are added once."""
    dense = Dense()
    mlp = tiled(dense, 4, home)
    for change in changes:
        change(mlp)

    assert_trains_like(mlp, dense)


def test_tiles_that_are_gathered_are_called_once():
    """An outer checkpoint computes nothing again; an error puts each tile's forward back."""
    dense = Dense()
    mlp = gathered(tiled(dense, 4))
    tiles, x = [tile for together in tiles_of(mlp) for tile in together], batch()
    calls.clear()
    broken.append(True)
    with pytest.raises(ZeroDivisionError):
        mlp(x)
    broken.clear()
    calls.clear()

    found = checkpoint(lambda x: 2 * mlp(x), x, use_reentrant=False)
    found.sum().backward()

    assert calls == [*map(id, tiles)]
    assert not any("forward" in tile.__dict__ for tile in tiles)
    assert_same(found, 2 * dense(x))


@pytest.mark.parametrize("trained", [True, False], ids=["input trains", "input is given"])
@pytest.mark.parametrize("again", [True, False], ids=["recomputed", "kept"])
def test_the_input_of_tiles_that_are_gathered_goes_with_backward(again: bool, trained: bool):
    """Nothing has it after a backward, and a second one is refused, as torch does."""
    mlp, x = gathered(tiled(Dense(), 4)), batch().detach().requires_grad_(trained)
    given = x * 2
    y = checkpoint(mlp, given, use_reentrant=False) if again else mlp(given)
    kept = weakref.ref(given)
    del given
    y.sum().backward()

    assert kept() is None
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


@pytest.mark.parametrize("splits", [4, 29])
def test_16_bits_of_tiles_that_are_gathered_are_summed_in_float32(splits: int):
    """Output and input gradient have at most 1.5 times plain bfloat16's error."""
    plain = Dense(dtype=torch.bfloat16)
    ours, x16 = gathered(tiled(plain, splits)), batch(200).detach().bfloat16()
    x16.requires_grad_()
    seed = torch.randn(200, OUT, generator=torch.Generator().manual_seed(3)).bfloat16()
    x = x16.detach().double().requires_grad_()
    y = copy.deepcopy(plain).double()(x)
    truth = (y, *torch.autograd.grad(y, x, seed.double()))

    def errors(model: Any) -> list[float]:
        y = model(x16)
        found = (y, *torch.autograd.grad(y, x16, seed))
        return [float((a - b).detach().norm()) for a, b in zip(found, truth, strict=True)]

    for a, b in zip(errors(ours), errors(plain), strict=True):
        assert a <= 1.5 * b


def test_called_tiles_keep_the_random_state_of_dropout():
    """The gradients are those of the mask that was drawn in forward, at a fixed seed."""
    x, mlp = batch(), hooked(tiled(Dense(), 4, dropout=0.5))

    def run(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        y: Tensor = mlp(x)
        return y

    assert torch.autograd.gradcheck(run, (x,))


def test_any_module_may_be_a_layer():
    """Modules that are no linears are called; the activation may be a module."""
    dense = Dense()
    mlp = memtile.TiledMLP(nn.Sequential(dense.gate), dense.up, dense.down, activation=nn.SiLU())
    x = batch()
    y = mlp(x)

    found = torch.autograd.grad(y.sum(), [x, *mlp.parameters()])
    expected = torch.autograd.grad(dense(x).sum(), [x, *dense.parameters()])
    for a, b in zip((y, *found), (dense(x), *expected), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("home", PLACES)
@pytest.mark.parametrize("size", [{"max_tile_bytes": 400}, {"in_splits": 2}, {"out_splits": 3}])
def test_layers_that_are_cut_later_and_not_alike(size: Any, home: Any):
    """By `memtile.tile`, which cuts each as it likes: each is called."""
    dense = Dense()
    mlp = memtile.TiledMLP(*copy.deepcopy(dense).children())
    where = None if home is None else resolve_home(home_called(home), "cpu")

    memtile.tile(nn.ModuleList([mlp]), **size, home=where)
    assert_trains_like(mlp, dense)


@pytest.mark.parametrize("home", PLACES)
def test_replaced_parameters_get_their_gradients(home: Any):
    """Those of `torch.func.functional_call`, which are gone in backward."""
    dense = Dense()
    mlp, x = tiled(dense, 3, home), batch()
    others = {n: (1.5 * p.detach()).requires_grad_() for n, p in mlp.named_parameters()}
    torch.func.functional_call(mlp, others, (x,)).square().sum().backward()

    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.mul_(1.5)
    mlp(x.detach()).square().sum().backward()
    for name, parameter in mlp.named_parameters():
        assert_same(others[name].grad, parameter.grad)


def test_homes_agree_bit_for_bit():
    """In 16 bits too."""
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for home in PLACES:
            mlp, x = tiled(Dense(dtype=dtype), 4, home), batch(dtype=dtype)
            y = mlp(x)
            y.float().square().sum().backward()
            own = {n: p.grad.clone() for n, p in mlp.named_parameters()}
            results.append({"y": y.detach(), "x": x.grad, **own})
            if home == "disk":
                assert allocation_of(mlp.up.tile(0, 0).weight.grad) is not None

        for found in results[1:]:
            assert_same_bits(found, results[0])


@pytest.mark.parametrize("trained", [True, False])
def test_a_tile_is_read_once_in_forward_and_once_in_backward(trained: bool):
    """Gate, up and down together, whatever the blocks; frozen ones too, for the input."""
    home = WatchedHome()
    mlp = tiled(Dense(), 7, home, block_rows=1, block_features=1)
    mlp.requires_grad_(trained)
    for number, tiles in enumerate(tiles_of(mlp)):
        for name, tile in zip(("gate", "up", "down"), tiles, strict=True):
            allocation_of(tile.weight).label = f"{name} {number}"
    home.clear()

    y = mlp(batch())
    forward = home.labels()
    y.sum().backward()

    read = [label for label in home.labels()[len(forward) :] if label]
    assert forward == [f"{name} {n}" for n in range(7) for name in ("gate", "up", "down")]
    assert len(read) == len(set(read)) >= 3 * (7 - 3)  # those of the turn are still in slabs
    home.close()


@pytest.mark.parametrize("home", PLACES)
def test_gradients_of_a_tile_go_before_the_next_ones(home: Any):
    """A hook that takes each gradient is called once for each, and finds no other tile's."""
    mlp, seen = tiled(Dense(bias=False), 4, home), list[int]()

    def take(parameter: Tensor) -> None:
        number = numbers[parameter]
        seen.append(number)
        others = [p for p, n in numbers.items() if n != number]
        assert all(p.grad is None for p in others)
        parameter.grad = None

    numbers = {t.weight: n for n, tiles in enumerate(tiles_of(mlp)) for t in tiles}
    hooks = [p.register_post_accumulate_grad_hook(take) for p in numbers]
    mlp(batch()).sum().backward()

    assert seen == [3, 3, 3, 2, 2, 2, 1, 1, 1, 0, 0, 0]
    for hook in hooks:  # or the layers would never be collected
        hook.remove()


@pytest.mark.parametrize("home", PLACES)
def test_who_asks_for_gradients(home: Any):
    """`backward(inputs=…)` leaves tiles alone; `autograd.grad` gives theirs; both orders work."""
    dense = Dense(bias=False)
    mlp, x = tiled(dense, 3, home), batch()
    mlp(x).sum().backward(inputs=[x])
    assert all(p.grad is None for p in mlp.parameters())
    weights = [tile.weight for _, tile in mlp.up.tiles()]

    (truth,) = torch.autograd.grad(dense(x).sum(), dense.up.weight, create_graph=True)
    found = torch.autograd.grad(mlp(x).sum(), weights, create_graph=True)

    assert_same(torch.cat(found), truth)
    second = torch.autograd.grad(torch.cat(found).square().sum(), x)
    assert_same(second[0], torch.autograd.grad(truth.square().sum(), x)[0])
    assert all(p.grad is None for p in mlp.parameters())


def test_two_uses_add_up():
    """An MLP that is called twice before backward gets the gradients of both."""
    for home in PLACES:
        dense = Dense()
        mlp, x = tiled(dense, 3, home), batch()
        (mlp(x).sum() + mlp(2 * x).square().sum()).backward()
        (dense(x).sum() + dense(2 * x).square().sum()).backward()

        for name, layer in dense.named_children():
            assert_same(getattr(mlp, name).dense_gradient("weight"), layer.weight.grad)


def test_a_parked_tile_that_is_written_to_before_backward_is_refused():
    """Gradients would be of other values. A new iteration is right."""
    mlp, x = tiled(Dense(), 3, "disk"), batch()
    y = mlp(x)
    with torch.no_grad():
        mlp.down.tile(0, 1).weight.mul_(2)

    with pytest.raises(ParkedError, match="modified between its forward"):
        y.sum().backward()

    mlp(x).sum().backward()
    assert all(p.grad is not None for p in mlp.parameters())


def test_a_read_that_fails_leaves_the_mlp_usable():
    """The error is the home's; the next call is right."""
    home, dense = WatchedHome(), Dense()
    mlp = tiled(dense, 3, home)
    home.broken.add("read")
    with pytest.raises(HomeIOError):
        mlp(batch())
    home.broken.clear()

    assert_trains_like(mlp, dense)
    home.close()


def test_an_optimizer_steps_tiles_in_backward():
    """Parked and stepped in backward, as the dense MLP in a step of its own."""
    dense = Dense()
    mlp = tiled(dense, 4, "disk")
    ours = memtile.TileOptimizer(mlp, torch.optim.AdamW, lr=0.01, mode="in_backward")
    theirs = torch.optim.AdamW(dense.parameters(), lr=0.01)
    for _ in range(3):
        for model, optimizer in ((mlp, ours), (dense, theirs)):
            optimizer.zero_grad()
            model(batch()).square().mean().backward()
            optimizer.step()

    for name, layer in dense.named_children():
        assert_same(getattr(mlp, name).weight + 0, layer.weight)

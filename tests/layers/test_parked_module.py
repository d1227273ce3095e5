"""A parked tile as a module: moved, copied, saved, loaded, refused, read and written whole."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from leftovers import check_nothing_is_left
from parked_layers import (
    HOMES,
    assert_same_bits,
    home_called,
    parked_pair,
    resident_and_parked,
    small_model,
    weights_of,
)
from paths import GRIDS, grid_id
from torch import Tensor, nn
from torch.nn.utils import prune

import memtile
from memtile import TiledLinear, TiledLinearReturnBias
from memtile.errors import (
    ArgumentError,
    HandleError,
    HomeFullError,
    ParkedCopyWarning,
    TileClassError,
    TileDtypeError,
    TileShapeError,
)
from memtile.homes import DiskHome, allocation_of
from memtile.layers import ParkedLinear

nothing_is_left = pytest.fixture(autouse=True)(check_nothing_is_left)
in_every_grid = pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
in_every_home = pytest.mark.parametrize("home", HOMES)
X = torch.randn(5, 13, generator=torch.Generator().manual_seed(3))


def state(module: nn.Module) -> dict[str, Tensor]:
    """Copies of everything that the module holds."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def is_parked(layer: nn.Module) -> bool:
    """Whether every weight of its tiles is at a home."""
    return all(allocation_of(p) is not None for n, p in layer.named_parameters() if "weight" in n)


# Moved


@in_every_home
@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.to("cpu"),
        lambda m: m.to(torch.float32),
        lambda m: m.float(),
        lambda m: m.cpu(),
        lambda m: m.to(torch.empty(1)),
        lambda m: m.requires_grad_(False).requires_grad_(True),
        lambda m: m.eval().train(),
        lambda m: m.zero_grad(),
    ],
)
def test_what_changes_nothing_leaves_tiles_at_home(home, move: Callable[[nn.Module], object]):
    """Moving to where the tiles are, in their dtype, keeps parameters, bits and allocations."""
    _, parked = resident_and_parked(home)
    before, parameters = state(parked), list(parked.parameters())

    move(parked)

    assert all(a is b for a, b in zip(parameters, parked.parameters(), strict=True))
    assert is_parked(parked)
    assert_same_bits(state(parked), before)


# Copied and saved


@in_every_home
@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: saved_and_loaded(m),
    ],
)
def test_copies_are_ordinary_layers_in_memory_and_say_so(home, copied):
    """deepcopy, pickle and torch.save: equal bits, no parked tile, and a warning."""
    _, parked = resident_and_parked(home)
    with pytest.warns(ParkedCopyWarning, match="ordinary layer in memory"):
        reference = copied(parked)

    assert not weights_of(reference)
    assert is_parked(parked)
    assert {type(t) for _, t in reference[0].tiles()} == {nn.Linear}
    assert_same_bits(state(reference), state(parked))
    torch.testing.assert_close(reference(X), parked(X))
    with torch.no_grad():
        reference[0].tile(0, 0).weight.zero_()
    assert parked[0].tile(0, 0).weight.any()


def saved_and_loaded(value: object) -> object:
    """Through torch.save and torch.load."""
    torch.save(value, stream := io.BytesIO())
    stream.seek(0)
    return torch.load(stream, weights_only=not isinstance(value, nn.Module))


def test_a_copy_may_be_parked_again():
    """The way out that the warning names works."""
    _, parked = resident_and_parked()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ParkedCopyWarning)
        reference = copy.deepcopy(parked)

    memtile.tile(memtile.untile(reference), out_splits=2, home=DiskHome())

    assert is_parked(reference)
    torch.testing.assert_close(reference(X), parked(X))


@in_every_home
def test_state_dicts_save_exactly_the_tiles_bytes(home):
    """No storage is larger than its tensor, and a file comes back bit for bit."""
    _, parked = resident_and_parked(home)

    found = parked.state_dict()

    for value in found.values():
        assert value.untyped_storage().nbytes() == value.nbytes
    assert_same_bits(dict(saved_and_loaded(found)), dict(found))


@in_every_home
def test_every_form_of_checkpoint_loads_into_parked_tiles(home):
    """Dense names, own tiles, tiles of another grid, assigned or copied: values go home."""
    sources = [
        small_model(5),
        memtile.tile(small_model(6), out_splits=3),
        memtile.tile(small_model(7), out_splits=2, in_splits=3),
    ]
    _, parked = resident_and_parked(home)
    parameters = weights_of(parked)
    for source in sources:
        for assign in (False, True):
            parked.load_state_dict(small_model(1).state_dict())
            parked.load_state_dict(source.state_dict(), assign=assign)

            assert torch.equal(parked[0].weight + 0, source[0].weight + 0)
            assert torch.equal(parked[2].weight + 0, source[2].weight + 0)
            assert all(weights_of(parked)[n] is p for n, p in parameters.items())


@in_every_home
def test_dense_forms_can_be_read(home):
    """The `.weight` handle, its gradient, `dense_state_dict` and `to_linear` are the dense bits."""
    model = small_model()
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}
    parked = memtile.tile(model, out_splits=3, in_splits=2, home=home_called(home))
    parked(X).sum().backward()

    assert_same_bits(dict(memtile.dense_state_dict(parked)), expected)
    assert torch.equal(parked[0].to_linear().weight, expected["0.weight"])
    assert torch.equal(parked[0].weight.detach() + 0, expected["0.weight"])
    assert parked[0].weight.grad.shape == (29, 13)
    with pytest.raises(HandleError):
        parked[0].weight.zero_()


# Made


@in_every_home
@pytest.mark.parametrize("splits", [1, 4])
def test_row_tiles_start_with_nn_linears_bits(home, splits):
    """Under the same seed, as resident row tiles do."""
    torch.manual_seed(5)
    dense = nn.Linear(13, 29)
    torch.manual_seed(5)
    layer = TiledLinear(13, 29, out_splits=splits, home=home_called(home))

    assert is_parked(layer)
    assert torch.equal(layer.weight + 0, dense.weight)
    assert torch.equal(layer.bias + 0, dense.bias)


@in_every_home
@in_every_grid
def test_every_grid_starts_as_it_does_in_memory(home, grid):
    """The whole layer's distribution, the bits of resident tiles, also after a reset."""
    layers = []
    for options in ({}, {"home": home_called(home)}):
        torch.manual_seed(6)
        layers.append(TiledLinear(13, 29, out_splits=grid[0], in_splits=grid[1], **options))

    assert_same_bits(state(layers[1]), state(layers[0]))
    for layer in layers:
        torch.manual_seed(7)
        layer.reset_parameters()
    assert_same_bits(state(layers[1]), state(layers[0]))


@in_every_home
def test_init_linear_and_copy_params_from_copy_home(home):
    """Values of a dense linear, and of a parked layer of another grid."""
    dense = nn.Linear(13, 29)
    layer = TiledLinear(13, 29, out_splits=3, init_linear=dense, home=home_called(home))
    other = TiledLinear(13, 29, out_splits=2, in_splits=3, home=home_called(home))
    other.copy_params_from(layer)

    for made in (layer, other):
        assert is_parked(made)
        assert torch.equal(made.weight + 0, dense.weight)
        assert torch.equal(made.bias + 0, dense.bias)


def test_parked_linear_is_a_linear_cls():
    """With a home, which all tiles share; without one, host memory."""
    home = DiskHome()
    layer = TiledLinear(13, 29, out_splits=3, in_splits=2, linear_cls=ParkedLinear, home=home)
    other = TiledLinear(13, 29, out_splits=3, linear_cls=ParkedLinear)

    assert {t.home for _, t in layer.tiles()} == {home}
    assert len({t.home for _, t in other.tiles()}) == 1
    torch.testing.assert_close(layer(X), layer.to_linear()(X))


@in_every_home
@pytest.mark.parametrize("bias", [True, False])
def test_a_parked_linear_by_itself_is_a_linear(home, bias):
    """It starts with nn.Linear's bits and gives its results and gradients."""
    torch.manual_seed(5)
    dense = nn.Linear(13, 29, bias=bias, dtype=torch.float64)
    torch.manual_seed(5)
    parked = ParkedLinear(13, 29, bias=bias, dtype=torch.float64, home=home_called(home))
    assert_same_bits(state(parked), state(dense))

    for module in (parked, dense):
        module(X.double()).square().sum().backward()

    assert allocation_of(parked.weight) is not None
    torch.testing.assert_close(parked.weight.grad, dense.weight.grad)
    assert "home=" in repr(parked)


def test_linears_without_rows_or_columns_work():
    """A weight without elements is not read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of initialising nothing
        assert ParkedLinear(5, 0)(torch.randn(2, 5)).shape == (2, 0)
        assert ParkedLinear(0, 5, bias=False)(torch.randn(2, 0)).tolist() == [[0] * 5] * 2


def test_a_full_home_makes_no_layer(monkeypatch):
    """HomeFullError at creation, and everything taken is given back."""
    home = DiskHome()

    def full(*_: object) -> None:
        raise HomeFullError(28, "the test wants it")

    monkeypatch.setattr("memtile.homes.segments.Segments.take", full)
    with pytest.raises(HomeFullError):
        TiledLinear(13, 29, out_splits=3, home=home)


def test_a_wrong_home_is_refused():
    """Neither a home nor the name of one."""
    for home in ("disc", 3):
        with pytest.raises(ArgumentError, match="home="):
            TiledLinear(13, 29, out_splits=3, home=home)
        with pytest.raises(ArgumentError, match="home="):
            ParkedLinear(13, 29, home=home)


def test_tiles_that_return_their_bias_are_asked_for_by_name():
    """A parked tile adds its bias, so it is no tile of `TiledLinearReturnBias`, which says so."""
    layer = TiledLinearReturnBias(13, 29, out_splits=3, linear_cls=ParkedLinear)

    with pytest.raises(TileClassError, match=r"not \(output, bias\)"):
        layer(X)


# Called wrongly


@in_every_home
@in_every_grid
def test_wrong_inputs_raise_memtiles_errors_and_leave_the_layer_usable(home, grid):
    """Width, rank, dtype, no tensor: of a layer, and of a parked linear by itself."""
    _, layer = parked_pair(grid, home, dtype=torch.float32)
    alone = ParkedLinear(13, 29, home=home_called(home))
    for module in (layer, alone):
        expected = module(X)
        for wrong, error in (
            (torch.randn(5, 12), TileShapeError),
            (torch.randn(5, 14), TileShapeError),
            (torch.tensor(1.0), TileShapeError),
            (X.double(), TileDtypeError),
            (X.half(), TileDtypeError),
            (X.long(), TileDtypeError),
            (X.tolist(), TileDtypeError),
            (None, TileDtypeError),
        ):
            with pytest.raises(error):
                module(wrong)

        assert torch.equal(module(X), expected)


def test_autocast_does_not_hide_float64_weights():
    """Autocast leaves float64 alone, so float32 beside it is refused, as in torch."""
    parked = ParkedLinear(13, 29, dtype=torch.float64)

    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TileDtypeError):
        parked(X)


# Shared, hooked, pruned


@in_every_home
def test_tiles_can_be_shared(home):
    """`share_tiles_with` makes one set of tiles, whose gradients are the sum of both uses."""
    home = home_called(home)
    one = TiledLinear(13, 13, bias=False, out_splits=3, home=home)
    other = TiledLinear(13, 13, bias=False, out_splits=3, home=home)
    other.share_tiles_with(one)
    other(torch.tanh(one(X))).sum().backward()
    dense = one.to_linear()
    dense.zero_grad()
    dense(torch.tanh(dense(X))).sum().backward()

    assert other.tile(1, 0).weight is one.tile(1, 0).weight
    torch.testing.assert_close(one.weight.grad + 0, dense.weight.grad)
    with pytest.raises(TileShapeError):
        one.share_tiles_with(TiledLinear(13, 13, out_splits=2, home=home))


@in_every_home
def test_hooks_on_tiles_are_called(home):
    """Forward and full backward hooks of one parked tile, and their changes, are honoured."""
    _, layer = parked_pair((3, 1), home, dtype=torch.float32)
    calls: list[str] = []
    plain = layer(X)
    tile = layer.tile(1, 0)
    tile.register_forward_hook(lambda m, i, out: (calls.append("forward"), out * 2)[1])
    tile.register_full_backward_hook(lambda *_: calls.append("backward"))

    y = layer(X.clone().requires_grad_())
    y.sum().backward()

    rows = layer.grid.out_spans[1]
    assert torch.equal(y[:, rows.start : rows.stop], plain[:, rows.start : rows.stop] * 2)
    assert calls == ["forward", "backward"]


def test_a_pruned_tile_computes_its_weight_and_can_be_moved():
    """Where there is no parameter called weight, the computed one is used, saved and moved."""
    _, layer = parked_pair((3, 1), dtype=torch.float32)
    tile = layer.tile(0, 0)
    prune.l1_unstructured(tile, "weight", 0.5)

    y = layer.to("cpu")(X)
    y.sum().backward()
    saved = {n: v.clone() for n, v in tile.state_dict().items()}
    tile.load_state_dict(saved)

    rows = layer.grid.out_spans[0].size
    torch.testing.assert_close(y[:, :rows], nn.functional.linear(X, tile.weight, tile.bias))
    assert (tile.weight == 0).sum() == (tile.weight.numel() + 1) // 2

"""Checkpoints: every form of a layer loads, bit for bit."""

import copy
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from layer_states import State, assert_holds, assert_unchanged, dense_linear, snapshot, tiles_of
from paths import GRIDS, grid_id, pair, shuffled
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from memtile import TiledEmbedding, TiledLinear
from memtile.errors import StateDictError
from memtile.testing import LargestAllocation


class Transposed(TiledLinear):
    """A layer whose dense form keeps its weight as (in, out), as GPT-2's does."""

    weight_is_transposed: ClassVar[bool] = True


FORMS: dict[str, Callable[[nn.Linear], State]] = {
    "dense": lambda dense: dict(dense.state_dict()),
    "same grid": lambda dense: tiles_of(dense, [4, 4, 3], [7, 6]),
    "one tile": lambda dense: tiles_of(dense, [11], [13]),
    "other grid": lambda dense: tiles_of(dense, [6, 5], [5, 4, 4]),
    "single rows": lambda dense: tiles_of(dense, [1] * 11, [13]),
    "older spans": lambda dense: tiles_of(dense, [2, 2, 2, 5], [4, 4, 5]),
    "dense weight, tiled bias": lambda dense: {
        "weight": dense.weight.detach(),
        **{k: v for k, v in tiles_of(dense, [6, 5], [13]).items() if k.endswith("bias")},
    },
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("grid", [*GRIDS, (11, 13)], ids=grid_id)
def test_every_form_of_a_checkpoint_loads(grid, form):
    """Dense, the same grid, any other grid, older releases' spans: the same bits in place."""
    dense = dense_linear()
    _, layer = pair(grid)
    tiles = list(layer.parameters())

    result = layer.load_state_dict(FORMS[form](dense))

    assert_holds(layer, dense)
    assert list(result.missing_keys) == list(result.unexpected_keys) == []
    assert all(one is other for one, other in zip(tiles, layer.parameters(), strict=True))


def test_the_order_of_a_checkpoint_does_not_matter():
    """Tiles are placed by their names, never by their order."""
    dense = dense_linear()
    state = tiles_of(dense, [1] * 11, [7, 6])
    _, layer = pair((3, 2))

    layer.load_state_dict({name: state[name] for name in shuffled(list(state), seed=0)})

    assert_holds(layer, dense)


def test_the_checkpoint_itself_is_not_changed():
    """Loading reads: names and tensors of the dictionary stay as they were."""
    dense = dense_linear()
    for form in FORMS.values():
        state = form(dense)
        before = {name: (id(value), value.clone()) for name, value in state.items()}
        pair((3, 2))[1].load_state_dict(state)

        assert {name: id(value) for name, value in state.items()} == {
            name: number for name, (number, _) in before.items()
        }
        assert all(torch.equal(state[name], value) for name, (_, value) in before.items())


@pytest.mark.parametrize("form", FORMS)
def test_values_are_converted_to_the_layers_dtype(form):
    """A bf16 checkpoint loads into float64 tiles exactly, as into `nn.Linear`."""
    dense = dense_linear(dtype=torch.bfloat16)
    _, layer = pair((3, 2), dtype=torch.float64)

    layer.load_state_dict(FORMS[form](dense))

    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert torch.equal(layer.weight, dense.weight.double())


@pytest.mark.parametrize("form", FORMS)
def test_assign_gives_the_tiles_copies_of_their_own(form):
    """`assign=True` takes the checkpoint's dtype; changing one later changes not the other."""
    dense = dense_linear(dtype=torch.bfloat16)
    _, layer = pair((3, 2), dtype=torch.float32)
    layer.requires_grad_(False)
    state = FORMS[form](dense)

    layer.load_state_dict(state, assign=True)

    assert_holds(layer, dense)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in layer.parameters())
    storages = {value.untyped_storage().data_ptr() for value in state.values()}
    assert not storages & {p.untyped_storage().data_ptr() for p in layer.parameters()}
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in layer.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_assign_fills_a_layer_on_the_meta_device(form):
    """A layer made without memory gets its memory from the checkpoint."""
    dense = dense_linear()
    layer = TiledLinear(13, 11, in_splits=2, out_splits=3, device="meta")

    layer.load_state_dict(FORMS[form](dense), assign=True)

    assert_holds(layer, dense)


def test_a_meta_layer_without_assign_is_told_so_as_any_module_is():
    """torch's own warning: copying into a meta parameter does nothing."""
    layer = TiledLinear(13, 11, in_splits=2, device="meta")

    with pytest.warns(UserWarning, match="assign=True"):
        layer.load_state_dict(dense_linear().state_dict())


def test_loading_dense_names_makes_no_full_size_copy():
    """Tile by tile into place: nothing is allocated."""
    dense = dense_linear()
    _, layer = pair((3, 2))
    state = dense.state_dict()

    with LargestAllocation() as largest:
        layer.load_state_dict(state)

    assert largest.nbytes == 0


@pytest.mark.parametrize("name", ["weight", "linears.0.0.weight"])
def test_a_transposed_layer_reads_dense_names_transposed_and_tiles_as_they_are(name):
    """`weight_is_transposed` concerns the dense tensor only: tiles are (out, in) in any layer."""
    dense = dense_linear()
    layer = Transposed(13, 11, out_splits=3, in_splits=2)
    state = {"bias": dense.bias.detach(), name: dense.weight.detach()}
    if name == "weight":
        state[name] = dense.weight.detach().t().contiguous()

    layer.load_state_dict(state)

    assert torch.equal(layer.weight, dense.weight.t())
    torch.testing.assert_close(
        layer.double()(torch.ones(2, 13).double()), dense.double()(torch.ones(2, 13).double())
    )


def test_an_embedding_loads_dense_rows_and_tiles_of_any_split():
    """Rows of the vocabulary are tiles: dense, the same and another split load bit for bit."""
    torch.manual_seed(1)
    dense = nn.Embedding(11, 3)
    for state in (
        dense.state_dict(),
        TiledEmbedding.from_embedding(dense, 4).state_dict(),
        {"embeddings.0.weight": dense.weight[:2], "embeddings.1.weight": dense.weight[2:]},
    ):
        layer = TiledEmbedding(11, 3, out_splits=4)
        layer.load_state_dict(state)

        assert torch.equal(layer.weight, dense.weight)


@pytest.mark.parametrize("form", ["dense", "dense weight, tiled bias", "other grid"])
@pytest.mark.parametrize("bias", [True, False])
def test_set_model_state_dict_takes_every_form(form, bias):
    """torch adds the model's own tiles to what it is given: the given values win over them."""
    dense = dense_linear()
    model = nn.ModuleDict({"block": pair((3, 2), bias=bias)[1]})
    state = {f"block.{k}": v for k, v in FORMS[form](dense).items() if bias or "bias" not in k}

    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))

    assert torch.equal(model["block"].weight, dense.weight)
    assert not bias or torch.equal(model["block"].bias, dense.bias)


def test_own_tiles_beside_a_dense_tensor_are_nothing_that_was_given():
    """Detached as in the layer's own state dict, too; with `assign=True` the tiles are copies."""
    dense = dense_linear()
    for assign in (False, True):
        _, layer = pair((3, 2))
        layer.load_state_dict({**layer.state_dict(), **dense.state_dict()}, assign=assign)

        assert_holds(layer, dense)


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_deep_in_a_model_loads_every_form(form):
    """The prefix may be anything, and other modules of the model load beside it."""
    dense = dense_linear()
    model = nn.ModuleDict({"block": nn.Sequential(pair((3, 2))[1], nn.Linear(11, 2))})
    head = nn.Linear(11, 2)
    state = {f"block.0.{name}": value for name, value in FORMS[form](dense).items()}
    state |= {f"block.1.{name}": value for name, value in head.state_dict().items()}

    model.load_state_dict(state)

    assert_holds(model["block"][0], dense)
    assert torch.equal(model["block"][1].weight, head.weight)


def test_a_layer_loads_its_own_state_dict_with_a_parametrized_tile():
    """Parametrized tiles have names of their own, which come back; other forms are refused."""
    _, layer = pair((3, 2))
    nn.utils.parametrizations.weight_norm(layer.tile(1, 1))
    state = copy.deepcopy(layer.state_dict())
    before = snapshot(layer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()

    layer.load_state_dict(state)

    assert_unchanged(layer, before)
    with pytest.raises(StateDictError, match=r"tile \(1, 1\) computes it"):
        layer.load_state_dict(dense_linear().state_dict())
    assert_unchanged(layer, before)


def test_a_layer_whose_tiles_differ_in_dtype_loads_its_own_state_dict():
    """What the layer itself is made of is no mixture."""
    _, layer = pair((3, 2))
    layer.tile(0, 1).double()
    state = copy.deepcopy(layer.state_dict())
    before = snapshot(layer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()

    layer.load_state_dict(state)

    assert_unchanged(layer, before)


def test_tiles_with_more_state_than_a_linear_load_by_their_own_names():
    """A `linear_cls` with buffers keeps them in the state dict, below its tile's name."""

    class Counted(nn.Linear):
        def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
            super().__init__(in_features, out_features, bias)
            self.register_buffer("count", torch.tensor(7))

    layer = TiledLinear(13, 11, in_splits=2, out_splits=3, linear_cls=Counted)
    other = TiledLinear(13, 11, in_splits=2, out_splits=3, linear_cls=Counted)
    layer.tile(1, 1).count.fill_(9)

    other.load_state_dict(layer.state_dict())

    assert other.tile(1, 1).count == 9
    assert torch.equal(other.weight, layer.weight)


def test_shared_tiles_load_once_for_both_layers():
    """A tie survives loading, and both layers have the checkpoint's values."""
    dense = dense_linear()
    _, layer = pair((3, 1))
    _, other = pair((3, 1), bias=False)
    other.share_tiles_with(layer)
    model = nn.ModuleDict({"a": layer, "b": other})

    model.load_state_dict(
        {"a.weight": dense.weight, "a.bias": dense.bias, "b.weight": dense.weight}
    )

    assert torch.equal(other.weight, dense.weight)
    assert other.tile(1, 0).weight is layer.tile(1, 0).weight


class Gained(TiledLinear):
    """A subclass with a parameter of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(1))


def test_a_subclass_loads_what_it_saves():
    """Names of its own are no unknown names."""
    layer = Gained(6, 8, out_splits=2)

    layer.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()})

    assert layer.gain.item() == 2

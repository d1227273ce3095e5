"""Checkpoints that are no layer: one clear error, and not a bit of the layer changed."""

from typing import Any

import pytest
import torch
from layer_states import State, assert_unchanged, dense_linear, snapshot, tiles_of
from paths import pair
from torch import nn

from memtile import TiledLinear
from memtile.errors import StateDictError


def changed(**entries: Any) -> State:
    """A checkpoint of the layer's own grid with some entries set, or taken out by None."""
    state = tiles_of(dense_linear(), [4, 4, 3], [7, 6])
    for name, value in entries.items():
        key = name.replace("__", ".")
        if value is None:
            del state[key]
        else:
            state[key] = value
    return state


def dense_state(**entries: Any) -> State:
    """A dense checkpoint with some entries set, or taken out by None."""
    state = {**dense_linear().state_dict(), **entries}
    return {name: value for name, value in state.items() if value is not None}


BAD: dict[str, tuple[State, str]] = {
    "nothing": ({}, "has no weight and no bias"),
    "no weight": (dense_state(weight=None), "has no weight, neither dense nor in tiles"),
    "no bias": (dense_state(bias=None), "has no bias"),
    "one tile missing": (changed(linears__1__0__weight=None), r"\[\(1, 0\)\] of a 3×2 grid"),
    "one bias missing": (changed(linears__1__1__bias=None), "bias: .*missing"),
    "last row missing": (
        changed(linears__2__0__weight=None, linears__2__1__weight=None),
        r"tiles make \(8, 13\), the layer's \(11, 13\)",
    ),
    "extra name": (dense_state(scale=torch.ones(1)), r"unknown names \['scale'\]"),
    "dense and tiles": (changed(weight=torch.ones(11, 13)), "both dense and in tiles"),
    "dense width": (
        dense_state(weight=torch.ones(11, 12)),
        r"is \(11, 12\), the layer's \(11, 13\)",
    ),
    "dense rank": (dense_state(weight=torch.ones(143)), r"is \(143,\)"),
    "dense bias": (dense_state(bias=torch.ones(12)), r"bias: the checkpoint's is \(12,\)"),
    "tile width": (changed(linears__2__1__weight=torch.ones(3, 5)), "does not line up"),
    "tile rank": (changed(linears__0__0__weight=torch.ones(4)), "does not line up"),
    "another layer's tiles": (
        {
            "linears.0.0.weight": torch.ones(4, 5),
            "linears.0.1.weight": torch.ones(4, 5),
            "linears.0.1.bias": torch.ones(4),
        },
        r"tiles make \(4, 10\), the layer's \(11, 13\)",
    ),
    "two grids mixed": (changed(linears__3__0__weight=torch.ones(2, 7)), "are missing"),
    "weights and biases of two grids": (
        {
            **{k: v for k, v in changed().items() if k.endswith("weight")},
            "linears.0.0.bias": torch.ones(6),
            "linears.1.0.bias": torch.ones(5),
        },
        r"cut at rows \(0, 4, 8, 11\), its bias tiles at \(0, 6, 11\)",
    ),
    "two biases in a row": (changed(linears__0__0__bias=torch.ones(4)), "more than one for a row"),
    "two dtypes": (
        changed(linears__0__0__weight=torch.ones(4, 7).double()),
        r"different dtypes \(torch.float32, torch.float64\)",
    ),
    "no tensor": (dense_state(weight="values"), "weight is a str, not a tensor"),
    "meta tensor": (dense_state(weight=torch.ones(11, 13, device="meta")), "on the meta device"),
    "meta tile": (
        changed(linears__2__1__weight=torch.ones(3, 6, device="meta")),
        "linears.2.1.weight is on the meta device",
    ),
}
LOADED_BY_TORCH = {"nothing", "no weight", "no bias", "extra name"}  # below a model: its own words


@pytest.mark.parametrize("bad", BAD)
def test_a_checkpoint_that_is_no_layer_loads_nothing(bad):
    """Missing, extra, misshapen, mixed: one clear error that is a RuntimeError, no bit changed."""
    state, message = BAD[bad]
    _, layer = pair((3, 2))
    before = snapshot(layer)

    with pytest.raises(StateDictError, match=message) as raised:
        layer.load_state_dict(state)

    assert isinstance(raised.value, RuntimeError)
    assert "TiledLinear" in str(raised.value)
    assert_unchanged(layer, before)
    assert layer(torch.ones(2, 13)).shape == (2, 11)


@pytest.mark.parametrize(
    ("bad", "assign"),
    [
        (bad, assign)
        for bad in sorted(set(BAD) - LOADED_BY_TORCH)
        for assign in (False, True)
        if not (assign and "meta" in bad)  # assign=True may give a layer meta tensors, as in torch
    ],
)
def test_below_a_model_such_a_checkpoint_leaves_the_layer_as_it_was(bad, assign):
    """The model's own error holds the layer's sentence, and none of its tiles is changed."""
    state, message = BAD[bad]
    _, layer = pair((3, 2))
    model = nn.Sequential(nn.ReLU(), layer)
    before = snapshot(layer)

    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict({f"1.{name}": v for name, v in state.items()}, assign=assign)

    assert_unchanged(layer, before)


@pytest.mark.parametrize("bad", sorted(LOADED_BY_TORCH))
def test_below_a_model_torch_names_what_is_missing_or_unknown(bad):
    """Missing and unknown names are reported as of any module; strict=False allows them."""
    state = {f"1.{name}": value for name, value in BAD[bad][0].items()}
    model = nn.Sequential(nn.ReLU(), pair((3, 2))[1])

    with pytest.raises(RuntimeError, match=r"(Missing|Unexpected) key\(s\) in state_dict"):
        model.load_state_dict(state)
    result = model.load_state_dict(state, strict=False)

    assert bool(result.missing_keys) == (bad != "extra name")
    assert bool(result.unexpected_keys) == (bad == "extra name")


def test_strict_false_loads_what_is_there():
    """Without strict a missing bias stays, an unknown name is passed over."""
    dense = dense_linear()
    _, layer = pair((3, 2))
    bias = layer.bias.detach().clone()

    result = layer.load_state_dict({"weight": dense.weight, "other": torch.ones(1)}, strict=False)

    assert torch.equal(layer.weight, dense.weight)
    assert torch.equal(layer.bias, bias)
    assert sorted(result.missing_keys) == [f"linears.{o}.1.bias" for o in range(3)]
    assert list(result.unexpected_keys) == ["other"]


@pytest.mark.parametrize("bad", ["tile width", "dense width", "one tile missing", "two dtypes"])
def test_strict_false_does_not_load_half_a_weight(bad):
    """What does not make one weight is an error without strict too, as a wrong shape is."""
    state, message = BAD[bad]
    _, layer = pair((3, 2))
    before = snapshot(layer)

    with pytest.raises(StateDictError, match=message):
        layer.load_state_dict(state, strict=False)

    assert_unchanged(layer, before)


def test_a_bias_for_a_layer_without_one_is_refused():
    """The checkpoint has a value that the layer would lose."""
    layer = TiledLinear(13, 11, bias=False, in_splits=2)

    with pytest.raises(StateDictError, match="the layer has none; make it with bias=True"):
        layer.load_state_dict(dense_linear().state_dict())

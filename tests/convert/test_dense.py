"""Dense checkpoints of tiled models, one tensor at a time."""

import weakref

import pytest
import torch
from torch import Tensor, nn

import memtile
from memtile.errors import ArgumentError


def net() -> nn.Module:
    """Linears, a buffer, and a tie."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(13, 6), nn.BatchNorm1d(6), nn.Linear(6, 9), nn.Linear(6, 13, bias=False)
    )
    model[3].weight = model[0].weight
    return model


def test_dense_state_dict_is_the_untiled_models() -> None:
    """Names, order and bits are those of the dense model, buffers and ties included."""
    model, dense = memtile.tile(net(), out_splits=3), net().state_dict()

    found = dict(memtile.dense_state_dict(model))

    assert list(found) == list(dense)
    assert all(torch.equal(found[name], dense[name]) for name in dense)


def test_dense_state_dict_never_holds_more_than_one_tensor() -> None:
    """Each assembled tensor is free once the next is asked for."""
    model = memtile.tile(
        nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), out_splits=2, in_splits=2
    )
    previous: weakref.ref[Tensor] | None = None

    for _, tensor in memtile.dense_state_dict(model):
        assert previous is None or previous() is None or previous() is tensor
        previous = weakref.ref(tensor)
        del tensor


def test_what_is_no_module_is_refused() -> None:
    """The class that was given is named, before anything is iterated over."""
    with pytest.raises(ArgumentError, match=r"a NoneType; it must be an nn.Module"):
        memtile.dense_state_dict(None)


def test_dense_state_dict_of_one_layer() -> None:
    """A tiled layer alone gives weight and bias."""
    linear = nn.Linear(6, 9)

    found = dict(memtile.dense_state_dict(memtile.TiledLinear.from_linear(linear, 2, 3)))

    assert list(found) == ["weight", "bias"]
    assert torch.equal(found["weight"], linear.weight)
    assert torch.equal(found["bias"], linear.bias)


def test_a_dense_checkpoint_round_trips_through_tiles_of_another_grid() -> None:
    """dense → tiles → dense names → tiles of another grid keeps every bit."""
    one = memtile.tile(net(), out_splits=3)
    two = memtile.tile(net(), out_splits=2, in_splits=2)

    two.load_state_dict(dict(memtile.dense_state_dict(one)))
    memtile.untile(two)

    dense = net().state_dict()
    assert all(torch.equal(value, dense[name]) for name, value in two.state_dict().items())

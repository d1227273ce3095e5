"""Parked layers that are made without memory, and filled later."""

import pytest
import torch
from torch import nn

from memtile import DiskHome, TiledLinear
from memtile.homes import allocation_of


def weights(layer):
    return [tile.weight for _, tile in layer.tiles()]


@pytest.mark.parametrize("splits", [1, 3])
def test_a_layer_on_meta_is_parked_when_it_is_loaded(splits):
    """With assign=True its tiles get their memory at home, and the checkpoint's values."""
    torch.manual_seed(3)
    dense = nn.Linear(11, 17)
    layer = TiledLinear(11, 17, out_splits=splits, home=DiskHome(), device="meta")

    layer.load_state_dict(dense.state_dict(), assign=True)

    assert all(allocation_of(weight) is not None for weight in weights(layer))
    assert torch.equal(layer.to_linear().weight, dense.weight)
    x = torch.randn(5, 11)
    torch.testing.assert_close(layer(x), dense(x))


def test_a_layer_on_meta_is_parked_when_it_gets_memory():
    """`to_empty` allocates at home; the content is undefined, as with torch."""
    layer = TiledLinear(11, 17, out_splits=2, home=DiskHome(), device="meta")

    layer.to_empty(device="cpu")

    assert all(allocation_of(weight) is not None for weight in weights(layer))
    layer.reset_parameters()
    assert layer(torch.randn(2, 11)).isfinite().all()

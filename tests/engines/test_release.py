"""The token that lets an engine free a tile in backward changes nothing else."""

import pytest
import torch
from torch import nn

from memtile.engines.release import release_in_backward


@pytest.fixture
def tile():
    torch.manual_seed(0)
    found = nn.Linear(5, 3)
    release_in_backward(found)
    return found


def test_a_tile_whose_input_needs_no_gradient_gets_an_input_that_does(tile):
    """Engines hook an input that requires grad."""
    seen = []
    tile.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    tile(torch.ones(2, 5))

    assert [each.requires_grad for each in seen] == [False, True]


def test_gradients_are_those_of_the_plain_tile(tile):
    """Bit for bit: the token does not change them."""
    plain = nn.Linear(5, 3)
    plain.load_state_dict(tile.state_dict())
    x = torch.randn(4, 5)
    tile(x).square().sum().backward()
    plain(x).square().sum().backward()

    assert torch.equal(tile.weight.grad, plain.weight.grad)
    assert torch.equal(tile.bias.grad, plain.bias.grad)


def test_an_input_by_its_name_is_one_by_position(tile):
    """`layer(input=x)` of a layer without tiles works as before, and gets its token."""
    seen, x = [], torch.ones(2, 5)
    expected = tile(x)
    tile.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))

    assert torch.equal(tile(input=x), expected)
    assert [each.requires_grad for each in seen] == [False, True]
    with pytest.raises(TypeError):
        tile(other=x)
    with pytest.raises(TypeError):
        tile()


@pytest.mark.parametrize("trains", [True, False])
def test_what_has_an_input_with_gradient_or_does_not_train_is_left_alone(tile, trains):
    """No token where the engine sees an input by itself, or where there is no backward."""
    tile.requires_grad_(trains)
    seen = []
    tile.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    tile(torch.ones(2, 5, requires_grad=trains))

    assert len(seen) == 1


@pytest.mark.parametrize("requires_grad", [True, False])
def test_the_result_may_be_changed_in_place(tile, requires_grad):
    """It is no view, as a linear's of three dimensions is: FSDP2's hooks would be lost."""
    result = tile(torch.ones(1, 2, 5, requires_grad=requires_grad))

    assert not result._is_view()
    result += 1
    result.sum().backward()
    assert torch.equal(tile.bias.grad, torch.full((3,), 2.0))


def test_a_result_that_backward_needs_is_guarded_still():
    """A tanh saves its result for backward: torch still raises where it was written in place."""
    tile = nn.Sequential(nn.Linear(5, 3), nn.Tanh())
    release_in_backward(tile)
    result = tile(torch.ones(2, 5))
    result += 1

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()

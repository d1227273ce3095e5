"""What others put in the place of gradients, state and values is used."""

import copy

import pytest
import torch
from small_training import (
    HOMES,
    MODES,
    batches,
    in_home,
    loss_of,
    optimizer_for,
    same,
    small,
    train,
    values,
)
from torch import nn, optim

from memtile.homes import allocation_of


@pytest.fixture(params=HOMES)
def home(request):
    """The name of a home."""
    return request.param


def _trained(home, mode="classic"):
    model = in_home(small(), home)
    optimizer = optimizer_for(model, mode=mode)
    train(model, optimizer, batches(1))
    return model, optimizer


def _plain_copy(optimizer, parameter):
    """Plain torch over a copy of one parameter, with a copy of its state."""
    reference = nn.Parameter(parameter.detach().clone())
    plain = optim.AdamW([reference], lr=0.01)
    plain.state[reference] = {k: v.clone() for k, v in optimizer.state[parameter].items()}
    return reference, plain


def _step_both(optimizer, parameter, reference, plain):
    reference.grad = parameter.grad.clone()
    plain.step()
    optimizer.step()


def _parameters(model):
    """A parked tile, a tied one, and a bias."""
    return [model.up.tile(1, 0).weight, model.head.tile(1, 0).weight, model.norm.bias]


def test_a_moment_that_was_replaced(home):
    """Another tensor put into the state is used and updated in place from then on."""
    model, optimizer = _trained(home)
    for parameter in _parameters(model):
        other = torch.full_like(parameter.detach(), 0.25)
        optimizer.state[parameter]["exp_avg"] = other
        reference, plain = _plain_copy(optimizer, parameter)
        parameter.grad = torch.ones_like(parameter)

        _step_both(optimizer, parameter, reference, plain)

        assert torch.equal(parameter, reference)
        assert optimizer.state[parameter]["exp_avg"] is other
        assert torch.equal(other, plain.state[reference]["exp_avg"])
        optimizer.zero_grad()


def test_a_moment_that_was_written_to(home):
    """A moment in a home that is written in place between steps is used as written."""
    model, optimizer = _trained(home)
    for parameter in _parameters(model):
        optimizer.state[parameter]["exp_avg"].fill_(0.25)
        reference, plain = _plain_copy(optimizer, parameter)
        parameter.grad = torch.ones_like(parameter)

        _step_both(optimizer, parameter, reference, plain)

        assert torch.equal(parameter, reference)
        assert torch.equal(optimizer.state[parameter]["exp_avg"], plain.state[reference]["exp_avg"])
        optimizer.zero_grad()


def test_state_that_was_dropped(home):
    """A parameter whose state was cleared starts anew, as with torch."""
    model, optimizer = _trained(home)
    parameter = model.up.tile(1, 0).weight
    optimizer.state[parameter].clear()
    reference = nn.Parameter(parameter.detach().clone())
    plain = optim.AdamW([reference], lr=0.01)
    parameter.grad = torch.ones_like(parameter)

    _step_both(optimizer, parameter, reference, plain)

    assert torch.equal(parameter, reference)
    assert optimizer.state[parameter]["step"] == 1


def test_a_gradient_that_was_assigned(home):
    """An ordinary tensor that replaces a gradient in a home is stepped with, and stays."""
    model, optimizer = _trained(home)
    loss_of(model, batches(1)[0]).backward()
    for parameter in _parameters(model):
        assigned = torch.full_like(parameter.detach(), 0.5)
        parameter.grad = assigned
        reference, plain = _plain_copy(optimizer, parameter)

        reference.grad = assigned.clone()
        plain.step()
        others = [p for p in model.parameters() if p is not parameter]
        kept = [p.grad for p in others]
        for other in others:
            other.grad = None
        optimizer.step()
        for other, gradient in zip(others, kept, strict=True):
            other.grad = gradient

        assert torch.equal(parameter, reference)
        assert parameter.grad is assigned
        assert torch.equal(assigned, torch.full_like(assigned, 0.5))


def test_backward_adds_to_an_assigned_gradient(home):
    """A gradient that was set before backward is added to, not overwritten."""
    (model, _), (reference, _) = _trained(home), _trained(home)
    ones = {p: torch.ones_like(p) for p in _parameters(model)}
    for parameter, gradient in ones.items():
        parameter.grad = gradient

    for each in (model, reference):
        loss_of(each, batches(1)[0]).backward()

    for parameter, other in zip(_parameters(model), _parameters(reference), strict=True):
        assert parameter.grad is ones[parameter]
        torch.testing.assert_close(parameter.grad - 1, other.grad, rtol=0, atol=1e-6)


def test_gradients_written_in_place(home):
    """Gradients in a home that are changed in place are stepped with as changed."""
    model, optimizer = _trained(home)
    loss_of(model, batches(1)[0]).backward()
    pairs = [(parameter, *_plain_copy(optimizer, parameter)) for parameter in _parameters(model)]
    for parameter, reference, _ in pairs:
        parameter.grad.mul_(-3)
        reference.grad = parameter.grad.clone()

    optimizer.step()

    for parameter, reference, plain in pairs:
        plain.step()
        assert torch.equal(parameter, reference)


def test_a_parameter_without_a_gradient_is_left_alone(home):
    """Without a gradient the parameter and its state stay as they are."""
    model, optimizer = _trained(home)
    loss_of(model, batches(1)[0]).backward()
    parameters = _parameters(model)
    before = [(p.detach().clone(), copy.deepcopy(optimizer.state[p])) for p in parameters]
    for parameter in parameters:
        parameter.grad = None

    optimizer.step()

    for parameter, (value, state) in zip(parameters, before, strict=True):
        assert torch.equal(parameter, value)
        assert all(torch.equal(optimizer.state[parameter][k], v) for k, v in state.items())


@pytest.mark.parametrize("mode", MODES)
def test_values_that_were_swapped(home, mode):
    """`p.data = other` moves a parameter away: the other memory is used and stepped."""
    (model, optimizer), (reference, reference_optimizer) = (
        _trained(home, mode),
        _trained(home, mode),
    )
    swapped = {}
    for parameter, other in zip(_parameters(model), _parameters(reference), strict=True):
        new = parameter.detach() * 1.5
        parameter.data, swapped[parameter] = new, new
        other.data.copy_(new)

    losses = [
        train(*pair, batches(2)) for pair in ((model, optimizer), (reference, reference_optimizer))
    ]

    assert losses[0] == losses[1]
    assert same(values(model), values(reference))
    for parameter, new in swapped.items():
        assert allocation_of(parameter) is None
        assert parameter.data_ptr() == new.data_ptr()


@pytest.mark.parametrize("mode", MODES)
def test_weights_written_between_steps(home, mode):
    """Averaged weights swapped in and out through `.data` are seen by every iteration."""
    (model, optimizer), (reference, reference_optimizer) = (
        _trained(home, mode),
        _trained(home, mode),
    )
    kept = values(model)
    for parameter in model.parameters():
        parameter.data.mul_(0.5)
    with torch.no_grad():
        halved = loss_of(model, batches(1)[0])
    model.load_state_dict(kept)

    losses = train(model, optimizer, batches(2))

    assert losses == train(reference, reference_optimizer, batches(2))
    assert halved != losses[0]
    assert same(values(model), values(reference))


def test_another_optimizer_on_the_same_parameters():
    """A plain torch optimizer steps parked tiles too; `TileOptimizer` goes on from its values."""
    runs = []
    for home in HOMES:
        model, optimizer = _trained(home)
        losses = train(model, optim.SGD(model.parameters(), lr=0.1, foreach=False), batches(1))
        losses += train(model, optimizer, batches(2))
        runs.append((losses, values(model)))

    assert all(losses == runs[0][0] and same(ours, runs[0][1]) for losses, ours in runs)

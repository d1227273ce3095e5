"""Clipping in classic mode: gradients at home are scaled as dense ones are."""

import gc
import math
from collections import Counter
from functools import wraps

import pytest
import torch
from small_training import HOMES, batches, in_home, loss_of, optimizer_for, same, small
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from memtile import DiskHome, TiledLinear
from memtile.errors import ArgumentError, OptimizerError
from memtile.homes import Allocation, allocation_of
from memtile.optim.clipping import _cells

FLOAT32_ROUNDING = 1e-5  # of a norm over some hundred values, summed in another order


@pytest.fixture(params=HOMES)
def home(request):
    """The name of a home."""
    return request.param


def _with_gradients(home):
    model = in_home(small(), home)
    optimizer = optimizer_for(model)
    loss_of(model, batches(1)[0]).backward()
    return model, optimizer


def _dense():
    model = small()
    loss_of(model, batches(1)[0]).backward()
    return model


def _gradients(model):
    return {n: p.grad.clone() if p.grad is not None else None for n, p in model.named_parameters()}


def _joined(model):
    """Gradients under dense names."""
    names = ("embed", "up", "twice", "down")
    found = {f"{name}.weight": getattr(model, name).weight.grad for name in names}
    found |= {f"{name}.bias": getattr(model, name).bias.grad for name in names[1:]}
    return {**found, "norm.weight": model.norm.weight.grad, "norm.bias": model.norm.bias.grad}


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        *(({"max_norm": value}, "of at least 0") for value in ("a", None, math.nan, -1, True)),
        *(({"max_norm": 1.0, "norm_type": value}, "2.0 or inf") for value in ("a", None, math.nan)),
    ],
)
def test_what_is_no_norm_is_refused(wrong, rule):
    """No gradient is scaled, where a NaN or a negative limit would spoil all of them."""
    model, optimizer = _with_gradients("disk")
    before = _gradients(model)

    with pytest.raises(ArgumentError, match=f"must be a number .*{rule}"):
        optimizer.clip_grad_norm_(**wrong)

    assert same(_gradients(model), before)
    optimizer.clip_grad_norm_(torch.tensor(0.1))
    assert not same(_gradients(model), before)


def test_gradients_written_after_their_norm_was_asked_for_are_seen():
    """After a norm without scaling, a second one reads the gradients again."""
    model = TiledLinear(7, 5, out_splits=2, home=DiskHome())  # fewer gradients than slabs
    optimizer = optimizer_for(model)
    model(torch.randn(3, 7)).square().sum().backward()
    norm = optimizer.clip_grad_norm_(math.inf)

    for parameter in model.parameters():
        parameter.grad.data.mul_(2)

    assert torch.equal(optimizer.clip_grad_norm_(math.inf), 2 * norm)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0, math.inf])
@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_it_clips_as_torch_clips_dense_gradients(home, max_norm, norm_type):
    """Norm and clipped gradients are the dense ones within rounding; a large limit scales none."""
    (model, optimizer), dense = _with_gradients(home), _dense()
    before = _gradients(model)

    norm = optimizer.clip_grad_norm_(max_norm, norm_type)
    expected = nn.utils.clip_grad_norm_(dense.parameters(), max_norm, norm_type)

    torch.testing.assert_close(norm, expected, rtol=FLOAT32_ROUNDING, atol=0)
    for name, ours in _joined(model).items():
        theirs = dense.get_parameter(name).grad
        scale = FLOAT32_ROUNDING * theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=scale)
    assert same(_gradients(model), before) == (max_norm > 1)


@pytest.mark.parametrize("foreach", [False, True])
def test_torchs_own_clipping_works_too(home, foreach):
    """`torch.nn.utils.clip_grad_norm_` clips the gradients at home, and the step uses them."""
    (model, optimizer), (other, others) = _with_gradients(home), _with_gradients(home)

    ours = optimizer.clip_grad_norm_(0.1)
    theirs = nn.utils.clip_grad_norm_(other.parameters(), 0.1, foreach=foreach)

    torch.testing.assert_close(ours, theirs, rtol=FLOAT32_ROUNDING, atol=0)
    for name, gradient in _gradients(model).items():
        expected = other.get_parameter(name).grad
        scale = FLOAT32_ROUNDING * expected.abs().max().item()
        torch.testing.assert_close(gradient, expected, rtol=0, atol=scale)
    optimizer.step()
    others.step()
    scale = FLOAT32_ROUNDING * 1e3  # Adam's first step divides small gradients by themselves
    for ours_p, theirs_p in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours_p, theirs_p, rtol=0, atol=scale * 0.01)


def test_clipped_gradients_are_what_is_stepped(home):
    """The step after clipping uses the clipped values, not values that were read before."""
    model = in_home(small(), home)
    optimizer = optimizer_for(model, torch.optim.SGD, lr=1.0)
    loss_of(model, batches(1)[0]).backward()
    before = [parameter.detach().clone() for parameter in model.parameters()]

    optimizer.clip_grad_norm_(0.01)
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    optimizer.step()

    assert all(
        torch.equal(parameter.detach(), old - gradient)
        for parameter, old, gradient in zip(model.parameters(), before, gradients, strict=True)
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite(home, bad):
    """By default it scales as torch does; with error_if_nonfinite it raises and scales nothing."""
    (model, optimizer), dense = _with_gradients(home), _dense()
    model.up.tile(1, 0).weight.grad[0, 0] = bad
    dense.up.weight.grad[7, 0] = bad
    before = {name: gradient.nan_to_num(7.0) for name, gradient in _gradients(model).items()}

    with pytest.raises(OptimizerError, match=f"the norm of the gradients is {bad}"):
        optimizer.clip_grad_norm_(0.1, error_if_nonfinite=True)

    after = {name: gradient.nan_to_num(7.0) for name, gradient in _gradients(model).items()}
    assert same(after, before)
    norm = optimizer.clip_grad_norm_(0.1)
    expected = nn.utils.clip_grad_norm_(dense.parameters(), 0.1)
    torch.testing.assert_close(norm, expected, equal_nan=True)
    for name, ours in _joined(model).items():
        torch.testing.assert_close(ours, dense.get_parameter(name).grad, equal_nan=True)


def test_without_gradients_the_norm_is_zero(home):
    """Without gradients the norm is 0, as in torch."""
    optimizer = optimizer_for(in_home(small(), home))

    assert optimizer.clip_grad_norm_(1.0) == 0


def test_gradients_stay_at_home(monkeypatch):
    """Clipping keeps every gradient's tensor and home, reads each twice and writes it once."""
    model, optimizer = _with_gradients("disk")
    gradients = [parameter.grad for parameter in model.parameters()]
    allocations = {each for each in map(allocation_of, gradients) if each}
    moved = Counter()
    for name in ("read", "write"):  # backward's read-ahead may still be under way: not counted
        monkeypatch.setattr(Allocation, name, _counting(getattr(Allocation, name), moved))

    optimizer.clip_grad_norm_(0.1)

    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    rooms = {allocation: allocation.room for allocation in allocations}
    assert {each: moved[each, "write"] for each in rooms} == rooms
    assert {each: moved[each, "read"] for each in rooms} == {k: 2 * v for k, v in rooms.items()}


def _counting(real, moved):
    """`Allocation.read` or `write` that adds the bytes to those of the allocation."""

    @wraps(real)
    def count(self, tensor, start=0):
        moved[self, real.__name__] += tensor.numel()
        real(self, tensor, start)

    return count


def test_only_what_it_optimizes_is_clipped(home):
    """Gradients of parameters that the optimizer does not have are neither counted nor scaled."""
    model = in_home(small(), home)
    optimizer = optimizer_for(model, params=model.down.parameters())
    loss_of(model, batches(1)[0]).backward()
    before, norms = _gradients(model), [p.grad.norm() for p in model.down.parameters()]

    norm = optimizer.clip_grad_norm_(0.01)

    torch.testing.assert_close(norm, torch.stack(norms).norm(), rtol=FLOAT32_ROUNDING, atol=0)
    changed = {n for n, g in _gradients(model).items() if not torch.equal(g, before[n])}
    assert changed == {n for n in before if n.startswith("down.")}


# What torch clips where gradients are gone, under names that were imported before


def _clip_with_norm(parameters, limit):
    nn.utils.clip_grads_with_norm_(parameters, limit, torch.tensor(9.0))


CLIPS = (
    pytest.param(clip_grad_norm_, id="clip_grad_norm_"),
    pytest.param(lambda p, limit: clip_grad_norm_(max_norm=limit, parameters=p), id="by name"),
    pytest.param(clip_grad_value_, id="clip_grad_value_"),
    pytest.param(_clip_with_norm, id="clip_grads_with_norm_"),
)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("given", [iter, list, lambda parameters: next(iter(parameters))])
def test_torch_refuses_to_clip_what_is_stepped_in_backward(clip, given):
    """torch's clipping refuses in-backward parameters, however it was imported and is called."""
    model = in_home(small(), "disk")
    optimizer = optimizer_for(model, mode="in_backward")
    loss_of(model, batches(1)[0]).backward()

    with pytest.raises(OptimizerError, match=r"stepped in backward.*max_grad_norm=0"):
        clip(given(model.parameters()), 1.0)

    optimizer.step()


def test_torch_clips_everything_else_meanwhile():
    """Other models are clipped as usual, and an infinite limit gives the norm."""
    model, dense, reference = in_home(small(), "disk"), _dense(), _dense()
    expected = clip_grad_norm_(reference.parameters(), 0.1)
    clip_grad_value_(reference.parameters(), 0.001)
    optimizer = optimizer_for(model, mode="in_backward")

    norm = clip_grad_norm_(dense.parameters(), 0.1)
    clip_grad_value_(dense.parameters(), 0.001)

    assert torch.equal(norm, expected)
    assert same(_gradients(dense), _gradients(reference))
    assert clip_grad_norm_(model.parameters(), math.inf) == 0
    with pytest.warns(UserWarning, match="empty generator"):
        assert clip_grad_norm_((p for p in ()), 1.0) == 0
    assert optimizer.mode == "in_backward"


def test_torchs_functions_are_its_own_again():
    """torch's functions have the check until the last in-backward optimizer is gone."""
    model, other = in_home(small(), "disk"), in_home(small(), "disk")
    before = _called()
    optimizers = [optimizer_for(each, mode="in_backward") for each in (model, other)]
    during = _called()

    del optimizers[0]
    gc.collect()
    assert _called() == during
    optimizers.clear()
    gc.collect()

    assert len(before) == 3
    assert all(ours is not theirs for ours, theirs in zip(during, before, strict=True))
    assert _called() == before
    loss_of(model, batches(1)[0]).backward()
    assert clip_grad_norm_(model.parameters(), 1.0) > 0


def _called():
    """What torch's functions for clipping call."""
    return [cell.cell_contents for cell in _cells()]

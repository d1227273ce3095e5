"""Optimizers that cannot step pieces are refused by name, with the rule and the way out."""

from typing import Any

import pytest
import torch
from threads import together
from torch import nn, optim

from memtile.errors import OptimizerError
from memtile.optim.slice_optimizer import SliceOptimizer

WAY_OUT = r"use it in an optimizer of its own, on parameters that are not parked"


class OfValues(optim.Optimizer):
    """What the users' optimizers below have in common."""

    def __init__(self, params: Any, lr: float = 1e-3, limit: float = 1.0):
        super().__init__(params, {"lr": lr, "limit": limit})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(self.update(p, group), alpha=group["lr"])

    def update(self, p: nn.Parameter, group: dict[str, Any]) -> torch.Tensor:
        return p.grad


class Clipped(OfValues):
    def update(self, p, group):
        return p.grad * min(1.0, group["limit"] / float(p.grad.norm()))


class Lamb(OfValues):
    def update(self, p, group):
        return p.grad * p.norm() / p.grad.norm()


class RowWise(OfValues):
    def update(self, p, group):
        return p.grad / p.grad.norm(dim=-1, keepdim=True)


class ColumnWise(OfValues):
    def update(self, p, group):
        return p.grad / p.grad.norm(dim=0, keepdim=True)


class CountsItself(OfValues):
    count = 0

    def step(self, closure=None):
        self.count += 1
        super().step()

    def update(self, p, group):
        return p.grad / self.count


class KeepsItsParameters(OfValues):
    def __init__(self, params: Any, **options: Any):
        super().__init__(params, **options)
        self.all = [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.all:
            p.sub_(p.grad)


class CountsInGroup(OfValues):
    def update(self, p, group):
        group["k"] = group.get("k", 0) + 1
        return p.grad / group["k"]


class Noisy(OfValues):
    def update(self, p, group):
        return p.grad + torch.rand_like(p)


class NoisyIn16Bits(OfValues):
    def update(self, p, group):
        return p.grad + torch.rand_like(p) if p.dtype == torch.bfloat16 else p.grad


class ManyBuffers(OfValues):
    def update(self, p, group):
        self.state[p]["buffers"] = [p.grad.clone(), p.grad.clone()]
        return p.grad


class Unable(OfValues):
    def update(self, p, group):
        raise KeyError("nothing here.")


def refusal(optimizer_class: Any, options: dict[str, Any] | None = None) -> str:
    with pytest.raises(OptimizerError) as caught:
        SliceOptimizer(optimizer_class, options or {})
    return str(caught.value)


@pytest.mark.parametrize("optimizer_class", [Clipped, Lamb, RowWise, ColumnWise, CountsItself])
def test_what_looks_beyond_a_value_is_refused(optimizer_class):
    """Norms, row and column means, and own step counts make slices differ: refused."""
    message = refusal(optimizer_class)

    assert message.startswith(
        f"{optimizer_class.__name__} is not element-wise: given no options, a torch"
    )
    assert WAY_OUT in message


@pytest.mark.parametrize("lr", [0.0, 1e-9, 10.0])
def test_the_check_sees_whatever_the_lr(lr):
    """The check does not use a warm-up's first lr of 0, at which no value changes."""
    assert "not element-wise" in refusal(Clipped, {"lr": lr})
    assert SliceOptimizer(optim.AdamW, {"lr": lr}).defaults["lr"] == lr


@pytest.mark.skipif(not hasattr(optim, "Muon"), reason="Muon came with torch 2.9")
def test_muon_is_refused():
    """Muon, which orthogonalises the whole matrix, is refused."""
    assert refusal(optim.Muon).startswith("Muon is not element-wise: given no options, a torch.f")


@pytest.mark.skipif(not hasattr(optim, "Adafactor"), reason="Adafactor came with torch 2.5")
def test_adafactor_is_refused():
    """Adafactor keeps a moment for each row and column, so no state of a tile's shape: refused."""
    message = refusal(optim.Adafactor)

    assert message.startswith("Adafactor keeps 'row_var', a Tensor of shape (6, 1), for a param")
    assert WAY_OUT in message


def test_counts_in_the_parameter_group_are_named():
    """An optimizer that counts steps in its parameter group is refused with what it counts."""
    message = refusal(CountsInGroup)

    assert message.startswith("CountsInGroup is not element-wise: given no options, it counts 'k'")


def test_parameters_kept_outside_the_groups_are_refused():
    """An optimizer that steps only the parameters it was constructed with is refused."""
    message = refusal(KeepsItsParameters)

    assert message.startswith("KeepsItsParameters steps only what it was constructed with")


@pytest.mark.parametrize("in_group", [False, True])
def test_fused_sgd_is_refused_where_it_leaves_values_out(in_group):
    """torch's fused SGD skips most values in 16 bits on the CPU (pytorch#191763): refused."""
    if fused_sgd_steps_all():
        pytest.skip("this torch steps all values: pytorch#191763 is mended in it")
    inner = SliceOptimizer(optim.SGD, {} if in_group else {"fused": True})

    with pytest.raises(OptimizerError, match=r"SGD is not element-wise: .*a torch.bfloat16 matrix"):
        inner.state_dtypes({**inner.defaults, "fused": True}, torch.bfloat16)
    assert inner.state_dtypes({**inner.defaults, "fused": True}, torch.float32) == {}


def fused_sgd_steps_all() -> bool:
    parameter = nn.Parameter(torch.zeros(64, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    optim.SGD([parameter], lr=1.0, fused=True).step()
    return bool((parameter == -1).all())


def test_random_steps_are_refused():
    """An optimizer that draws random numbers is refused; torch's generator is left as it was."""
    before = torch.get_rng_state()

    assert refusal(Noisy).startswith("Noisy draws random numbers in its step")
    assert torch.equal(before, torch.get_rng_state())


def test_random_steps_in_one_dtype_are_refused_for_it():
    """Stochastic rounding, in 16 bits only, is refused when 16-bit state is asked for."""
    inner = SliceOptimizer(NoisyIn16Bits, {})

    assert inner.state_dtypes(inner.defaults, torch.float32) == {}
    with pytest.raises(OptimizerError, match="NoisyIn16Bits draws random numbers"):
        inner.state_dtypes(inner.defaults, torch.bfloat16)


class Neighboured(optim.SGD):
    """Another thread draws random numbers while this one steps."""

    def step(self, closure=None):
        together(lambda: torch.rand(3))
        return super().step(closure)


def test_random_numbers_of_other_threads_are_left_alone():
    """Random draws of another thread during the check do not matter, and are not repeated."""
    before = torch.get_rng_state()

    SliceOptimizer(Neighboured, {"lr": 0.1})

    assert not torch.equal(before, torch.get_rng_state())


def test_the_construction_draws_no_random_numbers():
    """Constructing leaves torch's random numbers as they were."""
    before = torch.get_rng_state()

    SliceOptimizer(optim.AdamW, {})

    assert torch.equal(before, torch.get_rng_state())


def test_closures_are_refused():
    """LBFGS needs a closure, to run the model in its step: refused."""
    assert refusal(optim.LBFGS).startswith("LBFGS needs a closure in step()")


def test_sparse_gradients_are_refused():
    """SparseAdam is refused since it takes no dense gradient, and the message says so."""
    assert refusal(optim.SparseAdam).startswith("SparseAdam steps sparse gradients only;")


def test_several_tensors_in_one_entry_are_refused():
    """An optimizer that keeps its buffers in a list is refused."""
    message = refusal(ManyBuffers)

    assert message.startswith("ManyBuffers keeps 'buffers', a Tensor of shape (6, 10), for a param")


def test_a_failing_step_is_refused_with_its_reason():
    """An error of a step on a small matrix is in the message, and is the exception's cause."""
    with pytest.raises(OptimizerError, match=r"Unable cannot step .*nothing here") as caught:
        SliceOptimizer(Unable, {})

    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("given", [3, None, nn.Linear, optim.AdamW.step])
def test_what_is_no_optimizer_class_is_refused(given):
    """Anything but a subclass of `torch.optim.Optimizer` is refused, with what to give instead."""
    assert "is no optimizer class; give a subclass of torch.optim.Optimizer" in refusal(given)


def test_an_instance_is_refused():
    """An optimizer instance is refused; the message asks for its class."""
    message = refusal(optim.SGD([torch.ones(1)]))

    assert message.startswith("SGD was given as an instance")
    assert message.endswith("give the class SGD, and its options by name")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"lr": -1.0}, "(lr=-1.0): Invalid learning rate: -1.0"),
        ({"momentum": 0.9}, "unexpected keyword argument 'momentum'"),
        ({"fused": True, "foreach": True}, "cannot be `True` together"),
    ],
    ids=["value", "name", "combination"],
)
def test_options_that_the_class_refuses_are_named(options, reason):
    """Options that the constructor refuses are in the message, with its own reason."""
    message = refusal(optim.AdamW, options)

    assert message.startswith("AdamW does not take the options (")
    assert reason in message


def test_differentiable_steps_are_refused():
    """differentiable=True is refused, as an option and as a group's."""
    assert "AdamW was given differentiable=True" in refusal(optim.AdamW, {"differentiable": True})
    with pytest.raises(OptimizerError, match="differentiable=False"):
        SliceOptimizer(optim.AdamW, {}).state_dtypes({"differentiable": True}, torch.float32)


def test_a_dtype_that_cannot_be_stepped_is_refused():
    """A dtype that the optimizer cannot step is refused with OptimizerError."""
    with pytest.raises(OptimizerError, match=r"SGD cannot step a dense torch\.int32 parameter"):
        SliceOptimizer(optim.SGD, {"lr": 0.5}).state_dtypes({"lr": 0.5}, torch.int32)

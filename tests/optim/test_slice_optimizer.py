"""A piece is stepped as torch would step it as a parameter, and nothing of it is kept."""

import functools
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from memtile.optim.slice_optimizer import ParameterSlice, SliceOptimizer

STEPS = 5


class Lion(optim.Optimizer):
    """A user's optimizer: no `no_grad`, lazily made state, an entry replaced at each step."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99)):
        super().__init__(params, {"lr": lr, "betas": betas})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p not in self.state:
                    self.state[p] = {"average": torch.zeros_like(p)}
                average, (first, second) = self.state[p]["average"], group["betas"]
                p.data.add_(average.lerp(p.grad, 1 - first).sign(), alpha=-group["lr"])
                self.state[p]["average"] = average.lerp(p.grad, 1 - second)


class HalfWay(optim.SGD):
    """Fails once it has stepped, when its group says so."""

    def step(self, closure=None):
        super().step()
        if self.param_groups[0].get("fails"):
            raise ValueError("half-way")


CASES: list[tuple[type[optim.Optimizer], dict[str, Any]]] = [
    (optim.SGD, {}),
    (optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (optim.SGD, {"momentum": 0.9, "dampening": 0.1, "maximize": True}),
    (optim.SGD, {"weight_decay": 0.1, "foreach": True}),
    (optim.SGD, {"weight_decay": torch.tensor(0.1)}),
    (optim.Adam, {"weight_decay": 0.1}),
    (optim.Adam, {"lr": torch.tensor(1e-3)}),
    (optim.AdamW, {}),
    (optim.AdamW, {"amsgrad": True, "maximize": True}),
    (optim.AdamW, {"fused": True, "amsgrad": True}),
    (optim.AdamW, {"fused": True, "maximize": True, "lr": torch.tensor(1e-3)}),
    (optim.Adam, {"fused": True, "maximize": True, "weight_decay": 0.1}),
    (optim.AdamW, {"foreach": True}),
    (optim.Adam, {"fused": True, "betas": [0.8, 0.9], "weight_decay": 0.1}),
    (optim.NAdam, {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    (optim.RAdam, {}),
    (optim.Adagrad, {"initial_accumulator_value": 0.5, "lr_decay": 0.1}),
    (optim.Adagrad, {"fused": True, "lr_decay": 0.1, "weight_decay": 0.1, "maximize": True}),
    (optim.RMSprop, {"centered": True, "momentum": 0.9}),
    (optim.Adadelta, {}),
    (optim.Adamax, {}),
    (optim.ASGD, {"t0": 2}),
    (optim.Rprop, {}),
    (Lion, {}),
]


def case_id(value: object) -> str:
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, torch.dtype):
        return str(value)
    return ",".join(f"{key}={v}" for key, v in value.items()) if isinstance(value, dict) else ""


def gradients(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape).to(dtype) for _ in range(STEPS)]


def lr_at(step: int, defaults: dict[str, Any]) -> Any:
    return defaults["lr"] * (1 - 0.1 * step)


@pytest.mark.parametrize(
    ("optimizer_class", "options", "dtype"),
    [
        *((*case, dtype) for case in CASES for dtype in (torch.float32, torch.bfloat16)),
        # in float32, where all torches step every value
        (optim.SGD, {"fused": True, "weight_decay": 0.1, "maximize": True}, torch.float32),
        (optim.SGD, {"fused": True, "momentum": 0.9, "nesterov": True}, torch.float32),
        (optim.SGD, {"fused": True, "momentum": 0.9, "dampening": 0.1}, torch.float32),
    ],
    ids=case_id,
)
def test_steps_as_torch_does(optimizer_class, options, dtype):
    """Two slices stepped together, lr changing, equal two parameters of torch bit for bit."""
    inner = SliceOptimizer(optimizer_class, options)
    starts = [torch.randn(7, 5).to(dtype), torch.randn(13).to(dtype)]
    rounds = [gradients(start.shape, dtype) for start in starts]
    parameters = [nn.Parameter(start.clone()) for start in starts]
    plain = [optimizer_class([parameter], **options) for parameter in parameters]
    values, states = [start.clone() for start in starts], [{}, {}]

    for step in range(STEPS):
        lr = lr_at(step, inner.defaults)
        for optimizer, parameter, grads in zip(plain, parameters, rounds, strict=True):
            optimizer.param_groups[0]["lr"] = lr
            parameter.grad = grads[step].clone()
            optimizer.step()
        pieces = [
            ParameterSlice(v, r[step].clone(), s)
            for v, r, s in zip(values, rounds, states, strict=True)
        ]
        inner.step(pieces, {**inner.defaults, "lr": lr})

    for value, state, parameter, optimizer in zip(values, states, parameters, plain, strict=True):
        assert torch.equal(value, parameter)
        expected = optimizer.state[parameter]
        assert state.keys() == expected.keys()
        assert all(
            torch.equal(torch.as_tensor(state[k]), torch.as_tensor(v))
            for k, v in expected.items()
            if v is not None
        )


def test_a_step_that_someone_replaced_is_called(monkeypatch):
    """torch's bare kernel stands for torch's own step only."""
    own, calls = optim.AdamW.step, []

    def step(self, closure=None):
        calls.append(self)
        return own(self)

    monkeypatch.setattr(optim.AdamW, "step", step)
    inner = SliceOptimizer(optim.AdamW, {"fused": True})
    piece, before = ParameterSlice(torch.ones(7, 5), torch.ones(7, 5)), len(calls)

    inner.step([piece], inner.defaults)
    inner.step([piece], inner.defaults)

    assert len(calls) == before + 2


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [
        (optim.Adam, {"betas": [0.9, 0.99]}),
        (optim.AdamW, {"amsgrad": True}),
        (optim.SGD, {}),
        (optim.SGD, {"momentum": 0.9}),
        (optim.Adagrad, {}),
    ],
    ids=case_id,
)
def test_the_function_behind_a_class_makes_no_optimizer(
    optimizer_class, options, fused, monkeypatch
):
    """From the second step on, torch's own classes step without an optimizer."""
    inner = SliceOptimizer(optimizer_class, {**options, "fused": fused})
    piece = ParameterSlice(torch.ones(7, 5), torch.ones(7, 5))
    inner.step([piece], inner.defaults)
    before = piece.value.clone()

    monkeypatch.setattr(inner, "_lent", None)
    inner.step([piece], inner.defaults)

    assert not torch.equal(piece.value, before)
    assert piece.state.get("step", 2) == 2


@pytest.mark.parametrize("options", [{"lr": torch.tensor(0.1)}, {"capturable": True}])
def test_unusual_options_are_left_to_the_class(options):
    """Options that are tensors, and those of accelerators, go to the class's own step."""
    inner = SliceOptimizer(optim.AdamW, {})

    assert inner.step_function({**inner.defaults, **options}) is None
    assert inner.step_function(inner.defaults) is not None


def test_a_step_that_is_counted_otherwise_is_left_to_the_class():
    """A number of steps that is no tensor, and moments of another dtype, are no function's."""
    inner = SliceOptimizer(optim.AdamW, {"fused": True})
    piece = ParameterSlice(torch.ones(7, 5), torch.ones(7, 5))
    inner.step([piece], inner.defaults)
    function = inner.step_function(inner.defaults)

    assert function.tensors(piece.value, piece.gradient, piece.state) is not None
    for key, entry in ("step", 1.0), ("exp_avg", torch.ones(7, 5).bfloat16()):
        changed = {**piece.state, key: entry}
        assert function.tensors(piece.value, piece.gradient, changed) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("optimizer_class", "options"), CASES, ids=case_id)
def test_state_dtypes_are_of_what_a_step_makes(optimizer_class, options, dtype):
    """`state_dtypes` has the tensors of the slice's shape that a first step makes, and dtypes."""
    inner = SliceOptimizer(optimizer_class, options)
    piece = ParameterSlice(torch.ones(7, 5, dtype=dtype), torch.ones(7, 5, dtype=dtype))

    layout = inner.state_dtypes(inner.defaults, dtype)
    inner.step([piece], inner.defaults)

    shaped = {k: v for k, v in piece.state.items() if isinstance(v, Tensor) and v.dim() == 2}
    assert layout == {key: entry.dtype for key, entry in shaped.items()}


def test_group_options_change_the_layout():
    """amsgrad and momentum add their entries where a group asks for them, and only there."""
    adam, sgd = SliceOptimizer(optim.AdamW, {}), SliceOptimizer(optim.SGD, {})
    dtype = torch.bfloat16

    moments = dict.fromkeys(("exp_avg", "exp_avg_sq"), dtype)
    assert adam.state_dtypes(adam.defaults, dtype) == moments
    assert adam.state_dtypes({"amsgrad": True}, dtype) == {**moments, "max_exp_avg_sq": dtype}
    assert sgd.state_dtypes(sgd.defaults, dtype) == {}
    assert sgd.state_dtypes({"momentum": 0.9}, dtype) == {"momentum_buffer": dtype}


def test_layout_knows_float32_state_of_bf16_parameters():
    """An entry that is always float32 is said to be float32 for a bfloat16 parameter."""

    class Float32Moment(optim.SGD):
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                self.state[p].setdefault("moment", torch.zeros_like(p, dtype=torch.float32))

    inner = SliceOptimizer(Float32Moment, {})

    assert inner.state_dtypes({}, torch.bfloat16) == {"moment": torch.float32}


@pytest.mark.parametrize(
    ("optimizer_class", "options"), [case for case in CASES if case[0] is not Lion], ids=case_id
)
def test_state_in_foreign_memory_is_updated_in_place(optimizer_class, options):
    """State given as views of one buffer is updated there, with the results of state of its own."""
    inner = SliceOptimizer(optimizer_class, options)
    start, grads = torch.randn(7, 5), gradients((7, 5))
    own, homed = (
        ParameterSlice(start.clone(), grads[0].clone()),
        ParameterSlice(start.clone(), grads[0].clone()),
    )
    names = sorted(inner.state_dtypes(inner.defaults, torch.float32))
    inner.step([own, homed], inner.defaults)
    home = torch.zeros(3, 35)
    for row, name in zip(home, names, strict=False):
        homed.state[name] = row.view(7, 5).copy_(homed.state[name])
    views = [homed.state[name] for name in names]

    for gradient in grads[1:]:
        own.gradient, homed.gradient = gradient.clone(), gradient.clone()
        inner.step([own, homed], inner.defaults)

    assert torch.equal(own.value, homed.value)
    for name, view, row in zip(names, views, home, strict=False):
        assert homed.state[name] is view
        assert torch.equal(own.state[name], row.view(7, 5))


def test_a_replaced_entry_is_found_in_the_state():
    """Where an optimizer puts a new tensor in the place of an entry, the caller's dict holds it."""
    inner = SliceOptimizer(Lion, {})
    home = torch.zeros(3, 4)
    state = {"average": home}

    inner.step([ParameterSlice(torch.ones(3, 4), torch.ones(3, 4), state)], {})

    assert state["average"] is not home
    assert torch.allclose(state["average"], torch.full((3, 4), 0.01))


def test_values_may_be_views_and_their_versions_are_bumped():
    """A strided view of a larger tensor is updated in place, and autograd is told so."""
    inner = SliceOptimizer(optim.SGD, {"lr": 1.0})
    dense = torch.zeros(4, 6)

    inner.step([ParameterSlice(dense[1:3, 2:5], torch.ones(2, 3))], inner.defaults)

    assert torch.equal(dense[1:3, 2:5], torch.full((2, 3), -1.0))
    assert dense.sum() == -6
    assert dense._version == 1


def test_an_initial_state_is_the_constructors():
    """State that a constructor makes is made for a slice too, with the group's options."""
    inner = SliceOptimizer(optim.Adagrad, {"initial_accumulator_value": 3.0})
    piece = ParameterSlice(torch.ones(3), torch.full((3,), 2.0))

    inner.step([piece], inner.defaults)

    assert torch.equal(piece.state["sum"], torch.full((3,), 7.0))


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_referenced(fails):
    """Nothing keeps value, gradient or state of a slice, after a step or an exception."""
    inner = SliceOptimizer(HalfWay, {"momentum": 0.9})
    piece = ParameterSlice(torch.ones(3), torch.ones(3))
    inner.step([piece], {})
    references = [weakref.ref(t) for t in (piece.value, piece.gradient, *piece.state.values())]

    if fails:
        with pytest.raises(ValueError, match="half-way"):
            inner.step([piece], {"fails": True})
        gc.collect()  # pytest's exception info and the frames refer to one another
    del piece

    assert len(references) == 3
    assert [reference() for reference in references] == [None] * 3


def test_after_an_exception_it_steps_again():
    """After a failed step other slices are stepped as usual."""
    inner = SliceOptimizer(HalfWay, {"lr": 1.0})
    with pytest.raises(ValueError, match="half-way"):
        inner.step([ParameterSlice(torch.ones(3), torch.ones(3))], {"fails": True})
    piece = ParameterSlice(torch.ones(5), torch.ones(5))

    inner.step([piece], {})

    assert torch.equal(piece.value, torch.zeros(5))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("optimizer_class", [optim.AdamW, Lion])
@pytest.mark.parametrize("create_graph", [False, True])
def test_steps_inside_a_post_accumulate_hook(optimizer_class, create_graph):
    """A parameter stepped in its hook, during backward, comes out as one stepped after it."""
    inner, state = SliceOptimizer(optimizer_class, {}), {}
    weight = nn.Parameter(torch.randn(5, 7))
    reference, x = nn.Parameter(weight.detach().clone()), torch.randn(3, 7)
    plain = optimizer_class([reference])

    def step(parameter: Tensor) -> None:
        inner.step([ParameterSlice(parameter, parameter.grad, state)], inner.defaults)
        parameter.grad = None

    weight.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        (x @ weight.T).square().sum().backward(create_graph=create_graph)
        (x @ reference.T).square().sum().backward()
        plain.step()
        plain.zero_grad()

    assert torch.equal(weight, reference)
    assert not any(v.requires_grad for v in state.values())


def test_a_whole_parameter_group_is_taken():
    """A parameter group of torch, with params and names in it, is taken as options."""
    named = [("weight", nn.Parameter(torch.ones(3))), ("bias", nn.Parameter(torch.ones(2)))]
    group = optim.Adagrad(named, lr=0.5).param_groups[0]
    inner, piece = SliceOptimizer(optim.Adagrad, {}), ParameterSlice(torch.ones(4), torch.ones(4))

    inner.step([piece], group)

    assert inner.state_dtypes(group, torch.float32) == {"sum": torch.float32}
    assert torch.allclose(piece.value, torch.full((4,), 0.5))


def test_hooks_of_all_optimizers_are_not_called_for_pieces():
    """A global step hook is called neither by the constructor nor by a step."""
    called = []
    before = register_optimizer_step_pre_hook(lambda *_: called.append("before"))
    after = register_optimizer_step_post_hook(lambda *_: called.append("after"))
    try:
        inner = SliceOptimizer(optim.AdamW, {})
        inner.step([ParameterSlice(torch.ones(3), torch.ones(3))], inner.defaults)
    finally:
        before.remove()
        after.remove()

    assert called == []


def test_a_step_wrapped_by_its_class_is_called_whole():
    """A decorator that copies the attributes of torch's wrapper is not taken off."""
    optim.SGD([torch.ones(1)])  # torch wraps the step of a class when it first makes one of it

    class Twice(optim.SGD):
        @functools.wraps(optim.SGD.step)
        def step(self, closure=None):
            optim.SGD.step(self)
            optim.SGD.step(self)

    inner = SliceOptimizer(Twice, {"lr": 1.0})
    piece = ParameterSlice(torch.zeros(3), torch.ones(3))

    inner.step([piece], {})

    assert torch.equal(piece.value, torch.full((3,), -2.0))


def test_a_step_that_an_instance_wears_is_called():
    """A `step` that the constructor sets on the instance is the one that is used."""

    class Doubled(optim.SGD):
        def __init__(self, params: Any, **options: Any):
            super().__init__(params, **options)
            step = self.step
            self.step = lambda: (step(), step())

    piece = ParameterSlice(torch.zeros(3), torch.ones(3))

    SliceOptimizer(Doubled, {"lr": 1.0}).step([piece], {})

    assert torch.equal(piece.value, torch.full((3,), -2.0))

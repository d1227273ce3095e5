"""torch's own functions of Adam, AdamW, SGD and Adagrad, called without the class around them.

They get the arguments that the class's `step` gives them, so results have the same bits. What they
save is the class's Python for each tile: 130 calls around a fused kernel of 0.2 ms for a MiB.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from types import NoneType
from typing import Any, Final  # options and state hold whatever the optimizer's class wants

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer
from torch.optim.adagrad import adagrad
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

_OWN_FOLDER: Final = os.path.dirname(torch.optim.__file__)
_PLAIN: Final = {float, int, bool, NoneType}
_COUNTS: Final = (torch.float32, torch.float64)

Options = Mapping[str, Any]
Absent = tuple[list[None], ...]


@dataclass(frozen=True)
class StepFunction:
    """One function of torch, for fixed options, that steps tensors in place.

    Attributes:
        keys: the state's tensors of the value's shape that it takes, in this order.
        is_fused: it makes no temporary tensors; others do, of the value's size.
        counts: the state has the number of steps.
    """

    function: Callable[..., Any]
    options: Options
    keys: tuple[str, ...]
    absent: Absent = ()  # in place of state that these options do without
    is_fused: bool = True
    counts: bool = True

    def tensors(
        self, value: Tensor, gradient: Tensor, state: Mapping[str, Any]
    ) -> list[Tensor] | None:
        """What `step` works on; None where the class itself has to step.

        It has to before its first step, outside of the CPU, and for whatever else is unusual.
        """
        if self.counts:
            number = state.get("step")
            if type(number) is not Tensor or number.dtype not in _COUNTS[: 2 - self.is_fused]:
                return None
            if not number.is_cpu:
                return None
        dtype = value.dtype
        tensors: list[Any] = [value, gradient, *map(state.get, self.keys)]
        for each in tensors:
            if type(each) is not Tensor or each.dtype is not dtype or not each.is_cpu:
                return None
        is_plain = dtype.is_floating_point and gradient.layout is torch.strided
        return tensors if is_plain and not gradient.requires_grad else None

    def step(self, tensors: Sequence[Tensor], number: Tensor | None) -> None:
        """Take step `number`, counted from 1, in place; tensors as of `tensors`, or rows."""
        lists = [[each] for each in tensors]
        if number is None:
            self.function(*lists, *self.absent, **self.options)
        else:  # torch's functions that are not fused count themselves
            count = number if self.is_fused else number - 1
            self.function(*lists, *self.absent, [count], **self.options)


def has_step_function(optimizer_class: type[Optimizer], step: Any) -> bool:
    """Whether it is a class of torch's that is known here, with a step that nobody has replaced."""
    code = getattr(step, "__code__", None)
    is_own = code is not None and os.path.dirname(code.co_filename) == _OWN_FOLDER
    return is_own and optimizer_class in _FUNCTIONS


def step_function_of(optimizer_class: type[Optimizer], options: Options) -> StepFunction | None:
    """The function for these options; None where one of them is a tensor, or unusual."""
    if options.get("capturable") or options.get("differentiable"):
        return None
    flat = chain.from_iterable(v if key == "betas" else (v,) for key, v in options.items())
    if not {*map(type, flat)} <= _PLAIN:
        return None
    return _FUNCTIONS[optimizer_class](options)


def _adam(options: Options, is_decoupled: bool = False) -> StepFunction:
    is_decoupled = options.get("decoupled_weight_decay", is_decoupled)
    beta1, beta2 = options["betas"]
    given = _picked(options, "lr", "weight_decay", "eps", "amsgrad", "maximize")
    given |= {"beta1": beta1, "beta2": beta2}
    keys: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    absent: Absent = ([],)
    if options["amsgrad"]:
        keys, absent = (*keys, "max_exp_avg_sq"), ()
    if options["fused"]:
        function = torch._fused_adamw_ if is_decoupled else torch._fused_adam_
        return StepFunction(function, given, keys, absent)
    given |= _picked(options, "foreach", "fused")
    return StepFunction(adamw if is_decoupled else adam, given, keys, absent, is_fused=False)


def _sgd(options: Options) -> StepFunction:
    has_momentum = options["momentum"] != 0
    keys = ("momentum_buffer",) if has_momentum else ()
    names = ("lr", "weight_decay", "momentum", "dampening", "nesterov", "maximize")
    given = _picked(options, *names)
    if options["fused"]:
        absent: Absent = () if has_momentum else ([],)
        given |= {"is_first_step": False}  # the class makes the momentum
        return StepFunction(torch._fused_sgd_, given, keys, absent, counts=False)
    given |= _picked(options, "foreach", "fused")
    absent = () if has_momentum else ([None],)
    return StepFunction(sgd, given, keys, absent, is_fused=False, counts=False)


def _adagrad(options: Options) -> StepFunction:
    given = _picked(options, "lr", "weight_decay", "lr_decay", "eps", "maximize")
    if options["fused"]:
        return StepFunction(torch._fused_adagrad_, given, ("sum",))
    given |= _picked(options, "foreach", "fused")
    return StepFunction(adagrad, given, ("sum",), is_fused=False)


def _picked(options: Options, *names: str) -> dict[str, Any]:
    return {name: options[name] for name in names}


_FUNCTIONS: Final[Mapping[type[Optimizer], Callable[[Options], StepFunction]]] = {
    Adam: _adam,
    AdamW: partial(_adam, is_decoupled=True),
    SGD: _sgd,
    Adagrad: _adagrad,
}

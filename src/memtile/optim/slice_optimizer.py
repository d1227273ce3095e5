"""Any element-wise torch optimizer, applied to slices of parameters, whose state is kept elsewhere.

A slice is stepped as if it were a parameter: the optimizer gets an `nn.Parameter` that shares the
slice's memory, with the slice's gradient and state. Between two steps it holds no tensors.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any  # options and state hold whatever the optimizer's class wants

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from memtile.errors import OptimizerError
from memtile.homes import fork_safe_lock
from memtile.optim.elementwise import (
    TRIAL_CUTS,
    agree,
    can_step,
    check_class,
    dtypes_of_state,
    refusal,
    refuse_differentiable,
    stand_in_values,
    trial_values,
)
from memtile.optim.step_functions import StepFunction, has_step_function, step_function_of

_CHECKED_LR = 0.1  # a warm-up's first lr is 0, at which every optimizer is element-wise
_REMEMBERED = 16  # functions: two or three groups, whose lr changes at every step
_trying = fork_safe_lock()  # torch's flags for a dispatch mode are of the whole process
_HOOKED = Optimizer.profile_hook_step(lambda optimizer: None).__code__


@dataclass(eq=False)
class ParameterSlice:
    """A part of a parameter for one step.

    Attributes:
        value: a plain tensor with as many dimensions as the parameter; updated in place.
        gradient: of the value's shape, dtype and device; an optimizer may overwrite it.
        state: what the optimizer keeps for it, empty before its first step. Its tensors are updated
            in place, or replaced here: then the caller copies them back.
    """

    value: Tensor
    gradient: Tensor
    state: dict[str, Any] = field(default_factory=dict)


class SliceOptimizer:
    """An optimizer class applied to slices of parameters, with these options of its constructor.

    A small matrix is stepped whole and in slices, to see that the class is element-wise; torch's
    random numbers are left as they were. `defaults` has the options of a parameter group that sets
    none. OptimizerError where it is no optimizer class, does not take the options, or cannot step
    slices.
    """

    def __init__(self, optimizer_class: type[Optimizer], options: Mapping[str, Any]) -> None:
        self._class = check_class(optimizer_class)
        self._has_function = has_step_function(self._class, _own_step(self._class))
        self._functions: dict[object, StepFunction] = {}  # by options and dtype
        self._options = dict(options)
        self.name = self._class.__name__
        refuse_differentiable(self.name, self._options)
        first = self._on_stand_in()
        self._begins_with_state, self.defaults = bool(first.state), dict(first.defaults)
        _drop(first)
        self._idle = [first]  # one for each thread that was ever in `step` with others
        self._checked: set[object] = set()
        self._latest: tuple[dict[str, Any], dict[str, torch.dtype]] = ({}, {})
        self.state_dtypes(self.defaults, torch.float32)

    def state_dtypes(
        self, group_options: Mapping[str, Any], dtype: torch.dtype
    ) -> dict[str, torch.dtype]:
        """The state entries that are tensors shaped like the parameter, and their dtypes.

        Found by one step of a stand-in on the CPU, so without entries that the optimizer makes in
        a later step. Each dtype and set of flags is checked once to be element-wise, or refused
        with OptimizerError.
        """
        refuse_differentiable(self.name, group_options)
        group = {**self.defaults, **group_options}
        asked = {**group, "params": dtype}  # what the answer depends on
        latest, known = self._latest
        if asked.keys() == latest.keys() and all(asked[key] is latest[key] for key in asked):
            return dict(known)  # each tile asks, and at every step where nothing is kept for it
        piece = ParameterSlice(stand_in_values(dtype), stand_in_values(dtype))
        with _trying, _NoDraws(self.name):
            self._try_step(piece, group)
        found = dtypes_of_state(self.name, piece.state)
        self._check_once(group, dtype)
        self._latest = asked, found
        return dict(found)

    def step(self, pieces: Sequence[ParameterSlice], group_options: Mapping[str, Any]) -> None:
        """Step all slices once, bit for bit as the optimizer would step each as a parameter.

        Options that the group lacks are taken from `defaults`. Devices and dtypes of the slices may
        differ. Several threads may step at once. Afterwards, also after an exception, the optimizer
        refers to nothing of the slices. Global hooks
        (`torch.optim.optimizer.register_optimizer_step_pre_hook`) are not called, except where the
        class's own step calls the step of another class.
        """
        with torch.no_grad():
            group = {**self.defaults, **group_options}
            if self._try_function(pieces, group):
                return
            with self._lent() as optimizer:
                stand_ins = [self._stand_in(optimizer, piece, group) for piece in pieces]
                optimizer.param_groups = [{**group, "params": stand_ins}]
                unhooked_step(optimizer)()
                for piece, stand_in in zip(pieces, stand_ins, strict=True):
                    kept = optimizer.state.get(stand_in)
                    if kept is not None and kept is not piece.state:
                        piece.state.clear()
                        piece.state.update(kept)

    def _try_function(self, pieces: Sequence[ParameterSlice], group: Mapping[str, Any]) -> bool:
        found = []
        for piece in pieces:
            function = self.step_function(group)
            if function is None:
                return False
            tensors = function.tensors(piece.value, piece.gradient, piece.state)
            if tensors is None:
                return False
            found.append((function, tensors, piece.state.get("step")))
        for function, tensors, number in found:
            function.step(tensors, number if number is None else number.add_(1))
        return True

    def step_function(self, options: Mapping[str, Any]) -> StepFunction | None:
        """torch's function behind the class, for these options; None where only `step` can step."""
        if not self._has_function:
            return None
        asked = tuple(map(options.get, self.defaults))
        try:
            found = self._functions.get(asked)
        except TypeError:  # a list has no hash: betas from a file, say
            found = None
        return self._find_function(asked, options) if found is None else found

    def _find_function(self, asked: object, options: Mapping[str, Any]) -> StepFunction | None:
        found = step_function_of(self._class, {key: options[key] for key in self.defaults})
        if found is not None:
            if len(self._functions) >= _REMEMBERED:
                self._functions.clear()
            with suppress(TypeError):
                self._functions[asked] = found
        return found

    @contextmanager
    def _lent(self) -> Iterator[Optimizer]:
        """An optimizer that no other thread uses meanwhile."""
        try:
            optimizer = self._idle.pop()  # a list's pop and append need no lock
        except IndexError:
            optimizer = self._on_stand_in()
        try:
            yield optimizer
        finally:
            _drop(optimizer)
            self._idle.append(optimizer)

    def _on_stand_in(self) -> Optimizer:
        return self._construct([nn.Parameter(stand_in_values(torch.float32))])

    def _stand_in(
        self, optimizer: Optimizer, piece: ParameterSlice, group: Mapping[str, Any]
    ) -> nn.Parameter:
        """A parameter in the slice's memory, with its gradient and state."""
        stand_in = nn.Parameter(piece.value)
        stand_in.grad = piece.gradient
        if not piece.state and self._begins_with_state:
            made = self._construct([{**group, "params": [stand_in]}])
            piece.state.update(made.state[stand_in])
        if piece.state:
            optimizer.state[stand_in] = piece.state
        return stand_in

    def _construct(self, params: Sequence[nn.Parameter] | Sequence[dict[str, Any]]) -> Optimizer:
        try:
            return self._class(params, **self._options)
        except Exception as error:  # the constructor may be anyone's
            raise OptimizerError(
                f"{self.name} does not take {_spelled(self._options)}: {error}; give options "
                "that its constructor takes, for a float32 matrix on the CPU"
            ) from error

    def _try_step(self, piece: ParameterSlice, group: Mapping[str, Any]) -> None:
        """Step a slice; an error of the optimizer's becomes an OptimizerError that says why."""
        try:
            self.step([piece], group)
        except OptimizerError:
            raise
        except Exception as error:  # the step may be anyone's
            raise self._failed(piece.value.dtype, group, error) from error

    def _failed(
        self, dtype: torch.dtype, group: Mapping[str, Any], error: Exception
    ) -> OptimizerError:
        def step_alone(parameter: nn.Parameter) -> None:
            unhooked_step(self._construct([{**group, "params": [parameter]}]))()

        said = str(error).rstrip(".")
        if can_step(step_alone, dtype, sparse=False):
            return refusal(self.name, f"steps only what it was constructed with: {said}")
        if can_step(step_alone, dtype, sparse=True):
            return refusal(
                self.name, "steps sparse gradients only; the gradient of a tile is dense"
            )
        return refusal(self.name, f"cannot step a dense {dtype} parameter on the CPU: {said}")

    def _check_once(self, group: Mapping[str, Any], dtype: torch.dtype) -> None:
        """Check that the class is element-wise, once for each dtype and flags: they choose kernels.

        A matrix must come out of three steps the same whole and in slices. What happens only after
        more steps, or on another device, is not seen. 16 bits are tried too: torch's fused SGD on
        the CPU leaves values out there (pytorch#191763).
        """
        flags = {(key, v) for key, v in group.items() if v is None or isinstance(v, bool)}
        if (dtype, frozenset(flags)) in self._checked:
            return
        options = {**group, "lr": _CHECKED_LR} if "lr" in group else dict(group)
        matrix, gradients = trial_values(dtype)
        truth = matrix.clone()
        changed = self._step_whole(truth, gradients, options)
        for dim, sizes in TRIAL_CUTS:
            pieces = [ParameterSlice(each.clone(), each) for each in matrix.split(sizes, dim)]
            for gradient in gradients:
                for piece, share in zip(pieces, gradient.split(sizes, dim), strict=True):
                    piece.gradient = share.clone()
                    self._try_step(piece, options)
            if not agree(torch.cat([piece.value for piece in pieces], dim), truth):
                raise refusal(self.name, self._not_elementwise(dtype, changed))
        self._checked.add((dtype, frozenset(flags)))

    def _step_whole(
        self, matrix: Tensor, gradients: Sequence[Tensor], options: Mapping[str, Any]
    ) -> list[str]:
        """Step a matrix in place, as torch does; gives the options of its group that changed."""
        parameter = nn.Parameter(matrix)
        optimizer = self._construct([{**options, "params": [parameter]}])
        before = dict(optimizer.param_groups[0])
        for gradient in gradients:
            parameter.grad = gradient.clone()
            unhooked_step(optimizer)()
        after = optimizer.param_groups[0]
        return [key for key, value in after.items() if value is not before.get(key)]

    def _not_elementwise(self, dtype: torch.dtype, changed: Sequence[str]) -> str:
        found = f"a {dtype} matrix stepped in halves came out otherwise than stepped whole"
        if changed:
            found = (
                f"it counts {', '.join(map(repr, changed))} in its parameter group, at every step"
            )
        return (
            f"is not element-wise: given {_spelled(self._options)}, {found}; tiles are stepped one "
            "by one, so a value may depend only on its own gradient, its own state and the options"
        )


class _NoDraws(TorchDispatchMode):
    """Refuses random draws in this thread: torch's generators are shared by all threads."""

    def __init__(self, name: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._name = name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise refusal(
                self._name,
                "draws random numbers in its step; a matrix stepped in tiles would get others than "
                "one stepped whole",
            )
        return func(*args, **(kwargs or {}))


def _drop(optimizer: Optimizer) -> None:
    optimizer.param_groups = []
    optimizer.state.clear()


def unhooked_step(optimizer: Optimizer) -> Callable[[], object]:
    """The optimizer's step without torch's own wrapper, which profiles and calls hooks.

    The wrapper is known by its code; any other step is called as it is.
    """
    if "step" in vars(optimizer):
        return optimizer.step
    return partial(_own_step(type(optimizer)), optimizer)


def _own_step(optimizer_class: type[Optimizer]) -> Callable[..., object]:
    step: Callable[..., object] = optimizer_class.step
    return vars(step)["__wrapped__"] if getattr(step, "__code__", None) is _HOOKED else step


def _spelled(options: Mapping[str, Any]) -> str:
    """The options as written in a call, for messages."""
    written = ", ".join(f"{key}={value!r}" for key, value in options.items())
    return f"the options ({written})" if written else "no options"

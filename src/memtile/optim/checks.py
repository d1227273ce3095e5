"""Checks of what a `TileOptimizer` is given, of the model that it steps, and of gradients."""

import cmath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, NoReturn, get_args

import torch
from torch import Tensor, nn

from memtile.errors import ArgumentError, MemtileError, NotFiniteError, OptimizerError
from memtile.homes import streamed_allocation
from memtile.transfer import is_stepped_in_backward

StepMode = Literal["classic", "in_backward"]
IdleMode = Literal["replay", "skip"]


def check_arguments(model: object, mode: object, idle: object) -> None:
    """Raise ArgumentError where one of them is none of what it may be."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"the model is a {type(model).__name__}; TileOptimizer takes the model itself, and "
            "parameters or groups of them as params=…"
        )
    if mode not in get_args(StepMode):
        raise ArgumentError(
            f"mode={mode!r} must be 'classic' (accumulates, clips) or 'in_backward' (keeps no "
            "gradients)"
        )
    if idle not in get_args(IdleMode):
        raise ArgumentError(
            f"idle={idle!r} must be 'replay' (experts without tokens are stepped as in the dense "
            "model) or 'skip' (they are not stepped)"
        )


def check_parameters(model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Raise OptimizerError for parameters that an optimizer of the model cannot step."""
    name = type(model).__name__
    if not _are_of(model, parameters):
        raise OptimizerError(
            f"params=… holds parameters that are not of this {name}; make the "
            "optimizer after memtile.tile, with parameters of the tiled model"
        )
    if any(parameter.is_meta for parameter in parameters):
        raise OptimizerError(
            f"parameters of this {name} are on the meta device, without values; "
            "load some first, with memtile.tile(model, …, checkpoint=folder) or "
            "memtile.load_checkpoint(model, folder)"
        )
    if any(map(is_stepped_in_backward, parameters)):
        raise OptimizerError(
            "another TileOptimizer steps parameters of this model in its backward; drop that "
            "one first (del optimizer)"
        )


@contextmanager
def refusing_parameters() -> Iterator[None]:
    """Raise what torch refuses of parameters and groups as OptimizerError."""
    try:
        yield
    except MemtileError:
        raise
    except (TypeError, ValueError) as error:
        raise OptimizerError(
            f"these parameters cannot be stepped: {error}; give parameters of the model, or groups "
            "of them, each in one group"
        ) from error


def refuse_copy() -> NoReturn:
    """Raise OptimizerError for a copy, which would be without what steps the tiles."""
    raise OptimizerError(
        "a TileOptimizer cannot be copied or pickled: its state lives in the homes of its model's "
        "tiles; make another one for the copy of the model and give it the state, "
        "load_state_dict(optimizer.state_dict()), or save the run by memtile.save_training"
    )


def refuse_scaler() -> NoReturn:
    """Raise OptimizerError for a GradScaler whose scaled gradients were stepped in backward."""
    raise OptimizerError(
        "a GradScaler divides gradients by its scale after backward, and in mode='in_backward' "
        "parameters were stepped in it, by the scaled ones: load the weights from before that, and "
        "train in bfloat16 or float32 without a scaler, or use mode='classic'"
    )


def check_still_of(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Raise OptimizerError where the model was tiled or untiled since."""
    given = list(parameters)
    if not _are_in(model, given) and not _are_of(model, given):
        raise OptimizerError(
            f"this {type(model).__name__} has other parameters than when this "
            "optimizer was made, and they would not be stepped; make it after memtile.tile "
            "(and a new one after memtile.untile)"
        )


def check_dtypes(model: nn.Module, dtypes: Mapping[Tensor, torch.dtype]) -> None:
    """Raise OptimizerError where parameters were cast since they had these dtypes."""
    for parameter, dtype in dtypes.items():
        if parameter.dtype != dtype:
            raise OptimizerError(
                f"a parameter of this {type(model).__name__} was {dtype} when this optimizer was "
                f"made, and is {parameter.dtype} now: cast the model first, and make the "
                "optimizer then"
            )


def check_in_memory(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Raise NotFiniteError where a gradient that needs no slab is not finite.

    There is one wait for a device where all are finite.
    """
    checked = [each for each in parameters if streamed_allocation(each) is None]
    gradients = [each.grad for each in checked if each.grad is not None]
    sums = [gradient.detach().sum().isfinite() for gradient in gradients]
    if sums and not torch.stack([each.to(sums[0].device) for each in sums]).all():
        for parameter in checked:
            check_finite(model, parameter, parameter.grad)


def check_finite(model: nn.Module, parameter: nn.Parameter, gradient: Tensor | None) -> None:
    """Raise NotFiniteError where the parameter's gradient holds NaN or infinity."""
    if gradient is None or is_finite(gradient):
        return
    names = (name for name, each in model.named_parameters() if each is parameter)
    raise NotFiniteError(
        f"the gradient of {next(names, 'a parameter')} is not finite; it was not applied, nor "
        "those after it: leave this batch out with zero_grad(), or go back to the last "
        "checkpoint and lower lr; in float16 use a torch.amp.GradScaler, or train in bfloat16"
    )


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity.

    A sum with one of those is not finite, and is quick: 4% of AdamW's time (measured, one thread).
    Only where the sum overflows are the values looked at one by one.
    """
    return cmath.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())


def _are_of(model: nn.Module, parameters: Iterable[nn.Parameter]) -> bool:
    own = set(model.parameters())
    return all(parameter in own for parameter in parameters)


def _are_in(model: nn.Module, parameters: Iterable[nn.Parameter]) -> bool:
    """`_are_of`, without the names that `nn.Module.parameters` makes: 5 calls a module, not 20.

    Of a model that gives other parameters than its modules have, it may say no.
    """
    own, seen = set[int](), set[int]()
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        own.update(map(id, module._parameters.values()))
        waiting.extend(module._modules.values())
    return own.issuperset(map(id, parameters))

"""The checks that an optimizer can step a parameter in slices; others are refused by name."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any  # options and state hold whatever the optimizer's class wants

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memtile.errors import OptimizerError

# (dimension, sizes) to cut the trial matrix into slices: ragged, so that no two means agree.
TRIAL_CUTS = ((0, (2, 4)), (1, (3, 7)))
_SHAPE = (6, 10)
_SCALES = (1.0, 100.0, 0.01)  # of each step's gradients: shows a threshold on a norm
_ULPS = 8  # vector loop and scalar tail may round differently
_WAY_OUT = (
    "use it in an optimizer of its own, on parameters that are not parked, or choose an "
    "element-wise one, such as AdamW, Adam, SGD or Adagrad"
)


def check_class(optimizer_class: object) -> type[Optimizer]:
    """The class; OptimizerError where it is no optimizer's, or its step needs a closure."""
    if isinstance(optimizer_class, Optimizer):
        name = type(optimizer_class).__name__
        raise OptimizerError(
            f"{name} was given as an instance, which holds parameters and their state itself; give "
            f"the class {name}, and its options by name"
        )
    if not isinstance(optimizer_class, type) or not issubclass(optimizer_class, Optimizer):
        raise OptimizerError(
            f"{optimizer_class!r} is no optimizer class; give a subclass of torch.optim.Optimizer, "
            "such as torch.optim.AdamW, and its options by name"
        )
    _, *arguments = inspect.signature(optimizer_class.step).parameters.values()
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if any(a.default is a.empty and a.kind not in variable for a in arguments):
        raise refusal(
            optimizer_class.__name__,
            "needs a closure in step(), to run the model again; a tile is stepped with the "
            "gradient that it has",
        )
    return optimizer_class


def refuse_differentiable(name: str, options: Mapping[str, Any]) -> None:
    """Raise OptimizerError for options that ask for a step which autograd records."""
    if options.get("differentiable"):
        raise OptimizerError(
            f"{name} was given differentiable=True; a piece is stepped in place, in memory that is "
            "used again, so no graph can lead through its step: leave differentiable=False"
        )


def can_step(step: Callable[[nn.Parameter], object], dtype: torch.dtype, *, sparse: bool) -> bool:
    """Whether a small parameter with a sparse or a dense gradient can be stepped."""
    try:
        parameter, gradient = nn.Parameter(stand_in_values(dtype)), stand_in_values(dtype)
        parameter.grad = gradient.to_sparse() if sparse else gradient
        step(parameter)
    except Exception:  # the step may be anyone's; which error it is, is not asked
        return False
    return True


def stand_in_values(dtype: torch.dtype) -> Tensor:
    """The values of a small parameter, of a shape that no other state tensor is likely to have."""
    return torch.ones(_SHAPE, dtype=dtype, device="cpu")


def refusal(name: str, why: str) -> OptimizerError:
    """The error for an optimizer that cannot step slices."""
    return OptimizerError(f"{name} {why}: {_WAY_OUT}")


def dtypes_of_state(name: str, state: Mapping[str, Any]) -> dict[str, torch.dtype]:
    """The dtypes of the entries of a stand-in's state that are shaped like it.

    OptimizerError for a tensor that is neither one number nor a plain entry of that shape.
    """
    for key, entry in state.items():
        for tensor in _tensors_in(entry):
            is_plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
            is_alike = tensor is entry and is_plain and tensor.shape == _SHAPE
            if tensor.numel() != 1 and not is_alike:
                raise refusal(
                    name,
                    f"keeps {key!r}, a {type(tensor).__name__} of shape {tuple(tensor.shape)}, for "
                    f"a parameter of shape {_SHAPE}; what is kept for a tile must be dense tensors "
                    "of the tile's own shape, or numbers",
                )
    return {
        key: entry.dtype
        for key, entry in state.items()
        if isinstance(entry, Tensor) and entry.shape == _SHAPE
    }


def _tensors_in(entry: object) -> list[Tensor]:
    if isinstance(entry, Mapping):
        entry = list(entry.values())
    if isinstance(entry, (list, tuple)):
        return [item for item in entry if isinstance(item, Tensor)]
    return [entry] if isinstance(entry, Tensor) else []


def trial_values(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """A small matrix, and its gradients in three steps."""
    generator = torch.Generator(device="cpu").manual_seed(20260101)

    def draw() -> Tensor:
        drawn = torch.randn(_SHAPE, generator=generator, dtype=torch.float32, device="cpu")
        return drawn.to(dtype)

    return draw(), [scale * draw() for scale in _SCALES]


def agree(ours: Tensor, truth: Tensor) -> bool:
    """Whether two results of trial steps differ in a few last bits at most."""
    allowed = _ULPS * torch.finfo(truth.dtype).eps * float(truth.abs().max())
    return torch.allclose(ours, truth, rtol=0, atol=allowed, equal_nan=True)

"""A model without its parameters: they are on the meta device, its buffers are real."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from memtile.convert.kinds import integrations
from memtile.errors import ArgumentError, CannotTileError

Model = TypeVar("Model", bound=nn.Module)

# What makes values that are drawn or written later, as parameters are made. What is computed
# (arange, tensor, zeros, ones, full) is real: a buffer is made of it, a rotary table say.
_MAKERS: Final = frozenset(
    {
        torch.empty,
        torch.empty_like,
        torch.empty_strided,
        torch.rand,
        torch.randn,
        torch.rand_like,
        torch.randn_like,
        Tensor.new_empty,
    }
)


def empty_model(factory: Callable[[], Model]) -> Model:
    """What `factory` makes, with its parameters on the meta device and its buffers real.

    No memory is used for the parameters and no time for drawing them. Give them values with
    `memtile.tile(model, …, checkpoint=folder)`, or look at the model with `memtile.plan`.

    What transformers keeps in float32 in a model of 16 bits (`from_pretrained` does, `from_config`
    does not) is float32 here too.

    Args:
        factory: makes the model, as `lambda: AutoModelForCausalLM.from_config(config)` does.

    Raises:
        ArgumentError: it makes no module.
        CannotTileError: a buffer could not be kept real, since it is computed from parameters or
            written into memory that was left empty; the message names it.
    """
    if isinstance(factory, nn.Module) or not callable(factory):
        raise ArgumentError(
            f"the factory is a {type(factory).__name__}; it must be a function that makes the "
            "model, such as memtile.empty_model(lambda: MyModel(config))"
        )
    with _parameters_on_meta(), _Makers():
        model = factory()
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"the factory gave a {type(model).__name__}; it must make an nn.Module, such as "
            "memtile.empty_model(lambda: MyModel(config))"
        )
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise CannotTileError(
                f"the buffer {name} of {type(model).__name__} is computed from parameters, or "
                "written into memory that was left empty, so it has no values before they do; "
                "make it of torch.arange, zeros, ones or tensor, or build the model with its values"
            )
    for integration in integrations():
        integration.emptied(model)
    return model


class _Makers(TorchFunctionMode):
    """Puts what is made empty or drawn on the meta device, unless it asks for another one."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # as torch gives them
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # whatever the function gives
        kwargs = dict(kwargs or {})
        if func in _MAKERS:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Whatever becomes a parameter inside is moved to the meta device, ties included."""
    register = nn.Module.register_parameter
    moved: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # by what they were made of

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            known = moved.get(id(parameter))
            if known is None:
                meta = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
                known = moved[id(parameter)] = (parameter, meta)
            parameter = known[1]
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]  # no hook
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]

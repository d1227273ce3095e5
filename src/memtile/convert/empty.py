"""`empty_model`: a model with its parameters on the meta device, and real buffers."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from memtile.convert.kinds import integrations
from memtile.errors import ArgumentError, CannotTileError
from memtile.homes import fork_safe_lock

Model = TypeVar("Model", bound=nn.Module)

# Functions whose values are drawn, or written later: parameters are made with them. Computed values
# (arange, tensor, zeros, ones, full) stay real, since buffers are made with them (rotary tables).
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
    `memtile.tile(model, …, checkpoint=folder)`, or look at the model with `memtile.plan`. Only what
    this thread makes is concerned: other threads may build models meanwhile.

    What transformers keeps in float32 in a model of 16 bits (`from_pretrained` does, `from_config`
    does not) is float32 here too.

    Args:
        factory: makes the model, as `lambda: AutoModelForCausalLM.from_config(config)` does.

    Raises:
        ArgumentError: it makes no module.
        CannotTileError: a buffer could not be kept real, since it is computed from parameters or
            written into memory that was left empty; the message names it.

    Examples:
        >>> model = memtile.empty_model(lambda: nn.Linear(64, 3000))
        >>> model.weight.device
        device(type='meta')
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
    """Makes empty and random tensors on the meta device."""

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


_moving = threading.local()  # .moved: (parameter, its meta copy) by the parameter's id
_patching = fork_safe_lock()
_inside = 0  # calls of `empty_model` under way, in all threads
_register = nn.Module.register_parameter


def _register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    """`register_parameter` while a thread is in `empty_model`; for other threads the plain one."""
    moved = getattr(_moving, "moved", None)
    if moved is not None and parameter is not None and not parameter.is_meta:
        known = moved.get(id(parameter))
        if known is None:
            meta = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
            known = moved[id(parameter)] = (parameter, meta)
        parameter = known[1]
    _register(module, name, parameter)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Every parameter registered inside, by this thread, is moved to meta; ties stay ties.

    torch's own registration hooks would fail where another thread registers a parameter meanwhile.
    """
    outer = getattr(_moving, "moved", None)
    _moving.moved = {} if outer is None else outer
    _patch(1)
    try:
        yield
    finally:
        _moving.moved = outer
        _patch(-1)


def _patch(more: int) -> None:
    """Put our function in place for the first call under way, and take it away after the last.

    If someone else has replaced it meanwhile, it stays, and does nothing any more.
    """
    global _inside, _register
    with _patching:
        if not _inside and nn.Module.register_parameter is not _register_on_meta:
            _register = nn.Module.register_parameter
            nn.Module.register_parameter = _register_on_meta  # type: ignore[method-assign,assignment]
        _inside += more
        if not _inside and nn.Module.register_parameter is _register_on_meta:
            nn.Module.register_parameter = _register  # type: ignore[method-assign]

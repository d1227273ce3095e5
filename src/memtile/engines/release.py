"""Tiles that an engine lets go of in backward even where their input needs no gradient.

Engines hang that moment on an input that requires grad; the first layer of a model has none.
"""

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function


class _Attach(Function):
    """The result as it is; in backward a zero for the token, which is all that it is there for."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, token: Tensor | None) -> Tensor:  # torch types no context
        """The result, which is no view of anything: what is done to it in place is safe."""
        ctx.zero = None if token is None else token.detach()
        return result.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:  # as above
        """The gradient, and a zero."""
        return gradients[0], None if ctx.zero is None else torch.zeros_like(ctx.zero)


def release_in_backward(tile: nn.Module) -> None:
    """Give a tile a token that requires grad beside each input that does not.

    Call it after the engine has hooked the tile: the token must be there before its hooks look.
    Results that are views (a linear's with a bias, of an input of three dimensions) become results
    of their own, without a copy: FSDP2 warns of views, whose hooks are lost when they are written.
    """
    plain = tile.forward

    def forward(input_: Any, token: Tensor | None = None) -> Any:  # whatever the tile takes, gives
        result = plain(input_)
        if not isinstance(result, tuple):
            return _attached(result, token)
        return (_attached(result[0], token), *map(_outliving, result[1:]))

    tile.forward = forward
    hook = partial(_with_token, next(iter(inspect.signature(plain).parameters)))
    tile.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)


def _attached(result: Tensor, token: Tensor | None) -> Tensor:
    if token is None and result._base is None:
        return result
    attached: Tensor = _Attach.apply(result, token)  # type: ignore[no-untyped-call]  # torch's own
    return attached


def _outliving(result: Any) -> Any:  # a bias or None, mostly
    """A bias that is returned is used when its tile is gone: a copy."""
    return result.clone() if isinstance(result, Tensor) else result


def _with_token(
    name: str, tile: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The input by position, also where it came by its name, and a token where it needs one."""
    if not inputs and name in named:
        named = dict(named)
        inputs = (named.pop(name),)
    trained = torch.is_grad_enabled() and any(p.requires_grad for p in tile.parameters())
    if not inputs or not trained or any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        return inputs, named
    device = inputs[0].device if isinstance(inputs[0], Tensor) else None
    return (*inputs, torch.zeros((), device=device, requires_grad=True)), named

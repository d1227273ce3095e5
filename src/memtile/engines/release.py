"""Tiles that an engine lets go of in backward even where their input needs no gradient.

Engines hang that moment on an input that requires grad; the first layer of a model has none.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function


class _Attach(Function):
    """The result as it is; in backward a zero for the token, which is all that it is there for."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, token: Tensor) -> Tensor:  # torch types no context
        """The result."""
        ctx.zero = token.detach()
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:  # torch types no context
        """The gradient, and a zero."""
        return gradients[0], torch.zeros_like(ctx.zero)


def release_in_backward(tile: nn.Module) -> None:
    """Give a tile a token that requires grad beside each input that does not.

    Call it after the engine has hooked the tile: the token must be there before its hooks look.
    """
    plain = tile.forward

    def forward(input_: Any, token: Tensor | None = None) -> Any:  # whatever the tile takes, gives
        result = plain(input_)
        if token is None:
            return result
        return _Attach.apply(result, token)  # type: ignore[no-untyped-call]  # torch's own

    tile.forward = forward
    tile.register_forward_pre_hook(_with_token, prepend=True)


def _with_token(tile: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    trained = torch.is_grad_enabled() and any(p.requires_grad for p in tile.parameters())
    if not trained or any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        return inputs
    device = inputs[0].device if isinstance(inputs[0], Tensor) else None
    return (*inputs, torch.zeros((), device=device, requires_grad=True))

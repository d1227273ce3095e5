"""Lets an engine free a tile in backward even where the tile's input needs no gradient.

Engines hook the gradient of an input; the inputs of a model's first layer have none.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function


class _Attach(Function):
    """Returns the result unchanged; in backward, the token's gradient is zero."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, token: Tensor | None) -> Tensor:  # torch types no context
        """The result as a tensor that is no view, so changing it in place is safe."""
        ctx.zero = None if token is None else token.detach()
        return result.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:  # as above
        """The gradient of the result, and zero for the token."""
        return gradients[0], None if ctx.zero is None else torch.zeros_like(ctx.zero)


def release_in_backward(tile: nn.Module) -> None:
    """Give a tile a token that requires grad beside each input that does not.

    Call it after the engine has hooked the tile: the token must be there before those hooks run.
    Results that are views (a linear's with a bias, of an input of three dimensions) become tensors
    that are none, without a copy: a view that is written in place loses FSDP2's hooks. A module of
    several inputs (the embedding of positions of OPT) is left as it is.
    """
    plain = tile.forward
    first, *others = inspect.signature(plain).parameters.values()
    if any(each.kind in (each.POSITIONAL_OR_KEYWORD, each.VAR_POSITIONAL) for each in others):
        return
    tile.forward = _with_result_attached(plain)
    hook = partial(_with_token, first.name)
    tile.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)


def _with_result_attached(plain: Callable[..., Any], trains: bool = False) -> Callable[..., Any]:
    """A forward that takes a token too, and attaches it to what `plain` gives.

    It gets one where the tile trains, or where `plain` is told to train others.
    """

    # whatever the tile takes and gives
    def forward(input_: Any, token: Tensor | None = None, **named: Any) -> Any:
        result = plain(input_, **named)
        if not isinstance(result, tuple):
            return _attached(result, token)
        # a bias that is returned is used after its tile is freed: a copy
        copies = (x.clone() if isinstance(x, Tensor) else x for x in result[1:])
        return (_attached(result[0], token), *copies)

    # the same of another forward (`layers.gathered_calls`)
    forward.around = _with_result_attached  # type: ignore[attr-defined]  # functions take attributes
    forward.trains = trains  # type: ignore[attr-defined]  # likewise
    return forward


def _attached(result: Tensor, token: Tensor | None) -> Tensor:
    if token is None and result._base is None:
        return result
    attached: Tensor = _Attach.apply(result, token)  # type: ignore[no-untyped-call]  # torch's own
    return attached


def _with_token(
    name: str, tile: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pass the input by position, also where it came by name, and a token where it needs one."""
    if not inputs and name in named:
        named = dict(named)
        inputs = (named.pop(name),)
    trains = getattr(tile.forward, "trains", False) or any(
        p.requires_grad for p in tile.parameters()
    )
    trained = torch.is_grad_enabled() and trains
    if not inputs or not trained or any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        return inputs, named
    device = inputs[0].device if isinstance(inputs[0], Tensor) else None
    return (*inputs, torch.zeros((), device=device, requires_grad=True)), named

"""`defer_logits`: the heads of a model give logits that are computed when they are needed."""

from typing import TypeVar

from torch import nn

from memtile.convert.kinds import integrations
from memtile.errors import ArgumentError
from memtile.layers import set_deferring

Model = TypeVar("Model", bound=nn.Module)


def defer_logits(model: Model, on: bool = True) -> Model:
    """Have the model's heads give deferred logits from now on, so that its losses need none.

    `memtile.tile` does so for transformers models. Where a head would give more than 4 Mi logits,
    it gives a tensor without values. `cross_entropy` of it, as transformers' losses call it, is
    `memtile.linear_cross_entropy`; whatever else needs values computes them. Parameters, names and
    state dicts are as they were.

    Args:
        model: with a transformers model in it; or a head itself, `nn.Linear` or `TiledLinear`.
        on: False: the logits are computed at once again.

    Returns:
        The same model.

    Raises:
        ArgumentError: it has no head that is known, or heads of other classes alone.

    Examples:
        >>> head = memtile.defer_logits(nn.Linear(64, 100_000))
        >>> loss = nn.CrossEntropyLoss()(head(torch.zeros(512, 64)), torch.arange(512))
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"the model is a {type(model).__name__}; it must be an nn.Module")
    done = set_deferring(model, on) or set_deferring_of(model, on)
    if on and not done:
        raise ArgumentError(
            f"{type(model).__name__} has no head that is known to give logits; give the head, an "
            "nn.Linear or a TiledLinear, such as memtile.defer_logits(model.head)"
        )
    return model


def set_deferring_of(model: nn.Module, on: bool) -> bool:
    """Have the known heads of a model defer, or all heads not any more; whether there are any."""
    known = (head for own in integrations() for head in own.heads(model))
    done = [set_deferring(head, on) for head in (known if on else model.modules())]
    return any(done)

"""Which experts' tiles a forward calls: those with rows, and those that others count on.

An engine that hooks tiles counts on all of them. Ranks that average gradients count on the same
ones: a tile that one of them calls is called by all, also with no rows, and has a gradient on all.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

Agreement = Callable[[Sequence[Any], Sequence[bool], int], list[bool]]
"""Given stacks, whether this rank calls each expert, and the number of the first: whether any rank
does. It is asked by all ranks at once."""

_agreements: "weakref.WeakKeyDictionary[nn.Module, Agreement]" = weakref.WeakKeyDictionary()


def agree_on_calls(stack: nn.Module, agreement: Agreement | None) -> None:
    """Call the experts of a `TiledStack` that any rank calls; None: those of this rank alone."""
    _agreements.pop(stack, None)
    if agreement is not None:
        _agreements[stack] = agreement


def called_experts(stacks: Sequence[Any], counts: Sequence[int], first: int = 0) -> list[bool]:
    """Whether each expert is called that has so many rows, from number `first` on.

    `stacks` are the `TiledStack`s that work on them together.
    """
    called = [bool(count) for count in counts]
    if any(stack.calls_all for stack in stacks):
        called = [True] * len(called)
    agreement = next((found for s in stacks if (found := _agreements.get(s))), None)
    return called if agreement is None else agreement(stacks, called, first)

"""Finds the most tokens of a step that fit a budget."""

from collections.abc import Callable
from itertools import count
from typing import Final

LENGTH_UNIT: Final = 64
"""The longest sequence is a multiple of so many tokens."""


def longest_step(excess: Callable[[int], int | None], batch: int) -> int:
    """The most tokens, of `batch` sequences of equal length, with no more bytes than are allowed.

    What a step takes grows with its tokens, almost as a line, so that a few sizes are asked for.

    Args:
        excess: by how many bytes a step of so many tokens is over its budget, 0 or less if it fits;
            None: it cannot be.
        batch: sequences.

    Returns:
        The tokens of one unit, where not even these fit.
    """
    unit = LENGTH_UNIT * batch
    low, high, at_low, at_high = 1, 2, excess(unit), excess(2 * unit)
    if at_low is None or at_low > 0:
        return unit
    while at_high is not None and at_high <= 0:
        # as far as the line through both says, between twice and 32 times
        growth = (at_high - at_low) / (high - low)
        meets = high - at_high / growth if growth > 0 else 0
        low, at_low, high = high, at_high, int(min(max(2 * high, meets), 32 * high))
        at_high = excess(high * unit)
    for turn in count():
        step = max(1, low // LENGTH_UNIT)
        if high - low <= step:
            break
        middle = (low + high) // 2
        if at_high is not None and turn % 3 < 2:  # where the line meets the budget, and beyond
            meets = low + int((high - low) * at_low / (at_low - at_high))
            middle = meets + (0 if turn % 3 == 0 else step if meets <= low else -step)
            middle = min(max(middle, low + 1), high - 1)
        now = excess(middle * unit)
        if now is not None and now <= 0:
            low, at_low = middle, now
        else:
            high, at_high = middle, now
    return low * unit

"""What bounds a step, in a word, and what to change about it, in a sentence.

Both come of two sums that are always kept: how long threads that compute waited for tiles, and how
long a home had reads or writes under way.
"""

from collections.abc import Sequence
from typing import Final

from memtile.cli.finetune.log import LoggedStep

COMPUTE: Final = "compute"
DISK: Final = "disk"
WAITING: Final = "waiting"

_FREE: Final = 0.1  # of a step: less than this is not worth a change
_BUSY: Final = 0.75  # of a step: a home that moves for so long is hardly ever idle
_MOST_TOKENS: Final = 16  # times as many: beyond that the estimate says nothing


def bound_by(entry: LoggedStep) -> str | None:
    """What a step was bound by; None where that was not measured.

    "compute": tiles were hardly waited for. "disk": they were, and the home was always at work.
    "waiting": they were, though the home was idle in between.
    """
    if entry.waited_seconds is None or entry.moving_seconds is None:
        return None
    if entry.waited_seconds < _FREE * entry.seconds:
        return COMPUTE
    return DISK if entry.moving_seconds >= _BUSY * entry.seconds else WAITING


def advice(entries: Sequence[LoggedStep], tokens: int) -> str | None:
    """What to change for more tokens a second; None where nothing was measured.

    The first step is left out where there are others: it learns which tile comes after which.
    """
    later = [each for each in entries[1:] or entries if each.waited_seconds is not None]
    seconds = sum(each.seconds for each in later)
    if not seconds:
        return None
    waited = sum(each.waited_seconds or 0.0 for each in later) / seconds
    moving = sum(each.moving_seconds or 0.0 for each in later) / seconds
    shares = f"tiles were waited for {waited:.0%} of the time"
    if waited < _FREE:
        return f"bound by compute: {shares}, and neither a faster disk nor more memory would help"
    if moving >= _BUSY:
        return (
            f"bound by disk: {shares}, with the disk at work for {min(moving, 1):.0%} of it; "
            f"{_enough_tokens(tokens, waited)}, or give a larger --budget or a faster --home"
        )
    return (
        f"bound by waiting: {shares}, with the disk at work for only {moving:.0%} of it; give a "
        "larger --budget, which makes tiles fewer and larger, and see one step by --trace FILE"
    )


def _enough_tokens(tokens: int, waited: float) -> str:
    """Reads take as long for more tokens, and products take longer, until they hide the reads."""
    times = 1 / max(1 - waited, 1 / _MOST_TOKENS)
    return f"about --tokens {int(tokens * times / 8 + 1) * 8} would hide the reads"

"""The table of an observation, as text and for rich."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from memtile.observing.intervals import (
    length,
    own_pieces,
    slabs_in_use,
    union,
    whole,
    worked,
)
from memtile.observing.recording import COMPUTE, READ, WAITS, WRITE, Event

if TYPE_CHECKING:
    from rich.table import Table

_HEAD: Final = ("", "count", "seconds", "of the time", "MiB", "MiB/s")
_MOST: Final = 3  # tiles that are named


@dataclass(frozen=True)
class TableRow:
    """One kind of work."""

    name: str
    count: int
    seconds: float
    share: float  # of the time observed
    nbytes: int = 0

    def cells(self) -> tuple[str, ...]:
        """As text."""
        mebibytes = self.nbytes / (1 << 20)
        rate = f"{mebibytes / self.seconds:.0f}" if self.nbytes and self.seconds else ""
        moved = f"{mebibytes:.1f}" if self.nbytes else ""
        count = str(self.count) if self.count else ""
        return self.name, count, f"{self.seconds:.3f}", f"{self.share:.0%}", moved, rate


def rows_of(events: Sequence[Event], seconds: float) -> list[TableRow]:
    """What threads did that compute, which adds up to the time where there is one, and the homes.

    The seconds of a forward are without the waits in it. Those of reads and of writes are those in
    which any was under way.
    """
    own: Counter[str] = Counter()
    for event, (begun, ended) in own_pieces(events):
        own[event.kind] += ended - begun
    counts = Counter(event.kind for event in events)
    rest = seconds - length(worked(events)) / 1e9

    def row(name: str, took: float, count: int = 0, nbytes: int = 0) -> TableRow:
        return TableRow(name, count, took, took / seconds if seconds else 0.0, nbytes)

    rows = [row(kind, own[kind] / 1e9, counts[kind]) for kind in (*COMPUTE, *WAITS) if counts[kind]]
    rows.append(row("outside of tiles", rest))
    for kind in (READ, WRITE):
        moved = [event for event in events if event.kind == kind]
        took = length(union(whole(moved))) / 1e9
        if moved:
            rows.append(row(f"meanwhile, {kind}", took, len(moved), sum(s.amount for s in moved)))
    return rows


def notes_on(events: Sequence[Event], seconds: float, dropped: int) -> list[str]:
    """Sentences below the table."""
    if not events:
        return [f"{seconds:.3f} s, in which no parked tile was used"]
    notes = [f"{seconds:.3f} s"]
    used = slabs_in_use(events)
    if used:
        area = sum((then - now) * slabs for (now, slabs), (then, _) in pairwise(used))
        mean, most = area / 1e9 / seconds, max(slabs for _, slabs in used)
        notes.append(f"slabs in use: {mean:.1f} on average, {most} at most")
    waited = _waited_for(events).most_common(_MOST)
    if waited:
        longest = ", ".join(f"{name} ({ns / 1e6:.1f} ms)" for name, ns in waited)
        notes.append(f"waited longest for: {longest}")
    if dropped:
        notes.append(f"{dropped} later events are missing: observe(max_events=…) keeps more")
    return notes


def _waited_for(events: Sequence[Event]) -> Counter[str]:
    """Nanoseconds of waits by tile: that of the forward, backward or step that a wait is in."""
    waited: Counter[str] = Counter()
    around: defaultdict[int, list[Event]] = defaultdict(list)  # by thread
    for event in events:
        open_events = around[event.thread]
        while open_events and open_events[-1].ended_ns <= event.begun_ns:
            open_events.pop()
        if event.kind in COMPUTE:
            open_events.append(event)
        elif event.kind in WAITS:
            waited[open_events[-1].name if open_events else event.name] += (
                event.ended_ns - event.begun_ns
            )
    return waited


def as_text(rows: Sequence[TableRow], notes: Sequence[str]) -> str:
    """Columns, then the notes."""
    lines = [_HEAD, *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([*table, *notes])


def as_rich(rows: Sequence[TableRow], notes: Sequence[str]) -> "Table":
    """The same for a console of rich."""
    from rich.table import Table
    from rich.text import Text

    table = Table(caption=Text("\n".join(notes)), caption_justify="left")
    for number, head in enumerate(_HEAD):
        table.add_column(head, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row.cells())
    return table

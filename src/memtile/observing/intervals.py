"""Sums over events: the time that each had for itself, the time that any of them took."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from math import ceil

from memtile.observing.recording import COMPUTE, SLABS, WAITS, Event

Piece = tuple[int, int]  # from, to: nanoseconds


def own_pieces(events: Iterable[Event]) -> Iterator[tuple[Event, Piece]]:
    """When each event was at work itself, and no event inside it, of the same thread.

    `events` are in order, as `Observation.events`; those of slabs are passed over.
    """
    by_thread: defaultdict[int, list[Event]] = defaultdict(list)
    for event in events:
        if event.kind != SLABS:
            by_thread[event.thread].append(event)
    for own in by_thread.values():
        yield from _of_thread(own)


def _of_thread(events: Iterable[Event]) -> Iterator[tuple[Event, Piece]]:
    inside: list[Event] = []  # each within the one before it
    now = 0
    for event in events:
        while inside and inside[-1].ended_ns <= event.begun_ns:
            yield inside[-1], (now, inside[-1].ended_ns)
            now = inside.pop().ended_ns
        if inside:
            yield inside[-1], (now, event.begun_ns)
        inside.append(event)
        now = event.begun_ns
    while inside:
        yield inside[-1], (now, inside[-1].ended_ns)
        now = inside.pop().ended_ns


def union(pieces: Iterable[Piece]) -> list[Piece]:
    """The same time without overlaps, in order."""
    found: list[Piece] = []
    for begun, ended in sorted(pieces):
        if found and begun <= found[-1][1]:
            found[-1] = found[-1][0], max(ended, found[-1][1])
        else:
            found.append((begun, ended))
    return found


def length(pieces: Iterable[Piece]) -> int:
    """Nanoseconds."""
    return sum(ended - begun for begun, ended in pieces)


def whole(events: Iterable[Event]) -> list[Piece]:
    """From begin to end of each."""
    return [(event.begun_ns, event.ended_ns) for event in events]


def shares(
    pieces: Iterable[tuple[Piece, float]], begun_ns: int, column_ns: float, columns: int
) -> list[float]:
    """The sum of the pieces' weights in each column of time, each by its share of the column."""
    found = [0.0] * columns
    for (begun, ended), weight in pieces:
        left, right = (begun - begun_ns) / column_ns, (ended - begun_ns) / column_ns
        for column in range(int(left), min(columns, ceil(right))):
            found[column] += weight * (min(right, column + 1) - max(left, column))
    return found


def worked(events: Sequence[Event]) -> list[Piece]:
    """When any thread computed with tiles or waited for them."""
    return union(whole(event for event in events if event.kind in (*COMPUTE, *WAITS)))


def slabs_in_use(events: Iterable[Event]) -> list[tuple[int, int]]:
    """(nanoseconds, slabs in use from then on), in order."""
    changes: defaultdict[int, int] = defaultdict(int)
    for event in events:
        if event.kind == SLABS:
            changes[event.begun_ns] += event.amount
            changes[event.ended_ns] -= event.amount
    found, used = [], 0
    for when, change in sorted(changes.items()):
        used += change
        found.append((when, used))
    return found

"""Sums over spans: the time that each had for itself, the time that any of them took."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from memtile.observing.recording import COMPUTE, SLABS, WAITS, Span

Piece = tuple[int, int]  # from, to: nanoseconds


def own_pieces(spans: Iterable[Span]) -> Iterator[tuple[Span, Piece]]:
    """When each span was at work itself, and no span inside it, of the same thread.

    `spans` are in order, as `Observation.spans`; those of slabs are passed over.
    """
    by_thread: defaultdict[int, list[Span]] = defaultdict(list)
    for span in spans:
        if span.kind != SLABS:
            by_thread[span.thread].append(span)
    for own in by_thread.values():
        yield from _of_thread(own)


def _of_thread(spans: Iterable[Span]) -> Iterator[tuple[Span, Piece]]:
    inside: list[Span] = []  # each within the one before it
    now = 0
    for span in spans:
        while inside and inside[-1].ended_ns <= span.begun_ns:
            yield inside[-1], (now, inside[-1].ended_ns)
            now = inside.pop().ended_ns
        if inside:
            yield inside[-1], (now, span.begun_ns)
        inside.append(span)
        now = span.begun_ns
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


def whole(spans: Iterable[Span]) -> list[Piece]:
    """From begin to end of each."""
    return [(span.begun_ns, span.ended_ns) for span in spans]


def worked(spans: Sequence[Span]) -> list[Piece]:
    """When any thread computed with tiles or waited for them."""
    return union(whole(span for span in spans if span.kind in (*COMPUTE, *WAITS)))


def slabs_in_use(spans: Iterable[Span]) -> list[tuple[int, int]]:
    """(nanoseconds, slabs in use from then on), in order."""
    changes: defaultdict[int, int] = defaultdict(int)
    for span in spans:
        if span.kind == SLABS:
            changes[span.begun_ns] += span.amount
            changes[span.ended_ns] -= span.amount
    found, used = [], 0
    for when, change in sorted(changes.items()):
        used += change
        found.append((when, used))
    return found

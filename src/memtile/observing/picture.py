"""The picture of an observation: lanes of time for compute, waits, reads and writes."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final

from memtile.observing.intervals import Piece, own_pieces, shares, slabs_in_use, union, whole
from memtile.observing.recording import (
    BACKWARD,
    FORWARD,
    READ,
    SLABS,
    STEP,
    WAIT_FOR_READ,
    WAIT_FOR_SLAB,
    WAIT_FOR_WRITE,
    WRITE,
    Event,
)

_LANES: Final = {  # from top to bottom: kinds of events, and their colours
    "compute": {FORWARD: "tab:blue", BACKWARD: "tab:cyan", STEP: "tab:purple"},
    "waits": {WAIT_FOR_READ: "tab:red", WAIT_FOR_SLAB: "tab:orange", WAIT_FOR_WRITE: "tab:pink"},
    "reads": {READ: "tab:green"},
    "writes": {WRITE: "tab:olive"},
    "slabs": {SLABS: "tab:gray"},
}
_COLUMNS: Final = 500  # two pixels wide


def draw(path: Path, events: Sequence[Event], begun_ns: int, seconds: float) -> None:
    """Draws all threads together as a PNG, `seconds` wide; needs matplotlib.

    The time is cut into columns, each of which may have many events of small tiles. A bar is as
    high as the share of its column that its kind took; that of slabs, as the share of the most that
    were in use. What has no events has no lane.
    """
    from matplotlib.figure import Figure

    heights = _heights(events, begun_ns, seconds * 1e9 / _COLUMNS)
    lanes = [lane for lane, kinds in _LANES.items() if heights.keys() & kinds.keys()]
    figure = Figure(figsize=(11, 1.2 + 0.6 * len(lanes)), layout="constrained")
    axes = figure.subplots()
    edges = [seconds * column / _COLUMNS for column in range(_COLUMNS + 1)]
    for place, lane in enumerate(lanes):
        base = [place + 0.4] * _COLUMNS
        for kind in (kind for kind in _LANES[lane] if kind in heights):
            top = [y - 0.8 * height for y, height in zip(base, heights[kind], strict=True)]
            axes.stairs(top, edges, baseline=base, fill=True, color=_LANES[lane][kind], label=kind)
            base = top
    axes.set_yticks(range(len(lanes)), lanes)
    axes.set_ylim(max(1, len(lanes)) - 0.5, -0.5)
    axes.set_xlim(0, seconds)
    axes.set_xlabel("seconds")
    if lanes:
        figure.legend(loc="outside upper center", ncols=9, fontsize="small", handlelength=1)
    figure.savefig(path, format="png", dpi=100)


def _heights(events: Sequence[Event], begun_ns: int, column_ns: float) -> dict[str, list[float]]:
    """How high the bar of each kind is in each column, 0 to 1."""
    found = {
        kind: [(piece, 1.0) for piece in union(pieces)] for kind, pieces in _by_kind(events).items()
    }
    used = slabs_in_use(events)
    most = max((slabs for _, slabs in used), default=0)
    found[SLABS] = [((now, then), slabs / most) for (now, slabs), (then, _) in pairwise(used)]
    return {
        kind: shares(pieces, begun_ns, column_ns, _COLUMNS)
        for kind, pieces in found.items()
        if pieces
    }


def _by_kind(events: Sequence[Event]) -> defaultdict[str, list[Piece]]:
    """When each kind was at work; a forward is not while it waits."""
    found: defaultdict[str, list[Piece]] = defaultdict(list)
    for event, piece in own_pieces(events):
        if event.kind not in (READ, WRITE):
            found[event.kind].append(piece)
    for kind in (READ, WRITE):
        found[kind] = whole(event for event in events if event.kind == kind)
    return found

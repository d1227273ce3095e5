"""The picture of an observation: lanes of time for compute, waits, reads and writes."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from memtile.observing.intervals import Piece, own_pieces, slabs_in_use, union, whole
from memtile.observing.recording import (
    BACKWARD,
    FORWARD,
    READ,
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
}


def draw(path: Path, events: Sequence[Event], begun_ns: int, seconds: float) -> None:
    """Draws all threads together as a PNG, `seconds` wide; needs matplotlib."""
    from matplotlib.figure import Figure

    pieces = _by_kind(events)
    figure = Figure(figsize=(11, 4), layout="constrained")
    lanes, slabs = figure.subplots(2, sharex=True, height_ratios=[5, 1])
    for place, kinds in enumerate(_LANES.values()):
        for kind, colour in kinds.items():
            bars = [
                ((begun - begun_ns) / 1e9, (ended - begun) / 1e9)
                for begun, ended in union(pieces[kind])
            ]
            if bars:
                lanes.broken_barh(bars, (place - 0.4, 0.8), color=colour, linewidth=0, label=kind)
    lanes.set_yticks(range(len(_LANES)), list(_LANES))
    lanes.set_ylim(len(_LANES) - 0.5, -0.5)
    lanes.set_xlim(0, seconds)
    if any(pieces.values()):
        lanes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=8, fontsize="small")
    used = [(begun_ns, 0), *slabs_in_use(events)]
    slabs.step([(when - begun_ns) / 1e9 for when, _ in used], [n for _, n in used], where="post")
    slabs.set_ylabel("slabs")
    slabs.set_xlabel("seconds")
    figure.savefig(path, format="png", dpi=100)


def _by_kind(events: Sequence[Event]) -> defaultdict[str, list[Piece]]:
    """When each kind was at work; a forward is not while it waits."""
    found: defaultdict[str, list[Piece]] = defaultdict(list)
    for event, piece in own_pieces(events):
        if event.kind not in (READ, WRITE):
            found[event.kind].append(piece)
    for kind in (READ, WRITE):
        found[kind] = whole(event for event in events if event.kind == kind)
    return found

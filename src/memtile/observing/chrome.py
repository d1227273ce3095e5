"""The trace file of an observation, for Perfetto and chrome://tracing.

Source: "Trace Event Format" of the Chromium project: complete events (X), counters (C) and metadata
(M), with times in microseconds.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any  # values of JSON

from memtile.observing.intervals import slabs_in_use
from memtile.observing.recording import READ, SLABS, WRITE, Event


def write(path: Path, events: Sequence[Event], threads: Mapping[int, str], begun_ns: int) -> None:
    """Writes the events as one JSON object; times count from `begun_ns`."""
    numbers = {thread: number for number, thread in enumerate(threads, 1)}
    with path.open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        entries = _entries(events, threads, numbers, begun_ns)
        file.write(",\n".join(json.dumps({"pid": os.getpid(), **entry}) for entry in entries))
        file.write("\n]}\n")


def _entries(
    events: Sequence[Event], threads: Mapping[int, str], numbers: Mapping[int, int], begun_ns: int
) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "name": "process_name", "tid": 0, "args": {"name": "memtile"}}
    for thread, name in threads.items():
        label = {"ph": "M", "name": "thread_name", "tid": numbers[thread]}
        yield {**label, "args": {"name": name}}
    for event in events:
        if event.kind != SLABS:
            yield _complete(event, numbers[event.thread], begun_ns)
    for when, slabs in slabs_in_use(events):
        counter = {"ph": "C", "name": SLABS, "tid": 0, "ts": (when - begun_ns) / 1000}
        yield {**counter, "args": {"slabs": slabs}}


def _complete(event: Event, tid: int, begun_ns: int) -> dict[str, Any]:
    details: dict[str, Any] = {"tile": event.name}
    if event.kind in (READ, WRITE):
        details["bytes"] = event.amount
    return {
        "ph": "X",
        "name": f"{event.kind}: {event.name}",
        "cat": event.kind,
        "tid": tid,
        "ts": (event.begun_ns - begun_ns) / 1000,
        "dur": (event.ended_ns - event.begun_ns) / 1000,
        "args": details,
    }

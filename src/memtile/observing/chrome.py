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
from memtile.observing.recording import READ, SLABS, WRITE, Span


def write(path: Path, spans: Sequence[Span], threads: Mapping[int, str], begun_ns: int) -> None:
    """Writes the spans as one JSON object; times count from `begun_ns`."""
    numbers = {thread: number for number, thread in enumerate(threads, 1)}
    with path.open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        events = _events(spans, threads, numbers, begun_ns)
        file.write(",\n".join(json.dumps({"pid": os.getpid(), **event}) for event in events))
        file.write("\n]}\n")


def _events(
    spans: Sequence[Span], threads: Mapping[int, str], numbers: Mapping[int, int], begun_ns: int
) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "name": "process_name", "tid": 0, "args": {"name": "memtile"}}
    for thread, name in threads.items():
        label = {"ph": "M", "name": "thread_name", "tid": numbers[thread]}
        yield {**label, "args": {"name": name}}
    for span in spans:
        if span.kind != SLABS:
            yield _complete(span, numbers[span.thread], begun_ns)
    for when, slabs in slabs_in_use(spans):
        counter = {"ph": "C", "name": SLABS, "tid": 0, "ts": (when - begun_ns) / 1000}
        yield {**counter, "args": {"slabs": slabs}}


def _complete(span: Span, tid: int, begun_ns: int) -> dict[str, Any]:
    details: dict[str, Any] = {"tile": span.name}
    if span.kind in (READ, WRITE):
        details["bytes"] = span.amount
    return {
        "ph": "X",
        "name": f"{span.kind}: {span.name}",
        "cat": span.kind,
        "tid": tid,
        "ts": (span.begun_ns - begun_ns) / 1000,
        "dur": (span.ended_ns - span.begun_ns) / 1000,
        "args": details,
    }

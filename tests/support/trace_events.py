"""The rules of the trace event format that a file for Perfetto must keep."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

COMMON = {"ph", "name", "pid", "tid"}
FIELDS = {"X": {"ts", "dur", "cat", "args"}, "C": {"ts", "args"}, "M": {"args"}}
METADATA = {"process_name", "thread_name"}


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The events of the file, after a check of each and of how they lie on their threads."""
    document = json.loads(path.read_text(encoding="utf-8"))
    events: list[dict[str, Any]] = document["traceEvents"]
    for event in events:
        _check(event)
    by_thread = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            by_thread[event["tid"]].append(event)
    named = {event["tid"] for event in events if event["name"] == "thread_name"}
    assert by_thread.keys() == named
    for own in by_thread.values():
        _check_nested(own)
    counters = [event["ts"] for event in events if event["ph"] == "C"]
    assert counters == sorted(counters)
    return events


def _check(event: dict[str, Any]) -> None:
    assert event.keys() == COMMON | FIELDS[event["ph"]], event
    assert isinstance(event["pid"], int)
    assert isinstance(event["tid"], int)
    for name in FIELDS[event["ph"]] & {"ts", "dur"}:
        assert isinstance(event[name], (int, float))
        assert event[name] >= 0, event
    if event["ph"] == "M":
        assert event["name"] in METADATA
        assert isinstance(event["args"]["name"], str)
    if event["ph"] == "C":
        assert all(isinstance(value, int) and value >= 0 for value in event["args"].values())


def _check_nested(events: list[dict[str, Any]]) -> None:
    """Events of a thread begin in order, and each ends before the one around it."""
    assert [event["ts"] for event in events] == sorted(event["ts"] for event in events)
    ends: list[float] = []
    for event in events:
        begun, ended = event["ts"], event["ts"] + event["dur"]
        while ends and ends[-1] <= begun + 1e-3:  # a nanosecond, in microseconds
            ends.pop()
        assert not ends or ended <= ends[-1] + 1e-3, event
        ends.append(ended)

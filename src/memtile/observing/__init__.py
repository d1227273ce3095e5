"""Observing: what a step reads, writes, computes and waits for, as a table, a trace, a picture."""

from memtile.observing.observation import Observation, check_trace_path, observe
from memtile.observing.recording import Event, Totals, totals

__all__ = ["Event", "Observation", "Totals", "check_trace_path", "observe", "totals"]

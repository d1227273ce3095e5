"""Looks at a model and at this machine, and makes plans by the formulas of `memtile.costmodel`."""

from memtile.planner.plan_for_machine import plan
from memtile.planner.plan_for_ranks import plan_ranks

__all__ = ["plan", "plan_ranks"]

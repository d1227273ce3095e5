"""Makes plans: counts a step, measures the machine, and searches with `memtile.costmodel`."""

from memtile.planner.plan_for_machine import plan
from memtile.planner.plan_for_ranks import plan_ranks

__all__ = ["plan", "plan_ranks"]

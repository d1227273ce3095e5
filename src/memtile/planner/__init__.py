"""What a plan is made from: the model surveyed, a step of it counted, the machine measured."""

from memtile.planner.plans import plan
from memtile.planner.rank_plans import plan_ranks

__all__ = ["plan", "plan_ranks"]

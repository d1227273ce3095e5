"""What a plan is made from: the model surveyed, a step of it counted, the machine measured."""

from memtile.planner.plans import plan

__all__ = ["plan"]

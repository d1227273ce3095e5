"""Formulas for memory and time of a step, and searches for a plan, on numbers alone: no torch.

`memtile.planner` looks at a model and at this machine, and calls what is here.
"""

from memtile.planning.budget import Budget
from memtile.planning.byte_sizes import format_byte_size, parse_byte_size, parse_speed
from memtile.planning.model_records import Products
from memtile.planning.plan import Plan
from memtile.planning.plan_parts import PlannedLayer
from memtile.planning.rank_memory import Moment
from memtile.planning.rank_plan import RankPlan
from memtile.planning.rank_traffic import Speeds
from memtile.planning.rates import Rates
from memtile.planning.shards import LooseModule, Parameter, ShardedLayer, Sharding, Uses

__all__ = [
    "Budget",
    "LooseModule",
    "Moment",
    "Parameter",
    "Plan",
    "PlannedLayer",
    "Products",
    "RankPlan",
    "Rates",
    "ShardedLayer",
    "Sharding",
    "Speeds",
    "Uses",
    "format_byte_size",
    "parse_byte_size",
    "parse_speed",
]

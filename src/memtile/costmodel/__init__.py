"""Formulas for memory and time of a step, and the search for a plan. Imports no torch.

`memtile.planner` gets the numbers from a model and from this machine, and calls these functions.
"""

from memtile.costmodel.budget import Budget
from memtile.costmodel.byte_sizes import format_byte_size, parse_byte_size, parse_speed
from memtile.costmodel.machine_profile import MachineProfile
from memtile.costmodel.model_records import Products
from memtile.costmodel.plan import Plan
from memtile.costmodel.plan_parts import PlannedLayer
from memtile.costmodel.rank_memory import Moment
from memtile.costmodel.rank_plan import RankPlan
from memtile.costmodel.rank_traffic import ClusterSpec
from memtile.costmodel.search import MAPPED_BYTES
from memtile.costmodel.shards import LooseModule, Parameter, ShardedLayer, Sharding, Uses

__all__ = [
    "MAPPED_BYTES",
    "Budget",
    "ClusterSpec",
    "LooseModule",
    "MachineProfile",
    "Moment",
    "Parameter",
    "Plan",
    "PlannedLayer",
    "Products",
    "RankPlan",
    "ShardedLayer",
    "Sharding",
    "Uses",
    "format_byte_size",
    "parse_byte_size",
    "parse_speed",
]

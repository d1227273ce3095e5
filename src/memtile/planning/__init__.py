"""How many tiles, living where: from counts and rates alone, without a tensor."""

from memtile.planning.budget import Budget, checked_size, needed, usable
from memtile.planning.byte_sizes import format_byte_size, parse_byte_size, parse_speed
from memtile.planning.counted import (
    Counted,
    Products,
    Rest,
    State,
    Weight,
    check_tokens,
)
from memtile.planning.layout import Layout, Rings
from memtile.planning.memory_model import Setting, terms
from memtile.planning.plan import PARKED, RESIDENT, Floor, Mode, Plan, PlannedLayer, Term
from memtile.planning.rank_memory import Moment, Offload, RankSetting, shards
from memtile.planning.rank_search import RankFound, RankSearch
from memtile.planning.rank_traffic import Speeds, Traffic, rank_floors, traffic
from memtile.planning.ranks import RankPlan
from memtile.planning.rates import WORKSPACE_SHAPE, Rates
from memtile.planning.search import Found, Search
from memtile.planning.shards import (
    Engine,
    LooseModule,
    Parameter,
    ShardedLayer,
    Sharding,
    Unit,
    Units,
    Uses,
)
from memtile.planning.time_model import floors, moved

__all__ = [
    "PARKED",
    "RESIDENT",
    "WORKSPACE_SHAPE",
    "Budget",
    "Counted",
    "Engine",
    "Floor",
    "Found",
    "Layout",
    "LooseModule",
    "Mode",
    "Moment",
    "Offload",
    "Parameter",
    "Plan",
    "PlannedLayer",
    "Products",
    "RankFound",
    "RankPlan",
    "RankSearch",
    "RankSetting",
    "Rates",
    "Rest",
    "Rings",
    "Search",
    "Setting",
    "ShardedLayer",
    "Sharding",
    "Speeds",
    "State",
    "Term",
    "Traffic",
    "Unit",
    "Units",
    "Uses",
    "Weight",
    "check_tokens",
    "checked_size",
    "floors",
    "format_byte_size",
    "moved",
    "needed",
    "parse_byte_size",
    "parse_speed",
    "rank_floors",
    "shards",
    "terms",
    "traffic",
    "usable",
]

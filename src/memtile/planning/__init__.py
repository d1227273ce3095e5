"""How many tiles, living where: from counts and rates alone, without a tensor."""

from memtile.planning.budget import Budget
from memtile.planning.byte_sizes import format_byte_size, parse_byte_size
from memtile.planning.counted import (
    LARGEST_WORKSPACE,
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
from memtile.planning.rates import Rates
from memtile.planning.search import Found, Search
from memtile.planning.time_model import floors, moved

__all__ = [
    "LARGEST_WORKSPACE",
    "PARKED",
    "RESIDENT",
    "Budget",
    "Counted",
    "Floor",
    "Found",
    "Layout",
    "Mode",
    "Plan",
    "PlannedLayer",
    "Products",
    "Rates",
    "Rest",
    "Rings",
    "Search",
    "Setting",
    "State",
    "Term",
    "Weight",
    "check_tokens",
    "floors",
    "format_byte_size",
    "moved",
    "parse_byte_size",
    "terms",
]

"""Between homes and those who work on tiles: slabs, the itinerary, reading ahead, passes."""

from memtile.transfer.ferries import GRADIENT_SLABS, SLABS, ferries_of
from memtile.transfer.ferry import Ferry, Loan
from memtile.transfer.itinerary import Itinerary
from memtile.transfer.parked import (
    ParkedSource,
    Use,
    gradient_of,
    is_stepped_in_backward,
    step_in_backward,
)
from memtile.transfer.passes import layer_call, unwatch_model, watch_model
from memtile.transfer.slabs import Holder

__all__ = [
    "GRADIENT_SLABS",
    "SLABS",
    "Ferry",
    "Holder",
    "Itinerary",
    "Loan",
    "ParkedSource",
    "Use",
    "ferries_of",
    "gradient_of",
    "is_stepped_in_backward",
    "layer_call",
    "step_in_backward",
    "unwatch_model",
    "watch_model",
]

"""Moving tiles between homes and those who work on them: slabs, reading ahead, iterations."""

from memtile.transfer.ferry import Ferry, Loan
from memtile.transfer.parked import (
    ParkedSource,
    gradient_of,
    is_stepped_in_backward,
    step_in_backward,
)
from memtile.transfer.passes import (
    GRADIENT_SLABS,
    SLABS,
    ferries_of,
    layer_call,
    unwatch_model,
    watch_model,
)
from memtile.transfer.slabs import Holder

__all__ = [
    "GRADIENT_SLABS",
    "SLABS",
    "Ferry",
    "Holder",
    "Loan",
    "ParkedSource",
    "ferries_of",
    "gradient_of",
    "is_stepped_in_backward",
    "layer_call",
    "step_in_backward",
    "unwatch_model",
    "watch_model",
]

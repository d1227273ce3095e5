"""Moves tiles between homes and the code that computes with them: slabs, prefetch, iterations."""

from memtile.transfer.activations import (
    ParkedActivations,
    home_of_activations,
    park_activations,
    park_each_forward,
)
from memtile.transfer.device_copies import COPIES_UNDER_WAY
from memtile.transfer.iterations import (
    GRADIENT_SLABS,
    SLABS,
    layer_call,
    rings_of,
    unwatch_model,
    watch_model,
)
from memtile.transfer.parked import (
    ParkedSource,
    catch_up,
    gradient_lock,
    gradients_go_home,
    is_stepped_in_backward,
    put_off_idle_steps,
    step_in_backward,
    values_together,
)
from memtile.transfer.saved_pieces import SavedPiece, SavedPieces, bytes_of
from memtile.transfer.slab_ring import Lease, SlabRing
from memtile.transfer.slabs import Holder

__all__ = [
    "COPIES_UNDER_WAY",
    "GRADIENT_SLABS",
    "SLABS",
    "Holder",
    "Lease",
    "ParkedActivations",
    "ParkedSource",
    "SavedPiece",
    "SavedPieces",
    "SlabRing",
    "bytes_of",
    "catch_up",
    "gradient_lock",
    "gradients_go_home",
    "home_of_activations",
    "is_stepped_in_backward",
    "layer_call",
    "park_activations",
    "park_each_forward",
    "put_off_idle_steps",
    "rings_of",
    "step_in_backward",
    "unwatch_model",
    "values_together",
    "watch_model",
]

"""Homes: where tiles live while they are not used, in memory or on disk."""

from memtile.homes.disk import DiskHome
from memtile.homes.filesystems import usable_folder
from memtile.homes.home import Allocation, Home, Reservation, Traffic
from memtile.homes.kernel import (
    PAGE,
    aligned_buffer,
    fits_page_cache,
    fork_safe_lock,
    keep_freed_memory_out,
    page_out,
    pieces,
    renew_in_child,
    scratch_like,
    trim_heap,
    whole_pages,
)
from memtile.homes.live_file import cannot_map
from memtile.homes.memory_homes import DeviceHome, HostHome
from memtile.homes.registry import (
    TensorTable,
    allocate_copy,
    allocation_of,
    evict,
    is_parked,
    register,
    reservation_of,
    resolve_home,
    set_reservation,
    streamed_allocation,
    tensor_of,
    word_for,
)

__all__ = [
    "PAGE",
    "Allocation",
    "DeviceHome",
    "DiskHome",
    "Home",
    "HostHome",
    "Reservation",
    "TensorTable",
    "Traffic",
    "aligned_buffer",
    "allocate_copy",
    "allocation_of",
    "cannot_map",
    "evict",
    "fits_page_cache",
    "fork_safe_lock",
    "is_parked",
    "keep_freed_memory_out",
    "page_out",
    "pieces",
    "register",
    "renew_in_child",
    "reservation_of",
    "resolve_home",
    "scratch_like",
    "set_reservation",
    "streamed_allocation",
    "tensor_of",
    "trim_heap",
    "usable_folder",
    "whole_pages",
    "word_for",
]

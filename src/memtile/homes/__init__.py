"""Homes: where tiles live while they are not used, in memory or on disk."""

from memtile.homes.buffers import aligned_buffer, pieces, scratch_like
from memtile.homes.disk import DiskHome
from memtile.homes.filesystems import usable_folder
from memtile.homes.forks import lock_of_a_module, renew_in_child
from memtile.homes.free_memory import fits_page_cache
from memtile.homes.home import PAGE, Allocation, Home, Reservation, Traffic, whole_pages
from memtile.homes.kernel import keep_freed_memory_out, page_out, trim_heap
from memtile.homes.live_file import cannot_map
from memtile.homes.memory_homes import DeviceHome, HostHome
from memtile.homes.registry import (
    allocate_copy,
    allocation_of,
    evict,
    hold_room,
    is_parked,
    register,
    room_of,
    streamed_allocation,
    tensor_of,
)
from memtile.homes.resolving import resolve_home, word_for

__all__ = [
    "PAGE",
    "Allocation",
    "DeviceHome",
    "DiskHome",
    "Home",
    "HostHome",
    "Reservation",
    "Traffic",
    "aligned_buffer",
    "allocate_copy",
    "allocation_of",
    "cannot_map",
    "evict",
    "fits_page_cache",
    "hold_room",
    "is_parked",
    "keep_freed_memory_out",
    "lock_of_a_module",
    "page_out",
    "pieces",
    "register",
    "renew_in_child",
    "resolve_home",
    "room_of",
    "scratch_like",
    "streamed_allocation",
    "tensor_of",
    "trim_heap",
    "usable_folder",
    "whole_pages",
    "word_for",
]

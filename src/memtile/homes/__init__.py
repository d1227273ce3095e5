"""Homes: where tiles live while they are not used, in memory or on disk."""

from memtile.homes.disk import DiskHome
from memtile.homes.endings import Ending, Gates, WorkerThreads
from memtile.homes.filesystems import (
    filesystem_name,
    overwrites_in_place,
    usable_folder,
    why_unusable,
)
from memtile.homes.home import Allocation, Home, Reservation
from memtile.homes.kernel import (
    PAGE,
    aligned_buffer,
    fork_safe_lock,
    keep_freed_memory_out,
    page_out,
    pieces,
    read_rows_ahead,
    renew_in_child,
    scratch_like,
    trim_heap,
    whole_pages,
)
from memtile.homes.limits import (
    fits_page_cache,
    free_bytes,
    memory_limit,
    page_cache_fit,
    processor_limit,
)
from memtile.homes.live_file import LiveFile, cannot_map
from memtile.homes.memory_homes import DeviceHome, HostHome
from memtile.homes.registry import (
    TensorTable,
    allocate_copy,
    allocation_of,
    evict,
    is_parked,
    read_values,
    register,
    reservation_of,
    resolve_home,
    set_reservation,
    streamed_allocation,
    tensor_of,
    word_for,
    write_values,
)
from memtile.homes.transfers import Traffic

__all__ = [
    "PAGE",
    "Allocation",
    "DeviceHome",
    "DiskHome",
    "Ending",
    "Gates",
    "Home",
    "HostHome",
    "LiveFile",
    "Reservation",
    "TensorTable",
    "Traffic",
    "WorkerThreads",
    "aligned_buffer",
    "allocate_copy",
    "allocation_of",
    "cannot_map",
    "evict",
    "filesystem_name",
    "fits_page_cache",
    "fork_safe_lock",
    "free_bytes",
    "is_parked",
    "keep_freed_memory_out",
    "memory_limit",
    "overwrites_in_place",
    "page_cache_fit",
    "page_out",
    "pieces",
    "processor_limit",
    "read_rows_ahead",
    "read_values",
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
    "why_unusable",
    "word_for",
    "write_values",
]

"""Groups: tensors that are moved together, and the keys that tell one group from another."""

import weakref
from collections.abc import Sequence

from memtile.homes import Allocation

Group = Sequence[Allocation]
Key = tuple["weakref.ref[Allocation]", ...]


def key_of(group: Group) -> Key:
    """What tells a group from others without keeping it alive."""
    key = tuple(weakref.ref(allocation) for allocation in group)
    hash(key)  # the references keep it: they cannot compute it once the allocations are gone
    return key


def group_of(key: Key) -> tuple[Allocation, ...] | None:
    """The allocations of a key; None once one of them is gone."""
    found = []
    for reference in key:
        allocation = reference()
        if allocation is None:
            return None
        found.append(allocation)
    return tuple(found)


def nbytes_of(group: Group) -> int:
    """Bytes of a slab that it takes."""
    nbytes = 0
    for allocation in group:
        nbytes += allocation.room
    return nbytes

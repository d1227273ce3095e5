"""Taking tiles through a ring in turn, and waiting for what its threads do."""

import time
from collections.abc import Callable

from watched_home import PATIENCE_SECONDS

from memtile.homes import Allocation, Home
from memtile.transfer import Holder, SlabRing, rings_of

FREE = {Holder.NOBODY, Holder.IDLE}
MakeRing = Callable[..., SlabRing]


def path(ring: SlabRing, order: list[Allocation]) -> list[float]:
    """One iteration: the first value of each tile, as it was found."""
    ring.start()
    return take(ring, order)


def take(ring: SlabRing, order: list[Allocation]) -> list[float]:
    """Each tile in turn: its first value, as it was found."""
    found = []
    for allocation in order:
        with ring.acquire((allocation,)) as lease:
            found.append(lease.tensors[0][0].item())
    return found


def wait_until(ring: SlabRing, condition: Callable[[], bool]) -> None:
    """Until something that the ring's threads announce has come to be."""
    until = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < until, ring.holders
        time.sleep(0.001)


def quiet(ring: SlabRing) -> None:
    """Until no read or write is under way."""
    wait_until(ring, lambda: not {Holder.READERS, Holder.WORKERS} & set(ring.holders))


def saved_is_written(home: Home) -> None:
    """Until what was saved for backward is at home."""
    ring = rings_of(home).activations
    wait_until(ring, lambda: Holder.WRITERS not in ring.holders)


def spoil(
    ring: SlabRing,
    allocation: Allocation,
    error: type[BaseException] | BaseException,
    stores: bool = False,
) -> None:
    """Acquire the tile, fill it with fives, and raise the error."""
    with ring.acquire((allocation,), written=True) as lease:
        lease.tensors[0].fill_(5)
        if stores:
            lease.store()
        raise error

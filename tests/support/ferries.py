"""Walking tiles through a ferry, and waiting for what its threads do."""

from collections.abc import Callable

from watched_home import PATIENCE_SECONDS

from memtile.homes import Allocation
from memtile.transfer import Ferry, Holder

FREE = {Holder.NOBODY, Holder.ITS_TILES}
MakeFerry = Callable[..., Ferry]


def walk(ferry: Ferry, order: list[Allocation]) -> list[float]:
    """One pass: the first value of each tile, as it was found."""
    found = []
    ferry.start()
    for allocation in order:
        with ferry.borrow((allocation,)) as loan:
            found.append(loan.tensors[0][0].item())
    return found


def wait_until(ferry: Ferry, condition: Callable[[], bool]) -> None:
    """Until something that the ring's threads announce has come to be."""
    with ferry._changed:
        assert ferry._changed.wait_for(condition, PATIENCE_SECONDS), ferry.holders


def quiet(ferry: Ferry) -> None:
    """Until no read or write is under way."""
    wait_until(ferry, lambda: not {Holder.READERS, Holder.WORKERS} & set(ferry.holders))


def spoil(
    ferry: Ferry,
    allocation: Allocation,
    error: type[BaseException] | BaseException,
    stores: bool = False,
) -> None:
    """Borrow the tile, fill it with fives, and raise the error."""
    with ferry.borrow((allocation,)) as loan:
        loan.tensors[0].fill_(5)
        if stores:
            loan.store()
        raise error

"""What one rank moves in a step, and a lower bound of the time it takes.

A ring all-gather of n ranks sends n - 1 shards over each rank's link, and so does its
reduce-scatter: (n - 1)/n of a parameter's bytes each. A unit of tiles is gathered for each use in
forward, once more for its backward, and again where activations are recomputed; what is tied is
gathered for each of its uses. What is frozen is not reduced. Parked activations leave the device
in forward and come back in backward.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from memtile.costmodel.model_records import Counted
from memtile.costmodel.plan_parts import Floor
from memtile.costmodel.rank_memory import FLOAT32, Rank
from memtile.costmodel.shards import GatherUnit, trained_of
from memtile.errors import ArgumentError


@dataclass(frozen=True)
class LinkTraffic:
    """Bytes of one rank that a step moves."""

    name: str  # what moves them, such as "all-gather"
    link: str  # over what: "ranks", "host" (between host and device) or "disk"
    nbytes: int


@dataclass(frozen=True)
class ClusterSpec:
    """What a rank does in a second; None: not known, so that it bounds nothing.

    Args:
        flops: of products.
        link: bytes to other ranks, one way.
        host: bytes between host and device.
        disk: bytes from and to the disk.
    """

    flops: float | None = None
    link: float | None = None
    host: float | None = None
    disk: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value < float("inf")):
                raise ArgumentError(
                    f"{field.name}={value!r} must be a number above 0, of bytes or operations in a "
                    "second, such as 50e9; leave it out where it is not known"
                )


def traffic(rank: Rank, counted: Counted) -> tuple[LinkTraffic, ...]:
    """What the fullest rank moves in one step; nothing that is 0 bytes."""
    whole, world = rank.sharding.whole, rank.sharding.world
    gathered = reduced = 0
    for unit, gathers, reductions in _used(rank):
        gathered += whole(unit) // world * gathers
        reduced += whole(trained_of(unit)) // world * reductions
    for unit, times in _kept(rank):
        gathered -= whole(unit) // world * times
    others = world - 1
    found = [
        LinkTraffic("all-gather", "ranks", gathered * others),
        LinkTraffic("reduce-scatter", "ranks", reduced * others),
        *_offloaded(rank, gathered),
        LinkTraffic("activations, out and back", "host", 2 * counted.parked_bytes),
    ]
    if rank.setting.home == "disk":
        found.append(LinkTraffic("activations, out and back", "disk", 2 * counted.parked_bytes))
    return tuple(each for each in found if each.nbytes)


def _used(rank: Rank) -> Iterator[tuple[GatherUnit, int, int]]:
    """Each unit, and how often a step gathers and reduces such units.

    What is tied is reduced once: its gradient is complete only after its first use. FSDP2 frees the
    root only after its backward; ZeRO-3 gathers all that is persistent, also frozen parameters,
    after each step of the optimizer.
    """
    for unit, times, uses in rank.units.tiles:
        yield unit, times * uses.gathers, times * min(uses.backward, 1)
    once = int(rank.trains)
    yield rank.units.resident, once, once


def _kept(rank: Rank) -> Iterator[tuple[GatherUnit, int]]:
    """Units that are still whole when their backward begins, and how often."""
    yield from rank.units.kept
    if rank.trains:
        for turn in rank.units.turns:
            yield from ((unit, turn.times) for unit in turn.kept(rank.setting.prefetch))


def _offloaded(rank: Rank, fetched: int) -> Iterator[LinkTraffic]:
    """Shards to the device for each use, gradients back; from and to a disk, with the moments."""
    own, offload = rank.shards, rank.setting.offload
    if offload == "none":
        return
    yield LinkTraffic("shards to the device", "host", fetched)
    yield LinkTraffic("gradients to the host", "host", own.gradients)
    if offload == "nvme":
        stepped = own.state + own.trained * FLOAT32
        written = own.parameters if own.trained else 0
        yield LinkTraffic("shards and moments read", "disk", fetched + stepped)
        yield LinkTraffic("shards and moments written", "disk", written + stepped)


def rank_floors(
    flops: int, moved: tuple[LinkTraffic, ...], speeds: ClusterSpec
) -> tuple[Floor, ...]:
    """Seconds that a step of one rank takes at least, for each speed that is known."""
    work = [("products", flops, speeds.flops)]
    names = {"ranks": "link between ranks", "host": "link to the host", "disk": "disk"}
    for link, speed in (("ranks", speeds.link), ("host", speeds.host), ("disk", speeds.disk)):
        nbytes = sum(each.nbytes for each in moved if each.link == link)
        work.append((names[link], nbytes, speed))
    return tuple(Floor(name, amount / speed) for name, amount, speed in work if speed and amount)

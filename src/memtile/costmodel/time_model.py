"""A lower bound of the time of a step on this machine, from its measured rates.

Products take flops / (flop/s); all other operations move bytes through memory; the optimizer steps
elements. One processor does these one after another, so they add up. A disk works at the same time:
the step takes the longer of the two.
"""

from dataclasses import dataclass

from memtile.costmodel.memory_model import Setting
from memtile.costmodel.model_records import Counted, ParkedLayout
from memtile.costmodel.plan_parts import Floor


@dataclass(frozen=True)
class Moved:
    """What a step moves between the home and memory."""

    read_bytes: int
    written_bytes: int
    visits: int  # of tiles, one for each product or step


def moved(setting: Setting, layout: ParkedLayout, checkpointing: bool) -> Moved:
    """What a step moves: each weight once for each iteration over it, and its state both ways.

    Of a stack of experts, only those that tokens are expected to be routed to.
    """
    read = written = visits = 0.0
    trains = setting.state is not None
    passes = (3 if checkpointing else 2) if trains else 1
    for weight in layout.parked:
        share = weight.hit_share(setting.tokens)
        tiles = share * sum(1 for _ in layout.tile_elements(weight))
        stepped = trains and weight.trainable
        visits += tiles * (passes + (2 if stepped else 0))
        if setting.in_place:
            continue
        uses = len(weight.names) - (1 if weight.is_looked_up else 0)
        nbytes = share * weight.nbytes
        read += nbytes * passes * uses
        if stepped:
            state = share * setting.state_bytes([weight])
            sent = nbytes if setting.sends_gradient(weight) else 0
            value = nbytes if setting.mode == "classic" or not uses else 0
            read += state + sent + value
            written += nbytes + state + sent
    return Moved(round(read), round(written), round(visits))


def floors(
    setting: Setting, layout: ParkedLayout, counted: Counted, moves: Moved, *, cached: bool
) -> tuple[Floor, ...]:
    """The floors of a step; `cached`: moves go through the page cache, which the CPU copies."""
    rates, elements = setting.rates, 0
    widest = max((weight.element_bytes for weight in layout.weights), default=4)
    if setting.state is not None:
        elements = sum(weight.elements for weight in layout.weights if weight.trainable)
        elements += sum(count for _, count in setting.rest.trainable)
    work = [
        ("products", counted.flops / max(1.0, rates.flops(setting.tokens, widest))),
        ("other operations", counted.touched_bytes / max(1.0, rates.touched_bytes)),
        ("optimizer", elements / max(1.0, rates.stepped_elements)),
        ("starting work on tiles", moves.visits * rates.tile_seconds),
    ]
    disk = moves.read_bytes / max(1.0, rates.read_bytes)
    disk += moves.written_bytes / max(1.0, rates.written_bytes)
    if cached:
        copied = moves.read_bytes + moves.written_bytes
        work.append(("copies from and to the page cache", copied / max(1.0, rates.cached_bytes)))
        disk = 0.0
    computing = ", ".join(name for name, seconds in work if seconds)
    found = [Floor(f"computing ({computing})", sum(seconds for _, seconds in work))]
    return (*found, Floor("the disk", disk)) if disk else tuple(found)

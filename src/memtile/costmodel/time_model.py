"""A lower bound of the time of a step on this machine, from its measured rates.

Products take flops / (flop/s); all other operations move bytes through memory; the optimizer steps
elements. One processor does these one after another, so they add up. A disk works at the same time:
the step takes the longer of the two.
"""

from dataclasses import dataclass
from typing import Final, Literal

from memtile.costmodel.machine_profile import MachineProfile
from memtile.costmodel.memory_model import Setting
from memtile.costmodel.model_records import Activations, Counted, ParkedLayout
from memtile.costmodel.plan_parts import Floor

FREE: Final = 1.1
"""A home is free where a step takes at most so many times as long as in memory."""

FREE_TILE: Final = 16 << 20
"""Bytes of the tile that `free_from` supposes."""

_MOST_DOUBLINGS: Final = 20
ReachedBy = Literal["host", "page cache", "direct"]


@dataclass(frozen=True)
class Moved:
    """What a step moves between the home and memory."""

    read_bytes: int
    written_bytes: int
    visits: int  # of tiles, one for each product or step


def moved(
    setting: Setting, layout: ParkedLayout, activations: Activations, parked_bytes: int = 0
) -> Moved:
    """What a step moves: each weight once for each iteration over it, and its state both ways.

    Of a stack of experts, only those that tokens are expected to be routed to. Activations at home,
    of so many bytes, are written once and read once.
    """
    read = written = float(parked_bytes)
    visits, trains = 0.0, setting.state is not None
    passes = (3 if activations.recomputed else 2) if trains else 1
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
    """The floors of a step; `cached`: tiles are worked on in the page cache."""
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
        mapped = moves.read_bytes + moves.written_bytes
        work.append(("mapping pages", mapped / max(1.0, rates.mapped_bytes)))
        disk = 0.0
    computing = ", ".join(name for name, seconds in work if seconds)
    found = [Floor(f"computing ({computing})", sum(seconds for _, seconds in work))]
    return (*found, Floor("the disk", disk)) if disk else tuple(found)


def free_from(
    rates: MachineProfile, place: ReachedBy, *, trains: bool, element_bytes: int
) -> int | None:
    """The tokens of a step from which on tiles at home cost at most a tenth of its time.

    Per element of a tile: e bytes, T tokens, F(T) flop/s; R, W and C bytes a second read, written
    and mapped from the page cache; S elements a second stepped; k visits of v seconds for
    the N elements of a tile.

        in memory   m = 2T/F(T)                    training: 6T/F(T) + 1/S
        moves       r = e, w = 0                   training: r = 2e + s, w = e + s
        host        m + kv/N                       k = 1; training: 4
        page cache  m + kv/N + (r + w)/C           the CPU maps pages
        direct      max(m + kv/N, r/R + w/W)       the disk works meanwhile

    It is free where that is at most 1.1 m. s is AdamW's state: two moments in float32, and a
    float32 copy of a weight in 16 bits. These are the terms of `floors`, in backward, without
    checkpointing and the operations that are not products.

    Args:
        rates: of the machine.
        place: of the tiles: "host", or a disk by the page cache or by direct I/O.
        trains: AdamW; else inference.
        element_bytes: of a weight's element: 4 or 2.

    Returns:
        None where it is not so at 2^20 tokens.
    """

    def is_free(tokens: int) -> bool:
        return _slowdown(rates, place, tokens, trains, element_bytes) <= FREE

    doublings = [2**power for power in range(_MOST_DOUBLINGS + 1)]
    below = max((tokens for tokens in doublings if not is_free(tokens)), default=0)
    if below == doublings[-1]:
        return None
    above = max(1, 2 * below)
    while above - below > 1:
        middle = (above + below) // 2
        below, above = (below, middle) if is_free(middle) else (middle, above)
    return above


def _slowdown(
    rates: MachineProfile, place: ReachedBy, tokens: int, trains: bool, element_bytes: int
) -> float:
    """Seconds for a tile at home over those for one in memory."""
    elements, state = FREE_TILE // element_bytes, 8 if element_bytes > 2 else 12
    products = (6 if trains else 2) * tokens / max(1.0, rates.flops(tokens, element_bytes))
    in_memory = products + (1 / max(1.0, rates.stepped_elements) if trains else 0.0)
    read = 2 * element_bytes + state if trains else element_bytes
    written = element_bytes + state if trains else 0
    work = in_memory + (4 if trains else 1) * rates.tile_seconds / elements
    if place == "page cache":
        work += (read + written) / max(1.0, rates.mapped_bytes)
    if place == "direct":
        disk = read / max(1.0, rates.read_bytes) + written / max(1.0, rates.written_bytes)
        work = max(work, disk)
    return work / in_memory

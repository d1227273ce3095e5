"""A plan for ranks as a table that people read."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from memtile.planning import table
from memtile.planning.budget import margin
from memtile.planning.byte_sizes import format_byte_size

if TYPE_CHECKING:
    from memtile.planning.plan import Place
    from memtile.planning.ranks import RankPlan

_TITLES = {
    "device": "memory of a device",
    "host": "host memory of a rank",
    "disk": "disk of a rank",
}
_LINKS = {"ranks": "between ranks", "host": "host and device", "disk": "disk"}
_ENGINES = {"fsdp2": "FSDP2", "zero3": "ZeRO-3"}


def of(plan: "RankPlan") -> str:
    """Every layer, term, link and floor, as lines."""
    lines = [summary(plan), "", *table.layer_lines(plan.layers), "", *_places(plan)]
    return "\n".join([*lines, *_traffic(plan), "", *_times(plan), *_world(plan)])


def summary(plan: "RankPlan") -> str:
    """What it comes to, in one line."""
    work = plan.optimizer or "inference"
    again = ", gradient checkpointing" if plan.checkpointing else ""
    where = {"none": "", "cpu": ", offloaded to the host", "nvme": ", offloaded to disk"}
    seconds = "" if plan.seconds is None else f", at least {plan.seconds:.2g} s a step"
    return (
        f"{plan.model}, {plan.world} ranks of {_ENGINES[plan.engine]}{where[plan.offload]}, "
        f"{plan.tokens} tokens a rank, {work}{again}: {plan.tiles} tiles; predicted peak "
        f"{format_byte_size(plan.peak_bytes)} a device{seconds}"
    )


def _places(plan: "RankPlan") -> Iterator[str]:
    for place in ("device", "host", "disk"):
        if plan.bytes_of(place):
            yield from table.aligned(_place(plan, place), right={1})
            yield ""
    moments = ", ".join(f"{m.name} {format_byte_size(m.nbytes)}" for m in plan.moments)
    yield f"beside what is kept: {moments}"
    if plan.padding_bytes:
        yield f"of the shards, {format_byte_size(plan.padding_bytes)} are padding"
    yield ""


def _place(plan: "RankPlan", place: "Place") -> list[tuple[str, ...]]:
    title = f"{_TITLES[place]}, in {plan.worst.name}" if place == "device" else _TITLES[place]
    rows: list[tuple[str, ...]] = [(title, "")]
    rows += [(t.name, format_byte_size(t.nbytes)) for t in plan.terms if t.place == place]
    total = plan.bytes_of(place)
    rows.append(("predicted peak", format_byte_size(total)))
    size = plan.device_memory
    if place == "device" and size is not None:
        rows.append(("margin, left free", format_byte_size(margin(size))))
        rows.append(("left", format_byte_size(max(0, size - margin(size) - total))))
        rows.append(("memory", format_byte_size(size)))
    return rows


def _traffic(plan: "RankPlan") -> Iterator[str]:
    rows: list[tuple[str, ...]] = [("a rank moves in a step", "over", "bytes")]
    rows += [(t.name, _LINKS[t.link], format_byte_size(t.nbytes)) for t in plan.traffic]
    if len(rows) == 1:
        rows.append(("nothing", "", ""))
    yield from table.aligned(rows, right={2})


def _times(plan: "RankPlan") -> Iterator[str]:
    rows: list[tuple[str, ...]] = [("a step takes at least, for", "seconds")]
    rows += [(floor.name, f"{floor.seconds:.3g}") for floor in plan.floors]
    yield from table.aligned(rows, right={1})
    yield f"{plan.flops:.3g} floating-point operations in products, on each rank"


def _world(plan: "RankPlan") -> Iterator[str]:
    if plan.smallest_world is not None and plan.device_memory is not None:
        size = format_byte_size(plan.device_memory)
        yield f"smallest world with {size} a device, of powers of two: {plan.smallest_world}"

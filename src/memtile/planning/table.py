"""A plan as a table that people read."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from memtile.planning.budget import MARGIN
from memtile.planning.byte_sizes import format_byte_size

if TYPE_CHECKING:
    from memtile.planning.plan import Place, Plan, PlannedLayer

_TITLES = {"device": "memory of the device", "host": "memory", "disk": "disk"}


def of(plan: "Plan") -> str:
    """Every layer, every term and every floor, as lines."""
    return "\n".join([summary(plan), "", *_layers(plan), "", *_places(plan), *_times(plan)])


def summary(plan: "Plan") -> str:
    """What a plan comes to, in one line."""
    work = f"{plan.optimizer}, {plan.mode}" if plan.optimizer else "inference"
    parked = len(plan.parked_layers)
    where = f"{plan.tiles} tiles of {parked} layers in {plan.home}" if parked else "nothing parked"
    again = ", gradient checkpointing" if plan.checkpointing else ""
    return (
        f"{plan.model}, {plan.tokens} tokens, {work}: {where}{again}; "
        f"{format_byte_size(plan.peak_bytes)} of {plan.budget}, "
        f"about {plan.seconds:.2g} s a step"
    )


def _layers(plan: "Plan") -> Iterator[str]:
    rows = [("layer", "shape", "dtype", "bytes", "tiles", "where", "why")]
    rows += [_row(layer) for layer in plan.layers]
    return _aligned(rows)


def _row(layer: "PlannedLayer") -> tuple[str, ...]:
    return (
        layer.name,
        f"{layer.shape[0]}×{layer.shape[1]}",
        layer.dtype,
        format_byte_size(layer.nbytes),
        str(layer.grid or "-"),
        layer.place,
        layer.reason,
    )


def _places(plan: "Plan") -> Iterator[str]:
    for place in ("device", "host", "disk"):
        if plan.bytes_of(place):
            yield from _aligned(_place(plan, place), right={1})
            yield ""


def _place(plan: "Plan", place: "Place") -> list[tuple[str, ...]]:
    rows = [(term.name, format_byte_size(term.nbytes)) for term in plan.terms if term.place == place]
    total, size = plan.bytes_of(place), plan.budget.of_place(place)
    rows = [(_TITLES[place], ""), *rows, ("predicted peak", format_byte_size(total))]
    if size is None:
        return rows
    if place != "disk":
        margin = size // MARGIN
        rows.append((f"margin, a {MARGIN}th of the budget", format_byte_size(margin)))
        total += margin
    rows.append(("left", format_byte_size(max(0, size - total))))
    return [*rows, ("budget", format_byte_size(size))]


def _times(plan: "Plan") -> Iterator[str]:
    rows = [("floors of a step", "seconds")]
    rows += [(floor.name, f"{floor.seconds:.3g}") for floor in plan.floors]
    yield from _aligned(rows, right={1})
    yield f"decided by {plan.decided_by}: predicted {plan.seconds:.3g} s a step"
    moved = format_byte_size(plan.read_bytes), format_byte_size(plan.written_bytes)
    yield f"read from the home in a step {moved[0]}, written to it {moved[1]}"


def _aligned(rows: list[tuple[str, ...]], right: frozenset[int] | set[int] = frozenset()) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()

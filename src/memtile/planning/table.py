"""A plan as a table that people read."""

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from memtile.home_names import parse_home
from memtile.planning.budget import margin
from memtile.planning.byte_sizes import format_byte_size

if TYPE_CHECKING:
    from memtile.planning.plan import Place, Plan, PlannedLayer

_TITLES = {"device": "memory of the device", "host": "memory", "disk": "disk"}


def of(plan: "Plan") -> str:
    """Every layer, every term and every floor, as lines."""
    return "\n".join(
        [
            summary(plan),
            "",
            *layer_lines(plan.layers),
            "",
            *_places(plan),
            *_times(plan),
            *_words(plan),
        ]
    )


def summary(plan: "Plan") -> str:
    """What a plan comes to, in one line."""
    work = f"{plan.optimizer} {plan.mode}" if plan.optimizer else "inference"
    parked = len(plan.parked_layers)
    where = f"{plan.tiles} tiles of {parked} layers {_at(plan.home)}" if parked else "all in memory"
    again = ", gradient checkpointing" if plan.checkpointing else ""
    return (
        f"{plan.model}, {plan.tokens} tokens, {work}: {where}{again}; "
        f"predicted peak {format_byte_size(plan.peak_bytes)}, about {plan.seconds:.2g} s a step"
    )


def _at(home: str) -> str:
    kind, folder = parse_home(home)
    words = {"disk": "on disk", "host": "in host memory", "device": "on the device"}
    return words[kind] + (f" in {folder}" if folder else "")


def layer_lines(layers: "Sequence[PlannedLayer]") -> Iterator[str]:
    """Layers that differ in one number of their name alone share a line."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for layer in layers:
        head, number, tail = _split(layer.name)
        alike.setdefault((head, tail, *_cells(layer)), []).append(number)
    rows: list[tuple[str, ...]] = [("layer", "shape", "dtype", "bytes", "tiles", "where", "why")]
    for (head, tail, *cells), numbers in alike.items():
        rows.append((f"{head}{_ranges(numbers)}{tail}", *cells))
    return aligned(rows)


def _split(name: str) -> tuple[str, str, str]:
    """A name around its first number: before, the number, after."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    tail = parts[at + 1 :]
    head = ".".join([*parts[:at], ""]) if at < len(parts) else name
    return head, "".join(parts[at : at + 1]), "".join(f".{part}" for part in tail)


def _ranges(numbers: list[str]) -> str:
    """Numbers with runs of them shortened, such as "0-3,7"."""
    if numbers == [""]:
        return ""
    runs: list[list[int]] = []
    for number in map(int, numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def _cells(layer: "PlannedLayer") -> tuple[str, ...]:
    return (
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
            yield from aligned(_place(plan, place), right={1})
            yield ""


def _place(plan: "Plan", place: "Place") -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        (term.name, format_byte_size(term.nbytes)) for term in plan.terms if term.place == place
    ]
    total, size = plan.bytes_of(place), plan.budget.of_place(place)
    rows = [(_TITLES[place], ""), *rows, ("predicted peak", format_byte_size(total))]
    if size is None:
        return rows
    if place != "disk":
        rows.append(("margin, left free of the budget", format_byte_size(margin(size))))
        total += margin(size)
    rows.append(("left", format_byte_size(max(0, size - total))))
    return [*rows, ("budget", format_byte_size(size))]


def _times(plan: "Plan") -> Iterator[str]:
    rows = [("a step takes at least, for", "seconds")]
    rows += [(floor.name, f"{floor.seconds:.3g}") for floor in plan.floors]
    yield from aligned(rows, right={1})
    decisive = plan.decided_by.partition(" (")[0]
    yield f"decided by {decisive}: predicted {plan.seconds:.3g} s a step"
    moved = format_byte_size(plan.read_bytes), format_byte_size(plan.written_bytes)
    yield f"read from the home in a step {moved[0]}, written to it {moved[1]}"


def _words(plan: "Plan") -> Iterator[str]:
    """What the lines above mean by words of ours."""
    if plan.parked_layers:
        yield (
            "parked: kept at the home (a file or host memory) and brought in tile by tile; "
            "resident: kept in memory"
        )
    if any(term.name.startswith("slabs ") for term in plan.terms):
        yield "slabs: a few buffers, each as large as the largest tile, that tiles are read into"


def aligned(rows: Sequence[tuple[str, ...]], right: Collection[int] = frozenset()) -> Iterator[str]:
    """Rows of equal length as lines, the columns that are named to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()

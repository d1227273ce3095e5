"""`memtile doctor`: measures this machine, and says what would stop a run or slow it down."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from memtile.cli.errors import CommandError
from memtile.cli.terminal import AsJson, progress
from memtile.costmodel import format_byte_size
from memtile.errors import UnsupportedPlatformError
from memtile.planner.machine_report import FreeFrom, MachineReport, Rate, examine
from memtile.testing import PeakMemory

_PREFIXES: Final = ("", "k", "M", "G", "T", "P")
_HOMES: Final = {
    "host": "host memory",
    "page cache": "disk, page cache",
    "direct": "disk, direct",
}


def run_doctor(
    folder: Annotated[
        Path | None,
        typer.Argument(help="Where homes will lie; the default of home=disk if left out."),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Measure this machine, and say what would stop a run or slow it down.

    Takes half a minute, and writes some GB to the disk. Exit code 1 where a run would stop.
    """
    if folder is not None and not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise CommandError(f"{folder} {what}: give a folder on the disk that tiles will live on.")
    with progress() as bars:

        def started(name: str) -> None:
            for task in bars.task_ids:
                bars.update(task, total=1, completed=1)
            bars.add_task(name, total=None)

        found = examine(folder, started)
    try:
        PeakMemory.ensure_measurable()
    except UnsupportedPlatformError as error:
        found = found.with_more([error.strerror or str(error)])
    if as_json:
        print(json.dumps(found.to_json(), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        show(found, Console())
    return 1 if found.problems else 0


def show(found: MachineReport, console: Console) -> None:
    """Prints the machine, its rates, from where on homes are free, and the verdict."""
    piped = not console.is_terminal  # a sentence stays one line for other programs
    console.print(_machine(found))
    if found.rates:
        console.print(_rates(found.rates))
    if found.free_from:
        console.print(_free_from(found.free_from))
    for sentence in found.warnings:
        console.print(Text(f"warning: {sentence}", style="yellow"), soft_wrap=piped)
    for sentence in found.problems:
        console.print(Text(f"problem: {sentence}", style="bold red"), soft_wrap=piped)
    console.print(_verdict(found))


def _machine(found: MachineReport) -> Table:
    table = Table(title="Machine", show_header=False)
    table.add_column("", overflow="fold")
    table.add_column("", overflow="fold")
    folder, system = found.folder, found.system
    if folder.path:
        table.add_row("folder of homes", Text(folder.path))
        free, total = format_byte_size(folder.free_bytes), format_byte_size(folder.total_bytes)
        table.add_row("disk", f"{free} of {total} free")
        direct = "works" if folder.direct else "does not work"
        table.add_row("filesystem", f"{folder.filesystem or 'unknown'}, direct I/O {direct}")
    free, total = _size(system.free_bytes), _size(system.memory_bytes)
    table.add_row("memory", f"{free} of {total} free")
    limit = "none" if system.limit_bytes is None else format_byte_size(system.limit_bytes)
    table.add_row("limits of cgroups", f"memory {limit}, processors {_quota(system.quota)}")
    table.add_row("processor", Text(system.processor))
    table.add_row("processors", f"{system.processors}, threads of torch: {system.threads}")
    if system.accelerator:
        more = f", {_size(system.accelerator_bytes)}" if system.accelerator_bytes else ""
        table.add_row("accelerator", Text(f"{system.accelerator}{more}"))
    versions = (f"{name} {number or 'not installed'}" for name, number in system.versions.items())
    table.add_row("versions", Text(", ".join(versions)))
    return table


def _rates(rates: Sequence[Rate]) -> Table:
    table = Table(title="What it does in a second")
    table.add_column("", overflow="fold")
    columns = ("now", "saved", "now / saved") if any(rate.saved for rate in rates) else ("now",)
    for name in columns:
        table.add_column(name, justify="right", overflow="fold")
    for rate in rates:
        saved = "" if rate.saved is None else _each_second(rate.saved, rate.unit)
        change = "" if rate.change is None else f"{rate.change:.2f}"
        cells = (_each_second(rate.now, rate.unit), saved, change)
        table.add_row(rate.what, *cells[: len(columns)])
    return table


def _free_from(rows: Sequence[FreeFrom]) -> Table:
    """One row a home, one column for each work and dtype."""
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        tokens = "never" if row.tokens is None else f"{row.tokens:,}"
        found.setdefault(_HOMES[row.home], {})[f"{row.work}\n{row.dtype}"] = tokens
    table = Table(title="Tokens of a step from which on a home is free", caption_justify="left")
    table.caption = "Free: at most 1.1 × the time in memory, in tiles of 16 MiB, on the CPU."
    table.add_column("home", overflow="fold")
    for name in next(iter(found.values())):
        table.add_column(name, justify="right", overflow="fold")
    for home, cells in found.items():
        table.add_row(home, *cells.values())
    return table


def _verdict(found: MachineReport) -> Text:
    if found.problems:
        number = len(found.problems)
        return Text(
            f"A run would stop here, for {number} reason{'s' * (number > 1)}.", style="bold red"
        )
    if found.warnings:
        return Text("A run works here; see the warnings.", style="yellow")
    return Text("A run works here.", style="green")


def _size(nbytes: int | None) -> str:
    return "unknown" if nbytes is None else format_byte_size(nbytes)


def _quota(quota: float | None) -> str:
    return "all" if quota is None else f"{quota:g}"


def _each_second(value: float, unit: str) -> str:
    """A rate with three digits, such as "1.25 GB/s"; visits as the time of one."""
    if unit == "visit":
        return f"{1e6 / value:.0f} µs/visit"
    power = 0
    while value >= 999.5 and power < len(_PREFIXES) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {_PREFIXES[power]}{unit}/s"

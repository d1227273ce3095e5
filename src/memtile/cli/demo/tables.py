"""Formats the demo's comparison as tables for a terminal."""

from typing import Final

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from memtile.cli.demo.records import DemoSettings, Machine, NamedSize, Outcome, Side
from memtile.costmodel import format_byte_size

_HOW_MEASURED: Final = (
    "Seconds: median of all steps but the first. Peak memory: resident, above the imports. "
    "Largest tensor: weight, gradient or optimizer state. Largest allocation: what any one "
    "operation of the first step made, activations included. Read and written: what memtile moves "
    "between the home and memory in a step."
)
_RATED_BYTES: Final = 600e12  # what makers of 1 TB consumer SSDs commonly warrant to be written


def show(outcome: Outcome, console: Console) -> None:
    """Prints the loss of each step, the costs, the generated texts and the verdicts."""
    console.print(_heading(outcome.settings, outcome.machine))
    console.print(_losses(outcome))
    console.print(_costs(outcome))
    console.print(_wear(outcome.tiled))
    if outcome.tiled.observed:
        console.print(Text(outcome.tiled.observed), soft_wrap=True)
    for name, side in (("dense", outcome.dense), ("tiled", outcome.tiled)):
        console.print(Panel(Text(side.continuation), title=f"Generated after training, {name}"))
    console.print(_verdicts(outcome))


def _heading(settings: DemoSettings, machine: Machine) -> Text:
    tile = format_byte_size(settings.max_tile_bytes)
    return Text(
        f"{settings.steps} AdamW steps of {settings.tokens} tokens, "
        f"learning rate {settings.learning_rate:g}, float32, tiles of at most {tile}, "
        f"home {settings.home}\n"
        f"{machine.processor}, {machine.logical_cpus} logical CPUs, {machine.system}\n"
        f"Python {machine.python}, torch {machine.torch}, transformers {machine.transformers}, "
        f"memtile {machine.memtile}\n"
    )


def _losses(outcome: Outcome) -> Table:
    table = Table(
        "step", "dense", "tiled", "difference", "dense s", "tiled s", title="Loss and seconds"
    )
    for column in table.columns:
        column.justify = "right"
    dense, tiled = outcome.dense, outcome.tiled
    losses = zip(dense.losses, tiled.losses, outcome.loss_differences, strict=True)
    seconds = zip(dense.seconds, tiled.seconds, strict=True)
    for step, (loss, second) in enumerate(zip(losses, seconds, strict=True), start=1):
        words = [f"{loss[0]:.6f}", f"{loss[1]:.6f}", f"{loss[2]:.1e}"]
        table.add_row(str(step), *words, *(f"{each:.2f}" for each in second))
    return table


def _costs(outcome: Outcome) -> Table:
    dense, tiled, seconds = outcome.dense, outcome.tiled, outcome.seconds_per_step
    table = Table(title="Costs", caption=_HOW_MEASURED, caption_justify="left")
    table.add_column("")
    table.add_column("dense", overflow="fold")
    table.add_column("tiled", overflow="fold")
    table.add_column("ratio", justify="right")
    words = (f"{seconds['dense']:.3f}", f"{seconds['tiled']:.3f}")
    _row(table, "seconds per step", *words, seconds["tiled"] / seconds["dense"])
    for what, left, right in (
        ("peak memory", NamedSize(dense.peak_bytes, ""), NamedSize(tiled.peak_bytes, "")),
        ("largest tensor", dense.largest_tensor, tiled.largest_tensor),
        ("largest allocation", dense.largest_allocation, tiled.largest_allocation),
    ):
        _row(table, what, _sized(left), _sized(right), right.nbytes / max(1, left.nbytes))
    left_count, right_count = dense.parameter_tensors, tiled.parameter_tensors
    _row(table, "parameter tensors", str(left_count), str(right_count), right_count / left_count)
    if tiled.home:
        table.add_row("read per step", "", format_byte_size(tiled.read_bytes))
        table.add_row("written per step", "", format_byte_size(tiled.written_bytes))
    return table


def _wear(tiled: Side) -> Text:
    """How much training writes to the disk, against what disks are rated for."""
    if "Disk" not in tiled.home or not tiled.written_bytes:
        return Text("")
    steps = _RATED_BYTES / tiled.written_bytes
    return Text(
        f"{tiled.home}.\nWear: 1000 steps write {format_byte_size(1000 * tiled.written_bytes)}; "
        f"600 TB, a common rating of a 1 TB SSD, are {steps:,.0f} steps.\n"
    )


def _row(table: Table, what: str, dense: str, tiled: str, ratio: float) -> None:
    table.add_row(what, dense, tiled, f"{ratio:.3f}" if ratio < 100 else f"{ratio:.0f}")


def _sized(size: NamedSize) -> str:
    return f"{format_byte_size(size.nbytes)}\n{size.what}".rstrip()


def _verdicts(outcome: Outcome) -> Text:
    text = Text()
    for verdict in outcome.verdicts:
        text.append(
            "kept   " if verdict.kept else "MISSED ", style="green" if verdict.kept else "bold red"
        )
        text.append(f"{verdict.promise}: {verdict.measured}\n")
    return text

"""`memtile plan`: what a budget is enough for, before anything is loaded."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from memtile.cli import models
from memtile.cli.clusters import ClusterOptions
from memtile.cli.console import interruptible
from memtile.cli.errors import CommandError
from memtile.cli.homes import check_home
from memtile.planning import parse_byte_size


def run_plan(
    model: Annotated[
        Path, typer.Argument(help="A transformers folder; config.json alone is enough.")
    ],
    budget: Annotated[
        str | None, typer.Option(help="Memory to use above the imports, such as 2GiB.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens in a step, on each rank.")] = 512,
    batch: Annotated[int, typer.Option(help="Sequences that these tokens are.")] = 1,
    optimizer: Annotated[
        str, typer.Option(help="A class of torch.optim, such as AdamW; none: inference.")
    ] = "AdamW",
    home: Annotated[
        str | None,
        typer.Option(
            help="Where parked tiles live: disk, disk:FOLDER, host, or checkpoint (no training).",
            show_default="disk",
        ),
    ] = None,
    mode: Annotated[
        Literal["in_backward", "classic"] | None,
        typer.Option(
            help="in_backward (keeps no gradients) or classic.", show_default="in_backward"
        ),
    ] = None,
    rates: Annotated[
        Path | None, typer.Option(help="A JSON file of rates, in place of measured ones.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The plan as JSON instead.")] = False,
    world_size: Annotated[
        int | None, typer.Option(help="Plan for so many ranks, instead of one process.")
    ] = None,
    engine: Annotated[
        Literal["fsdp2", "zero3"] | None, typer.Option(help="What shards over the ranks.")
    ] = None,
    device_memory: Annotated[
        str | None, typer.Option(help="Memory of each rank's device, such as 80GiB.")
    ] = None,
    offload: Annotated[
        Literal["none", "cpu", "nvme"] | None,
        typer.Option(
            help="Where shards and moments live: none (on the device), cpu, or nvme (zero3).",
            show_default="none",
        ),
    ] = None,
    link: Annotated[
        str | None, typer.Option(help="What a rank sends to others, such as 50GB/s.")
    ] = None,
    host_link: Annotated[
        str | None, typer.Option(help="Between host and device, such as 25GB/s.")
    ] = None,
    disk: Annotated[str | None, typer.Option(help="A rank's disk, such as 7GB/s.")] = None,
    flops: Annotated[
        str | None, typer.Option(help="Products of a rank, such as 400TFLOP/s.")
    ] = None,
) -> int:
    """Show which layers are tiled for a budget, or for many ranks, and what a step will take."""
    cluster = ClusterOptions(
        world_size, engine, device_memory, offload, link, host_link, disk, flops
    )
    shared = {"tokens": tokens, "batch": batch}
    if world_size is not None:
        cluster.check_alone({"--budget": budget, "--home": home, "--mode": mode, "--rates": rates})
        return _show(model, as_json, optimizer, "plan_ranks", {**shared, **cluster.arguments()})
    if budget is None:
        raise CommandError("there is no limit: give --budget 2GiB, or --world-size for a cluster.")
    parse_byte_size(budget, "--budget")
    if check_home(home or "disk", "checkpoint") == "checkpoint":
        if optimizer != "none":
            raise CommandError("--home checkpoint is read only: give --optimizer none with it.")
        home = "disk"  # what is in memory is the same
    alone = {"budget": budget, "home": home or "disk", "mode": mode or "in_backward"}
    return _show(model, as_json, optimizer, "plan", {**shared, **alone, "rates": rates})


def _show(
    folder: Path,
    as_json: bool,
    optimizer: str,
    door: Literal["plan", "plan_ranks"],
    arguments: dict[str, Any],  # of that function
) -> int:
    """Plan the model of a folder by one of memtile's doors, and print it."""
    models.check_folder(folder)
    with interruptible():
        models.load_transformers(folder)
        import memtile

        with Console(stderr=True).status("counting a step, measuring the machine once"):
            make: Any = getattr(memtile, door)  # one of two functions, whose keywords differ
            plan = make(models.empty_of(folder), optimizer=_optimizer(optimizer), **arguments)
    print(plan.to_json() if as_json else plan)
    return 0


def _optimizer(name: str) -> "type | None":
    import torch

    if name == "none":
        return None
    found = {known.lower(): getattr(torch.optim, known) for known in dir(torch.optim)}
    chosen = found.get(name.lower())
    if not (isinstance(chosen, type) and issubclass(chosen, torch.optim.Optimizer)):
        raise CommandError(
            f"--optimizer {name!r} is no class of torch.optim: give one such as AdamW or SGD, or "
            "none for inference."
        )
    return chosen

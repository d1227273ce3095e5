"""`memtile plan`: what a budget is enough for, before anything is loaded."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from memtile.cli import models
from memtile.cli.console import interruptible
from memtile.cli.errors import CommandError
from memtile.cli.homes import check_home
from memtile.planning import parse_byte_size


def run_plan(
    model: Annotated[
        Path, typer.Argument(help="A transformers folder; config.json alone is enough.")
    ],
    budget: Annotated[str, typer.Option(help="Memory to use above the imports, such as 2GiB.")],
    tokens: Annotated[int, typer.Option(help="Tokens in a step.")] = 512,
    optimizer: Annotated[
        str, typer.Option(help="A class of torch.optim, such as AdamW; none: inference.")
    ] = "AdamW",
    home: Annotated[
        str,
        typer.Option(
            help="Where parked tiles live: disk, disk:FOLDER, host, or checkpoint (no training)."
        ),
    ] = "disk",
    mode: Annotated[
        Literal["in_backward", "classic"],
        typer.Option(help="in_backward (keeps no gradients) or classic."),
    ] = "in_backward",
    rates: Annotated[
        Path | None, typer.Option(help="A JSON file of rates, in place of measured ones.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The plan as JSON instead.")] = False,
) -> int:
    """Show which layers are tiled for a budget, where they live, and what a step will take."""
    parse_byte_size(budget, "--budget")
    if check_home(home, "checkpoint") == "checkpoint":
        if optimizer != "none":
            raise CommandError("--home checkpoint is read only: give --optimizer none with it.")
        home = "disk"  # what is in memory is the same
    models.check_folder(model)
    with interruptible():
        models.load_transformers(model)
        import memtile

        with Console(stderr=True).status("counting a step, measuring the machine once"):
            plan = memtile.plan(
                models.empty_of(model),
                budget=budget,
                tokens=tokens,
                optimizer=_optimizer(optimizer),
                home=home,
                mode=mode,
                rates=rates,
            )
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

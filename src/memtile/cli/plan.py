"""`memtile plan`: shows which layers are tiled for a budget, without loading the model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final, Literal

import torch
import typer
from rich.console import Console

import memtile
from memtile.cli import models
from memtile.cli.errors import CommandError
from memtile.cli.terminal import AsJson
from memtile.costmodel import ClusterSpec, parse_byte_size, parse_speed
from memtile.planner import plan_ranks
from memtile.testing import PeakMemory

_OTHERS: Final = "the tokenizer"


def run_plan(
    model: Annotated[
        Path, typer.Argument(help="A transformers folder; config.json alone is enough.")
    ],
    budget: Annotated[
        str | None, typer.Option(help="Memory to use above the imports, such as 2GiB.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens in a step, on each rank.")] = 128,
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
    as_json: AsJson = False,
    trust_remote_code: models.TrustsCode = False,
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
    one_process = {"--budget": budget, "--home": home, "--mode": mode, "--rates": rates}
    speeds = {"--link": link, "--host-link": host_link, "--disk": disk, "--flops": flops}
    cluster = {"--engine": engine, "--device-memory": device_memory, "--offload": offload, **speeds}
    _check_cluster(world_size, cluster, one_process)
    if world_size is not None and engine is not None:
        memory = device_memory and parse_byte_size(device_memory, "--device-memory")
        rank = _speeds(speeds)
        with _counting(model):
            ranks = plan_ranks(
                models.empty_of(model, trust_remote_code, named=True),
                optimizer=_optimizer(optimizer),
                world_size=world_size,
                engine=engine,
                device_memory=memory or None,
                offload=offload or "none",
                speeds=rank,
                tokens=tokens,
                batch=batch,
            )
        print(ranks.to_json() if as_json else ranks)
        return 0
    if budget is None:
        raise CommandError("there is no limit: give --budget 2GiB, or --world-size for a cluster.")
    allowed = parse_byte_size(budget, "--budget")
    home = models.check_home(home or "disk", "checkpoint")
    if home == "checkpoint" and optimizer != "none":
        raise CommandError("--home checkpoint is read only: give --optimizer none with it.")
    with _counting(model), PeakMemory() as peak:  # as `finetune` and `generate` plan
        if models.has_tokenizer(model):
            models.tokenizer_of(model, trust_remote_code)
        empty = models.empty_of(model, trust_remote_code, named=True)
        with models.within(allowed, peak.nbytes, _OTHERS) as left:
            found = memtile.plan(
                empty,
                budget=left,
                tokens=tokens,
                batch=batch,
                optimizer=_optimizer(optimizer),
                home=home,
                mode=mode or "in_backward",
                rates=rates,
            )
    others = models.budget_note(allowed, allowed - left, _OTHERS)
    print(found.to_json() if as_json else f"{found}\n{others}")
    return 0


def _check_cluster(
    world_size: int | None, cluster: Mapping[str, str | None], one_process: Mapping[str, object]
) -> None:
    """Refuses options that do not belong together; the keys are their names."""
    given = [option for option, value in cluster.items() if value is not None]
    if given and world_size is None:
        raise CommandError(f"{given[0]} is of a cluster: give --world-size N and --engine with it.")
    if world_size is None:
        return
    if cluster["--engine"] is None:
        raise CommandError("--world-size needs --engine: give --engine fsdp2 or zero3 with it.")
    for option, value in one_process.items():
        if value is not None:
            raise CommandError(
                f"{option} plans one process: leave it out beside --world-size, whose limit is "
                "--device-memory."
            )


def _speeds(given: Mapping[str, str | None]) -> ClusterSpec:
    def speed(option: str, unit: str = "B") -> float | None:
        text = given[option]
        return None if text is None else parse_speed(text, option, unit)

    flops, link = speed("--flops", "FLOP"), speed("--link")
    return ClusterSpec(flops=flops, link=link, host=speed("--host-link"), disk=speed("--disk"))


@contextmanager
def _counting(folder: Path) -> Iterator[None]:
    """Checks the folder, loads transformers, and shows what is going on."""
    models.check_folder(folder, needs_weights=False)
    models.load_transformers(folder)
    with Console(stderr=True).status("counting a step, measuring the machine once"):
        yield


def _optimizer(name: str) -> type[torch.optim.Optimizer] | None:
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

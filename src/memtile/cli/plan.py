"""`memtile plan`: shows which layers are tiled for a budget, without loading the model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import torch
import typer
from rich.console import Console

import memtile
from memtile.cli import models
from memtile.cli.errors import CommandError, check_at_least
from memtile.cli.terminal import AsJson, with_options
from memtile.costmodel import ClusterSpec, Plan, RankPlan, parse_byte_size, parse_speed
from memtile.home_names import RANK_HOMES, parse_home
from memtile.planner import plan_ranks
from memtile.planner.saved_rates import rates_of
from memtile.testing import PeakMemory

_OTHERS: Final = "the tokenizer"
_CLUSTER: Final = ("engine", "device_memory", "offload", "link", "host_link", "disk", "flops")
_PROCESS: Final = ("budget", "mode", "rates")


@dataclass(frozen=True)
class PlanArguments:
    """What the command line gives; the fields are its options."""

    model: Annotated[
        Path, typer.Argument(help="A transformers folder; config.json alone is enough.")
    ]
    budget: Annotated[
        str | None, typer.Option(help="Memory to use above the imports, such as 2GiB.")
    ] = None
    tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens in a step, on each rank; or --longest.", show_default=str(models.TOKENS)
        ),
    ] = None
    longest: Annotated[
        bool, typer.Option("--longest", help="Plan the longest sequences that fit the budget.")
    ] = False
    batch: Annotated[int, typer.Option(help="Sequences that these tokens are.")] = 1
    optimizer: Annotated[
        str, typer.Option(help="A class of torch.optim, such as AdamW; none: inference.")
    ] = "AdamW"
    home: Annotated[
        str | None,
        typer.Option(
            help="Where parked tiles live: disk, disk:FOLDER, host, or checkpoint (no training). "
            "Of ranks, where activations are parked: host, disk or disk:FOLDER.",
            show_default="disk; of ranks, host",
        ),
    ] = None
    mode: Annotated[
        Literal["in_backward", "classic"] | None,
        typer.Option(
            help="in_backward (keeps no gradients) or classic.", show_default="in_backward"
        ),
    ] = None
    rates: Annotated[
        Path | None, typer.Option(help="A JSON file of rates, in place of measured ones.")
    ] = None
    as_json: AsJson = False
    trust_remote_code: models.TrustsCode = False
    world_size: Annotated[
        int | None, typer.Option(help="Plan for so many ranks, instead of one process.")
    ] = None
    engine: Annotated[
        Literal["fsdp2", "zero3"] | None, typer.Option(help="What shards over the ranks.")
    ] = None
    device_memory: Annotated[
        str | None, typer.Option(help="Memory of each rank's device, such as 80GiB.")
    ] = None
    offload: Annotated[
        Literal["none", "cpu", "nvme"] | None,
        typer.Option(
            help="Where shards and moments live: none (on the device), cpu, or nvme (zero3).",
            show_default="none",
        ),
    ] = None
    link: Annotated[
        str | None, typer.Option(help="What a rank sends to others, such as 50GB/s.")
    ] = None
    host_link: Annotated[
        str | None, typer.Option(help="Between host and device, such as 25GB/s.")
    ] = None
    disk: Annotated[str | None, typer.Option(help="A rank's disk, such as 7GB/s.")] = None
    flops: Annotated[str | None, typer.Option(help="Products of a rank, such as 400TFLOP/s.")] = (
        None
    )


@with_options(PlanArguments)
def run_plan(given: PlanArguments) -> int:
    """Show which layers are tiled for a budget, or for many ranks, and what a step will take."""
    _check_belonging(given)
    models.check_folder(given.model, needs_weights=False)
    if given.world_size is not None:
        ranks = _plan_ranks(given)
        print(ranks.to_json() if given.as_json else ranks)
        return 0
    found, others = _plan_process(given)
    print(found.to_json() if given.as_json else f"{found}\n{others}")
    return 0


def _check_belonging(given: PlanArguments) -> None:
    """Refuses options that do not belong together."""
    if given.longest and given.tokens is not None:
        raise CommandError(
            "--longest finds the number of tokens: leave out --tokens, or --longest."
        )
    check_at_least("--tokens", _tokens(given), 1)
    check_at_least("--batch", given.batch, 1)
    cluster = _first_given(given, _CLUSTER)
    if given.world_size is None:
        if cluster:
            raise CommandError(
                f"{cluster} is of a cluster: give --world-size N and --engine with it."
            )
        return
    if given.engine is None:
        raise CommandError("--world-size needs --engine: give --engine fsdp2 or zero3 with it.")
    option = "--longest" if given.longest else _first_given(given, _PROCESS)
    if option:
        raise CommandError(
            f"{option} plans one process: leave it out beside --world-size, whose limit is "
            "--device-memory."
        )


def _tokens(given: PlanArguments) -> int:
    return models.TOKENS if given.tokens is None else given.tokens


def _first_given(given: PlanArguments, names: Sequence[str]) -> str | None:
    return next((f"--{n.replace('_', '-')}" for n in names if getattr(given, n) is not None), None)


def _plan_ranks(given: PlanArguments) -> RankPlan:
    assert given.world_size is not None
    assert given.engine is not None
    text = given.device_memory
    memory = parse_byte_size(text, "--device-memory") if text else None
    home = "host" if given.home is None else given.home
    parse_home(home, "--home ", RANK_HOMES)
    speeds = _speeds(given)
    with _counting(given.model):
        return plan_ranks(
            models.empty_of(given.model, given.trust_remote_code, named=True),
            optimizer=_optimizer(given.optimizer),
            options=_options(given.optimizer),
            world_size=given.world_size,
            engine=given.engine,
            device_memory=memory,
            offload=given.offload or "none",
            home=home,
            speeds=speeds,
            tokens=_tokens(given),
            batch=given.batch,
        )


def _plan_process(given: PlanArguments) -> tuple[Plan, str]:
    """The plan, and what of the budget it leaves to others."""
    if given.budget is None:
        raise CommandError("there is no limit: give --budget 2GiB, or --world-size for a cluster.")
    allowed = parse_byte_size(given.budget, "--budget")
    home = models.check_home(given.home or "disk", "checkpoint")
    if home == "checkpoint" and given.optimizer != "none":
        raise CommandError("--home checkpoint is read only: give --optimizer none with it.")
    rates = None if given.rates is None else rates_of(given.rates, None, "--rates ")
    with _counting(given.model), PeakMemory() as peak:  # as `finetune` and `generate` plan
        if models.has_tokenizer(given.model):
            models.tokenizer_of(given.model, given.trust_remote_code)
        empty = models.empty_of(given.model, given.trust_remote_code, named=True)
        with models.within(allowed, peak.nbytes, _OTHERS) as left:
            found = memtile.plan(
                empty,
                budget=left,
                tokens="longest" if given.longest else _tokens(given),
                batch=given.batch,
                optimizer=_optimizer(given.optimizer),
                options=_options(given.optimizer),
                home=home,
                mode=given.mode or "in_backward",
                rates=rates,
            )
    return found, models.budget_note(allowed, allowed - left, _OTHERS)


def _speeds(given: PlanArguments) -> ClusterSpec:
    def speed(text: str | None, option: str, unit: str = "B") -> float | None:
        return None if text is None else parse_speed(text, option, unit)

    return ClusterSpec(
        flops=speed(given.flops, "--flops", "FLOP"),
        link=speed(given.link, "--link"),
        host=speed(given.host_link, "--host-link"),
        disk=speed(given.disk, "--disk"),
    )


@contextmanager
def _counting(folder: Path) -> Iterator[None]:
    """Loads transformers, and shows what is going on."""
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


def _options(name: str) -> dict[str, bool] | None:
    """The options of the optimizer; of AdamW those that `finetune` gives it."""
    return {"fused": True} if name.lower() == "adamw" else None

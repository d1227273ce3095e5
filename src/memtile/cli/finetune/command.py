"""The options of `memtile finetune`; starts or resumes the run."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import typer
from rich.console import Console

from memtile.cli import models
from memtile.cli.errors import CommandError, check_at_least
from memtile.cli.finetune.data_files import Data, find_data
from memtile.cli.finetune.display import Display
from memtile.cli.finetune.limits import advice
from memtile.cli.finetune.log import LOG, PICTURE
from memtile.cli.finetune.run import Result, finetune
from memtile.cli.finetune.settings import (
    Options,
    TrainingSettings,
    digests,
    holds_run,
    is_first_rank,
    weight_files,
)
from memtile.cli.terminal import Trace, progress, with_options
from memtile.costmodel import format_byte_size, parse_byte_size
from memtile.observing import check_trace_path
from memtile.planner.saved_rates import cache_folder

_MEBIBYTE: Final = 1 << 20


@dataclass(frozen=True)
class FinetuneArguments:
    """What the command line gives; the fields are its options."""

    model: models.Folder
    data: Annotated[
        list[Path],
        typer.Argument(
            metavar="DATA...",
            help="Text files, JSON lines or Parquet, or folders of them; rows have text, messages, "
            "or prompt and completion.",
        ),
    ]
    out: Annotated[Path, typer.Option(help="The folder of the run and of the fine-tuned model.")]
    budget: Annotated[
        str | None,
        typer.Option(help="Memory to use above the imports; 2GiB where nothing is given."),
    ] = None
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 100
    tokens: Annotated[int, typer.Option(help="Tokens in a step, one sequence.")] = models.TOKENS
    no_packing: Annotated[
        bool,
        typer.Option(
            "--no-packing",
            help="A sequence for each text, padded or cut; chats and completions always have one.",
        ),
    ] = False
    lr: Annotated[float, typer.Option(help="The highest learning rate of AdamW.")] = 1e-5
    schedule: Annotated[
        Literal["constant", "linear", "cosine"],
        typer.Option(help="How the learning rate goes on; linear and cosine end at 0."),
    ] = "cosine"
    warmup: Annotated[
        int, typer.Option(help="First steps, in which the learning rate rises from 0.")
    ] = 0
    clip: Annotated[
        float | None,
        typer.Option(
            metavar="NORM",
            help="Scale gradients to this norm at most; all are kept until the step for it.",
        ),
    ] = None
    validation: Annotated[
        list[Path] | None, typer.Option(help="Data whose loss is shown; may be repeated.")
    ] = None
    eval_steps: Annotated[
        int | None,
        typer.Option(help="Steps between losses on --validation.", show_default="50"),
    ] = None
    home: Annotated[
        str | None,
        typer.Option(help="Where tiles live: disk, disk:FOLDER or host; disk if nothing is given."),
    ] = None
    lora: Annotated[
        int | None, typer.Option(metavar="RANK", help="Train adapters only; needs peft.")
    ] = None
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 50
    seed: Annotated[int, typer.Option(help="Of the order of sequences, and of dropout.")] = 0
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False
    engine: Annotated[
        Literal["fsdp2", "zero3"] | None,
        typer.Option(help="What shards tiles over the ranks of torchrun."),
    ] = None
    tile: Annotated[
        str | None, typer.Option(help="With --engine: the most that a tile has; 16MiB.")
    ] = None
    offload: Annotated[
        bool, typer.Option("--offload", help="With --engine: shards live in host memory.")
    ] = False
    cache: Annotated[
        Path | None, typer.Option(help="Where tokens are kept for other runs (~/.cache/memtile).")
    ] = None
    trace: Trace = None
    strict: models.Strict = False
    trust_remote_code: models.TrustsCode = False


@with_options(FinetuneArguments)
def run_finetune(given: FinetuneArguments) -> int:
    """Fine-tune a model that need not fit in memory, on texts, chats or completions.

    Ctrl-C saves and stops; the same command with --resume goes on, bit for bit. With --engine, each
    rank trains on a sequence of its own in each step.
    """
    _check_engine(given)
    options = _options(given)
    models.check_folder(given.model)
    data = _data(given)
    settings = _settings(given, data)
    _check_out(given.out, settings, given.resume)
    models.load_transformers(given.model)
    alone = given.engine is None
    console = Console(highlight=False, quiet=not alone and not is_first_rank())
    limit = f" of {format_byte_size(options.budget)}" if alone else " a rank"
    with Display(console, given.steps, limit, options.trace) as display:
        result = finetune(settings, data, options, display)
    _show(result, given, limit, console)
    return 0


def _check_engine(given: FinetuneArguments) -> None:
    if given.engine is None:
        if given.tile or given.offload:
            raise CommandError(
                "--tile and --offload go with --engine: in one process give --budget."
            )
        return
    for option, value in (("--budget", given.budget), ("--home", given.home)):
        if value is not None:
            raise CommandError(
                f"{option} plans one process; with --engine, tiles are shards over ranks: give "
                "--tile and --offload instead."
            )
    if given.trace is not None:
        raise CommandError("--trace shows homes, and engines hold shards: leave out one of them.")
    if given.lora is not None:
        raise CommandError("--lora is not there over ranks: leave out --engine, or --lora.")


def _options(given: FinetuneArguments) -> Options:
    options = Options(
        budget=parse_byte_size(given.budget or "2GiB", "--budget"),
        home=models.check_home(given.home or "disk"),
        strict=given.strict,
        trusts_code=given.trust_remote_code,
        out=given.out,
        save_every=given.save_every,
        resume=given.resume,
        tile_bytes=parse_byte_size(given.tile or "16MiB", "--tile"),
        offload=given.offload,
        cache=given.cache or cache_folder(),
        eval_steps=50 if given.eval_steps is None else given.eval_steps,
        trace=None if given.trace is None else check_trace_path(given.trace),
    )
    if given.engine is not None:
        _check_launched()
    check_at_least("--save-every", options.save_every, 1)
    check_at_least("--eval-steps", options.eval_steps, 1)
    return options


def _check_launched() -> None:
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        raise CommandError(
            "--engine trains over ranks, and this is a single process: start it with "
            "torchrun --nproc-per-node 2 -m memtile.cli finetune … (any number of processes)."
        )


def _data(given: FinetuneArguments) -> list[Data]:
    """What to train on, then what to evaluate on, if there is any."""
    found = [find_data(given.data, "DATA")]
    if given.validation:
        found.append(find_data(given.validation, "--validation"))
        _check_alike(*found)
    elif given.eval_steps is not None:
        raise CommandError("--eval-steps has no data to take a loss on: give --validation FILE.")
    return found


def _check_alike(data: Data, validation: Data) -> None:
    if data.columns != validation.columns:
        ours, theirs = (" and ".join(each.columns) for each in (data, validation))
        raise CommandError(
            f"--validation has {theirs}, and DATA {ours}: give what has the same, or the losses "
            "cannot be compared."
        )


def _settings(given: FinetuneArguments, data: list[Data]) -> TrainingSettings:
    return TrainingSettings(
        model=str(given.model.resolve()),
        data=_names(data[0]),
        steps=given.steps,
        tokens=given.tokens,
        lr=given.lr,
        seed=given.seed,
        lora=given.lora,
        digests=_digests(given.model, data, given.lora is not None),
        engine=given.engine,
        validation=tuple(name for each in data[1:] for name in _names(each)),
        packing=data[0].is_text and not given.no_packing,
        clip=given.clip,
        warmup=given.warmup,
        schedule=given.schedule,
    )


def _names(data: Data) -> tuple[str, ...]:
    return tuple(str(file.resolve()) for file in data.files)


def _digests(model: Path, data: list[Data], with_weights: bool) -> tuple[str, ...]:
    """The digests of the run's files, with a bar: a large model takes minutes to read."""
    files = [file for each in data for file in each.files]
    read = [*files, *(weight_files(model) if with_weights else ())]
    mebibytes = sum(file.stat().st_size for file in read) / _MEBIBYTE
    with progress() as bars:
        task = bars.add_task("reading data and weights, MiB", total=mebibytes)
        return digests(
            model,
            files,
            with_weights,
            with_template=data[0].columns != ("text",),
            on_read=lambda nbytes: bars.advance(task, nbytes / _MEBIBYTE),
        )


def _check_out(out: Path, settings: TrainingSettings, resume: bool) -> None:
    if out.exists() and not out.is_dir():
        raise CommandError(f"--out {out} is a file: give a folder.")
    if resume:
        settings.check_continues(out)
    elif holds_run(out):
        raise CommandError(
            f"--out {out} holds a run already: go on with it by --resume, or give another folder."
        )
    elif out.is_dir() and any(out.iterdir()):
        raise CommandError(f"--out {out} is not empty: give a new folder.")


def _show(result: Result, given: FinetuneArguments, limit: str, console: Console) -> None:
    out = given.out
    if result.entries:
        ends = {entry.step: entry.loss for entry in (result.entries[0], result.entries[-1])}
        words = ", ".join(f"loss of step {step}: {loss:.3f}" for step, loss in ends.items())
        console.print(
            f"{words}; {result.seconds:.0f} s, "
            f"peak memory {format_byte_size(result.peak_bytes)}{limit}",
            soft_wrap=True,
        )
    change = advice(result.entries, given.tokens)
    if change is not None:
        console.print(change, soft_wrap=True)
    has_picture = (out / PICTURE).is_file()
    files = f"{LOG}, {PICTURE}" if has_picture else f"{LOG} ({PICTURE} needs matplotlib)"
    console.print(f"the fine-tuned model is in {out}; see {files}", soft_wrap=True)

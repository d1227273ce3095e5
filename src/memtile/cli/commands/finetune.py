"""`memtile finetune`: a model trained within a budget of memory, saved, stopped and continued."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from memtile.cli import models
from memtile.cli.console import interruptible
from memtile.cli.errors import CommandError
from memtile.cli.finetune import LOG, PICTURE, Settings, check_texts, digests, holds_run
from memtile.cli.finetune.display import Display
from memtile.cli.homes import check_home
from memtile.planning import format_byte_size, parse_byte_size

if TYPE_CHECKING:
    from memtile.cli.finetune.loop import Result


def run_finetune(
    model: Annotated[Path, typer.Argument(help="A transformers folder with safetensors.")],
    texts: Annotated[list[Path], typer.Argument(metavar="TEXT...", help="UTF-8 text files.")],
    out: Annotated[Path, typer.Option(help="The folder of the run and of what comes of it.")],
    budget: Annotated[
        str, typer.Option(help="Memory to use above the imports, such as 2GiB.")
    ] = "2GiB",
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 100,
    tokens: Annotated[int, typer.Option(help="Tokens in a step, one sequence.")] = 128,
    lr: Annotated[
        float, typer.Option(help="Learning rate of AdamW; it falls to 0 along a cosine.")
    ] = 1e-5,
    home: Annotated[
        str, typer.Option(help="Where tiles live: disk, disk:FOLDER or host.")
    ] = "disk",
    lora: Annotated[
        int | None, typer.Option(metavar="RANK", help="Train adapters only; needs peft.")
    ] = None,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the order of sequences, and of dropout.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
) -> int:
    """Fine-tune a model that need not fit in memory, on plain text.

    Ctrl-C saves and stops; the same command with --resume goes on, bit for bit.
    """
    allowed = parse_byte_size(budget, "--budget")
    check_home(home)
    if save_every < 1:
        raise CommandError(f"--save-every {save_every} is too few: give 1 or more.")
    models.check_folder(model)
    paths = tuple(str(text.resolve()) for text in texts)
    check_texts(texts)
    found = digests(model, texts)
    settings = Settings(str(model.resolve()), paths, steps, tokens, lr, seed, lora, found)
    _check_out(out, settings, resume)
    console = Console(highlight=False)
    with interruptible():
        models.load_transformers(model)
        from memtile.cli.finetune.run import Options, finetune

        with Display(console, steps, allowed) as display:
            result = finetune(
                settings,
                Options(out, allowed, home, save_every, resume),
                display.planned,
                display.started,
                display.report,
            )
    _show(result, out, allowed, console)
    return 0


def _check_out(out: Path, settings: Settings, resume: bool) -> None:
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


def _show(result: "Result", out: Path, allowed: int, console: Console) -> None:
    losses = result.losses
    if losses:
        count = "1 step" if len(losses) == 1 else f"{len(losses)} steps"
        peak, budget = format_byte_size(result.peak_bytes), format_byte_size(allowed)
        console.print(
            f"loss {losses[0]:.3f} → {losses[-1]:.3f} in {count}, {result.seconds:.0f} s; "
            f"peak memory {peak} of {budget}",
            soft_wrap=True,
        )
    has_picture = (out / PICTURE).is_file()
    files = f"{LOG}, {PICTURE}" if has_picture else f"{LOG} ({PICTURE} needs matplotlib)"
    console.print(f"the fine-tuned model is in {out}; see {files}", soft_wrap=True)

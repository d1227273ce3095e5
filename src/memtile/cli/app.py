"""The command line: options in, one sentence out for a mistake, and an exit code.

Exit codes: 0 all promises kept; 1 a promise missed; 2 a mistake in what was given, or a system that
lacks what is needed; 3 a worker process that ended without a result; 130 or 143 interrupted by
Ctrl-C or SIGTERM.
"""

import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated, Final, cast

import typer

from memtile.cli.commands.convert import run_convert
from memtile.cli.commands.demo import run_demo
from memtile.cli.commands.finetune import run_finetune
from memtile.cli.commands.generate import run_generate
from memtile.cli.commands.inspect import run_inspect
from memtile.cli.commands.plan import run_plan
from memtile.cli.errors import Interrupted, WorkerError, sentence_of
from memtile.errors import MemtileError
from memtile.interrupting import interrupts_are_errors

# UsageError, found this way because newer releases of typer carry a copy of click of their own.
_UsageError: Final = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])

app = typer.Typer(
    help="Linear layers that are too big for memory, cut into tiles.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and gives its exit code; a mistake is one sentence on stderr.

    So is what other libraries and the system say of what a user gave; an error of our own code is
    raised.

    Args:
        arguments: The words after `memtile`; those of this process if None.
    """
    interrupts_are_errors()
    try:
        code: int = app(args=arguments, prog_name="memtile", standalone_mode=False) or 0
        # typer's own, for Ctrl-C outside of `interruptible`; older releases raise Abort
        return _refuse("Interrupted.", code) if code == 130 else code
    except WorkerError as error:
        sys.stderr.write(error.log)
        return _refuse(str(error), 3)
    except Interrupted as interruption:
        return _refuse(str(interruption), interruption.code)
    except MemtileError as error:
        # not str: a system's number would stand before the sentence
        return _refuse(getattr(error, "strerror", None) or str(error), 2)
    except _UsageError as error:
        return _refuse(f"{error.format_message().rstrip('.')}; see: memtile --help", 2)
    except typer.Abort:
        return _refuse("Interrupted.", 130)
    except Exception as error:
        sentence = sentence_of(error)
        if sentence is None:
            raise
        return _refuse(sentence, 2)


def _refuse(sentence: str, code: int) -> int:
    sys.stderr.write(f"memtile: {sentence}\n")
    return code


def _say_version(asked: bool) -> None:
    if asked:
        print(f"memtile {version('memtile')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_say_version, help="Print the version and stop."
        ),
    ] = False,
) -> None:
    """Linear layers that are too big for memory, cut into tiles."""


app.command("demo")(run_demo)
app.command("plan")(run_plan)
app.command("finetune")(run_finetune)
app.command("generate")(run_generate)
app.command("inspect")(run_inspect)
app.command("convert")(run_convert)

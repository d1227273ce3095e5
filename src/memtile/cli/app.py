"""The command `memtile`: its subcommands, the message for a mistake, and the exit code.

Exit codes: 0 success; 1 the demo missed a bound, or the doctor found what would stop a run; 2 wrong
input, or a system that lacks what is needed; 3 a worker process ended without a result; 130 or 143
interrupted by Ctrl-C or SIGTERM.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Annotated, Final, cast

import typer

from memtile.cli.convert import run_convert
from memtile.cli.demo.command import run_demo
from memtile.cli.doctor import run_doctor
from memtile.cli.errors import Interrupted, WorkerError, sentence_of
from memtile.cli.finetune.command import run_finetune
from memtile.cli.generate import run_generate
from memtile.cli.inspect import run_inspect
from memtile.cli.plan import run_plan
from memtile.cli.terminal import interruptible
from memtile.errors import MemtileError
from memtile.interrupting import interrupts_are_errors

# UsageError, found this way because newer releases of typer carry a copy of click of their own.
_UsageError: Final = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])
_COMMANDS: Final[dict[str, Callable[..., int]]] = {
    "demo": run_demo,
    "plan": run_plan,
    "finetune": run_finetune,
    "generate": run_generate,
    "inspect": run_inspect,
    "convert": run_convert,
    "doctor": run_doctor,
}

app = typer.Typer(
    help="Linear layers that are too big for memory, cut into tiles.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; a mistake is one sentence on stderr, an error of our own code is raised."""
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


for _name, _command in _COMMANDS.items():
    app.command(_name)(interruptible()(_command))

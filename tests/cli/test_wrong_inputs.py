"""Every command, given what is wrong: one sentence, exit code 2, and nothing left behind."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from memtile.cli import main

GENERATE = ["generate", "model", "--prompt", "word1", "--tokens", "3"]
FINETUNE = ["finetune", "model", "text", "--out", "new/out", "--steps", "1", "--tokens", "16"]
PLAN = ["plan", "model", "--budget", "400MiB", "--tokens", "16"]
CODE = {"AutoConfig": "configuration_mine.Mine", "AutoModelForCausalLM": "modeling_mine.Mine"}
TOKENIZER = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["toks.Mine", None]}}
EVIL = "raise SystemExit('this code ran')"


@pytest.fixture
def here(tiny_model, tiny_text, tmp_path, monkeypatch) -> Path:
    """Gives the working folder, with a `model` and a `text` in it; a prompt for input fails."""
    shutil.copytree(tiny_model, tmp_path / "model")
    shutil.copy(tiny_text, tmp_path / "text")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("memtile.cli.finetune.log.draw", lambda out: False)  # a process of its own
    monkeypatch.setattr("builtins.input", lambda prompt="": pytest.fail(f"asked: {prompt}"))
    return tmp_path


def change(here, name, content):
    """One file of the model: removed, replaced, or with some of its JSON replaced."""
    file = here / "model" / name
    if content is None:
        file.unlink()
    elif isinstance(content, bytes):
        file.write_bytes(content)
    else:
        old = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**old, **content}))


def refused(here, capsys, words) -> str:
    """The one line that the command ends with; fails where it does anything else."""
    before = {path: path.is_file() and path.read_bytes() for path in here.rglob("*")}
    capsys.readouterr()

    code = main(words)

    printed = capsys.readouterr()
    assert (code, printed.out) == (2, ""), printed.err
    assert printed.err.startswith("memtile: ")
    assert len(printed.err.splitlines()) == 1, printed.err
    assert {path: path.is_file() and path.read_bytes() for path in here.rglob("*")} == before
    return printed.err


# The model's folder


@pytest.mark.parametrize("command", [PLAN, GENERATE, FINETUNE], ids=lambda words: words[0])
@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("nowhere/at/all", "is no folder"),
        ("org/name", "hf download org/name --local-dir name"),
        ("text", "is a file: give the folder that holds it"),
        ("tiny.gguf", "gguf_file"),
        ("ggufs", "gguf_file"),
        ("pickles", "pickles can run any code"),
        ("empty", "no config.json"),
    ],
)
def test_what_is_no_folder_of_a_model_gets_a_way_out(here, capsys, command, model, sentence):
    """A name of the Hub, a file, GGUF, pickles and nothing: the sentence says what to do."""
    for folder, file in (("ggufs", "tiny.gguf"), ("pickles", "pytorch_model.bin")):
        (here / folder).mkdir()
        (here / folder / file).write_bytes(b"GGUF")
        shutil.copy(here / "model" / "config.json", here / folder)
    (here / "empty").mkdir()
    (here / "tiny.gguf").write_bytes(b"GGUF")

    assert sentence in refused(here, capsys, [model if w == "model" else w for w in command])


@pytest.mark.parametrize("command", [PLAN, GENERATE, FINETUNE], ids=lambda words: words[0])
@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("config.json", {"model_type": "mine", "auto_map": CODE}, "Mine of modeling_mine.py"),
        ("tokenizer_config.json", TOKENIZER, "Mine of toks.py"),
        ("config.json", b"[]", "config.json cannot be read"),
        ("config.json", {"hidden_size": "wide"}, "hidden_size"),
        ("config.json", {"num_attention_heads": 0}, "no causal language model"),
        ("config.json", {"hidden_act": "nope"}, "KeyError 'nope'"),
        ("config.json", {"model_type": "vit"}, "ViTConfig"),
        ("config.json", {"num_hidden_layers": 3}, "layers.2.self_attn.q_proj.weight is missing"),
        ("config.json", {"vocab_size": 50}, "the checkpoint's is (99, 24)"),
        ("tokenizer.json", b"[1", "no tokenizer that can be loaded"),
        ("tokenizer.json", b"{}", "no tokenizer that can be loaded"),
        ("model.safetensors", b"xx", "not whole"),
    ],
)
def test_a_folder_that_cannot_be_run_is_refused_before_a_plan(
    here, capsys, command, name, content, sentence
):
    """Code that would be run is named and not run; damage is named; no plan is printed before."""
    for file in ("configuration_mine", "modeling_mine", "toks"):
        (here / "model" / f"{file}.py").write_text(EVIL)
    brings_code = isinstance(content, dict) and "auto_map" in content
    change(here, name, content)

    said = refused(here, capsys, command)
    assert sentence in said
    assert ("--trust-remote-code" in said) == brings_code


@pytest.mark.parametrize("command", [GENERATE, FINETUNE], ids=lambda words: words[0])
@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("whisper", "whose encoder this command cannot use"),
        ("bert", "each token sees those after it"),
    ],
)
def test_models_that_are_no_writers_of_text_are_refused(here, capsys, command, kind, sentence):
    """transformers makes a language model of their configs, which is not what was trained."""
    change(here, "config.json", {"model_type": kind, "architectures": ["Given"]})

    said = refused(here, capsys, command)
    assert "is a Given" in said
    assert sentence in said


def test_code_runs_where_it_is_trusted(here, capsys, monkeypatch):
    """`--trust-remote-code` is the only way: the model's own classes are then made."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(here / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(here / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    (here / "model" / "configuration_mine.py").write_text(
        "import transformers\nclass Mine(transformers.LlamaConfig):\n    model_type = 'mine'\n"
    )
    (here / "model" / "modeling_mine.py").write_text(
        "import transformers\nfrom .configuration_mine import Mine as Config\n"
        "class Mine(transformers.LlamaForCausalLM):\n    config_class = Config\n"
    )
    change(here, "config.json", {"model_type": "mine", "auto_map": CODE})

    assert main([*PLAN, "--trust-remote-code"]) == 0
    assert capsys.readouterr().out.startswith("Mine, 16 tokens")


@pytest.mark.parametrize("command", [GENERATE, FINETUNE], ids=lambda words: words[0])
def test_a_missing_tokenizer_has_a_sentence(here, capsys, command):
    """It is named as what is missing; a plan needs none."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        change(here, name, None)

    assert "model holds no tokenizer: copy" in refused(here, capsys, command)
    assert main(PLAN) == 0


# Settings of the folder


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (b"{", "not a valid JSON"),
        (b"[]", "generation_config.json"),
        ({"num_return_sequences": 2, "num_beams": 1}, "num_return_sequences"),
        ({"num_beams": "four"}, "num_beams='four'"),
        ({"cache_implementation": "fancy"}, "fancy"),
    ],
)
def test_settings_that_cannot_be_followed_are_named(here, capsys, settings, sentence):
    """A generation_config.json that contradicts itself is one sentence."""
    change(here, "generation_config.json", settings)

    assert sentence in refused(here, capsys, GENERATE)


def test_a_setting_that_this_transformers_lacks_is_named(here, capsys):
    """What only shows once text is generated is one sentence too, below the plan."""
    change(here, "generation_config.json", {"num_beams": 4, "num_beam_groups": 2})

    assert main(GENERATE) == 2
    assert "generation_config.json (Group Beam Search" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [b"{", {"num_beams": 4, "num_return_sequences": 2}])
def test_settings_of_generation_do_not_keep_a_model_from_training(here, capsys, settings):
    """Settings of generation are not used in training."""
    change(here, "generation_config.json", settings)

    assert main(FINETUNE) == 0
    assert (here / "new" / "out" / "model.safetensors").is_file()


# Options, texts, and the other commands


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([*PLAN, "--budget", "600"], "--budget '600' has no unit: write 600MiB"),
        ([*GENERATE, "--budget", "2"], "--budget '2' has no unit"),
        ([*FINETUNE, "--budget", "600"], "--budget '600' has no unit"),
        (["demo", "--max-tile", "4096"], "--max-tile '4096' has no unit"),
        (["convert", "model", "new", "--max-shard", "5"], "--max-shard '5' has no unit"),
        (["convert", "model", "new", "--modules=*", "--max-tile", "5"], "--max-tile '5' has no"),
        ([*PLAN[:2], "--world-size", "2", "--engine", "fsdp2", "--link", "5"], "--link '5'"),
        ([*GENERATE, "--tokens", "64"], "more than the model reads at once, 64: give less"),
        ([*FINETUNE, "--tokens", "65"], "--tokens 65: 65 tokens are more than the model reads"),
        ([*PLAN, "--rates", "model"], "model"),
        ([*PLAN, "--rates", "text"], "text"),
        ([*PLAN, "--home", "disk:text"], "text"),
        ([*FINETUNE, "--home", "disk:text/more"], "text/more"),
        ([*GENERATE, "--seed", str(1 << 63)], "--seed 9223372036854775808 is too large: give one"),
        ([*FINETUNE, "--seed", str(1 << 63)], "--seed 9223372036854775808 is too large: give one"),
        ([*GENERATE, "--seed", "-1"], "--seed -1 is too few: give 0 or more"),
        ([*FINETUNE, "--lora", "25"], "its smaller side, 24 for the largest of them; give 24 or"),
        ([*FINETUNE, "--out", "text"], "--out text is a file"),
        ([*FINETUNE, "--out", "text/more"], "text/more"),
        ([*FINETUNE, "--out", "model"], "--out model is not empty"),
        ([*FINETUNE, "--budget", "20MiB"], "--budget 20.0 MiB"),
        ([*GENERATE, "--budget", "1MiB"], "--budget 1.00 MiB"),
        (["finetune", "model", "model", *FINETUNE[3:]], "DATA holds several kinds of files"),
        (["finetune", "model", "bare", *FINETUNE[3:]], "DATA bare is a folder without files"),
        (["finetune", "model", "lost", *FINETUNE[3:]], "No such file"),
        (["finetune", "model", "none", "none", *FINETUNE[3:]], "none is empty"),
        (["inspect", "tiny.gguf"], "gguf_file"),
        (["inspect", "text"], "text"),
        (["inspect", "hollow"], "no .safetensors"),
        (["convert", "hollow", "new"], "no .safetensors"),
        (["convert", "tiny.gguf", "new"], "gguf_file"),
        (["convert", "model", "text"], "text"),
        (["demo", "--model", "org/name"], "hf download org/name"),
        (["demo", "--model", "hollow"], "no config.json"),
        (["demo", "--model", "model", "--text", "model"], "Is a directory"),
    ],
    ids=lambda words: words[0] if isinstance(words, list) else None,
)
def test_what_is_given_wrong_is_one_sentence(here, capsys, words, sentence):
    """Sizes without units, folders in place of files and files in place of folders are refused."""
    (here / "hollow").mkdir()
    (here / "bare").mkdir()
    (here / "none").write_text(" \n")
    (here / "tiny.gguf").write_bytes(b"GGUF")

    assert sentence in refused(here, capsys, words)


def test_an_empty_text_among_others_is_skipped_and_said(here, capsys):
    """The run goes on with the others."""
    (here / "none").write_text("\n")

    assert main(["finetune", "model", "text", "none", *FINETUNE[3:]]) == 0
    assert "1 document, 320 tokens; 1 skipped that are empty" in capsys.readouterr().out


def test_what_was_in_the_way_is_as_it_was_after_a_failed_start(here, capsys):
    """A folder that was there, empty, is there and empty; one that was made is gone."""
    (here / "old").mkdir()

    said = refused(here, capsys, [*FINETUNE, "--out", "old", "--budget", "20MiB"])

    assert "--budget 20.0 MiB" in said


# Who is to blame


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (PermissionError(13, "Permission denied", "a/file"), "a/file: Permission denied"),
        (json.JSONDecodeError("Expecting value", "x", 0), "JSON file cannot be read"),
    ],
)
def test_what_the_system_says_is_one_sentence(here, capsys, monkeypatch, error, sentence):
    """Errors that a user can cause are no tracebacks, wherever they are raised."""

    def fail(*arguments):
        raise error

    monkeypatch.setattr("memtile.cli.inspect.inspect", fail)

    assert sentence in refused(here, capsys, ["inspect", "model"])


def test_a_bug_of_ours_shows_its_traceback(here, monkeypatch):
    """What no user can have caused is raised as it is."""

    def fail(*arguments):
        raise ValueError("a bug")

    monkeypatch.setattr("memtile.cli.inspect.inspect", fail)

    with pytest.raises(ValueError, match="a bug"):
        main(["inspect", "model"])

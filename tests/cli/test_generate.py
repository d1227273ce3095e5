"""`memtile generate`: the tokens of plain transformers, straight from the folder's own files."""

import json
import shutil

import families
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from memtile.cli import main

PROMPT = "word1 word2 word3"


def arguments(model, *more):
    return ["generate", str(model), "--prompt", PROMPT, "--tokens", "9", *more]


@pytest.fixture(scope="module")
def expected(tiny_model):
    """Gives what plain transformers goes on with, likeliest token by likeliest token."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = AutoTokenizer.from_pretrained(tiny_model)(PROMPT, return_tensors="pt").input_ids
    mask = torch.ones_like(ids)
    found = model.generate(
        ids, attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=1
    )
    return found[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("home", ["checkpoint", "disk", "host"])
def test_the_tokens_are_those_of_transformers(tiny_model, expected, capsys, home):
    """From the checkpoint's files, from a disk home and from memory: the same tokens."""
    before = {path: path.read_bytes() for path in tiny_model.iterdir()}

    code = main(arguments(tiny_model, "--home", home, "--json"))

    assert code == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == expected
    assert {path: path.read_bytes() for path in tiny_model.iterdir()} == before


def test_text_goes_to_stdout_and_the_rest_to_stderr(tiny_model, expected, capsys):
    """Only the new text is on stdout, for pipes; tokens, seconds and memory are on stderr."""
    code = main(arguments(tiny_model))

    printed = capsys.readouterr()
    words = AutoTokenizer.from_pretrained(tiny_model).decode(expected, skip_special_tokens=True)
    assert code == 0
    assert printed.out.split() == words.split()
    assert "9 tokens in" in printed.err
    assert "peak memory" in printed.err


def test_draws_depend_on_the_seed_alone(tiny_model, capsys):
    """With a temperature, the same seed gives the same text, another one another."""
    texts = []
    for seed in ("1", "1", "2"):
        main(arguments(tiny_model, "--temperature", "5", "--seed", seed, "--json"))
        texts.append(json.loads(capsys.readouterr().out)["token_ids"])

    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--tokens", "0"], "--tokens 0"),
        (["--temperature", "-1"], "--temperature -1"),
        (["--budget", "0B"], "less than one byte"),
        (["--budget", "1KiB"], "budget"),
        (["--home", "moon"], "no home"),
        (["--chat"], "no chat template"),
        (["--prompt", ""], "--prompt is empty"),
    ],
)
def test_a_mistake_is_one_sentence(tiny_model, capsys, options, sentence):
    """Each ends with exit code 2 and one line that names the way out."""
    assert main(arguments(tiny_model, *options)) == 2

    printed = capsys.readouterr()
    assert printed.out == ""
    assert sentence in printed.err
    assert len(printed.err.splitlines()) == 1


def broken(folder, model, name, content):
    """A copy of the model with one file replaced, or removed."""
    for path in model.iterdir():
        if path.name != name:
            (folder / path.name).write_bytes(path.read_bytes())
    if content is not None:
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("config.json", None, "no config.json"),
        ("config.json", b"{", "config.json cannot be read"),
        ("config.json", b'{"model_type": "unheard-of"}', "no causal language model"),
        ("config.json", b'{"model_type": "vit"}', "no causal language model"),
        ("tokenizer.json", b"{", "tokenizer"),
        ("model.safetensors", None, "no .safetensors"),
        ("model.safetensors", b"short", "not whole"),
        ("model.safetensors", b"\x80\x04\x95" + b"p" * 40, "is a pickle"),
    ],
)
def test_a_damaged_folder_is_one_sentence(tiny_model, tmp_path, capsys, name, content, sentence):
    """What is missing, cut short, foreign or of another kind is named; no traceback."""
    folder = broken(tmp_path, tiny_model, name, content)

    assert main(arguments(folder)) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert len([line for line in printed.err.splitlines() if line.startswith("memtile:")]) == 1


def test_no_folder_is_one_sentence(tmp_path, capsys):
    """A path that is not there is named."""
    assert main(arguments(tmp_path / "nothing")) == 2
    assert "is no folder" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["T5", "BART", "LLaVA", "Qwen2-VL", "Gemma-3 with images"])
def test_encoders_and_the_text_side_of_models_with_images(family, tiny_model, tmp_path, capsys):
    """The prompt goes to the encoder, or to the language model: the tokens of transformers."""
    model = families.build(family)
    model.save_pretrained(tmp_path)
    for path in tiny_model.glob("tokenizer*"):
        shutil.copy(path, tmp_path)
    ids = AutoTokenizer.from_pretrained(tmp_path)(PROMPT, return_tensors="pt").input_ids
    found = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False
    )
    expected = found[0, 1 if model.config.is_encoder_decoder else ids.shape[1] :].tolist()
    capsys.readouterr()

    code = main(arguments(tmp_path, "--json"))

    assert code == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == expected
    assert len(expected) > 1

"""Folders that the commands read: what is refused by name, what is left out and said."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaModel

from memtile.cli import main


def commands(folder, text, out):
    """What begins each command that reads a folder."""
    return {
        "plan": ["plan", str(folder), "--budget", "400MiB", "--tokens", "16"],
        "generate": ["generate", str(folder), "--prompt", "word1 word2", "--tokens", "3"],
        "finetune": [
            *["finetune", str(folder), str(text), "--out", str(out), "--budget", "400MiB"],
            *["--steps", "1", "--tokens", "16"],
        ],
    }


@pytest.mark.parametrize("command", ["plan", "generate", "finetune"])
def test_quantized_weights_are_one_sentence(tiny_model, tiny_text, tmp_path, capsys, command):
    """The method is named with the way out, before anything is made."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    described = json.loads((folder / "config.json").read_text())
    described["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(described))

    code = main(commands(folder, tiny_text, tmp_path / "out")[command])

    printed = capsys.readouterr()
    assert code == 2
    assert "quantized by mxfp4" in printed.err
    assert "give the folder of the unquantized model" in printed.err
    assert len(printed.err.splitlines()) == 1
    assert printed.out == ""
    assert not (tmp_path / "out").exists()


def with_one_name_more(folder, place):
    """A copy of a folder that holds a tensor of nobody."""
    shutil.copytree(folder, place)
    state = {**load_file(place / "model.safetensors"), "stranger.weight": torch.ones(3)}
    save_file(state, place / "model.safetensors", metadata={"format": "pt"})
    return place


@pytest.mark.parametrize("command", ["generate", "finetune"])
def test_one_name_too_many_is_a_line(tiny_model, tiny_text, tmp_path, capsys, command):
    """The rest is used; with --strict the folder is refused in one sentence."""
    folder = with_one_name_more(tiny_model, tmp_path / "model")

    words = commands(folder, tiny_text, tmp_path / "out")[command]
    refused = main([*commands(folder, tiny_text, tmp_path / "no")[command], "--strict"])
    sentence = capsys.readouterr().err
    code = main(words)

    said = capsys.readouterr().err.splitlines()
    assert (refused, code) == (2, 0)
    assert "it has stranger.weight" in sentence.splitlines()[-1]
    assert [line for line in said if line.startswith("memtile:")] == [
        f"memtile: {folder} holds stranger.weight, which the model has not: left out"
    ]


def test_text_is_not_drawn_from_a_head_that_is_new(tiny_model, tmp_path, capsys):
    """A folder of the base model alone has no head to generate with: the missing name is given."""
    shutil.copytree(tiny_model, tmp_path / "model")
    config = AutoConfig.from_pretrained(tiny_model, tie_word_embeddings=False)
    LlamaModel(config).save_pretrained(tmp_path / "model")

    code = main(commands(tmp_path / "model", None, None)["generate"])

    assert code == 2
    assert "lacks lm_head.weight" in capsys.readouterr().err.splitlines()[-1]

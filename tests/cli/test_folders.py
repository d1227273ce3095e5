"""Folders that the commands read: what is refused by name, what is left out and said."""

import json
import shutil

import pytest

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

"""`memtile inspect`: what is there, whether its bytes are right, and one sentence for damage."""

import json

import pytest
import torch

from memtile.checkpoints import Outgoing, write_checkpoint
from memtile.cli import main


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "layer.weight": torch.randn(7, 5, generator=generator),
        "layer.bias": torch.randn(7, generator=generator).bfloat16(),
        "count": torch.tensor(3),
    }


@pytest.fixture
def checkpoint(tmp_path):
    """Gives a folder with a checkpoint in two shards, with checksums."""
    folder = tmp_path / "checkpoint"
    outgoing = [Outgoing.of(name, tensor) for name, tensor in tensors().items()]
    write_checkpoint(folder, outgoing, max_shard_bytes=140)
    return folder


def flip(file):
    """Change the last byte of a file."""
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


def test_a_checkpoint_is_listed_and_verified(checkpoint, capsys):
    """Names, shapes, dtypes, files and the sum are shown, and all checksums hold."""
    assert main(["inspect", str(checkpoint)]) == 0

    printed = capsys.readouterr().out
    for word in ["layer.weight", "7 × 5", "float32", "bfloat16", "one number", "model-00002-of"]:
        assert word in printed
    assert "3 tensors, 162 B" in printed
    assert "checksums of 3 tensors verified" in printed


def test_json_is_the_same_for_scripts(checkpoint, capsys):
    """`--json` prints one document with every tensor."""
    assert main(["inspect", str(checkpoint), "--json"]) == 0

    found = json.loads(capsys.readouterr().out)
    assert {row["name"]: row["shape"] for row in found["rows"]} == {
        name: list(tensor.shape) for name, tensor in tensors().items()
    }
    assert (found["kind"], found["verified"], found["unknown"]) == ("safetensors checkpoint", 3, 0)


def test_a_flipped_bit_is_one_sentence(checkpoint, capsys):
    """Damage is found, named, and ends with exit code 2; without verifying it is not looked for."""
    flip(sorted(checkpoint.glob("*.safetensors"))[0])

    assert main(["inspect", str(checkpoint)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert "not those that were written" in printed.err
    assert main(["inspect", str(checkpoint), "--no-verify"]) == 0
    assert "checksums of 3 tensors not verified (--no-verify)" in capsys.readouterr().out


def test_a_foreign_checkpoint_has_no_checksums(tmp_path, capsys):
    """What another library wrote is listed, and said to be unverified."""
    from safetensors.torch import save_file

    save_file(tensors(), tmp_path / "other.safetensors")

    assert main(["inspect", str(tmp_path / "other.safetensors")]) == 0
    assert "no checksums of 3 tensors" in capsys.readouterr().out


@pytest.mark.parametrize("given", ["", "tiles.memtile"])
def test_a_kept_home_is_refused_with_the_way_out(tmp_path, capsys, given):
    """Kept homes are gone: the sentence says what holds a model instead."""
    (tmp_path / "tiles.memtile").write_bytes(bytes(4096))

    assert main(["inspect", str(tmp_path / given)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "no longer read" in printed.err
    assert "memtile.save_checkpoint or memtile finetune --out" in printed.err
    assert len(printed.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("nowhere", None, "does not exist"),
        ("x.safetensors", b"", "not whole"),
        ("x.safetensors", b"\x80\x04" + b"p" * 40, "pickle"),
        ("x.gguf", b"GGUF\3\0\0\0" + bytes(60), "GGUF"),
        ("x.safetensors", b"words and words and words", "no safetensors file"),
        (
            "model.safetensors.index.json",
            b'{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}',
            "there twice",
        ),
        ("pytorch_model.bin", b"\x80\x04", "pickle"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "b.safetensors"}}', "not there"),
        ("model.safetensors.index.json", b"[]", "no index"),
    ],
)
def test_nonsense_is_one_sentence(tmp_path, capsys, name, content, sentence):
    """What is no checkpoint is refused with the reason, exit code 2, no traceback."""
    if content is not None:
        (tmp_path / name).write_bytes(content)

    assert main(["inspect", str(tmp_path / name)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert sentence in printed.err
    assert len(printed.err.splitlines()) == 1

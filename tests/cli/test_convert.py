"""`memtile convert`: dense names to tile names and back, bit for bit."""

import errno
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from safetensors_files import entry, raw_file
from torch import nn

import memtile
from memtile.checkpoints import Checkpoint
from memtile.cli import main
from memtile.errors import CheckpointError


def model():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(11, 5),
            "up": nn.Linear(5, 13),
            "down": nn.Linear(13, 5, bias=False),
        }
    )


@pytest.fixture
def dense(tmp_path):
    """Gives a folder with a dense checkpoint and a text beside it."""
    folder = tmp_path / "dense"
    folder.mkdir()
    save_file(dict(model().state_dict()), folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def tensors(folder):
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def test_linears_become_tiles_that_the_layer_loads(dense, tmp_path, capsys):
    """Tile names and spans are those of a tiled linear, whose strict load takes them."""
    out = tmp_path / "tiles"

    code = main(
        ["convert", str(dense), str(out), "--modules", "*p", "--out-splits", "3", "--in-splits=2"]
    )

    found = tensors(out)
    layer = memtile.TiledLinear(5, 13, in_splits=2, out_splits=3)
    layer.load_state_dict(
        {k.removeprefix("up."): v for k, v in found.items() if k.startswith("up.")}
    )
    assert code == 0
    assert "1 linears cut" in capsys.readouterr().out
    assert {"up.linears.0.0.weight", "up.linears.2.1.bias", "down.weight"} <= found.keys()
    assert torch.equal(layer.to_linear().weight, model()["up"].weight)
    assert torch.equal(layer.to_linear().bias, model()["up"].bias)
    assert (out / "config.json").read_text() == "{}"


def test_what_lies_beside_is_copied_byte_for_byte(dense, tmp_path):
    """Any other file is copied; weights in other formats and half-written files are not."""
    raw = bytes(range(256)) + b"\r\n"
    (dense / "additional_chat_templates").mkdir()
    kept = ["config.json", "tokenizer.model", "merges.txt", "modeling_own.py", "LICENSE"]
    kept.append("additional_chat_templates/tool.jinja")
    left = ["model.gguf", "pytorch_model.bin", ".lock", "model.safetensors.partial-00", "m.onnx"]
    for name in kept + left:
        (dense / name).write_bytes(raw)

    assert main(["convert", str(dense), str(tmp_path / "out")]) == 0

    out = tmp_path / "out"
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert found == {*kept, "model.safetensors"}
    assert all((out / name).read_bytes() == raw for name in kept)


def test_dtypes_that_torch_lacks_are_carried(tmp_path, capsys):
    """Bytes and names of dtypes are those of the source; only what would be cut is refused."""
    table = {
        "up.weight": entry("F32", [3, 2], 0, 24),
        "up.scale": entry("F8_E8M0", [3], 24, 27),
        "six.weight": entry("F6_E2M3", [2, 2], 27, 30),
        "six.other": entry("F8_E4M3FNUZ", [2], 30, 32),
        "four.weight": entry("F4", [3, 2], 32, 35),
    }
    source = raw_file(tmp_path / "x.safetensors", table, bytes(range(35)))
    out = tmp_path / "out"

    code = main(["convert", str(source), str(out), "--modules=up", "--out-splits=2"])

    assert code == 0
    found = Checkpoint.open(out)
    for name, one in list(table.items())[1:]:
        start, stop = one["data_offsets"]
        assert found[name].entry.kind == one["dtype"]
        assert list(found[name].shape) == one["shape"]
        assert b"".join(bytes(p.tolist()) for p in found[name].raw()) == bytes(range(start, stop))
    assert found.check_sums() == 6
    with safe_open(out / "model.safetensors", "pt") as theirs:
        assert theirs.get_slice("four.weight").get_dtype() == "F4"
    assert (
        main(["convert", str(source), str(tmp_path / "o"), "--modules=four", "--in-splits=2"]) == 2
    )
    assert "'four.weight' is kept as F4, which memtile can show and copy" in capsys.readouterr().err


def test_tiles_of_any_grid_become_dense_and_tiles_of_another(dense, tmp_path):
    """Dense, to tiles, to tiles of another grid, to dense: the bytes that it began with."""
    one, two, back = (tmp_path / name for name in ("one", "two", "back"))

    codes = [
        main(["convert", str(dense), str(one), "--modules=up", "--modules=down", "--in-splits=3"]),
        main(["convert", str(one), str(two), "--modules", "*", "--max-tile", "60B"]),
        main(["convert", str(two), str(back), "--max-shard", "300B"]),
    ]

    expected, found = model().state_dict(), tensors(back)
    assert codes == [0, 0, 0]
    assert "embed.linears.0.0.weight" in tensors(two)  # what the pattern names is cut
    assert (back / "model.safetensors.index.json").exists()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--out-splits", "2"], "--modules is missing"),
        (["--modules", "up"], "needs a size"),
        (["--modules", "up", "--max-tile", "1MiB", "--in-splits", "2"], "needs a size"),
        (["--modules", "nothing", "--in-splits", "2"], "no linear called 'nothing'"),
        (["--modules", "up", "--out-splits", "99"], "99"),
        (["--modules", "up", "--max-tile", "large"], "not a size"),
        (["--max-shard", "0B"], "less than one byte"),
    ],
)
def test_a_mistake_is_one_sentence(dense, tmp_path, capsys, options, sentence):
    """Options that make no sense end with exit code 2 and write nothing."""
    assert main(["convert", str(dense), str(tmp_path / "out"), *options]) == 2

    printed = capsys.readouterr()
    assert sentence in printed.err
    assert len(printed.err.splitlines()) == 1
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("name", ["embed.weight", "up.weight", "down.weight"])
@pytest.mark.parametrize("options", [[], ["--modules=up", "--out-splits=3"]])
def test_a_damaged_checkpoint_is_refused(tmp_path, capsys, name, options):
    """A flipped bit in any tensor gets load_checkpoint's refusal; nothing is written."""
    damaged, out = tmp_path / "damaged", tmp_path / "out"
    memtile.save_checkpoint(model(), damaged)
    flip_last_bit(Checkpoint.open(damaged)[name])

    code = main(["convert", str(damaged), str(out), *options])

    with pytest.raises(CheckpointError) as refused:
        memtile.load_checkpoint(model(), damaged)
    assert code == 2
    assert str(refused.value) in " ".join(capsys.readouterr().err.split())
    assert f"the bytes of {name!r}" in str(refused.value)
    assert not out.exists()


def flip_last_bit(stored):
    """Change the last bit of a tensor's file range."""
    with stored.file.path.open("r+b") as file:
        file.seek(stored.entry.offset + stored.nbytes - 1)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


def test_tiles_that_make_no_linear_are_refused(dense, tmp_path, capsys):
    """A missing tile is named, and so is a checkpoint onto itself."""
    state = memtile.TiledLinear(5, 7, out_splits=3).state_dict()
    del state["linears.1.0.weight"]
    folder = tmp_path / "torn"
    folder.mkdir()
    save_file({f"x.{name}": tensor for name, tensor in state.items()}, folder / "a.safetensors")

    assert main(["convert", str(folder), str(tmp_path / "out")]) == 2
    assert "(1, 0)" in capsys.readouterr().err
    assert main(["convert", str(dense), str(dense)]) == 2
    assert "another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("model.gguf", b"GGUF\3\0\0\0" + bytes(60), "gguf_file=name"),
        ("pytorch_model.bin", b"PK\3\4", "pickle"),
        ("notes.txt", b"words", "no .safetensors file"),
        ("model.safetensors", b"", "model.safetensors is not whole: it has 0 bytes"),
    ],
)
def test_what_is_no_checkpoint_gets_a_way_out(tmp_path, capsys, name, content, sentence):
    """A folder or a file of another kind, and an empty file, are named; nothing is written."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / name).write_bytes(content)

    for source in (folder, folder / name):
        assert main(["convert", str(source), str(tmp_path / "out")]) == 2
        printed = capsys.readouterr()
        assert len(printed.err.splitlines()) == 1
        assert sentence in printed.err or source.suffix == ".txt"
    assert not (tmp_path / "out").exists()


def test_a_target_that_is_a_file_is_one_sentence(dense, tmp_path, capsys):
    """A target that cannot be a folder is refused before anything is written."""
    (tmp_path / "out").write_text("mine")

    assert main(["convert", str(dense), str(tmp_path / "out")]) == 2

    printed = capsys.readouterr().err
    assert "give another folder" in printed
    assert "make room" not in printed
    assert (tmp_path / "out").read_text() == "mine"


def test_a_folder_that_holds_something_is_refused(dense, tmp_path, capsys):
    """A checkpoint that is in the target stays, byte for byte; a target that is empty is used."""
    out, empty = tmp_path / "out", tmp_path / "empty"
    memtile.save_checkpoint(nn.Linear(3, 2), out)
    empty.mkdir()
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    code = main(["convert", str(dense), str(out)])

    printed = capsys.readouterr()
    assert code == 2
    assert printed.err.endswith("is not empty: give a new folder.\n")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert main(["convert", str(dense), str(empty)]) == 0


def test_a_conversion_that_fails_leaves_no_folder(dense, tmp_path, capsys, monkeypatch):
    """On a full disk the folders that it made are gone; those that were there stay."""
    (tmp_path / "mine").mkdir()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)

    for out in ("new/deep", "mine"):
        assert main(["convert", str(dense), str(tmp_path / out)]) == 2
        assert "make room" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert list((tmp_path / "mine").iterdir()) == []

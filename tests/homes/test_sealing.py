"""Kept homes: sealed whole or not at all, and never guessed at when they are opened again."""

import errno
import gc
import json
import os
import re
import struct
import zlib

import pytest
import torch

from memtile.errors import HomeError, HomeIOError, SealError
from memtile.homes import (
    DeviceHome,
    DiskHome,
    HostHome,
    SealedFile,
    berth_of,
    disk_io,
    sealing,
    settle_in,
)

_TILES = {
    "a.weight": torch.arange(1.5e6).view(1000, 1500),  # more than one piece
    "a.bias": torch.arange(7).to(torch.bfloat16),
    "empty": torch.zeros(3, 0, dtype=torch.int64),
    "scalar": torch.tensor(True),
    "ä/ö": torch.arange(5000, dtype=torch.float64),
}


def _park(home, tiles=_TILES):
    settled = {label: settle_in(home, tile) for label, tile in tiles.items()}
    for label, tensor in settled.items():
        berth_of(tensor).label = label
    return settled


@pytest.fixture
def sealed(tmp_path):
    with DiskHome(tmp_path, keep=True) as home:
        kept = _park(home)
        home.berth((100,), torch.float32)  # one without a label
    del kept
    return tmp_path / "tiles.memtile"


def _flip(path, offset):
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)


def _reheaded(path, table=None, **changes):
    """The file with another table or header, and right checksums over it."""
    raw = path.read_bytes()
    header = sealing.unpack_header(raw[: sealing.HEADER_BYTES], "")
    table = raw[header.table_offset :] if table is None else table
    size = header.table_offset + len(table)
    header = header._replace(table_crc=zlib.crc32(table), table_bytes=len(table), file_bytes=size)
    header = header._replace(**changes)
    path.write_bytes(header.packed() + raw[sealing.HEADER_BYTES : header.table_offset] + table)


@pytest.mark.parametrize("make_home", [DeviceHome, HostHome, DiskHome])
def test_what_was_sealed_comes_back(sealed, make_home):
    """Every labelled tile comes bit for bit into a home of any kind; nothing else is there."""
    with SealedFile.open(sealed) as file, make_home() as home:
        assert set(file.entries) == set(_TILES)
        for label, tile in _TILES.items():
            berth = home.berth(tile.shape, tile.dtype)

            file.copy_to(label, berth)

            assert torch.equal(berth.tensor(), tile)
            assert file.entries[label].shape == tile.shape
            assert file.entries[label].dtype is tile.dtype


def test_only_the_sealed_file_is_in_the_folder(sealed):
    """Sealing leaves one file, which only its owner may read."""
    assert os.listdir(sealed.parent) == ["tiles.memtile"]
    assert sealed.stat().st_mode & 0o777 == 0o600


def test_without_nameless_files_a_partial_one_becomes_the_sealed_one(tmp_path, monkeypatch):
    """Where the filesystem has no O_TMPFILE, a partial name is renamed, or removed if dropped."""
    real = os.open

    def refusing(path, flags, *rest, **names):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "no")
        return real(path, flags, *rest, **names)

    monkeypatch.setattr(os, "open", refusing)
    home = DiskHome(tmp_path, keep=True)
    assert [name[:22] for name in os.listdir(tmp_path)] == ["tiles.memtile.partial-"]
    del home
    gc.collect()
    assert os.listdir(tmp_path) == []

    with DiskHome(tmp_path, keep=True) as home:
        kept = _park(home)
    with DiskHome.reopen(tmp_path) as home:
        kept = _park(home, {"other": torch.ones(3)})

    assert os.listdir(tmp_path) == ["tiles.memtile"]
    assert set(SealedFile.open(tmp_path / "tiles.memtile").entries) == {"other"}
    del kept


def test_a_folder_with_a_sealed_home_is_not_overwritten(sealed):
    """A new kept home beside a sealed one is refused, and the message names reopen."""
    with pytest.raises(HomeError, match=re.escape("DiskHome.reopen(folder)")):
        DiskHome(sealed.parent, keep=True)


def test_of_two_kept_homes_the_second_does_not_overwrite(tmp_path):
    """Where another home has sealed into the folder meanwhile, closing refuses and keeps both."""
    first, second = DiskHome(tmp_path, keep=True), DiskHome(tmp_path, keep=True)
    kept = [_park(first), _park(second, {"other": torch.ones(3)})]
    first.close()

    with pytest.raises(HomeError, match="is there already"):
        second.close()

    assert set(SealedFile.open(tmp_path / "tiles.memtile").entries) == set(_TILES)
    assert os.listdir(tmp_path) == ["tiles.memtile"]
    os.unlink(tmp_path / "tiles.memtile")
    second.close()
    assert set(SealedFile.open(tmp_path / "tiles.memtile").entries) == {"other"}
    del kept


def test_a_reopened_home_is_sealed_in_place_of_the_old(sealed):
    """The old file is whole while the new home lives, and is replaced when that is closed."""
    with DiskHome.reopen(sealed.parent) as home:
        weight = home.berth((1000, 1500), torch.float32)
        home.sealed.copy_to("a.weight", weight)
        weight.label = "a.weight"
        weight.tensor().add_(1)
        with SealedFile.open(sealed) as old:
            assert set(old.entries) == set(_TILES)
    with DiskHome.reopen(sealed.parent) as home:
        copy = home.berth((1000, 1500), torch.float32)
        home.sealed.copy_to("a.weight", copy)

        assert set(home.sealed.entries) == {"a.weight"}
        assert torch.equal(copy.tensor(), _TILES["a.weight"] + 1)


def test_a_reopened_home_that_is_dropped_leaves_the_old(sealed):
    """Without close nothing is sealed: the old file stays, byte for byte."""
    before = sealed.read_bytes()
    home = DiskHome.reopen(sealed.parent)
    kept = _park(home, {"a.bias": torch.zeros(7)})
    del home, kept
    gc.collect()

    assert sealed.read_bytes() == before
    assert os.listdir(sealed.parent) == ["tiles.memtile"]


def test_a_block_left_by_an_exception_is_not_sealed(sealed, caplog):
    """Half-way values do not take the place of whole ones, and the log says so."""
    before = sealed.read_bytes()

    home = DiskHome.reopen(sealed.parent)
    kept = _park(home, {"a.bias": torch.zeros(7)})
    with pytest.raises(KeyboardInterrupt), home:
        raise KeyboardInterrupt

    assert home.closed
    assert sealed.read_bytes() == before
    assert "not sealed" in caplog.text
    del kept


def test_tensors_that_stay_alive_do_not_change_a_sealed_file(tmp_path):
    """After closing, tensors keep their values and may be written to; the file is as it was."""
    with DiskHome(tmp_path, keep=True) as home:
        kept = _park(home)
    before = (tmp_path / "tiles.memtile").read_bytes()
    assert all(torch.equal(kept[label], tile) for label, tile in _TILES.items())

    kept["a.weight"].zero_()

    assert (tmp_path / "tiles.memtile").read_bytes() == before
    assert not bool(kept["a.weight"].any())


def test_a_label_given_twice_is_refused_and_can_be_mended(tmp_path):
    """Two berths of one label are SealError, naming it; the home stays open to be closed again."""
    home = DiskHome(tmp_path, keep=True)
    kept = [settle_in(home, torch.ones(3)), settle_in(home, torch.zeros(3))]
    for tensor in kept:
        berth_of(tensor).label = "twice"
    with pytest.raises(SealError, match="'twice'"):
        home.close()
    assert os.listdir(tmp_path) == []

    berth_of(kept[1]).label = "second"
    home.close()

    with SealedFile.open(tmp_path / "tiles.memtile") as file:
        assert set(file.entries) == {"twice", "second"}


@pytest.mark.parametrize("fault", ["read", "write", "sync", "rename"])
def test_a_fault_while_sealing_leaves_the_old_file(sealed, monkeypatch, fault):
    """An error of the disk is HomeIOError, the old file stays whole, and closing again seals."""
    before = sealed.read_bytes()
    home = DiskHome.reopen(sealed.parent)
    kept = _park(home, {"a.bias": torch.zeros(7)})

    def failing(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    place, name = {
        "read": (disk_io, "read_at"),
        "write": (disk_io, "write_at"),
        "sync": (os, "fsync"),
        "rename": (os, "rename"),
    }[fault]
    monkeypatch.setattr(place, name, failing)
    with pytest.raises(HomeIOError):
        home.close()
    monkeypatch.undo()

    assert sealed.read_bytes() == before
    home.close()
    assert os.listdir(sealed.parent) == ["tiles.memtile"]
    with SealedFile.open(sealed) as file:
        assert set(file.entries) == {"a.bias"}
    del kept


def test_a_home_that_could_not_be_sealed_leaves_nothing_of_its_own(sealed, monkeypatch):
    """Dropped after sealing failed half-way, a home takes its partial name along."""
    home = DiskHome.reopen(sealed.parent)
    berth = home.berth((3,), torch.float32)
    berth.label = "a"

    def failing(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(HomeIOError):
        home.close()
    monkeypatch.undo()
    del berth, home
    gc.collect()

    assert os.listdir(sealed.parent) == ["tiles.memtile"]


def test_a_missing_file_is_refused(tmp_path):
    """Without a sealed file, reopen says how one comes to be."""
    with pytest.raises(SealError, match="keep=True"):
        DiskHome.reopen(tmp_path)
    with pytest.raises(SealError, match="not a file"):
        SealedFile.open(tmp_path)


@pytest.mark.parametrize("raw", [b"", b"\x93NUMPY" + bytes(100), bytes(9000)])
def test_another_kind_of_file_is_refused(tmp_path, raw):
    """What does not begin with the magic is no sealed home."""
    (tmp_path / "tiles.memtile").write_bytes(raw)

    with pytest.raises(SealError, match="is not a sealed memtile home"):
        DiskHome.reopen(tmp_path)


def test_another_version_is_refused_by_number(sealed):
    """A file of another version of the format is refused, both versions named."""
    _reheaded(sealed, version=7)

    with pytest.raises(SealError, match=r"version 7 of the format, this memtile reads 1"):
        SealedFile.open(sealed)


@pytest.mark.parametrize("left", [7, 40, 4096, 100_000, -1])
def test_a_file_that_was_cut_short_is_refused(sealed, left):
    """However much is missing, also the last byte only, the file is refused."""
    os.truncate(sealed, left if left > 0 else sealed.stat().st_size + left)

    with pytest.raises(SealError, match="cut short"):
        SealedFile.open(sealed)


def test_a_file_that_was_added_to_is_refused(sealed):
    """A byte too many is a file that was changed."""
    with sealed.open("ab") as file:
        file.write(b"\0")

    with pytest.raises(SealError, match="added to"):
        SealedFile.open(sealed)


@pytest.mark.parametrize("offset", [13, 20, 28, 36, 42])
def test_a_flipped_bit_in_the_header_is_refused(sealed, offset):
    """Any field of the header that changed is noticed."""
    _flip(sealed, offset)

    with pytest.raises(SealError, match="header is corrupt"):
        SealedFile.open(sealed)


def test_a_flipped_bit_in_the_table_is_refused(sealed):
    """A table that changed is noticed before it is believed."""
    _flip(sealed, sealed.stat().st_size - 20)

    with pytest.raises(SealError, match="table is corrupt"):
        SealedFile.open(sealed)


@pytest.mark.parametrize(
    "row",
    [
        "no row",
        ["x", [2], "float32", 4096, 9, 0],  # nbytes
        ["x", [2], "float32", 1 << 40, 8, 0],  # beyond the file
        ["x", [2], "float32", -4096, 8, 0],
        ["x", [-2], "float32", 4096, -8, 0],
        ["x", [2], "load", 4096, 8, 0],  # in torch, and no dtype
        ["x", [2], "float", 4096],
        {"x": 1},
    ],
)
def test_a_table_without_meaning_is_refused(sealed, row):
    """A table with a right checksum is still not believed where it cannot be."""
    _reheaded(sealed, json.dumps([row]).encode())

    with pytest.raises(SealError, match="its table"):
        SealedFile.open(sealed)


def test_a_flipped_bit_in_a_tile_is_refused_by_its_label(sealed, tmp_path):
    """The tile whose bytes changed is refused when it is copied; the others are good."""
    with SealedFile.open(sealed) as file:
        entry = file.entries["a.weight"]
    _flip(sealed, entry.offset + entry.nbytes - 1)

    with SealedFile.open(sealed) as file, HostHome() as home:
        with pytest.raises(SealError, match=r"'a\.weight'"):
            file.copy_to("a.weight", home.berth(entry.shape, entry.dtype))
        file.copy_to("a.bias", berth := home.berth((7,), torch.bfloat16))

        assert torch.equal(berth.tensor(), _TILES["a.bias"])


def test_a_file_of_another_model_is_refused(sealed):
    """A tile that is missing, too many, of another shape or dtype is named."""
    expected = {label: (tuple(tile.shape), tile.dtype) for label, tile in _TILES.items()}
    fewer = {label: kind for label, kind in expected.items() if label != "scalar"}
    with SealedFile.open(sealed) as file:
        file.check_matches(expected)

        for wrong, said in [
            ({**expected, "b": ((1,), torch.float32)}, "it has no 'b'"),
            (fewer, "it has 'scalar', which the model has not"),
            ({**expected, "a.bias": ((8,), torch.bfloat16)}, r"'a.bias' is \(7,\)"),
            ({**expected, "a.bias": ((7,), torch.float16)}, "the model's is .* torch.float16"),
        ]:
            with pytest.raises(SealError, match=f"of another model, or .*{said}"):
                file.check_matches(wrong)


def test_a_berth_that_does_not_fit_is_refused(sealed):
    """Copying into another shape or dtype, or an unknown label, is refused before a byte moves."""
    with SealedFile.open(sealed) as file, HostHome() as home:
        for label, shape, dtype in [
            ("a.bias", (8,), torch.bfloat16),
            ("a.bias", (7,), torch.float16),
            ("nothing", (7,), torch.bfloat16),
        ]:
            with pytest.raises(SealError, match="another model"):
                file.copy_to(label, home.berth(shape, dtype))

        assert home.traffic.written_bytes == 0


def test_a_closed_sealed_file_refuses(sealed):
    """After close, copying raises HomeError; closing again does nothing."""
    file = SealedFile.open(sealed)
    file.close()
    file.close()

    with HostHome() as home, pytest.raises(HomeError, match="was closed"):
        file.copy_to("a.bias", home.berth((7,), torch.bfloat16))


def test_refused_files_are_not_left_open(sealed):
    """Whatever was wrong with it, a refused file is closed again."""
    before = len(os.listdir("/proc/self/fd"))
    for offset in (0, 8, 20, sealed.stat().st_size - 20):
        _flip(sealed, offset)
        with pytest.raises(SealError):
            DiskHome.reopen(sealed.parent)
        _flip(sealed, offset)

    assert len(os.listdir("/proc/self/fd")) == before


def test_the_format_is_what_it_was(sealed):
    """A file of version 1 begins with the magic, the version and what the header tells."""
    magic, version = struct.unpack("<8sI", sealed.read_bytes()[:12])

    assert (magic, version) == (b"memtile\0", 1)

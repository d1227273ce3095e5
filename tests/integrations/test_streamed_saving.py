"""save_pretrained of a tiled model writes, tile by tile, what transformers would write."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from leftovers import check_nothing_is_left
from safetensors.torch import load_file
from small_models import KINDS, WRITERS, pair
from tiny_llama import TILE_BYTES, assert_same_values, dense_values, llama, on_disk
from torch import Tensor

import memtile
from memtile.testing import LargestAllocation

nothing_is_left = pytest.fixture(autouse=True)(check_nothing_is_left)
# ViT's patches are cut by a convolution, which stays as it is and is named in a warning.
pytestmark = pytest.mark.filterwarnings(
    "ignore:2 parameters stay above:memtile.errors.TileSizeWarning"
)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_is_transformers_own(kind: str, tmp_path: Path) -> None:
    """The same files, the same names and bits of tensors, the same configs; ViT's are renamed."""
    dense, tiled = pair(kind)
    memtile.tile(tiled, max_tile_bytes=700)

    dense.save_pretrained(tmp_path / "dense")
    tiled.save_pretrained(tmp_path / "tiled")

    ours, theirs = (sorted((tmp_path / name).iterdir()) for name in ("tiled", "dense"))
    assert [path.name for path in ours] == [path.name for path in theirs]
    for our, their in zip(ours, theirs, strict=True):
        if our.suffix == ".json":
            assert json.loads(our.read_text()) == json.loads(their.read_text())
    assert_same_values(tensors_in(tmp_path / "tiled"), tensors_in(tmp_path / "dense"))


@pytest.mark.parametrize("kind", WRITERS)
def test_the_dense_weights_are_not_made(kind: str, tmp_path: Path) -> None:
    """Saving allocates nothing as large as the largest weight."""
    model = pair(kind)[0]
    largest = max(parameter.nbytes for parameter in model.parameters())
    memtile.tile(model, max_tile_bytes=700)

    with LargestAllocation() as allocated:
        model.save_pretrained(tmp_path)

    assert allocated.nbytes < largest


def test_a_folder_is_replaced_by_shards_and_by_one_file_again(tmp_path: Path) -> None:
    """max_shard_size in words, as transformers reads it; no file of the earlier save is left."""
    model = on_disk(llama())
    for size, is_sharded in (("50GB", False), ("60KB", True), (60_000, True), ("1MB", False)):
        model.save_pretrained(tmp_path, max_shard_size=size)

        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert (tmp_path / "model.safetensors.index.json").exists() == is_sharded
        assert len(list(tmp_path.glob("*.safetensors"))) == (9 if is_sharded else 1)
        assert_same_values(dense_values(loaded), dense_values(model))


@pytest.mark.parametrize(
    "options", [{"variant": "half"}, {"save_original_format": False}, {"is_main_process": False}]
)
def test_other_options_are_transformers_to_obey(options: dict[str, Any], tmp_path: Path) -> None:
    """A variant's name, another format, another process: the same files as of the dense model."""
    dense = llama()
    tiled = memtile.tile(copy.deepcopy(dense), max_tile_bytes=TILE_BYTES)

    dense.save_pretrained(tmp_path / "dense", **options)
    tiled.save_pretrained(tmp_path / "tiled", **options)

    ours, theirs = ({p.name for p in (tmp_path / n).iterdir()} for n in ("tiled", "dense"))
    assert ours == theirs
    assert_same_values(tensors_in(tmp_path / "tiled"), tensors_in(tmp_path / "dense"))


def test_weights_left_out_on_saving_stay_out(tmp_path: Path) -> None:
    """A model that lists names which it does not save is written by transformers."""
    model = memtile.tile(llama(tied=False), max_tile_bytes=TILE_BYTES)
    model._keys_to_ignore_on_save = {"lm_head.weight"}

    model.save_pretrained(tmp_path)

    assert "lm_head.weight" not in tensors_in(tmp_path)
    assert torch.equal(
        tensors_in(tmp_path)["model.norm.weight"], model.state_dict()["model.norm.weight"]
    )

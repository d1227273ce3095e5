"""The configs of a saved model are those of the folder that it came from, with what differs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_llama import llama, on_disk

import memtile

OLDER = {"rope_theta": 500000.0, "torch_dtype": "float32", "made_by": {"me": [1, "ü"]}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Gives a model's folder with texts as older releases of transformers write them."""
    llama().save_pretrained(tmp_path / "older")
    for name, changes in (("config.json", OLDER), ("generation_config.json", {"top_k": 7})):
        file = tmp_path / "older" / name
        words = json.loads(file.read_text()) | {"transformers_version": "4.30.0"} | changes
        for newer in ("rope_parameters", "dtype"):
            words.pop(newer, None)
        file.write_text(json.dumps(words, ensure_ascii=False))
    return tmp_path / "older"


def loaded(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def built(folder: Path) -> Any:
    """The same model without from_pretrained: from the config, filled by memtile."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model = memtile.empty_model(lambda: transformers.LlamaForCausalLM(config))
    model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return memtile.tile(model, max_tile_bytes=9000, checkpoint=folder)


@pytest.mark.parametrize("make", [loaded, lambda folder: on_disk(loaded(folder)), built])
@pytest.mark.parametrize("save", [memtile.save_checkpoint, lambda m, out: m.save_pretrained(out)])
def test_where_nothing_differs_they_are_the_bytes_of_the_folder(
    folder: Path, tmp_path: Path, make: Any, save: Any
) -> None:
    """However it was made and is saved by us: `rope_theta` stays where older readers look."""
    model = make(folder)
    if make is loaded and save is not memtile.save_checkpoint:
        model = memtile.tile(model, max_tile_bytes=9000)

    save(model, tmp_path / "out")

    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_what_differs_is_changed_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    """A changed dtype, class and setting are written under the file's own keys."""
    model = transformers.LlamaModel.from_pretrained(folder, dtype=torch.bfloat16)
    model.config.rms_norm_eps = 1e-3
    before = model.config.to_dict()

    memtile.save_checkpoint(memtile.tile(model, max_tile_bytes=9000), tmp_path / "out")

    expected = json.loads((folder / "config.json").read_text())
    expected |= {"torch_dtype": "bfloat16", "architectures": ["LlamaModel"], "rms_norm_eps": 1e-3}
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == expected
    assert model.config.to_dict() == before


def test_a_setting_of_generation_is_changed_alone(folder: Path, tmp_path: Path) -> None:
    """The rest of generation_config.json, its version too, is the folder's."""
    model = loaded(folder)
    model.generation_config.max_new_tokens = 5

    memtile.save_checkpoint(model, tmp_path / "out")

    expected = json.loads((folder / "generation_config.json").read_text()) | {"max_new_tokens": 5}
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert found == expected


@pytest.mark.parametrize("spoiled", ["{", "[]", '{"model_type": "gpt2"}', None])
def test_a_folder_that_is_gone_or_of_another_model_is_not_asked(
    folder: Path, tmp_path: Path, spoiled: str | None
) -> None:
    """Then the configs are what `save_pretrained` writes."""
    model = loaded(folder)
    if spoiled is None:
        (folder / "config.json").unlink()
    else:
        (folder / "config.json").write_text(spoiled)

    memtile.save_checkpoint(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")

    ours, theirs = ((tmp_path / n / "config.json").read_text() for n in ("ours", "theirs"))
    assert ours == theirs


def test_a_model_from_gguf_is_not_called_packed(folder: Path, tmp_path: Path) -> None:
    """config.json of a model from GGUF no longer has its quantization_config."""
    model = loaded(folder)
    model.config.quantization_config = {"quant_method": "gguf", "gguf_file": "x.gguf"}

    memtile.save_checkpoint(model, tmp_path / "out")

    out = tmp_path / "out" / "config.json"
    assert out.read_bytes() == (folder / "config.json").read_bytes()
    assert "quantization_config" in model.config.to_dict()

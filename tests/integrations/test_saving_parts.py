"""A model with tiled layers anywhere in it saves dense weights."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from small_models import build, pair
from torch import nn

import memtile
from memtile.errors import CannotTileError
from memtile.integrations.saving import with_tiles

# ViT's patches are cut by a convolution, which stays as it is and is named in a warning.
pytestmark = pytest.mark.filterwarnings(
    "ignore:2 parameters stay above:memtile.errors.TileSizeWarning"
)


def by_hand(model: Any) -> None:
    """One linear put in place of another, without `tile`."""
    model.lm_head = memtile.TiledLinear.from_linear(model.lm_head, out_splits=3)


PARTS: dict[str, tuple[str, Callable[[Any], object]]] = {
    "the base": ("llama", lambda m: memtile.tile(m.model, max_tile_bytes=700)),
    "a plain module": ("gpt2", lambda m: memtile.tile(m.transformer.h, out_splits=3)),
    "the encoder": ("t5", lambda m: memtile.tile(m.encoder.block, out_splits=2)),
    "a tower": ("vit", lambda m: memtile.tile(m.vit, max_tile_bytes=700)),
    "a layer": ("llama", by_hand),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_model_of_which_a_part_is_tiled_saves_dense_weights(part: str, tmp_path: Path) -> None:
    """A model around a tiled one, itself never tiled, saves dense weights."""
    kind, act = PARTS[part]
    dense, tiled = pair(kind)
    act(tiled)

    tiled.save_pretrained(tmp_path)

    assert_loads(dense, tmp_path)


def test_a_model_that_is_put_around_tiles_saves_dense_weights(tmp_path: Path) -> None:
    """Made afterwards, with the tiled part as a module of its own; also a copy of it."""
    dense = build("llama")
    base = memtile.tile(copy.deepcopy(dense.model), max_tile_bytes=700)
    around = transformers.LlamaForCausalLM(dense.config)
    around.model = base
    around.lm_head.load_state_dict(dense.lm_head.state_dict())

    for number, model in enumerate((around, copy.deepcopy(around))):
        model.save_pretrained(tmp_path / str(number))

        assert_loads(dense, tmp_path / str(number))


def test_adapters_over_a_part_in_tiles_have_dense_names(tmp_path: Path) -> None:
    """Biases of the base that PEFT saves beside adapters are saved too."""
    dense = peft.get_peft_model(build("qwen2"), peft.LoraConfig(r=2, bias="all"))
    tiled = copy.deepcopy(dense)
    memtile.tile(tiled.base_model.model.model, out_splits=3)

    dense.save_pretrained(tmp_path / "dense")
    tiled.save_pretrained(tmp_path / "tiled")

    names = [
        sorted(peft.utils.load_peft_weights(str(tmp_path / name))) for name in ("dense", "tiled")
    ]
    assert any(name.endswith("bias") for name in names[0])
    assert names[0] == names[1]


class OwnConfig(transformers.PretrainedConfig):  # type: ignore[misc]  # it has no types
    """Of the class below."""

    model_type = "own-tiles"


class OwnTiles(transformers.PreTrainedModel):  # type: ignore[misc]  # likewise
    """A class that makes a tiled layer itself, and a linear."""

    config_class = OwnConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.up, self.down = memtile.TiledLinear(13, 11, out_splits=3), nn.Linear(11, 13)
        self.post_init()


def test_a_class_that_makes_tiles_itself_saves_what_it_loads(tmp_path: Path) -> None:
    """A class that makes tiles itself saves and loads names of tiles."""
    model = OwnTiles(OwnConfig())

    model.save_pretrained(tmp_path)

    assert_loads(model, tmp_path)


def test_tiles_of_a_class_beside_tiles_of_tile_are_refused(tmp_path: Path) -> None:
    """A model with own and added tiles is refused: no folder could be loaded."""
    model = memtile.tile(OwnTiles(OwnConfig()), out_splits=2)

    with pytest.raises(CannotTileError, match="makes up in tiles, and down was tiled later"):
        model.save_pretrained(tmp_path)


def test_where_it_cannot_be_known_who_made_the_tiles_saving_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class that cannot be made of its config, with a tiled layer that no dense one was."""
    model = OwnTiles(OwnConfig())
    monkeypatch.setattr(OwnTiles, "__init__", lambda self: None)

    with pytest.raises(CannotTileError, match="up was made as a tiled layer"):
        model.save_pretrained(tmp_path)


def test_shards_with_names_of_tiles_are_refused(tmp_path: Path) -> None:
    """distributed_checkpoint=True is refused: transformers would write names of tiles."""
    model = memtile.tile(build("llama"), out_splits=2)

    with pytest.raises(CannotTileError, match=r"memtile\.save_checkpoint"):
        model.save_pretrained(tmp_path, distributed_checkpoint=True)


def test_a_class_that_is_loaded_while_tiles_are_there_saves_once_it_is_known() -> None:
    """A method that is running when it is replaced raises and asks to be called again."""

    class Late(nn.Module):
        def save_pretrained(self) -> str:
            with_tiles(Late, "save_pretrained", lambda plain, model: "dense")  # when tiles are read
            return "tiles"

    model = Late()
    model.layer = memtile.TiledLinear(5, 3)

    with pytest.raises(CannotTileError, match="call it again"):
        model.save_pretrained()
    assert model.save_pretrained() == "dense"


def assert_loads(model: Any, folder: Path) -> None:
    """A model of the same class, loaded from the folder, has the same bits."""
    loaded = type(model).from_pretrained(folder).state_dict()
    expected = model.state_dict()
    assert list(loaded) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in loaded.items())

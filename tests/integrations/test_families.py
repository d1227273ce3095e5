"""What every family of models can do: tiled, trained, filled, planned and saved.

`families.py` has the models; `benchmarks/families.py` makes the table in the docs of a run of this.
"""

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers
from family_steps import BATCH, TOKENS, batch_of, loss_and_result
from given_rates import RATES
from safetensors.torch import load_file
from safetensors_files import same_tensors

import memtile
from memtile.layers import DeferredLogits, TiledModule, deferring_head

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

pytestmark = pytest.mark.filterwarnings("ignore::memtile.errors.TileSizeWarning")
PAGE = Path(__file__).parent.parent.parent / "docs" / "families.md"
LARGEST = 1100  # bytes of a tile: nearly every weight of these models is cut, often raggedly
# No linear and no embedding of words: convolutions, positions, biases, heads that pool an image,
# DeepSeek-V4's products in groups and weights of its residual streams.
STAYS = re.compile(
    r"conv|position|patch_embed|_bias$|\.A_log$|head\.attention\.(in|out)_proj|mm_input_projection"
    r"|\.o_a_proj\.weight$|_hc\.fn$"
)
ADDS_A_BIAS = ("BART", "mBART", "Pegasus", "Marian")  # to the logits, which are computed then


@dataclass(frozen=True)
class Family:
    """A family's dense model, the folder that it was saved to, and a batch with labels."""

    name: str
    dense: Any  # a PreTrainedModel
    folder: Path
    batch: dict[str, Any]

    def copy(self) -> Any:
        return copy.deepcopy(self.dense)

    def tiled(self, home: str = "disk") -> Any:
        return memtile.tile(self.copy(), max_tile_bytes=LARGEST, home=home)


# `make test` takes every third family, CI all of them.
NAMES = [
    pytest.param(name, marks=[pytest.mark.slow] if number % 3 else [])
    for number, name in enumerate(families.SOURCES)
]


@pytest.fixture(scope="module", params=NAMES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    dense = families.build(request.param)
    folder = tmp_path_factory.mktemp("family")
    dense.save_pretrained(folder)
    return Family(request.param, dense, folder, batch_of(dense))


def test_is_tiled(family: Family) -> None:
    """Tiled onto disk it gives the same, and no large weight is left whole."""
    with torch.no_grad():
        _, expected = loss_and_result(family.dense, family.batch)
        tiled = family.tiled()
        _, found = loss_and_result(tiled, family.batch)

    torch.testing.assert_close(found, expected)
    assert [name for name in whole(tiled) if not STAYS.search(name)] == []


def whole(model: Any) -> list[str]:
    """The weights above the size of a tile that are not in tiles."""
    inside = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, TiledModule)
        for parameter in module.parameters()
    }
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and parameter.nbytes > LARGEST and id(parameter) not in inside
    ]


def test_is_trained(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of AdamW in backward, tile by tile, changes all parameters as it does the dense.

    The loss of a head, with the factors and the soft cap that some have, computes no logits.
    """
    computed: list[int] = []
    values = DeferredLogits.computed
    monkeypatch.setattr(deferring_head, "LEAST_LOGITS", 0)
    monkeypatch.setattr(
        DeferredLogits, "computed", lambda logits: computed.append(1) or values(logits)
    )
    dense, tiled = family.copy(), family.tiled("host")
    options = {"lr": 1e-2, "eps": 1e-2}  # with a larger eps, rounding of a gradient stays rounding
    plain = torch.optim.AdamW(dense.parameters(), **options)
    ours = memtile.TileOptimizer(tiled, torch.optim.AdamW, mode="in_backward", **options)
    for model, optimizer in ((dense, plain), (tiled, ours)):
        loss_and_result(model, family.batch)[0].backward()
        optimizer.step()

    expected = dict(dense.named_parameters(remove_duplicate=False))
    found = dict(memtile.dense_state_dict(tiled))
    before = dict(family.dense.named_parameters(remove_duplicate=False))
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name], parameter.detach())
    assert any(not torch.equal(before[name], parameter) for name, parameter in expected.items())
    assert bool(computed) == (family.name in ADDS_A_BIAS)


def test_is_filled(family: Family) -> None:
    """A model on meta has the values that `from_pretrained` gives it, bit for bit."""
    cls, config = type(family.dense), copy.deepcopy(family.dense.config)
    empty = memtile.empty_model(lambda: cls._from_config(config))

    memtile.tile(empty, max_tile_bytes=LARGEST, checkpoint=family.folder, home="disk")

    loaded = dict(cls.from_pretrained(family.folder).named_parameters())
    found = dict(memtile.dense_state_dict(empty))
    assert [name for name in loaded if not torch.equal(loaded[name], found[name])] == []


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, None], ids=["training", "inference"])
def test_is_planned(family: Family, optimizer: type[torch.optim.Optimizer] | None) -> None:
    """A plan of the folder needs no `work=`, and has tiles where the budget is small."""
    asked: dict[str, Any] = {
        "tokens": TOKENS,
        "batch": BATCH,
        "optimizer": optimizer,
        "rates": RATES,
        "home": "host",
        "checkpointing": None if optimizer is None else False,  # one count of the step
    }

    plan = memtile.plan(family.folder, budget="64MiB", **asked)

    assert plan.model == type(family.dense).__name__
    assert plan.peak_bytes > family.dense.num_parameters()


def test_is_saved(family: Family, tmp_path: Path) -> None:
    """Saved from tiles, its files have the names, dtypes and values of the dense model's own."""
    family.tiled("host").save_pretrained(tmp_path)

    names = {path.name for path in family.folder.glob("*.safetensors")}
    assert {path.name for path in tmp_path.glob("*.safetensors")} == names
    for name in names:
        assert same_tensors(load_file(tmp_path / name), load_file(family.folder / name))
    again = type(family.dense).from_pretrained(tmp_path)
    loaded = dict(again.named_parameters())
    expected = dict(family.dense.named_parameters())
    assert [name for name in expected if not torch.equal(loaded[name], expected[name])] == []

"""LoRA adapters of an MLP's linears: computed with its tiles, or called with their linears."""

import copy
import importlib
from typing import Any

import peft
import pytest
import torch
from leftovers import check_nothing_is_left
from tiny_llama import batch_of_sentences, llama
from torch import Tensor, nn
from torch.nn import functional
from watched_home import WatchedHome

import memtile
from memtile.layers import mlp_in_tiles, mlp_pairs
from memtile.testing import error_ratio

nothing_is_left = pytest.fixture(autouse=True)(check_nothing_is_left)
pytestmark = pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning")
WIDTH, INNER, OUT = 13, 29, 11
RANKS = {"gate": 2, "up": 3, "down": 5}
BLOCKS = {"block_rows": 3, "block_features": 4}


class Mlp(nn.Module):
    """A gated or plain MLP."""

    def __init__(self, gated: bool = True, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(WIDTH, INNER, bias=bias)
        self.gate = nn.Linear(WIDTH, INNER, bias=bias) if gated else None
        self.down = nn.Linear(INNER, OUT, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(…, OUT) of (…, WIDTH)."""
        h = self.up(x)
        h = functional.gelu(h) if self.gate is None else functional.silu(self.gate(x)) * h
        y: Tensor = self.down(h)
        return y


class Beside(nn.Module):
    """The two linears of an MLP, with another one and a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.up = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, INNER)
        self.out = nn.Sequential()
        self.out.add_module("down", nn.Linear(INNER, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """(…, WIDTH) of (…, WIDTH)."""
        y: Tensor = x + self.out(functional.gelu(self.up(self.first(x))))
        return y


class Model(nn.Module):
    """Something with an MLP in it."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        """What the MLP gives."""
        y: Tensor = self.mlp(x)
        return y


def adapted(targets: Any = ("gate", "up", "down"), gated: bool = True, **options: Any) -> Any:
    """A model in float64 with adapters that do something, of ranks that differ."""
    ranks = {name: rank for name, rank in RANKS.items() if name in targets}
    config = peft.LoraConfig(target_modules=list(targets), rank_pattern=ranks, **options)
    torch.manual_seed(1)
    model = peft.get_peft_model(Model(Mlp(gated)), config).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows and of features."""

    def in_blocks(x: Tensor, *layers: Any, **options: Any) -> Tensor:
        return memtile.tiled_mlp(x, *layers, **options, **BLOCKS)

    for module in (mlp_in_tiles, mlp_pairs):
        monkeypatch.setattr(module, "tiled_mlp", in_blocks)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One number for each MLP whose linears are called as modules."""
    seen: list[int] = []
    module = importlib.import_module("memtile.layers.tiled_mlp")  # not the function of that name
    original = module._called

    def noted(*given: Any) -> Tensor:
        seen.append(1)
        return original(*given)

    monkeypatch.setattr(module, "_called", noted)
    return seen


def batch(*lead: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(*(lead or (2, 4)), WIDTH, generator=generator, dtype=torch.float64)
    return x.to(dtype).requires_grad_()


def step(model: Any, x: Tensor) -> dict[str, Any]:
    """The result and all gradients of a step."""
    torch.manual_seed(3)
    y = model(x)
    upstream = torch.linspace(-1.0, 2.0, y.numel(), dtype=torch.float64).view(y.shape)
    (dx,) = torch.autograd.grad(y, x, upstream.to(y.dtype), retain_graph=True)
    y.backward(upstream.to(y.dtype))
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": dx, **trained}


def assert_same_step(ours: Any, theirs: Any, *lead: int) -> None:
    found, truth = step(ours, batch(*lead)), step(theirs, batch(*lead))
    assert found.keys() == truth.keys()
    for name in found:
        torch.testing.assert_close(found[name], truth[name], rtol=1e-12, atol=1e-12, msg=name)


def placed(model: Any, place: str) -> Any:
    """In tiles or not, and put away or not."""
    if place == "whole":
        return memtile.tile_mlps(model)
    home = None if place == "in tiles" else "host"
    return memtile.tile(model, out_splits=4, home=home, tile_mlps=True)


@pytest.mark.parametrize("place", ["whole", "in tiles", "parked"])
@pytest.mark.parametrize(
    "targets", [("gate", "up", "down"), ("gate",), ("up",), ("down",), ("up", "down")], ids=str
)
@pytest.mark.parametrize("gated", [True, False])
def test_adapters_train_with_the_tiles(gated: bool, targets: Any, place: str, called: list[int]):
    """Result and gradients are the dense model's, whichever linears have adapters."""
    targets = [name for name in targets if gated or name != "gate"] or ["up"]
    dense = adapted(targets, gated)
    ours = placed(copy.deepcopy(dense), place)

    assert_same_step(ours, dense)
    assert_same_step(ours, dense, 3)
    assert called == []


@pytest.mark.parametrize("place", ["whole", "in tiles", "parked"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_adapters_of_linears_in_two_modules(when: str, place: str, monkeypatch: pytest.MonkeyPatch):
    """They may come before `tile_mlps` and after it."""
    config = peft.LoraConfig(target_modules=["up", "down"], init_lora_weights=False, r=3)
    models = [Model(Beside()).double() for _ in range(2)]
    if when == "before":
        memtile.tile_mlps(models[0])
    torch.manual_seed(1)
    ours = peft.get_peft_model(models[0], config)
    torch.manual_seed(1)
    dense = peft.get_peft_model(models[1], config)
    if (when, place) != ("before", "whole"):
        placed(ours, place)
    seen: list[Any] = []
    plain = mlp_pairs.tiled_mlp

    def noted(*given: Any, **options: Any) -> Tensor:
        seen.append(given)
        return plain(*given, **options)

    monkeypatch.setattr(mlp_pairs, "tiled_mlp", noted)

    assert_same_step(ours, dense)
    assert len(seen) == 1
    merged = ours.merge_and_unload()
    torch.testing.assert_close(merged(batch()), dense(batch()), rtol=1e-12, atol=1e-12)
    assert len(seen) == 2


def test_trained_bases_and_dropout_of_the_input(called: list[int]):
    """Weights and adapters are trained together; gate and up may drop parts of their input."""
    dense = adapted()
    dense.requires_grad_(True)
    ours = placed(copy.deepcopy(dense), "whole")
    assert_same_step(ours, dense)
    ours = adapted(("gate", "up"), lora_dropout=0.5)
    memtile.tile_mlps(ours)

    def run(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        y: Tensor = ours(x)
        return y

    assert torch.autograd.gradcheck(run, (batch(3),))
    assert called == []


def test_both_orders_of_derivatives():
    """A gradient of gradients is the dense model's."""
    dense = adapted()
    found = []
    for model in (memtile.tile_mlps(copy.deepcopy(dense)), dense):
        x, trained = batch(), [p for p in model.parameters() if p.requires_grad]
        first = torch.autograd.grad(model(x).square().sum(), [x, *trained], create_graph=True)
        total = sum(each.square().sum() for each in first)
        found.append([*first, *torch.autograd.grad(total, [x, *trained])])

    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)


OTHERS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "biases": {"lora_bias": True},
    "dropout between": {"lora_dropout": 0.5},
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_adapters_are_called(other: str, called: list[int]):
    """With their linears, and their results are right."""
    dense = adapted(**OTHERS[other])
    ours = memtile.tile_mlps(copy.deepcopy(dense))
    if "dropout" in other:
        for model in (dense, ours):
            assert model(batch()).shape == (2, 4, OUT)
            model.eval()
        called.clear()
    assert_same_step(ours, dense)
    assert len(called) == (0 if "dropout" in other else 1)


def test_switched_off_and_merged_adapters():
    """As PEFT computes them."""
    dense = adapted()
    ours = memtile.tile_mlps(copy.deepcopy(dense))
    with dense.disable_adapter(), ours.disable_adapter():
        torch.testing.assert_close(ours(batch()), dense(batch()))
    for model in (dense, ours):
        model.merge_adapter()
    torch.testing.assert_close(ours(batch()), dense(batch()))
    for model in (dense, ours):
        model.unmerge_adapter()
    assert_same_step(ours, dense)
    merged = ours.merge_and_unload()
    torch.testing.assert_close(merged(batch()), dense(batch()))


def test_float32_adapters_of_a_16_bit_base():
    """As PEFT makes them: as accurate as its own forward."""
    exact = adapted()
    plain = copy.deepcopy(exact).bfloat16()
    for name, parameter in plain.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.float()
    ours = memtile.tile_mlps(copy.deepcopy(plain))
    x = batch(64, dtype=torch.bfloat16)
    exact.load_state_dict(plain.state_dict())
    found, theirs = step(ours, x), step(plain, x)
    truth = step(exact, x.detach().double().requires_grad_())

    for name, value in found.items():
        assert value.dtype == theirs[name].dtype, name
        assert error_ratio(value, theirs[name], truth[name]) <= 2.0, name


def test_a_parked_base_is_read_once_in_forward_and_once_in_backward():
    """No more than by the model's own forward."""
    home = WatchedHome()
    ours = memtile.tile(adapted(), out_splits=7, home=home, tile_mlps=True)
    home.clear()
    ours(batch()).sum().backward()

    assert 3 * 7 * 2 - 3 * 3 <= len(home.labels()) <= 3 * 7 * 2
    home.close()


@pytest.mark.parametrize(
    ("parked", "adapters_first"), [(True, True), (False, True), (False, False)]
)
def test_adapters_train_like_on_the_dense_model(
    parked: bool, adapters_first: bool, called: list[int]
):
    """LoRA on gate, up and down, put there before and after (PEFT adapts no tiles).

    They are computed with the products; adapters of other kinds are called with their linears.
    """

    def with_adapters(model: Any) -> Any:
        torch.manual_seed(5)
        linears = ["gate_proj", "up_proj", "down_proj", "q_proj"]
        config = peft.LoraConfig(r=3, target_modules=linears, lora_dropout=0.0)
        wrapped = peft.get_peft_model(model, config)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        return wrapped

    def in_tiles(model: Any) -> Any:
        if not parked:
            return memtile.tile_mlps(model)
        return memtile.tile(model, max_tile_bytes=18000, home="host", tile_mlps=True)

    dense = with_adapters(llama().double())
    ours = llama().double()
    ours = in_tiles(with_adapters(ours)) if adapters_first else with_adapters(in_tiles(ours))
    for model in (ours, dense):
        model(**batch_of_sentences()).loss.backward()

    assert called == []
    trained = {name: p for name, p in dense.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 4
    for name, parameter in ours.named_parameters():
        assert (parameter.grad is None) == (name not in trained), name
        if name in trained:
            torch.testing.assert_close(parameter.grad, trained[name].grad, rtol=1e-6, atol=1e-9)

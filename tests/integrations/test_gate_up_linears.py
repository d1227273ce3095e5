"""MLPs whose gate and up are one linear (Phi-3, GLM, ModernBERT), computed by tiles."""

import copy
from collections.abc import Callable
from typing import Any

import families
import peft
import pytest
import torch
from family_steps import batch_of
from given_rates import RATES
from leftovers import check_nothing_is_left
from torch import Tensor, nn
from torch.nn import functional
from watched_home import WatchedHome

import memtile
from memtile.convert import select_mlps
from memtile.costmodel import model_records
from memtile.costmodel.tile_grids import tile_grids
from memtile.layers import mlp_in_tiles
from memtile.testing import peak_allocated_bytes

nothing_is_left = pytest.fixture(autouse=True)(check_nothing_is_left)
pytestmark = pytest.mark.filterwarnings("ignore::memtile.errors.TileSizeWarning")

MLP = "model.layers.0.mlp"
ADAMW: dict[str, Any] = {"lr": 1e-2, "eps": 1e-2}


def gate_first(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, dim=-1)
    return functional.silu(gate) * up


def up_first(h: Tensor) -> Tensor:
    up, gate = torch.split(h, h.shape[-1] // 2, dim=-1)
    return functional.dropout(up * functional.gelu(gate), 0.0)


def in_sections(h: Tensor) -> Tensor:
    gate, up = torch.tensor_split(h, 2, -1)
    return up * torch.relu(gate).square()


def gate_with_rows(gate: Tensor, up: Tensor) -> Tensor:
    return up * (gate.tanh() * gate.shape[0])


TAKEN = [gate_first, up_first, in_sections]
NOT_TAKEN: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "three parts": (lambda h: torch.cat(h.chunk(3, -1), -1)[..., :32].relu(), "gives several"),
    "of unequal size": (lambda h: torch.split(h, [20, 44], -1)[0].relu(), "gives several"),
    "along rows": (lambda h: torch.cat([*h.split(1, 0)] * 2)[..., :32].relu(), "gives several"),
    "one half": (lambda h: functional.silu(h.chunk(2, -1)[0]), "something else"),
    "the halves of halves": (lambda h: gate_first(torch.cat(gate_first(h).chunk(2, -1), -1)), ""),
    "no activation": (lambda h: torch.mul(*h.chunk(2, -1)), "no activation"),
    "sums of columns": (lambda h: up_first(h).cumsum(-1), "something else"),
    "sums before the product": (
        lambda h: h.chunk(2, -1)[1] * h.chunk(2, -1)[0].cumsum(-1),
        "",
    ),
    "by columns": (lambda h: h[..., :32].relu() * h[..., 32:], "not element-wise"),
    "by rows": (lambda h: h.chunk(2, -1)[1] * (h.chunk(2, -1)[0].tanh() * h.shape[0]), ""),
    "with rows": (lambda h: gate_with_rows(*h.chunk(2, -1)), "depends on the number of rows"),
    "gate twice": (lambda h: functional.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[0], ""),
}


class Mlp(nn.Module):
    """One linear for gate and up, with biases."""

    def __init__(self, between: Callable[[Tensor], Tensor], width: int = 16, inner: int = 32):
        super().__init__()
        torch.manual_seed(0)
        self.gate_up, self.down = nn.Linear(width, 2 * inner), nn.Linear(inner, width)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.between(self.gate_up(x)))
        return y


class TwoLinears(nn.Module):
    """The same with two."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate, self.up = nn.Linear(width, inner), nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return y


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One number for each MLP that `tiled_mlp` computes."""
    seen: list[int] = []

    def counted(x: Tensor, *layers: Any, **options: Any) -> Tensor:
        seen.append(len(x))
        return memtile.tiled_mlp(x, *layers, **options)

    monkeypatch.setattr(mlp_in_tiles, "tiled_mlp", counted)
    return seen


@pytest.mark.parametrize("tiles", [0, 1, 3])
@pytest.mark.parametrize("between", TAKEN)
def test_gradients_and_second_derivatives(between: Any, tiles: int, calls: list[int]):
    """In whichever half the gate is; in tiles that do not divide the features too."""
    dense = Mlp(between).double()
    model = copy.deepcopy(dense)
    ours = (
        memtile.tile(model, out_splits=tiles, tile_mlps=True) if tiles else memtile.tile_mlps(model)
    )
    x, upstream = torch.randn(2, 7, 16).double().requires_grad_(), torch.randn(2, 7, 16).double()
    found = []
    for each in (ours, dense):
        y = each(x)
        (first,) = torch.autograd.grad((y * upstream).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        each(x).backward(upstream)
        found.append([y, first, second, x.grad])
        x.grad = None

    for own, theirs in zip(*found, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-12, atol=1e-14)
    weights = {n: p.grad for n, p in dense.named_parameters()}
    memtile.untile(ours)
    assert len(calls) == 2
    if not tiles:
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(parameter.grad, weights[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_others_are_left_alone(name: str):
    """Parts that are no two halves, or are used in another way."""
    between, reason = NOT_TAKEN[name]
    (decision,) = select_mlps(Mlp(between))

    assert not decision.taken
    assert reason in decision.reason


def test_a_model_whose_mlps_cannot_be_cut_is_told():
    """Tiles that were made before are not cut again."""
    model = memtile.tile(families.build("Phi-3"), max_tile_bytes=2200)
    with pytest.warns(memtile.errors.TileSizeWarning, match="has no MLP that can be computed"):
        memtile.tile(model, max_tile_bytes=2200, tile_mlps=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_takes_no_more_memory_than_two_linears(dtype: torch.dtype):
    """The gradient of both is one tensor from the beginning, of no more bytes than it has."""
    one, two = Mlp(gate_first, 64, 4096).to(dtype), TwoLinears(64, 4096).to(dtype)
    x = torch.randn(256, 64, dtype=dtype, requires_grad=True)
    peaks = []
    for each in (one, two):
        memtile.tile_mlps(each)
        each(x).sum().backward()
        for leaf in (x, *each.parameters()):
            leaf.grad = None
        peaks.append(peak_allocated_bytes(lambda each=each: each(x).sum().backward()))

    assert peaks[0] <= peaks[1] + 4 * 8192  # its bias
    grad = one.gate_up.weight.grad
    assert grad is not None
    assert grad.untyped_storage().nbytes() == grad.nbytes


def test_each_tile_is_read_once_in_each_pass():
    """Of both halves and down together, forward and backward."""
    home = WatchedHome()
    model = families.build("Phi-3")
    memtile.tile(model, max_tile_bytes=2200, home=home, tile_mlps=True)
    batch = batch_of(model)
    for name, parameter in model.named_parameters():
        if ".mlp." in name:
            memtile.homes.allocation_of(parameter).label = name
    for _ in range(3):  # in the first ones the order is learnt
        home.clear()
        model(**batch).loss.backward()
        model.zero_grad()

    grid = model.get_submodule(MLP).gate_up_proj.grid
    read = [label for label in home.labels() if ".mlp." in label]
    assert grid.out_parts == (0, 22, 44, 66, 88)
    assert sorted(set(read)) == sorted(n for n, _ in model.named_parameters() if ".mlp." in n)
    assert max(map(read.count, read)) <= 2
    home.close()


def test_a_plan_computes_them():
    """The losses are the dense model's."""
    dense = families.build("Phi-3").train()
    ours, batch = copy.deepcopy(dense), batch_of(dense)
    rows, length = batch["input_ids"].shape
    plan = memtile.plan(
        ours, budget="1GiB", tokens=rows * length, batch=rows, tile_mlps=True, rates=RATES
    )
    memtile.tile(ours, plan)
    for model in (ours, dense):
        optimizer = memtile.TileOptimizer(model, torch.optim.AdamW, **ADAMW)
        for _ in range(2):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    assert plan.tiles_mlps
    assert sum(each.taken for each in select_mlps(ours)) == 1
    torch.testing.assert_close(ours(**batch).loss, dense(**batch).loss, rtol=1e-5, atol=0)


def test_plans_cut_both_halves_alike():
    """At the bounds of down, also where those do not divide the features."""
    options: dict[str, Any] = {"dtype": "float32", "element_bytes": 4, "trainable": True}
    options |= {"rows_only": False, "obstacle": ""}
    both = model_records.Weight(("gate_up",), (2 * 700, 512), **options)
    down = model_records.Weight(("down",), (512, 700), **options)
    found = tile_grids([both, down], [model_records.Mlp(("gate_up",), "down")])

    assert len(found) > 2
    for grids in found:
        cut = grids["down"].in_parts
        assert grids["gate_up"].out_parts == (*cut, *(700 + bound for bound in cut[1:]))
        assert grids["gate_up"].in_parts == (0, 512)


def test_with_adapters_its_own_forward_runs(calls: list[int]):
    """LoRA around the linear that is both: added before, it is not taken; after, left alone."""
    config = peft.LoraConfig(target_modules=["gate_up_proj"], r=2)
    for before in (True, False):
        model = families.build("Phi-3")
        if not before:
            memtile.tile_mlps(model)
        adapted: Any = peft.get_peft_model(model, config)
        if before:
            with pytest.raises(memtile.errors.ArgumentError, match="gate and up are one layer"):
                memtile.tile_mlps(adapted)
        adapted(**batch_of(model)).loss.backward()

    assert calls == []


def test_cut_otherwise_it_is_not_taken():
    """The reason says how it must be cut."""
    model = memtile.tile(families.build("Phi-3"), out_splits=3)
    with pytest.raises(memtile.errors.ArgumentError, match=r"cut at \[0, 30, 59, 88\]"):
        memtile.tile_mlps(model)
    memtile.untile(model)
    memtile.tile_mlps(model)
    assert sum(each.taken for each in select_mlps(model)) == 1

"""Plans that park activations: when, what they predict, and that tiling carries them out."""

import copy
from typing import Any

import pytest
import torch
from given_rates import RATES
from tiny_llama import HIDDEN, llama
from torch import nn

import memtile
from memtile.costmodel import Plan
from memtile.errors import ArgumentError, BudgetError
from memtile.homes import DiskHome
from memtile.planner.longest_step import longest_step
from memtile.testing import assert_as_accurate
from memtile.transfer import SavedPieces

MIB = 1 << 20
TOKENS, WIDTH, LAYERS = 1024, 256, 8  # the input and what comes after each has 1 MiB
TIGHT, WIDE = "14MiB", "64MiB"
PARKED = (LAYERS + 1) * MIB


def deep(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [(nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU()) for _ in range(LAYERS)]
    return nn.Sequential(*(module for pair in layers for module in pair))


def planned(budget: object, model: object = None, **options: object) -> Plan:
    given = {"tokens": TOKENS, "rates": RATES, **options}
    return memtile.plan(deep() if model is None else model, budget=budget, **given)


def term(plan: Plan, name: str) -> int:
    return sum(each.nbytes for each in plan.terms if each.name == name)


def long_llama(layers: int) -> Any:
    config = copy.deepcopy(llama().config)
    config.num_hidden_layers, config.max_position_embeddings = layers, 512
    return type(llama())(config)


@pytest.fixture
def stored(monkeypatch):
    """The bytes of each piece that is parked, in whole pages."""
    found, real = [], SavedPieces.store

    def store(self, *given):
        piece = real(self, *given)
        found.append(piece.allocation.room)
        return piece

    monkeypatch.setattr(SavedPieces, "store", store)
    return found


def test_activations_are_parked_where_nothing_else_fits():
    """The plan says so; with more memory they stay there, and it is refused where that is asked."""
    tight, wide = planned(TIGHT), planned(WIDE)

    assert tight.parks_activations
    assert "activations on disk" in tight.summary
    assert not wide.parks_activations
    assert "activations" not in wide.summary
    with pytest.raises(BudgetError):
        planned(TIGHT, park_activations=False)


def test_what_is_parked_is_counted():
    """They are at home and moved twice, and memory holds less: what one layer works with."""
    kept = planned(WIDE, park_activations=False)
    parked = planned(WIDE, park_activations=True)

    assert term(parked, "activations at home") == PARKED
    assert parked.read_bytes - kept.read_bytes == PARKED
    assert parked.written_bytes - kept.written_bytes == PARKED
    assert term(kept, "activations kept for backward") == PARKED + 4  # and the loss
    assert term(parked, "activations kept for backward") <= MIB + 4


def test_plans_are_kept_as_json():
    """The choice is part of the text."""
    plan = planned(TIGHT)

    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"home": "host"}, "home= is memory, where they are already"),
        ({"optimizer": None}, "nothing is trained"),
        ({"park_activations": "disk"}, "must be one of None, True, False"),
    ],
)
def test_activations_that_cannot_be_parked_are_refused(options, sentence):
    """In memory, or where there is no backward, the option has no meaning."""
    with pytest.raises(ArgumentError, match=sentence):
        planned("1GiB", **{"park_activations": True, **options})


def train(model: nn.Module, mode: str, steps: int = 2) -> list[float]:
    optimizer = memtile.TileOptimizer(model, torch.optim.AdamW, mode=mode, lr=1e-3)
    x, losses = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_tiled_model_parks_them_in_each_call(stored):
    """Losses have the bits of a run that keeps them, and the home is that of the tiles."""
    losses, counts = [], []
    for parks in (True, False):
        model, home = deep(), DiskHome()
        plan = planned(TIGHT if parks else WIDE, park_activations=parks)
        assert bool(plan.parked_layers) is parks
        memtile.tile(model, plan, home=home)
        losses.append(train(model, plan.mode))
        counts.append(sum(stored))
        stored.clear()

    assert losses[0] == losses[1]
    assert counts == [2 * PARKED, 0]


def test_they_are_parked_where_all_weights_are_in_memory(stored):
    """A budget may hold the weights and not the activations; without a backward none are."""
    model = deep()
    plan = planned(WIDE, park_activations=True)
    assert not plan.parked_layers

    memtile.tile(model, plan)
    with torch.no_grad():
        model(torch.zeros(TOKENS, WIDTH))
    assert not stored
    model(torch.zeros(TOKENS, WIDTH)).sum().backward()

    assert sum(stored) == PARKED


def test_untiled_models_and_copies_park_nothing(stored):
    """`untile` ends it; a copy of a model keeps activations in memory."""
    model = memtile.tile(deep(), planned(WIDE, park_activations=True))
    for other in (copy.deepcopy(model), memtile.untile(model)):
        assert other(torch.zeros(TOKENS, WIDTH)).requires_grad

    assert not stored


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_in_a_call_ends_it(stored, error):
    """Nothing is parked of what is computed after the next call."""
    model = memtile.tile(deep(), planned(WIDE, park_activations=True))

    def stop(*_: object) -> None:
        raise error

    handle = model[4].register_forward_pre_hook(stop)
    with pytest.raises(error):
        model(torch.zeros(TOKENS, WIDTH))
    handle.remove()
    model(torch.zeros(TOKENS, WIDTH)).sum().backward()  # after a Ctrl-C this one ends both
    stored.clear()

    assert torch.zeros(TOKENS, WIDTH, requires_grad=True).exp().exp().requires_grad
    assert not stored


def test_what_is_recomputed_is_not_parked():
    """Of a model that recomputes, inputs of blocks and what the head needs are parked."""
    options = {"tokens": 4096, "batch": 8, "park_activations": True}
    parked = [
        planned("1GiB", long_llama(4), checkpointing=checkpointing, **options)
        for checkpointing in (None, False)
    ]
    inputs, everything = (term(plan, "activations at home") for plan in parked)

    assert [plan.checkpointing for plan in parked] == [True, False]
    assert 5 * 4096 * HIDDEN * 4 < inputs < everything / 4


def test_counts_are_those_of_a_run(stored):
    """What the plan counts for the home is what a step of the model stores there."""
    model = long_llama(2)
    options = {"tokens": 4096, "batch": 8, "park_activations": True}
    plan = planned("1GiB", model, checkpointing=False, **options)
    memtile.tile(model, plan)
    ids = torch.randint(0, model.config.vocab_size, (8, 512))
    stored.clear()

    model.train()(input_ids=ids, labels=ids, use_cache=False)

    assert sum(stored) == term(plan, "activations at home")


# The longest sequences


def test_the_longest_step_is_the_last_that_fits():
    """A plan of a sixty-fourth more tokens does not fit."""
    plan = planned("30MiB", tokens="longest", batch=4)

    assert plan.tokens % (4 * 64) == 0
    assert planned("30MiB", tokens=plan.tokens, batch=4).peak_bytes == plan.peak_bytes
    with pytest.raises(BudgetError):
        planned("30MiB", tokens=plan.tokens + max(256, plan.tokens // 32), batch=4)


def test_the_longest_step_is_that_of_the_best_choice():
    """Parking is no loss: of few layers it takes more than it saves, and is left out then."""
    longest = [
        planned("30MiB", deep()[:3], tokens="longest", park_activations=parks).tokens
        for parks in (None, False, True)
    ]

    assert longest[0] == longest[1] > longest[2]


def test_a_model_that_reads_no_more_gives_the_limit():
    """A model's own limit on its positions is kept."""
    model = long_llama(2)
    limit = model.config.max_position_embeddings

    plan = memtile.plan(model, budget="4GiB", tokens="longest", rates=RATES)

    assert plan.tokens == limit // 64 * 64


def test_a_budget_for_no_tokens_is_refused():
    """The error is that of the shortest sequence."""
    with pytest.raises(BudgetError, match="64 tokens need at least"):
        planned("1MiB", tokens="longest")


@pytest.mark.parametrize("curve", [lambda n: n, lambda n: n * n // 1000, lambda n: int(n**0.5)])
@pytest.mark.parametrize("limit", [65, 1000, 123_456])
@pytest.mark.parametrize("longest", [None, 9_999])
def test_the_search_asks_for_few_sizes(curve, limit, longest):
    """Of growing functions that are no lines too; the answer is within a 64th of the best."""
    asked = []

    def excess(tokens):
        asked.append(tokens)
        return None if longest and tokens > longest else curve(tokens) - curve(limit)

    best = min(limit, longest or limit)
    found = longest_step(excess, 1)

    assert best * 63 / 64 - 64 <= found <= best
    assert len(asked) <= 25


# MLPs in tiles


class Gated(nn.Module):
    """A gated MLP, 32 times as wide inside."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(32, 1024, bias=False) for _ in range(2))
        self.down = nn.Linear(1024, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def gated() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), *(Gated() for _ in range(3)))


def test_mlps_are_in_tiles_where_nothing_else_fits():
    """Steps are as accurate as the dense ones, of several inputs: errors of one vary by half."""
    dense, model = gated(), gated()
    options = {"tokens": 4096, "rates": RATES, "optimizer": torch.optim.SGD}
    plan = memtile.plan(model, budget="40MiB", park_activations=False, **options)
    inputs = torch.randn(4, 4096, 32, generator=torch.Generator().manual_seed(1))

    memtile.tile(model, plan)

    assert plan.tiles_mlps
    assert "MLPs in tiles" in plan.summary
    with pytest.raises(BudgetError):
        memtile.plan(gated(), budget="40MiB", tile_mlps=False, park_activations=False, **options)
    truth = copy.deepcopy(dense).double()
    grads = []
    for each in (model, dense, truth):
        losses = [each(x).square().mean() for x in inputs.to(each[0].weight.dtype)]
        grads += [torch.stack([torch.autograd.grad(e, each[1].gate.weight)[0] for e in losses])]
    assert_as_accurate(*grads, factor=1.5)


def test_layers_of_an_mlp_are_cut_alike():
    """Bounds of gate, up and down are the same, and all three are parked or none is."""
    options = {"tokens": 64, "rates": RATES, "tile_mlps": True, "park_activations": False}
    splits = set()
    for kib in range(3000, 8000, 1000):
        plan = memtile.plan(gated(), budget=kib << 10, **options)
        grids = {layer.name: layer.grid for layer in plan.layers}
        for number in (1, 2, 3):
            gate, up, down = (grids[f"{number}.{name}"] for name in ("gate", "up", "down"))
            assert (gate is None) == (up is None) == (down is None)
            if gate is not None:
                assert gate.out_parts == up.out_parts == down.in_parts
                assert gate.in_splits == down.out_splits == 1
            splits.add(gate and gate.out_splits)

    assert splits == {None, 1, 2}


def test_mlps_are_not_asked_for_where_there_are_none():
    """The error says why; a plan of inference leaves them alone unless it is asked for."""
    with pytest.raises(ArgumentError, match=r"tile_mlps=True: Sequential has no MLP"):
        planned("1GiB", nn.Sequential(nn.Linear(32, 32)), tile_mlps=True)
    assert not memtile.plan(
        gated(), budget="64MiB", tokens=64, rates=RATES, optimizer=None
    ).tiles_mlps

"""Plans for ranks: the arithmetic of shards, what is refused, and that tiling follows them."""

from functools import partial

import pytest
import torch
import transformers
from torch import nn

import memtile
from memtile.convert.tiling_mlps import has_mlps_in_tiles
from memtile.costmodel import (
    ClusterSpec,
    LooseModule,
    Parameter,
    RankPlan,
    ShardedLayer,
    Sharding,
    Uses,
)
from memtile.costmodel.rank_memory import peak_moment
from memtile.errors import ArgumentError, BudgetError, MemtileError
from memtile.geometry import Grid
from memtile.homes import DeviceHome
from memtile.layers import DeferringHead, ParkedLinear
from memtile.planner import plan_ranks
from memtile.transfer import SavedPieces

MIB = 1 << 20
TRAINED = Uses(1, 0, 1)


def stack(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(70, 5001), nn.ReLU(), nn.Linear(5001, 301), nn.ReLU(), nn.Linear(301, 7)
    return nn.Sequential(*layers).to(dtype)


def planned(world: int, engine: str = "fsdp2", dtype=torch.float32, **options) -> RankPlan:
    def work(model: nn.Module) -> torch.Tensor:
        return model(torch.empty(tokens, 70, dtype=dtype, device="meta")).float().sum()

    tokens = options.get("tokens", 33)
    given = {"tokens": tokens, "work": work, **options}
    return plan_ranks(stack(dtype), world_size=world, engine=engine, **given)


@pytest.mark.parametrize(
    ("engine", "world", "elements"),
    [
        ("fsdp2", 1, 7 * 10),
        ("fsdp2", 2, 4 * 10),  # rows 0-3, and 4-6 padded
        ("fsdp2", 64, 10),  # a row for each of 64 ranks, of 7 that there are
        ("zero3", 2, 35),
        ("zero3", 64, 2),  # 70 elements padded to 128
    ],
)
def test_shards_are_as_large_as_the_fullest_ranks(engine, world, elements):
    """FSDP2 cuts rows in equal pieces, ZeRO-3 elements."""
    sharding = Sharding(engine, world, 0)

    assert sharding.shard(Parameter(7, 10, 4, True)) == elements


def test_neighbours_are_gathered_together_up_to_a_size():
    """Tiles of 3×4, 3×3, 2×4 and 2×3 elements with biases, in units of at most 100 bytes."""
    layer = ShardedLayer(
        "up", Parameter(5, 7, 4, True), (Parameter(5, 1, 4, True),), False, TRAINED
    )
    units = Sharding("fsdp2", 2, 100).units([layer], {"up": Grid.uniform(5, 7, 2, 2)}, [])

    sizes = [[(p.rows, p.columns) for p in unit] for unit, _, _ in units.tiles]
    assert sizes == [[(3, 4), (3, 3), (3, 1)], [(2, 4), (2, 3), (2, 1)]]


@pytest.mark.parametrize(("unit_bytes", "root"), [(0, 0), (72, 0), (73, 2)])
def test_a_module_without_tiles_is_a_unit_where_it_is_as_large_as_one(unit_bytes, root):
    """Smaller ones are in the root unit, which is whole for all of a step."""
    own = Parameter(9, 1, 4, True), Parameter(9, 1, 4, True)
    units = Sharding("fsdp2", 2, unit_bytes).units(
        [], {}, [LooseModule("norm", own, True, TRAINED)]
    )

    assert (len(units.resident), units.number) == (root, 0 if root else 1)


def test_zero3_keeps_whole_what_is_no_larger_than_a_tiles_bias():
    """Biases of tiles and small norms are persistent; every larger parameter is gathered."""
    layer = ShardedLayer(
        "up", Parameter(5, 7, 4, True), (Parameter(5, 1, 4, True),), False, TRAINED
    )
    own = Parameter(4, 1, 4, True), Parameter(9, 1, 4, True), Parameter(9, 2, 4, True)
    loose = [LooseModule("norm", own, True, TRAINED)]
    units = Sharding("zero3", 2, 100).units([layer], {"up": Grid.uniform(5, 7)}, loose)

    assert [parameter.rows for parameter in units.resident] == [4, 5]
    assert sorted(p.elements for unit, _, _ in units.tiles for p in unit) == [9, 18, 35]


def test_zero3_gathers_a_bias_that_is_as_large_as_a_tile_with_its_weight():
    """The smallest tile has 10 elements, so that a bias of 30 is not persistent."""
    layers = [
        ShardedLayer(
            name,
            Parameter(rows, 10, 4, True),
            (Parameter(rows, 1, 4, True),),
            False,
            TRAINED,
        )
        for name, rows in (("up", 30), ("down", 1))
    ]
    grids = {"up": Grid.uniform(30, 10), "down": Grid.uniform(1, 10)}
    units = Sharding("zero3", 2, 100).units(layers, grids, [])

    assert [[p.elements for p in unit] for unit, _, _ in units.tiles] == [[300, 30], [10]]
    assert [parameter.elements for parameter in units.resident] == [1]


def test_zero3_keeps_masters_of_everything():
    """AdamW: 12 bytes an element, also beside float32, offloaded or not."""
    elements = sum(p.numel() for p in stack().parameters())
    found = {
        (dtype, offload): planned(1, "zero3", dtype, offload=offload).term(
            "optimizer's state of shards"
        )
        for dtype, offload in (
            (torch.bfloat16, "none"),
            (torch.float32, "none"),
            (torch.float32, "cpu"),
        )
    }

    assert [nbytes // elements for nbytes in found.values()] == [12, 12, 12]


def test_zero3_gathers_one_unit_ahead_and_reduces_through_one_bucket():
    """Backward: the largest weight in use, the one gathered ahead, its gradient, the bucket."""
    plan = planned(2, "zero3")
    largest = 5002 * 301 * 4 - 301 * 4  # 5001 × 301, which two ranks pad by one element
    largest += largest // 4 % 2 * 4

    for name in ("unit in use", "units on their way"):
        assert plan.term(name) == largest, name
    assert plan.term("bucket of gradients") == 5001 * 301 * 4
    assert plan.term("gradient of a unit, whole") == 5001 * 301 * 4


def test_a_link_carries_all_but_a_ranks_own_share():
    """Forward and backward gather, gradients are reduced: (n - 1)/n of the padded bytes each."""
    plan = planned(4, "zero3")
    weights = sum(padded(p.numel()) for p in stack().parameters() if p.dim() == 2)
    biases = sum(padded(p.numel()) for p in stack().parameters() if p.dim() == 1)

    again = padded(5001) - padded(7 * 301)  # no persistent bias; and the last tile, whole anyway
    assert plan.moved("all-gather") == (2 * weights + biases + again) * 3 // 4
    assert plan.moved("reduce-scatter") == (weights + biases) * 3 // 4


def padded(elements: int) -> int:
    """Bytes in float32, of elements that four ranks share."""
    return -(-elements // 4) * 4 * 4


def test_floors_are_bytes_and_operations_over_speeds():
    """The step takes the longest floor; without speeds there is none."""
    speeds = ClusterSpec(flops=1e12, link=50e9, disk=7e9)
    plan = planned(4, "zero3", offload="nvme", speeds=speeds)

    found = {floor.name: floor.seconds for floor in plan.floors}
    sent = plan.moved("all-gather") + plan.moved("reduce-scatter")
    disk = plan.moved("shards and moments read") + plan.moved("shards and moments written")
    assert found == {
        "products": plan.flops / 1e12,
        "link between ranks": sent / 50e9,
        "disk": disk / 7e9,
    }
    assert plan.seconds == max(found.values())
    assert planned(4, "zero3").seconds is None


def test_offloading_moves_shards_gradients_and_moments_away():
    """What the device kept is in host memory; with "nvme" on the disk, gradients excepted."""
    names = ("shards of parameters", "gradients of shards", "optimizer's state of shards")
    places = {
        offload: [
            next(
                term.place for term in planned(2, "zero3", offload=offload).terms if term.name == n
            )
            for n in names
        ]
        for offload in ("none", "cpu", "nvme")
    }

    assert places["none"] == ["device"] * 3
    assert places["cpu"] == ["host"] * 3
    assert places["nvme"] == ["disk", "host", "disk"]


def test_a_smaller_device_gets_smaller_tiles():
    """Whole layers where they fit, and no more tiles than needed where they do not."""
    tiles = [planned(2, device_memory=f"{size}MiB").tiles for size in (200, 40, 30)]

    assert tiles[0] == 3
    assert tiles == sorted(tiles)
    assert tiles[-1] > 3


def test_the_smallest_world_is_the_first_that_fits():
    """Half of that world is refused, and the message names it."""
    size = "27MiB"
    world = planned(64, device_memory=size).smallest_world

    assert world is not None
    assert world > 1
    assert planned(world, device_memory=size).peak_bytes <= 27 * MIB
    with pytest.raises(BudgetError, match=f"{world} ranks would do"):
        planned(world // 2, device_memory=size)


def test_what_no_number_of_ranks_holds_is_said():
    """Activations are not shared among ranks."""
    with pytest.raises(BudgetError, match="no number of ranks"):
        planned(4, device_memory="25MiB", tokens=3000)


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_mlps_are_in_tiles_where_nothing_fits_otherwise(engine):
    """Their layers are cut alike, three units in use at once, and the model computes them so."""

    def model():
        mlps = (nn.Sequential(nn.Linear(70, 900), nn.SiLU(), nn.Linear(900, 70)) for _ in range(2))
        return nn.Sequential(*mlps)

    def plan(**options):
        given = {"tokens": 2000, "engine": engine, "unit_bytes": 0, **options}
        return plan_ranks(model(), world_size=2, **given)

    whole, in_tiles = (plan(tile_mlps=on) for on in (False, True))
    between = (whole.peak_bytes + in_tiles.peak_bytes) // 2
    with pytest.raises(BudgetError):
        plan(device_memory=between, tile_mlps=False)
    found = plan(device_memory=between)
    tiled = memtile.tile(model(), found)

    assert (whole.tiles_mlps, in_tiles.tiles_mlps, found.tiles_mlps) == (False, True, True)
    assert in_tiles.peak_bytes < whole.peak_bytes / 2
    assert "MLPs in tiles" in str(found)
    cut = (plan(max_tile_bytes=20_000, tile_mlps=on) for on in (False, True))
    forwards = [next(m for m in each.moments if m.name == "forward") for each in cut]
    in_use = [next(t.nbytes for t in m.terms if t.name == "unit in use") for m in forwards]
    assert in_use[1] > 1.8 * in_use[0]
    up, _, down = tiled[0]
    assert up.grid.out_parts == down.grid.in_parts
    assert has_mlps_in_tiles(tiled)


@pytest.mark.parametrize(("given", "returns"), [(None, True), (False, False)])
def test_freed_memory_is_returned_as_the_plan_supposes(monkeypatch, given, returns):
    """Where the CPU is the ranks' device."""
    called = []
    monkeypatch.setattr("memtile.convert.tiling.keep_freed_memory_out", lambda: called.append(1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    memtile.tile(stack(), planned(2), return_freed_memory=given)

    assert called == [1] * returns


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_loss_needs_no_logits(engine, tied):
    """Of 512 tokens and 40 000 classes they would be 78 MiB; the model that is tiled has none."""
    config = transformers.LlamaConfig(
        vocab_size=40_000,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    plan = plan_ranks(config, world_size=2, engine=engine, tokens=512)
    model = memtile.tile(transformers.LlamaForCausalLM(config), plan)

    assert peak_moment(plan.moments).nbytes < 48 * MIB
    # of the head in forward and, unless it is whole still, in backward, and of the embedding
    weights = 2.0 if engine == "fsdp2" else 1.5
    assert plan.moved("all-gather") == pytest.approx(weights * 40_000 * 32 * 4, rel=0.01)
    assert isinstance(model.lm_head, DeferringHead)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, None])
def test_logits_that_a_step_gives_are_counted(optimizer):
    """They are computed, also where a step ends with them: 512 tokens of 40 000 classes."""

    def work(model: nn.Module) -> torch.Tensor:
        return model(torch.zeros(512, 8, device="meta"))

    model = nn.Sequential(nn.Linear(8, 8), memtile.defer_logits(nn.Linear(8, 40_000)))
    options = {"engine": "fsdp2", "tokens": 512, "work": work, "optimizer": optimizer}
    plan = plan_ranks(model, world_size=2, **options)

    assert peak_moment(plan.moments).nbytes >= 512 * 40_000 * 4


def test_mlps_that_are_not_there_are_refused():
    """With what to ask instead."""
    with pytest.raises(ArgumentError, match="has no MLP that can be computed by tiles"):
        plan_ranks(nn.Linear(70, 7), world_size=2, engine="fsdp2", tokens=5, tile_mlps=True)
    with pytest.raises(ArgumentError, match="tile_mlps"):
        planned(2, tile_mlps="yes")


def test_activations_are_parked_where_nothing_else_fits():
    """The device holds less, its rank's host or disk what is parked, which moves twice a step."""
    layers = [(nn.Linear(256, 256), nn.ReLU()) for _ in range(30)]
    deep = nn.Sequential(*(module for pair in layers for module in pair))
    plan = partial(plan_ranks, deep, world_size=64, engine="fsdp2", tokens=1024)
    kept = plan()
    parked = plan(device_memory="28MiB")
    on_disk = plan(park_activations=True, home="disk:folder")

    assert parked.parks_activations
    assert not kept.parks_activations
    assert "activations in host memory" in parked.summary
    assert "activations on disk in folder" in on_disk.summary
    assert parked.bytes_of("host") == on_disk.bytes_of("disk") == 31 * MIB  # the input too
    assert on_disk.bytes_of("host") == 3 * MIB  # slabs
    assert parked.term("activations on their way") == 8 * MIB
    assert kept.peak_bytes - on_disk.peak_bytes > 25 * MIB
    moved = [(each.link, each.nbytes) for each in on_disk.traffic if each.name.startswith("activ")]
    assert moved == [("host", 62 * MIB), ("disk", 62 * MIB)]
    with pytest.raises(BudgetError):
        plan(device_memory="28MiB", park_activations=False)


def test_a_model_parks_activations_as_planned_for_ranks(monkeypatch):
    """Tiles stay in memory for the engine; another home may be given."""
    plan = planned(2, tokens=2000, park_activations=True)
    labels, real = [], SavedPieces.store

    def store(self, tensor, start, stop, label):
        labels.append((label, self.home))
        return real(self, tensor, start, stop, label)

    monkeypatch.setattr(SavedPieces, "store", store)
    home = memtile.DiskHome()
    for given in (None, home):
        memtile.tile(stack(), plan, home=given)(torch.zeros(2000, 70)).sum().backward()

    first, second = labels[: len(labels) // 2], labels[len(labels) // 2 :]
    assert [label for label, _ in first] == [label for label, _ in second]
    assert "activation float32 (2000, 5001)" in dict(first)
    assert {type(where) for _, where in first} == {memtile.HostHome}
    assert {where for _, where in second} == {home}
    assert home.mapped_bytes == 0  # a rank's plan has none for pages that stay mapped


@pytest.mark.parametrize("home", ["device", "checkpoint", "disk:/no/such", DeviceHome()])
def test_a_home_where_activations_cannot_be_parked_is_refused_before_tiling(home):
    """The model is as it was."""
    model = stack()

    with pytest.raises(MemtileError):
        memtile.tile(model, planned(2, tokens=2000, park_activations=True), home=home)
    assert type(model[0]) is nn.Linear


def test_tied_weights_keep_a_whole_gradient():
    """Autograd adds up the uses' gradients before any of it can be reduced."""
    tied = nn.Sequential(nn.Embedding(61, 20), nn.Linear(20, 61, bias=False))
    tied[1].weight = tied[0].weight
    plan = plan_ranks(tied, world_size=2, engine="fsdp2", tokens=5)

    backward = next(moment for moment in plan.moments if moment.name == "backward")
    found = {term.name: term.nbytes for term in backward.terms}
    assert found["gradients of what is tied, until its first use"] == 61 * 20 * 4


def test_inference_holds_shards_alone():
    """No gradients, no moments, one gather of each unit."""
    plan = planned(2, optimizer=None, engine="zero3")

    assert plan.term("gradients of shards") == plan.term("optimizer's state of shards") == 0
    assert [each.name for each in plan.traffic] == ["all-gather"]


def test_a_plan_for_ranks_comes_back_as_it_was():
    """Every field survives, grids, moments and speeds too."""
    speeds = ClusterSpec(link=50e9)
    plan = planned(2, device_memory="30MiB", speeds=speeds)

    assert RankPlan.from_json(plan.to_json()) == plan
    assert str(RankPlan.from_json(plan.to_json())) == str(plan)


def test_a_model_is_tiled_as_planned_for_ranks():
    """Each layer that can be tiled is, also as one tile, and in memory for an engine to shard."""
    plan = planned(2, device_memory="30MiB")
    model = memtile.tile(stack(), plan)

    assert [str(model[i].grid) for i in (0, 2, 4)] == [str(layer.grid) for layer in plan.layers]
    assert not any(isinstance(module, ParkedLinear) for module in model.modules())
    with pytest.raises(ArgumentError, match="leave home out"):
        memtile.tile(stack(), plan, home="host")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"world_size": 0}, "world_size=0"),
        ({"world_size": True}, "world_size=True"),
        ({"engine": "ddp"}, "engine='ddp'"),
        ({"offload": "nvme"}, "engine='zero3'"),
        ({"offload": "tape"}, "offload='tape'"),
        ({"prefetch": -1}, "prefetch=-1"),
        ({"device_memory": "much"}, "not a size"),
        ({"device_memory": MIB, "max_tile_bytes": MIB}, "give it alone"),
        ({"checkpointing": True}, "gradient_checkpointing_enable"),
        ({"home": "checkpoint"}, "host, disk or disk:FOLDER"),
        ({"park_activations": "disk"}, "park_activations='disk'"),
        ({"park_activations": True, "optimizer": None}, "nothing is trained"),
    ],
)
def test_what_no_cluster_is_is_refused_by_name(options, words):
    """They are refused before anything is counted."""
    given = {"world_size": 2, "engine": "fsdp2", "tokens": 9, **options}

    with pytest.raises(ArgumentError, match=words):
        plan_ranks(stack(), **given)


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), True, "fast"])
def test_what_is_no_speed_is_refused(value):
    """Each must be a number above 0."""
    with pytest.raises(ArgumentError, match="link="):
        ClusterSpec(link=value)


def test_the_default_unit_is_the_engines():
    """The default of `unit_bytes` is that of `shard`."""
    from memtile.engines.torch_fsdp2 import SMALLEST_UNIT

    assert planned(2).unit_bytes == SMALLEST_UNIT

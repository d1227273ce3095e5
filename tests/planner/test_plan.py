"""Plans: what fits, what is refused, and that tiling follows them."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from given_rates import RATES
from torch import nn

import memtile
from memtile.costmodel import Budget, Plan
from memtile.errors import ArgumentError, BudgetError, CannotTileError, HomeError
from memtile.homes import keep_freed_memory_out

KIB = 1 << 10
MIB = 1 << 20


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(70, 500), nn.ReLU(), nn.Linear(500, 301), nn.ReLU(), nn.Linear(301, 7)
    )


def planned(budget: object, model: object = None, **options: object) -> Plan:
    given = {"tokens": 33, "rates": RATES, **options}
    return memtile.plan(stack() if model is None else model, budget=budget, **given)


def test_with_room_for_all_nothing_is_parked():
    """A budget that holds the model, its moments and a step leaves every layer dense."""
    plan = planned("1GiB")

    assert (plan.tiles, plan.parked_layers) == (0, ())
    assert {layer.place for layer in plan.layers} == {"resident"}


@pytest.mark.parametrize("work", [{}, {"optimizer": None}, {"mode": "classic"}])
def test_more_budget_never_means_more_tiles(work):
    """A larger budget never gives more tiles."""
    tiles = []
    for kib in range(200, 6000, 290):
        try:
            tiles.append(planned(kib * KIB, **work).tiles)
        except BudgetError:
            assert not tiles, "a larger budget must not be refused"

    assert tiles == sorted(tiles, reverse=True)
    assert tiles[0] > tiles[-1] == 0


@pytest.mark.parametrize("rates", [{"workspace_bytes": 11 * MIB}, {"layer_memory": 30 * KIB}])
def test_every_budget_above_the_least_is_planned(rates):
    """This holds also where memory of products or objects depends on the layout."""
    given = dataclasses.replace(RATES, **rates)
    tiles = []
    for kib in range(200, 20_000, 990):
        try:
            tiles.append(planned(kib * KIB, optimizer=None, rates=given).tiles)
        except BudgetError:
            assert not tiles, "a larger budget must not be refused"

    assert tiles == sorted(tiles, reverse=True)


def test_what_trains_is_not_run_by_a_plan_of_what_is_frozen():
    """Its gradients and moments were not planned. A layer that trains in the plan may be frozen."""
    frozen = stack().requires_grad_(False)
    frozen[4].requires_grad_(True)
    plan = planned("1GiB", frozen)

    with pytest.raises(CannotTileError, match="frozen in the plan"):
        memtile.tile(stack(), plan)

    memtile.tile(stack().requires_grad_(False), planned("1GiB"))


def test_a_plan_that_is_none_is_refused():
    """A number or a text instead of a plan is refused, and the message says what to give."""
    for given in (4096, "plan.json"):
        with pytest.raises(ArgumentError, match="out_splits"):
            memtile.tile(stack(), given)


@pytest.mark.parametrize("option", [{"work": 3}, {"options": 3}, {"rates": 3}])
def test_arguments_of_another_kind_are_refused_by_name(option):
    """The message begins with what was given."""
    with pytest.raises(ArgumentError, match=f"{next(iter(option))}=3"):
        planned("1GiB", **option)


def test_a_budget_beyond_all_machines_is_refused():
    """A size larger than any machine is refused."""
    with pytest.raises(ArgumentError, match="any machine"):
        planned("9" * 400 + "GiB")


def test_a_home_that_holds_no_files_is_refused():
    """Folders of the kernel look writable but hold no files."""
    with pytest.raises(HomeError, match="no files"):
        planned("1GiB", home="disk:/proc")


def test_no_plan_predicts_more_than_its_budget():
    """The peak stays below the budget, by its margin."""
    for kib in (3200, 3600, 4000):
        plan = planned(kib * KIB)

        assert plan.peak_bytes <= kib * KIB * 15 // 16


def test_the_terms_add_up_to_the_peak():
    """The peak of a place is the sum of its terms."""
    plan = planned(3300 * KIB)

    assert plan.peak_bytes == sum(term.nbytes for term in plan.terms if term.place == "host")
    assert plan.bytes_of("disk") == sum(t.nbytes for t in plan.terms if t.place == "disk")


def test_a_resident_model_takes_what_its_parameters_and_moments_take():
    """Weights once, AdamW's moments twice, biases likewise: to the byte."""
    model = stack()
    parameters = sum(parameter.nbytes for parameter in model.parameters())

    terms = {term.name: term.nbytes for term in planned("1GiB", model).terms}

    assert terms["resident weights"] + terms["norms, biases and other parameters"] == parameters
    assert terms["optimizer state of what is resident"] == 2 * parameters


@pytest.mark.usefixtures("in_slabs")
def test_slabs_are_as_the_rings_make_them(tmp_path):
    """The predicted slabs are as many as a run has, each as large as the largest of them."""
    from memtile.transfer import rings_of

    model, home = stack(), memtile.DiskHome(tmp_path)
    plan = planned(3300 * KIB, model, home=home)
    memtile.tile(model, plan, home=home)
    optimizer = memtile.TileOptimizer(model, torch.optim.AdamW, mode="in_backward", lr=1e-3)
    for _ in range(3):
        model(torch.randn(33, 70)).square().mean().backward()
        optimizer.step()
    terms = {term.name: term.nbytes for term in plan.terms}
    sizes = [[s.memory.numel() for s in ring._slabs] for ring in rings_of(home).all()]
    weights, _, steps = (len(each) * max(each) for each in sizes)

    assert weights == terms["slabs of tiles"]
    assert steps == terms["slabs of optimizer steps"]


@pytest.mark.usefixtures("in_slabs")
def test_what_is_moved_is_what_the_home_counts(tmp_path):
    """Bytes read and written in a step are those of the plan, up to what slabs still held."""
    model, home = stack(), memtile.DiskHome(tmp_path)
    plan = planned(3300 * KIB, model, home=home)
    memtile.tile(model, plan, home=home)
    optimizer = memtile.TileOptimizer(model, torch.optim.AdamW, mode="in_backward", lr=1e-3)
    moved = []
    for _ in range(3):
        before = home.traffic
        model(torch.randn(33, 70)).square().mean().backward()
        optimizer.step()
        moved.append(
            (
                home.traffic.read_bytes - before.read_bytes,
                home.traffic.written_bytes - before.written_bytes,
            )
        )
    pages = 4096 * plan.tiles * 4

    assert plan.written_bytes <= moved[-1][1] <= plan.written_bytes + pages
    assert moved[-1][0] <= plan.read_bytes + pages


def test_tiling_by_a_plan_follows_it():
    """Parked layers get their grids and the plan's home, the others stay as they are."""
    model = stack()
    plan = planned(3300 * KIB, model)
    assert plan.parked_layers

    memtile.tile(model, plan)

    for layer in plan.layers:
        module = model.get_submodule(layer.name)
        is_tiled = isinstance(module, memtile.TiledLinear)
        assert is_tiled == (layer.grid is not None)
        assert not is_tiled or module.grid == layer.grid


def test_a_planned_model_computes_what_the_dense_one_does():
    """Tiling by a plan changes no value."""
    x = torch.randn(5, 70, generator=torch.Generator().manual_seed(1))
    dense, tiled = stack(), stack()

    memtile.tile(tiled, planned(3300 * KIB, tiled))

    assert torch.allclose(dense(x), tiled(x), rtol=1e-5)


def test_a_plan_of_another_model_is_refused():
    """A plan for other shapes or names is refused, and nothing is tiled."""
    plan = planned(3300 * KIB)
    others = [
        nn.Sequential(nn.Linear(70, 501), nn.ReLU(), nn.Linear(501, 301)),
        stack().double(),
        nn.Sequential(*stack(), nn.Linear(7, 7)),
    ]

    for other in others:
        with pytest.raises(CannotTileError, match="the plan does not fit"):
            memtile.tile(other, plan)
        assert not any(isinstance(m, memtile.TiledLinear) for m in other.modules())


def test_sizes_beside_a_plan_are_refused():
    """A plan says how each layer is cut."""
    with pytest.raises(ArgumentError, match="max_tile_bytes=…"):
        memtile.tile(stack(), planned("1GiB"), max_tile_bytes=100)


@pytest.mark.parametrize("budget", [0, -1, "0MiB", "plenty", True, 1.5, None, [1], ""])
def test_a_budget_of_nothing_is_refused(budget):
    """Zero, negative and nonsense are refused with the way out."""
    with pytest.raises(ArgumentError, match="budget"):
        planned(budget)


@pytest.mark.parametrize("tokens", [0, -3, 1.5, "many", True, None])
def test_nonsense_tokens_are_refused(tokens):
    """Tokens are a whole number of at least 1."""
    with pytest.raises(ArgumentError, match="tokens="):
        planned("1GiB", tokens=tokens)


def test_tokens_that_no_batch_makes_are_refused():
    """Tokens are batch times length."""
    with pytest.raises(ArgumentError, match="batch=2"):
        planned("1GiB", batch=2)


@pytest.mark.parametrize("option", [{"home": "attic"}, {"home": "disk:"}, {"mode": "fast"}])
def test_unknown_homes_and_modes_are_refused(option):
    """The message lists the known values."""
    with pytest.raises(ArgumentError, match="must be"):
        planned("1GiB", **option)


def test_checkpointing_is_refused_where_there_is_none():
    """A model without it, asked to recompute, is refused."""
    with pytest.raises(ArgumentError, match="gradient_checkpointing_enable"):
        planned("1GiB", checkpointing=True)


def test_where_nothing_fits_the_need_is_said_and_true():
    """The budget that the message asks for is enough, and the message says what else to change."""
    with pytest.raises(BudgetError, match=r"need at least host .* fewer tokens") as raised:
        planned(100 * KIB)
    words = str(raised.value).split("need at least host ")[1].split(",")[0].split(";")[0]
    needed = memtile.costmodel.parse_byte_size(words, "need")

    assert planned(int(needed * 1.01)).tiles > 0


def test_memory_homes_are_told_of_disks():
    """Parking in memory saves no memory: the message names the disk."""
    with pytest.raises(BudgetError, match="home='disk:FOLDER'"):
        planned(100 * KIB, home="host")


def test_room_on_the_disk_is_a_budget_too():
    """A plan whose tiles do not fit on the disk is refused."""
    fits = planned(Budget(host=3300 * KIB))

    with pytest.raises(BudgetError, match="disk"):
        planned(Budget(host=3300 * KIB, disk=fits.bytes_of("disk") // 4))


def test_a_frozen_weight_has_no_moments():
    """A frozen layer takes memory for its weight alone."""
    model = stack().requires_grad_(False)
    model[4].requires_grad_(True)
    terms = {term.name: term.nbytes for term in planned("1GiB", model).terms}

    trained = sum(parameter.nbytes for parameter in model[4].parameters())
    assert terms["optimizer state of what is resident"] == 2 * trained


def test_a_tiled_model_is_refused():
    """A plan is made before tiling."""
    model = memtile.tile(stack(), out_splits=2)

    with pytest.raises(CannotTileError, match="is tiled already"):
        planned("1GiB", model)


def test_a_plan_leaves_the_model_as_it_was():
    """Planning reads shapes alone: parameters, gradients and modes stay."""
    model = stack().eval()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    planned(3300 * KIB, model)

    assert not model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


MALLOC = """
import resource, sys, torch
sys.path[:0] = {folders}
from given_rates import RATES
import memtile
from torch import nn

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2 << 18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

made = lambda: nn.Sequential(nn.Linear(7, 5))
torch.ones(5 << 20)  # glibc keeps blocks of this size from now on
plan = memtile.plan(made(), budget="1GiB", tokens=3, rates=RATES)
print(faults())
memtile.tile(made(), plan, return_freed_memory=False)
print(faults())
hole, above = torch.ones(3 << 18), torch.ones(3 << 18)  # the second keeps the first in the heap
del hole
memtile.tile(made(), plan)
print(faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_planning_leaves_malloc_alone_and_tiling_by_a_plan_can():
    """Freed memory is reused after `plan`; `tile` returns it to the system, unless told not to.

    It is returned too where a block of its size lies free in the heap when `tile` is called.

    Memory that was returned is requested again with a page fault for each page. Blocks of 2 MiB
    leave one free block in the heap, or two side by side: torch aligns to 64 bytes, so it depends
    on the address where the heap ends.
    """
    folders = [str(Path(__file__).parent.parent / "support"), *filter(None, sys.path)]
    code = MALLOC.format(folders=folders)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    planned_faults, left_alone, returned = map(int, done.stdout.split())

    assert max(planned_faults, left_alone) < 4 * 512  # blocks that are used again take none
    assert returned > 19 * 512


def test_memory_that_is_returned_at_once_is_logged(caplog):
    """`tile` says that it changes the process, and how to avoid that."""
    keep_freed_memory_out.cache_clear()

    with caplog.at_level("INFO", "memtile.homes"):
        memtile.tile(stack(), planned("1GiB"), return_freed_memory=False)
        assert not caplog.records
        memtile.tile(stack(), planned("1GiB"))

    assert "return_freed_memory=False" in caplog.text

"""Tiles as shards of FSDP2: processes over gloo, compared with the dense model in one process."""

import re
from statistics import fmean

import pytest
import torch
import torch.distributed as dist
from cases import chosen, with_slow
from engine_cases import (
    STEPS,
    Case,
    Mlp,
    Net,
    ParallelNet,
    batches,
    parallel_losses,
    plain_step,
    tiled,
    train,
)
from fsdp2_worker import CASES, spawn
from torch.distributed.fsdp import FSDPModule

import memtile
from memtile.engines.torch_fsdp2 import shard
from memtile.errors import ArgumentError, CannotTileError, EngineError, ParkedError

QUICK = (
    *("one tile", "ragged", "recomputed after evaluation", "clipped", "another way, tied", "MLP"),
    "a loss without logits, head whole",
)
NAMES = with_slow(CASES, QUICK)
AT_FOUR = (*QUICK, "offloaded", "neighbours together", "hybrid")
_WORLDS = [2, *(pytest.param(world, marks=pytest.mark.slow) for world in (1, 4))]


@pytest.fixture(scope="module", params=_WORLDS)
def outcome(request):
    return spawn(request.param, chosen(request))


@pytest.fixture
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def dense():
    """The dense losses and parameters of each case, trained in this process."""
    found = {}
    for name, case in CASES.items():
        model = Net(case)
        losses = train(model, case)
        found[name] = losses, model.state_dict()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_ranks_train_as_the_dense_model_does(outcome, dense, name):
    """After four steps of AdamW the shards hold the dense run's parameters, in float64."""
    model = tiled(CASES[name])
    model.load_state_dict(outcome.states[name])
    found = dict(memtile.dense_state_dict(model))

    for key, expected in dense[name][1].items():
        assert (found[key] - expected).norm() <= 1e-9 * expected.norm(), key


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_those_of_the_dense_model(outcome, dense, name):
    """Each rank's loss is that of its part of the batch; their mean is the dense loss."""
    means = [fmean(losses) for losses in zip(*_losses(outcome, name), strict=True)]

    assert means == pytest.approx(dense[name][0], rel=1e-9)


def test_tensor_parallel_linears_that_return_their_bias_train(outcome):
    """Megatron's linears, each of half the width, give the losses they give without FSDP2."""
    expected = parallel_losses(plain_step(ParallelNet()))

    assert expected[-1] < expected[0]
    for rank in outcome.ranks:
        assert rank["parallel"] == pytest.approx(expected, rel=1e-5)


def test_experts_in_tiles_train_as_the_dense_model_does(outcome):
    """Two experts a tile, of which each rank's tokens hit others; in float64."""
    assert all(rank["experts"] <= 1e-9 for rank in outcome.ranks)


@pytest.mark.parametrize("name", NAMES)
def test_at_most_two_tiles_are_gathered_at_once(outcome, name):
    """The tile in use and the next: in forward, backward, recomputation and after evaluation.

    Of an MLP in tiles, the tiles of all its layers that are used together, each with its adapter.
    """
    in_use = {"": 1, "plain": 2}.get(CASES[name].mlp, 3) * (1 + CASES[name].adapted)
    assert all(rank["live"][name][0] <= in_use + 1 for rank in outcome.ranks)


def test_tiles_of_mlps_are_gathered_once_in_forward_and_once_in_backward(outcome):
    """Their blocks are computed again without another gather, and no whole MLP is."""
    for rank in outcome.ranks:
        assert rank["computed"] == 0
        assert rank["live"]["MLP"][1] == 2 * STEPS


def test_no_logits_are_computed_for_a_loss(outcome):
    """Whatever the head is; its tiles are gathered once in forward and once in backward."""
    for rank in outcome.ranks:
        assert rank["logits"] == 0
        assert rank["live"]["a loss without logits, head whole"][1] == 2 * STEPS


def test_a_loss_without_logits_is_float32_whatever_results_are_cast_to(outcome):
    """A sum of exponentials in bfloat16 would be off by 0.4 %."""
    assert all(rank["narrow"] <= 1e-5 for rank in outcome.ranks)


def test_deferred_logits_are_refused_after_a_step(outcome):
    """They would be those of the new weights."""
    assert all("read them before the optimizer's step" in r["after a step"] for r in outcome.ranks)


def test_ranks_with_other_numbers_of_tokens_gather_the_same(outcome):
    """In inference, an MLP of few tokens is computed whole only where nothing is gathered."""
    assert all(rank["uneven"] <= 1e-12 for rank in outcome.ranks)


def test_mlps_change_between_tiles_and_their_own_forwards(outcome):
    """What was prefetched in one order is not freed while the other uses it."""
    assert all(rank["own forwards"] <= 1e-12 for rank in outcome.ranks)


def test_other_grids_on_other_ranks_are_refused_on_every_rank(outcome):
    """Every rank raises before anything is sharded; none waits for another."""
    if len(outcome.ranks) == 1:
        pytest.skip("one rank agrees with itself")
    assert all("make the same model" in rank["refused"] for rank in outcome.ranks)


def test_ranks_that_use_other_modules_are_told_which_on_every_rank(outcome):
    """Ranks that use another expert, or one more, or differ after many equal steps, all raise."""
    if len(outcome.ranks) == 1:
        pytest.skip("one rank agrees with itself")
    wants = [r"rank 0 .* gathers experts\.0.* while rank 1 gathers experts\.1"]
    wants += [r"rank 0 .* while rank 1 gathers experts\.1", wants[0].replace(".1", ".2")]

    for rank in outcome.ranks:
        assert all(map(re.match, wants, rank["other ways"])), rank["other ways"]


def test_a_sharded_model_loads_what_another_one_gives(outcome):
    """`get_model_state_dict` and `set_model_state_dict` work, with the names of tiles."""
    assert all(rank["loads"] for rank in outcome.ranks)


def test_a_bias_that_is_returned_outlives_its_tile(outcome):
    """The bias is added after its tile was freed, and gets its gradient."""
    assert all(rank["returned_bias"] <= 1e-12 for rank in outcome.ranks)


def test_a_shard_is_never_read_as_a_tile(outcome):
    """`.weight` of a sharded layer raises, and the message says how to get its values."""
    assert all("get_model_state_dict" in rank["weight"] for rank in outcome.ranks)


@pytest.mark.parametrize("options", [{"unit_bytes": -1}, {"prefetch": True}, {"prefetch": 1.5}])
def test_numbers_that_mean_nothing_are_refused(alone, options):
    """`unit_bytes` and `prefetch` that are no whole numbers of at least 0 raise."""
    with pytest.raises(ArgumentError, match="whole number"):
        shard(memtile.tile(Net(Case()), out_splits=2), **options)


@pytest.mark.parametrize(
    "options", [{"mesh": 2}, {"mp_policy": torch.bfloat16}, {"offload_policy": "cpu"}]
)
def test_what_is_no_mesh_or_policy_is_refused(alone, options):
    """Other types raise here; torch would ignore some, and fail much later with others."""
    with pytest.raises(ArgumentError, match=next(iter(options))):
        shard(memtile.tile(Net(Case()), out_splits=2), **options)


def test_what_is_sharded_is_not_tiled(alone):
    """The error says what to do instead."""
    model = shard(memtile.tile(Net(Case()), out_splits=2), unit_bytes=0)

    with pytest.raises(CannotTileError, match="tile the model first"):
        memtile.tile(model, out_splits=3)


def test_a_model_without_tiles_is_refused(alone):
    """torch's own `fully_shard` is enough for it."""
    with pytest.raises(ArgumentError, match="nothing of Net is tiled"):
        shard(Net(Case()))


def test_layers_without_tiles_are_units_of_their_own(alone):
    """From `unit_bytes` on; smaller and tied ones share the root's unit."""
    model = memtile.tile(Net(Case()), out_splits=2, modules=["up"])
    shard(model, unit_bytes=600)

    units = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    assert units == ["", "up.linears.0.0", "up.linears.1.0", "down"]


def test_a_bias_that_modules_share_is_one_shard(alone):
    """It is gathered with the root, and gets the gradients of both uses."""

    def net():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)).double()
        model[1].bias = model[0].bias
        return model

    dense, model = net(), shard(memtile.tile(net(), out_splits=4), unit_bytes=0)
    x = torch.randn(3, 6, dtype=torch.float64)
    for each in (dense, model):
        each(x).square().sum().backward()

    assert model[0].bias is model[1].bias
    torch.testing.assert_close(model[0].bias.grad.full_tensor(), dense[0].bias.grad)


def test_a_part_that_is_called_before_the_model_is_refused(alone):
    """FSDP2 would gather everything, and the model could not be used any more."""
    model = shard(memtile.tile(Net(Case()), out_splits=4), unit_bytes=0)

    with pytest.raises(EngineError, match="called before the model itself"):
        model.embedding(batches()[0])
    model(batches()[0])
    model.embedding(batches()[0])


def test_parked_tiles_are_refused(alone, tmp_path):
    """A tile is either parked in a home or sharded."""
    with memtile.DiskHome(tmp_path) as home:
        model = memtile.tile(Net(Case()), out_splits=2, home=home)

        with pytest.raises(ParkedError, match="offload_policy"):
            shard(model)


def test_mlps_are_put_in_tiles_after_sharding_too(alone):
    """And taken out of them, and put in again."""
    model = shard(tiled(Case(mlp="gated")), unit_bytes=0)
    truth = model(batches()[0])
    for on in (True, False, True):
        memtile.tile_mlps(model, on)
        Mlp.computed = 0
        torch.testing.assert_close(model(batches()[0]), truth)
        assert Mlp.computed == (not on)


def test_an_embedding_of_several_inputs_is_a_unit(alone):
    """OPT's embedding of positions takes three; gradients are the dense model's."""

    class Shifted(torch.nn.Embedding):
        def forward(self, input, offset, scale=1.0):
            return super().forward(input + offset) * scale

    class Positions(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.head = Shifted(9, 6), torch.nn.Linear(6, 5)

        def forward(self, ids):
            return self.head(self.embedding(ids, 2, 0.5)).square().sum()

    dense, model = Positions(), Positions()
    shard(memtile.tile(model, out_splits=2, modules=["head"]), unit_bytes=1)
    for each in (dense, model):
        each(torch.arange(7)).backward()

    found = model.embedding.weight.grad.full_tensor()
    torch.testing.assert_close(found, dense.embedding.weight.grad)


def test_a_model_is_sharded_once(alone):
    """A second `shard` raises: every tile would be hooked twice."""
    model = shard(memtile.tile(Net(Case()), out_splits=2))

    with pytest.raises(EngineError, match="sharded already"):
        shard(model)


def test_a_torch_that_is_too_old_is_refused(alone, monkeypatch):
    """On a CPU torch 2.6 is refused: it would fail in the middle of the first forward."""
    monkeypatch.setattr(torch, "__version__", "2.6.0+cu124")

    with pytest.raises(EngineError, match="install a newer one"):
        shard(memtile.tile(Net(Case()), out_splits=2))


def test_without_a_process_group_the_way_to_one_is_said():
    """A script that was started as one process is told to use torchrun."""
    with pytest.raises(EngineError, match="torchrun"):
        shard(memtile.tile(Net(Case()), out_splits=2))


def _losses(outcome, name):
    return [rank["losses"][name] for rank in outcome.ranks]

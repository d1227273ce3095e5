"""Tiles as shards of ZeRO-3: processes over gloo, compared with the dense model in one process."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from cases import chosen, with_slow
from engine_cases import CASES, Case, Net, ParallelNet, distance, parallel_losses, plain_step, train
from processes import Program, torchrun_environments
from small_experts import ExpertsLoss
from zero3_worker import EXPERTS, spawn

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed here"
)
QUICK = ("ragged", "recomputed", "clipped", "MLP", "a loss without logits, head whole")
NAMES = with_slow(CASES, QUICK)
AT_FOUR = (*QUICK, "one tile", "frozen tiles", "offloaded")
_WORLDS = [2, *(pytest.param(world, marks=pytest.mark.slow) for world in (1, 4))]


@pytest.fixture(scope="module", params=_WORLDS)
def outcome(request):
    return spawn(request.param, chosen(request))


@pytest.fixture(scope="module")
def dense():
    """Parameters and losses of each case, in float64 and in float32, trained in this process."""
    found = {}
    for name, case in CASES.items():
        for dtype in (torch.float64, torch.float32):
            model = Net(case, dtype)
            losses = train(model, case)
            found[name, dtype] = {**model.state_dict(), "losses": torch.tensor(losses)}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_ranks_train_as_the_dense_model_does(outcome, dense, name):
    """After four steps of AdamW tiles differ from the float64 run at most 4 times as dense float32.

    Losses are those of the dense run too, step by step.
    """
    truth, rounded = dense[name, torch.float64], dense[name, torch.float32]
    losses = torch.tensor([rank["cases"][name]["losses"] for rank in outcome.ranks]).mean(0)

    assert distance({**outcome.states[name], "losses": losses}, truth) <= 4 * distance(
        rounded, truth
    )


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_train_as_the_dense_model_does(outcome, name):
    """Of a mixture of experts in tiles, of which each rank's tokens hit others."""
    results = {}
    for dtype in (torch.float64, torch.float32):
        model = ExpertsLoss(name, dtype, **EXPERTS[name])
        losses = train(model, Case())
        results[dtype] = {**model.state_dict(), "losses": torch.tensor(losses)}
    truth, rounded = results[torch.float64], results[torch.float32]
    losses = torch.tensor([rank["cases"][name]["losses"] for rank in outcome.ranks]).mean(0)

    assert distance({**outcome.states[name], "losses": losses}, truth) <= 4 * distance(
        rounded, truth
    )


def test_tensor_parallel_linears_that_return_their_bias_train(outcome):
    """Megatron's linears, each of half the width, give the losses they give without ZeRO-3."""
    expected = parallel_losses(plain_step(ParallelNet()))

    assert expected[-1] < expected[0]
    for rank in outcome.ranks:
        assert rank["parallel"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", [*NAMES, *EXPERTS])
def test_at_most_two_tiles_are_gathered_at_once(outcome, name):
    """The tile in use and the next: in forward, backward, recomputation and after evaluation.

    Of an MLP in tiles, the tiles of all its layers that are used together. Nothing else, such as a
    checkpoint, keeps the values of others in memory. What is called twice, here all eight tiles of
    an MLP, DeepSpeed frees after its last backward.
    """
    case = CASES.get(name, Case())
    in_use = 8 if case.twice else {"": 1, "plain": 2}.get(case.mlp, 3)
    for rank in outcome.ranks:
        seen = rank["cases"][name]
        assert seen["elements"] <= (in_use + 1) * seen["largest"]
        if len(outcome.ranks) > 1:  # one rank gathers into its own shards
            assert seen["held"] <= (in_use + 1) * seen["largest"]


def test_no_mlp_is_computed_whole(outcome):
    """Their tiles are gathered, and the blocks of each computed meanwhile."""
    assert all(rank["computed"] == 0 for rank in outcome.ranks)


def test_no_logits_are_computed_for_a_loss(outcome):
    """Though DeepSpeed has hooks on every module that logits pass."""
    assert all(rank["logits"] == 0 for rank in outcome.ranks)


@pytest.mark.parametrize("by_module", [False, True])
def test_a_loss_in_the_model_is_computed_without_logits(outcome, by_module):
    """By a function or by `nn.CrossEntropyLoss`; the logits can be had until the step."""
    for rank in outcome.ranks:
        found = rank["heads"][by_module]
        assert found["computed"] == 0
        assert found["seen"] == ["DeferredLogits", "Tensor", "DeferredLogits"]
        assert found["loss"] <= 1e-6
        assert found["logits"] <= 1e-5
        assert found["off"] == "Tensor"
        assert "read them before the optimizer's step" in found["after"]


@pytest.mark.parametrize("frozen", [False, True])
def test_a_loss_outside_the_model_trains_it(outcome, frozen):
    """Without logits too, by torch's own backward, over two of them; a penalty computes them."""
    for rank in outcome.ranks:
        found = rank["outside"][frozen]
        assert found["computed, True"] == 2
        assert found["losses, True"] == pytest.approx(found["losses, False"], rel=1e-6)


def test_deepspeed_by_itself_keeps_every_tile(outcome):
    """Without the config and without `hold` the tiling saves nothing."""
    for rank in outcome.ranks:
        assert rank["defaults"]["tiles"] == rank["defaults"]["all"]


def test_layers_made_inside_init_have_rank_0s_values(outcome):
    """Copied from a linear on rank 0, a partitioned one or tiles of another grid, or drawn."""
    for rank in outcome.ranks:
        assert all(rank["inside"].values()), rank["inside"]


def test_one_tile_is_gathered_at_a_time(outcome):
    """While tiles of linears and embeddings are copied, loaded and read."""
    assert all(rank["most"] == 1 for rank in outcome.ranks)


def test_a_copy_reaches_the_masters(outcome):
    """Values copied after `deepspeed.initialize` survive a step: odd sizes and 16 bits too."""
    for rank in outcome.ranks:
        assert all(rank["masters"].values()), rank["masters"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("no values", ["where nothing has values", "its own error says why"]),
        ("another shape", ["both must agree", "its own error says why"]),
        ("gathered", ["leave that context out"]),
        ("grids", ["make the same model"]),
        ("no engine", ["takes the engine"]),
        ("twice", ["attached already"]),
    ],
)
def test_what_cannot_work_is_refused_on_every_rank(outcome, case, words):
    """Every rank raises; none waits for another."""
    if len(outcome.ranks) == 1 and case in ("grids", "another shape"):
        pytest.skip("one rank agrees with itself")
    for rank in outcome.ranks:
        said = rank["refusals"][case]
        assert any(each in said for each in words), said


def test_a_config_that_keeps_tiles_is_said(outcome):
    """`hold` warns of each value of DeepSpeed's defaults that defeats the tiling."""
    for rank in outcome.ranks:
        assert any("stage3_max_reuse_distance" in each for each in rank["warned"])
        assert len(rank["warned"]) == 6


def test_the_code_of_the_documentation_runs():
    """In a process of its own, because DeepSpeed replaces functions of torch."""
    page = Path(__file__).parents[2] / "docs" / "engines.md"
    (code,) = re.findall(r"```python\n(# not run[^`]*)```", page.read_text(encoding="utf-8"))
    ran = Program(exec, code, {}, environment=torchrun_environments(1)[0])
    printed = ran.wait()

    assert ran.process.exitcode == 0, printed
    assert "stage3_max_reuse_distance is 1000000000" in printed

"""ZeRO-3 holds the tiles: real processes over gloo against the dense model in one process."""

from collections.abc import Mapping

import pytest
import torch
from engine_cases import CASES, Net, train
from torch import Tensor

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed here")
from zero3_worker import spawn

_WORLDS = [2, *(pytest.param(world, marks=pytest.mark.slow) for world in (1, 4))]


@pytest.fixture(scope="module", params=_WORLDS)
def outcome(request):
    return spawn(request.param)


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


def distance(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """The norm of all differences between two sets of tensors."""
    return sum((found[key] - truth[key]).norm().item() ** 2 for key in truth) ** 0.5


@pytest.mark.parametrize("name", CASES)
def test_ranks_train_as_the_dense_model_does(outcome, dense, name):
    """After ten steps of AdamW tiles are as near to the float64 run as dense float32 is, times 4.

    Losses are those of the dense run too, step by step.
    """
    truth, rounded = dense[name, torch.float64], dense[name, torch.float32]
    losses = torch.tensor([rank["cases"][name]["losses"] for rank in outcome.ranks]).mean(0)

    assert distance({**outcome.states[name], "losses": losses}, truth) <= 4 * distance(
        rounded, truth
    )


@pytest.mark.parametrize("name", CASES)
def test_at_most_two_tiles_are_gathered_at_once(outcome, name):
    """Forward and backward, ids as input, after evaluation, recomputed: the one and the next."""
    for rank in outcome.ranks:
        seen = rank["cases"][name]
        assert seen["elements"] <= 2 * seen["largest"]


def test_deepspeed_by_itself_keeps_every_tile(outcome):
    """Without the config and without `hold` the tiling saves nothing."""
    for rank in outcome.ranks:
        assert rank["defaults"]["tiles"] == rank["defaults"]["all"]

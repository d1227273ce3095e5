"""DistributedDataParallel trains tiles as it trains any parameter."""

import pytest
import torch
from ddp_worker import COMPUTING, IDS, Mlps, Net, Writer, rows, spawn, train
from torch import Tensor, nn

import memtile

LOSSES = ("losses", "losses, logits", "unused", "unused, both", "unused, both, of logits")


@pytest.mark.parametrize("kind", ["plain", *LOSSES, *COMPUTING])
def test_two_processes_train_a_tiled_model_as_one_trains_the_dense_one(kind: str) -> None:
    """After three steps both ranks hold the parameters of a single dense process, ties included.

    Also for a mean over uneven numbers of tokens, whose losses compute no logits. "unused": DDP
    searches for unused parameters, as transformers' Trainer has it do; "static": it learns a graph.
    """
    dense = Net() if kind == "plain" else Writer()
    train(dense, [IDS, IDS, IDS])

    ranks = spawn(kind)

    assert_same_parameters(ranks, dense)


def test_two_processes_train_two_stacked_mlps_as_one_trains_them() -> None:
    """Each weight is ready once, in blocks of few rows too, and ranks agree."""
    model = Mlps()
    train(model, rows(0, 1))

    ranks = spawn("mlps")

    assert_same_parameters(ranks, memtile.untile(model))


def assert_same_parameters(ranks: list[dict[str, Tensor]], model: nn.Module) -> None:
    """Those of each rank are the model's, and bit for bit the other rank's."""
    expected = model.state_dict()
    for found in ranks:
        assert list(found) == list(expected)
        for name, value in found.items():
            difference = (value - expected[name]).norm()
            assert difference <= 1e3 * torch.finfo(torch.float64).eps * expected[name].norm(), name
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in expected)

"""DistributedDataParallel trains tiles as it trains any parameter."""

import torch
from ddp_worker import IDS, Net, spawn, train


def test_two_processes_train_a_tiled_model_as_one_trains_the_dense_one() -> None:
    """After three steps both ranks hold the parameters of a single dense process, ties included."""
    dense = Net()
    train(dense, [IDS, IDS, IDS])

    ranks = spawn()

    expected = dense.state_dict()
    for found in ranks:
        assert list(found) == list(expected)
        for name, value in found.items():
            difference = (value - expected[name]).norm()
            assert difference <= 1e3 * torch.finfo(torch.float64).eps * expected[name].norm(), name
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in expected)

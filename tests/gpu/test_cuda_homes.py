"""Parked tiles whose working device is a GPU: pinned host memory, disks through pinned slabs."""

import copy

import pytest
import torch
from torch import nn

import memtile
from memtile.homes import aligned_buffer, allocation_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def small_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(67, 129), nn.ReLU(), nn.Linear(129, 31))
    return model.cuda()


def train(model, optimizer, steps=3):
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        x, y = torch.randn(17, 67, generator=generator), torch.randn(17, 31, generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x.cuda()), y.cuda())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def home_called(name):
    return memtile.DiskHome() if name == "disk" else name


@pytest.mark.parametrize("mode", ["classic", "in_backward"])
@pytest.mark.parametrize("name", ["device", "host", "disk"])
def test_every_home_trains_as_the_dense_model_does(name, mode):
    """Losses of three AdamW steps agree with torch's own over the dense model on the GPU."""
    dense = small_model()
    model = memtile.tile(copy.deepcopy(dense), out_splits=3, in_splits=2, home=home_called(name))
    ours = memtile.TileOptimizer(model, torch.optim.AdamW, mode=mode, lr=1e-2)

    losses = train(model, ours)

    expected = train(dense, torch.optim.AdamW(dense.parameters(), lr=1e-2))
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["host", "disk"])
def test_weights_stay_off_the_device(name):
    """`model.to("cuda")` leaves parked weights where they are; only biases are on the device."""
    model = memtile.tile(small_model(), out_splits=3, home=home_called(name))

    model.to("cuda")

    parked = [p for p in model.parameters() if allocation_of(p) is not None]
    assert len(parked) == 6
    assert all(p.is_cpu for p in parked)
    assert all(p.is_cuda for p in model.parameters() if allocation_of(p) is None)


def test_host_memory_and_slabs_are_pinned():
    """Both are registered with CUDA, page for page."""
    model = memtile.tile(small_model(), out_splits=3, home="host")

    assert model[0].linears[0][0].weight.is_pinned()
    assert aligned_buffer(5000).is_pinned()


def test_autocast_does_not_serve_an_earlier_tile():
    """Many tiles of one shape through the same slabs, in bfloat16: each product has its own."""
    dense = small_model()
    model = memtile.tile(copy.deepcopy(dense), out_splits=8, home=memtile.DiskHome())
    x = torch.randn(64, 67, device="cuda")

    with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(model(x), dense(x), rtol=2e-2, atol=2e-2)

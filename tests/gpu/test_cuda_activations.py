"""Activations of a GPU, parked in pinned host memory on a stream of their own, and on disk."""

import pytest
import torch
from saving_blocks import BATCH, LENGTH, SMALL, WIDTH, Blocks, equal
from torch import nn

import memtile

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MIB = 1 << 20


def gradients(model, context):
    torch.manual_seed(1)
    model.zero_grad()
    x = torch.randn(BATCH, LENGTH, WIDTH, device="cuda", requires_grad=True)
    with context:
        loss = model(x * 1)
    loss.backward()
    return [loss.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("name", ["host", "disk"])
def test_gradients_have_the_same_bits(name, reentrant):
    """With and without recomputation, in several steps."""
    model = Blocks(reentrant).cuda()
    parked = memtile.park_activations(name, smallest_bytes=SMALL, model=model)
    expected = gradients(model, torch.enable_grad())

    for _ in range(3):
        assert equal(gradients(model, parked), expected)


def test_what_is_modified_after_it_was_saved_comes_back_as_it_was():
    """Though the copy to the host may still be under way."""
    x = torch.randn(2048, 2048, device="cuda", requires_grad=True)
    with memtile.park_activations("host"):
        y = x * 1
        loss = y.square().sum()
        with torch.no_grad():
            y.zero_()
    loss.backward()

    assert torch.equal(x.grad, 2 * x.detach())


def test_the_devices_memory_holds_a_few_layers():
    """Of 32 layers that keep 16 MiB each, most are in host memory when forward ends."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(1024, 1024), nn.Tanh()) for _ in range(32)))
    model.cuda()
    x = torch.randn(4096, 1024, device="cuda")

    def peak(context):
        model.zero_grad(set_to_none=False)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with context:
            loss = model(x).sum()
        loss.backward()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    peak(torch.enable_grad())  # gradients and workspaces are there afterwards
    plain = peak(torch.enable_grad())
    parked = peak(memtile.park_activations("host"))
    assert plain >= 32 * 16 * MIB
    # 8 clones under way, 6 pieces that were fetched, and what one layer works with.
    assert parked <= 20 * 16 * MIB

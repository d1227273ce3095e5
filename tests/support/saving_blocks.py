"""A small transformer that saves all sorts of tensors, and a function that saves given ones."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH, LENGTH, BATCH, BLOCKS = 24, 37, 2, 3
SMALL = 1000  # bytes: rstd and mean of a LayerNorm are smaller here


class Block(nn.Module):
    """Fused projections cut by views, a mask that all blocks share, dropout, a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gate_up, self.down = nn.Linear(WIDTH, 6 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        parts = self.qkv(self.first(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (3, -1)).transpose(1, 2) for part in parts)
        scores = (q @ k.transpose(-1, -2)).masked_fill(~mask, -torch.inf).softmax(-1)
        x = x + self.out((scores @ v).transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.second(x)).chunk(2, -1)
        return x + self.down(
            nn.functional.dropout(nn.functional.silu(gate) * up, 0.1, self.training)
        )


class Blocks(nn.Module):
    """Blocks one after another, recomputed by this kind of checkpointing (reentrant or not)."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reentrant, self.blocks = reentrant, nn.ModuleList(Block() for _ in range(BLOCKS))
        self.register_buffer("mask", torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril())

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x, self.mask)
            else:
                x = checkpoint(block, x, self.mask, use_reentrant=self.reentrant)
        return x.square().mean()


def step(model: nn.Module, parked: Any = None, inside: bool = False, seed: int = 1) -> list[Tensor]:
    """The loss and all gradients of one forward and backward; `parked` may be a context for it."""
    torch.manual_seed(seed)
    model.zero_grad()
    x = torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)
    with parked or contextlib.nullcontext():
        loss = model(x * 1)
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    return [loss.detach(), x.grad, *(p.grad for p in model.parameters())]


def equal(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Whether all have the same bits."""
    assert len(ours) == len(theirs) > 0
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class Keeping(torch.autograd.Function):
    """Saves tensors for backward, which puts them into `found`; gives `x` times two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, found: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.found = found
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.found[:] = ctx.saved_tensors  # once: each look unpacks them
        return (gradient * 2, None, *(None for _ in ctx.found))


def kept(*tensors: Tensor, x: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """A sum to run backward from, to `x`, and the list that then has what backward found."""
    found: list[Tensor] = []
    x = torch.ones(1, requires_grad=True) if x is None else x
    return Keeping.apply(x, found, *tensors).sum(), found

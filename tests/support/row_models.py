"""A norm and an MLP for tests of row tiles, with inputs, and a comparison in float64."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional


class Mlp(nn.Module):
    """A norm and a gated MLP, with a residual."""

    def __init__(self, width: int = 13, inner: int = 29) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.down = nn.LayerNorm(width), nn.Linear(inner, width)
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """(…, width) of (…, width)."""
        h = self.norm(x)
        return x + self.down(functional.silu(self.gate(h)) * self.up(h))


def batch(*lead: int, width: int = 13) -> Tensor:
    """A seeded input that requires grad."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*lead, width, generator=generator, dtype=torch.float64).requires_grad_()


def gradients(y: Tensor, *of: Tensor) -> list[Tensor]:
    """Gradients of a seeded combination of the results."""
    generator = torch.Generator().manual_seed(2)
    seed = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    return list(torch.autograd.grad(y, of, seed))


def assert_close(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> None:
    """Equal up to the rounding of float64 sums."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= 1e-13 * (1 + b.norm())

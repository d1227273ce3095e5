"""`StackTile`: some rows of a stack of experts, as a module; parked or not."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from memtile import ops
from memtile.homes import Home, is_parked
from memtile.layers import checks
from memtile.layers.parked import ParkedModule
from memtile.transfer import ParkedSource, catch_up, layer_call


class StackTile(nn.Module):
    """Some rows of a stack: those of several whole experts, of one, or a part of one's.

    Args:
        experts: how many experts it holds; 1 for a part of one.
        rows: of all of them.
        columns: as many as the stack has.
        is_transposed: whether an expert's matrix is kept as (in, out).
        device: of the weight (rows, columns), which has no starting values.
        dtype: of the weight.
    """

    def __init__(
        self,
        experts: int,
        rows: int,
        columns: int,
        is_transposed: bool = False,
        *,
        device: Any = None,  # as torch takes it
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.experts, self.is_transposed = experts, is_transposed
        self.weight = nn.Parameter(torch.empty(rows, columns, device=device, dtype=dtype))

    def forward(self, input: Tensor, counts: Sequence[int], used: Sequence[Tensor] = ()) -> Tensor:
        """(N, out) of rows (N, in) that are grouped by expert, `counts[e]` for expert e.

        `used` are the weights of all tiles that the experts module uses, in order, to read ahead.
        """
        groups = ops.Groups(tuple(counts), self.is_transposed)
        if not (ops.transformed() or checks.is_plain(self, type(self))):  # an engine hooks it
            checks.check_dtypes_and_devices("StackTile", [input], self.weight, same_device=False)
            x = input.to(ops.autocast_dtype(input) or input.dtype)
            return ops.gathered_linear(x, self.weight, groups=groups)
        return ops.grouped_linear(input, groups.matrices(self.weight), groups.counts)

    def extra_repr(self) -> str:
        """Experts and shape."""
        return f"experts={self.experts}, {tuple(self.weight.shape)}"


class ParkedStackTile(ParkedModule, StackTile):
    """A `StackTile` whose weight is parked; it is in memory for the products only."""

    resident_class: ClassVar[type[nn.Module]] = StackTile

    def __init__(
        self,
        *shape: Any,  # as a `StackTile` takes it
        device: Any = None,  # as torch takes it
        dtype: torch.dtype | None = None,
        home: Home | str = "host",
    ) -> None:
        StackTile.__init__(self, *shape, device="meta", dtype=dtype)
        self._park_weight(home, self.weight.shape, device, dtype)

    def forward(self, input: Tensor, counts: Sequence[int], used: Sequence[Tensor] = ()) -> Tensor:
        """As of a `StackTile`."""
        weight: Any = self.weight  # functional_call and parametrizations put other tensors there
        if ops.transformed() or not is_parked(weight) or not weight.numel():
            catch_up((weight,))
            return super().forward(input, counts, used)
        checks.check_dtypes_and_devices("StackTile", [input], weight, same_device=False)
        x = input.to(ops.autocast_dtype(input) or input.dtype)
        groups = ops.Groups(tuple(counts), self.is_transposed)
        with layer_call():
            source = ParkedSource(weight, used or (weight,))
            return ops.parked_linear(x, weight, None, source, groups)

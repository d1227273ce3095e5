"""A call of a row-wise function: which of its arguments are cut, and how many rows fit a budget."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from memtile import ops
from memtile.costmodel.byte_sizes import format_byte_size
from memtile.errors import BudgetError, RowTilesError
from memtile.geometry import spans_of

_PROBED = 64  # rows of the smaller of two tiles that are measured


class BoundCall:
    """A function with its arguments, called with the tensors among them.

    Attributes:
        tensors: those among the arguments.
        lead: the leading dimensions that rows are.
        cut: whether each tensor is cut.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.name, self._function = name, function
        self._module: nn.Module | None = None
        self._given, self._form = tree_flatten((args, kwargs))
        self.tensors = [each for each in self._given if isinstance(each, Tensor)]
        self.lead = self.tensors[0].shape[:-1] if self.tensors else torch.Size()
        self.cut = tuple(
            not number
            or (tensor.shape[: len(self.lead)] == self.lead and type(tensor) is not nn.Parameter)
            for number, tensor in enumerate(self.tensors)
        )

    def keep_to(self, module: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        """Refuse calls where the module has other parameters than these."""
        self._module, self._parameters = module, parameters

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        """Its result for the rows of a tile."""
        if self._module is not None:
            self._check_parameters(self._module)
        following = iter(tensors)
        given = [next(following) if isinstance(e, Tensor) else e for e in self._given]
        args, kwargs = tree_unflatten(given, self._form)
        result = self._function(*args, **kwargs)
        lead = tensors[self.cut.index(True)].shape[: len(self.lead)]
        for each in tree_leaves(result):
            self._check(each, lead)
        return result

    def _check_parameters(self, module: nn.Module) -> None:
        if [*map(id, module.parameters())] != [*map(id, self._parameters)]:
            raise RowTilesError(
                f"{self.name}: its parameters were replaced between its forward and its backward, "
                "as torch.func.functional_call does: row tiles would be computed again with "
                "others; use torch.func.grad, or memtile.untile(module)"
            )

    def _check(self, result: object, lead: torch.Size) -> None:
        if (isinstance(result, Tensor) and result.shape[: len(lead)] == lead) or result is None:
            return
        what = tuple(result.shape) if isinstance(result, Tensor) else f"a {type(result).__name__}"
        raise RowTilesError(
            f"{self.name}: it gave {what} for a tile of {lead.numel()} rows; results must be "
            f"tensors ({', '.join(map(str, lead))}, …), each row of which depends on the same row "
            "of the inputs only. An argument that is broadcast over rows must be expanded to "
            "theirs before"
        )

    def kind(self) -> object:
        """What tells inputs apart whose tiles take different memory."""
        lead, device = len(self.lead), self.tensors[0].device.type
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        shapes = (
            (tensor.shape[lead if cut else 0 :], tensor.dtype, tensor.requires_grad)
            for tensor, cut in zip(self.tensors, self.cut, strict=True)
        )
        return tuple(shapes), device, autocast

    def rows_within(self, budget: int) -> int:
        """How many rows' activations and their gradients fit; BudgetError for none.

        The call must have two rows at least.
        """
        few = min(_PROBED, self.lead.numel() // 2)
        by_row = -(-(self._peak(2 * few) - self._peak(few)) // few)
        if by_row > budget:
            raise BudgetError(
                f"{self.name}: a row takes {format_byte_size(by_row)} of activations and their "
                f"gradients, and budget= is {format_byte_size(budget)}; give at least as much"
            )
        return budget // max(1, by_row)

    def _peak(self, rows: int) -> int:
        """Bytes that a tile of so many rows makes, at most at once, forward and backward."""
        (span,) = spans_of((0, rows))
        call = ops.RowCall(self, self.lead, self.cut, (span,), self.name)
        kept, apart = ops.kept_random_states(self.tensors), ops.saved_for_itself()
        with kept, apart, ops.LiveBytes() as live:
            given = [
                call.part(call.flat(tensor), span).detach() if cut else tensor.detach()
                for tensor, cut in zip(self.tensors, self.cut, strict=True)
            ]
            trained = [x.requires_grad_() for x in given if x.is_floating_point()]
            needed = [r for r in ops.tensors_in(self(given)) if r.requires_grad]
            if needed and trained and torch.is_grad_enabled():
                seeds = [torch.ones_like(result) for result in needed]
                torch.autograd.grad(needed, trained, seeds, allow_unused=True)
        return sum(live.peak)

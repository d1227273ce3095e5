"""`tile_rows`: a row-wise module or function, run over tiles of its rows.

Rows are the positions of all leading dimensions of the first tensor: a tensor (batch, sequence,
features) has batch · sequence rows, and a tile of it is (1, n, features). A module sees tensors of
the rank that it is used to, and the size of a tile depends neither on how many sequences there are
nor on how long they are.

There are three ways to run the tiles:
- as one autograd function (`ops.row_tiles`), in general;
- with a checkpoint of each tile, where an engine shards modules inside and hooks their calls: its
  ranks agree on the number of tiles first, since each tile gathers; and for `torch.compile`;
- not at all, under `torch.func` and other transforms: the function is called with everything.
"""

from collections.abc import Callable, Sequence
from functools import partial, update_wrapper
from types import MethodType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn

from memtile import ops
from memtile.costmodel.budget import checked_size
from memtile.costmodel.byte_sizes import format_byte_size
from memtile.errors import ArgumentError, RowTilesError, check_whole_number
from memtile.geometry import partition_uniform, spans_of
from memtile.layers.bound_call import BoundCall
from memtile.layers.derived_class import ChangedModule, apply_change, undo_change
from memtile.layers.values import groups_of

F = TypeVar("F", bound=Callable[..., Any])


def tile_rows(
    module_or_function: F, *, rows: int | None = None, budget: int | str | None = None
) -> F:
    """Run a row-wise module or function over tiles of rows, computed again in backward.

    What it computes between input and output then exists for one tile at a time, in forward and in
    backward. Row-wise means that each row of the results depends on the same row of the inputs
    only, as in norms, MLPs, heads and adapters, but not in attention or batch norm. This is not
    checked, except that results have the rows of the tile and that no buffer changes.

    Rows are all leading dimensions (…) of the first tensor (…, features) among the arguments. Other
    tensors with the same leading dimensions are cut too, also in tuples, lists and dicts;
    parameters and all other arguments are passed whole. Results are tensors, or tuples, lists or
    dicts of them.

    A module is changed in place: its class becomes one derived from its own. Names, hooks,
    attributes and `isinstance` stay; its own hooks see whole tensors, those of modules inside see
    tiles. `memtile.untile` undoes it. A second call replaces the size.

    Args:
        module_or_function: called with tensors.
        rows: of a tile, at most. Tiles are as even as possible.
        budget: instead, bytes or a size such as "256MiB" that the activations of a tile and their
            gradients may take: as many rows as fit, measured at the first call with each kind of
            input.

    Returns:
        The module itself, or a function.

    Raises:
        ArgumentError: it cannot be called, has no forward or one of its own on the instance, or
            there is not one of `rows` and `budget`.

    The call raises RowTilesError where results do not have the rows of the tile, a buffer changes
    (batch norm in training), or a tensor is used that was computed before and needs a gradient
    (pass it as an argument); BudgetError where not even a row fits.

    Examples:
        >>> mlp = torch.nn.Sequential(
        ...     torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8)
        ... )
        >>> memtile.tile_rows(mlp, rows=16)(torch.randn(2, 20, 8)).shape
        torch.Size([2, 20, 8])
    """
    tiling, module = RowTiling(rows, budget), cast(Any, module_or_function)
    if not isinstance(module, nn.Module):
        if not callable(module) or isinstance(module, type):
            raise ArgumentError(
                f"{module!r} is neither a module nor a function; give one that is called with "
                "tensors"
            )
        return cast(F, _RowTiledFunction(module, tiling))
    if "forward" in module.__dict__ or isinstance(module, torch.jit.ScriptModule):
        raise ArgumentError(
            f"this {type(module).__name__} has a forward of its own on the instance, or is a "
            "script, so that its class cannot say how it is called; call tile_rows before what "
            "put it there"
        )
    if type(module).forward is nn.Module.forward:
        raise ArgumentError(
            f"a {type(module).__name__} has no forward; call tile_rows for each module in it"
        )
    apply_change(module, RowTiled)
    module.__dict__["row_tiling"] = tiling
    return module_or_function


def untile_rows(module: nn.Module) -> None:
    """Undo `tile_rows` of a module."""
    if undo_change(module, RowTiled):
        del module.__dict__["row_tiling"]


class RowTiled(ChangedModule):
    """A module that runs over row tiles: its class is derived from this and from its own."""

    row_tiling: "RowTiling"

    def extra_repr(self) -> str:
        """As of its own class, and the size of tiles."""
        return ", ".join(filter(None, [super().extra_repr(), str(self.row_tiling)]))

    def run(self, forward: partial[Any], args: Any, kwargs: Any) -> Any:
        """The results of all row tiles."""
        return self.row_tiling.run(forward, self, args, kwargs)


class _RowTiledFunction:
    """A function over row tiles."""

    def __init__(self, function: Callable[..., Any], tiling: "RowTiling") -> None:
        update_wrapper(self, function)
        self._function, self.row_tiling = function, tiling

    def __get__(self, instance: object, owner: type | None = None) -> "_RowTiledFunction":
        """The method of an instance, where it is written in the body of a class."""
        if instance is None:
            return self
        return _RowTiledFunction(MethodType(self._function, instance), self.row_tiling)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(self._function, "__self__", None)
        module = owner if isinstance(owner, nn.Module) else None
        return self.row_tiling.run(self._function, module, args, kwargs)


class RowTiling:
    """The size of the row tiles of one module or function.

    Args:
        rows: of a tile.
        budget: of its activations, instead.

    Raises:
        ArgumentError: not one of them is given, or it is no size.
    """

    def __init__(self, rows: int | None, budget: int | str | None) -> None:
        if (rows is None) == (budget is None):
            raise ArgumentError(f"rows={rows!r}, budget={budget!r}: give one of them")
        if rows is not None:
            check_whole_number("rows", rows, 1)
        self._rows, self._budget = rows, checked_size(budget, "budget")
        self._fitting: dict[object, int] = {}  # rows, by the kind of input

    def __str__(self) -> str:
        if self._budget is not None:
            return f"row_budget={format_byte_size(self._budget)}"
        return f"rows={self._rows}"

    def run(
        self,
        function: Callable[..., Any],
        module: nn.Module | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """What the function gives for these arguments; the module is what it belongs to."""
        name = _name(function if module is None else module)
        bound = BoundCall(function, name, args, kwargs)
        compiled = torch.compiler.is_compiling()
        if not bound.lead or (ops.transformed() and not compiled):
            return function(*args, **kwargs)
        inside = None if compiled else module  # nothing is asked of it while it is traced
        parameters = [] if inside is None else list(inside.parameters())
        groups, buffers = groups_of(parameters), _versions(inside)
        if inside is not None and not groups:  # engines replace parameters by gathered ones
            bound.keep_to(inside, parameters)
        number, rows = bound.lead.numel(), self._rows or self._fitting_rows(bound, inside, groups)
        count = _agreed(max(1, -(-number // rows)), groups, bound.tensors[0].device)
        spans = spans_of(partition_uniform(number, count))
        call = ops.RowCall(bound, bound.lead, bound.cut, spans, name)
        if compiled or groups:
            trained = bool(groups) and any(p.requires_grad for p in parameters)
            result = ops.checkpointed_row_tiles(call, bound.tensors, is_hooked=trained)
        else:
            result = ops.row_tiles(call, bound.tensors)
        _check_buffers(name, buffers, _versions(inside))
        return result

    def _fitting_rows(
        self, bound: BoundCall, module: nn.Module | None, groups: Sequence[Any]
    ) -> int:
        """As many rows as fit into the budget, measured once for each kind of input."""
        assert self._budget is not None
        if torch.compiler.is_compiling():
            if self._fitting:
                return min(self._fitting.values())
            raise ArgumentError(
                f"{bound.name}: budget= measures a tile, which compilers cannot do; call it once "
                "before it is compiled, or give rows="
            )
        kind = bound.kind(), torch.is_grad_enabled(), module is not None and module.training
        if kind not in self._fitting:
            if groups:
                raise ArgumentError(
                    f"{bound.name}: budget= measures a tile by itself, which the shards of an "
                    "engine cannot be used for; give rows="
                )
            if bound.lead.numel() < 2:  # nothing can be told apart, nor is it for the next call
                return 1
            self._fitting[kind] = bound.rows_within(self._budget)
        return self._fitting[kind]


def _agreed(count: int, groups: Sequence[Any], device: torch.device) -> int:
    """The largest number of tiles that any rank has, since all must make as many calls."""
    if not groups:
        return count
    most = torch.tensor(count, device=device)
    for group in groups:
        dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    return int(most.item())


def _versions(module: nn.Module | None) -> dict[str, int]:
    """How often each buffer was written to."""
    if module is None:
        return {}
    return {name: b._version for name, b in module.named_buffers() if not b.is_inference()}


def _check_buffers(name: str, before: dict[str, int], after: dict[str, int]) -> None:
    changed = [buffer for buffer, version in after.items() if before.get(buffer) != version]
    if changed:
        raise RowTilesError(
            f"{name}: its forward writes to the buffer {changed[0]}, as batch norm does in "
            "training: it would do so for each tile, and again in backward; leave it out of what "
            "is run over row tiles, or call eval() on what has the buffer"
        )


def _name(called: object) -> str:
    if isinstance(called, nn.Module):
        return getattr(called, "whole_class", type(called)).__name__
    return getattr(called, "__qualname__", None) or type(called).__name__

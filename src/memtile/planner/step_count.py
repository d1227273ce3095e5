"""Counts one step of a model on a meta copy that is tiled as a layout says."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from memtile.convert import (
    TilingDecision,
    put_mlps_in_tiles,
    replace_chosen,
    set_checkpointing,
    set_deferring_of,
    tileables,
)
from memtile.costmodel import Products
from memtile.costmodel.model_records import Activations, Counted, ParkedLayout
from memtile.errors import CannotTileError, MemtileError
from memtile.homes import DeviceHome, is_parked, register
from memtile.layers import ParkedModule
from memtile.planner.model_survey import Survey
from memtile.planner.operation_count import count_step
from memtile.transfer import SavedPiece, SavedPieces, bytes_of, park_each_forward


@dataclass(frozen=True)
class StepCount:
    """Counts a step of a layout, on a copy of the model whose parameters hold nothing."""

    seen: Survey  # of the model
    drops_gradients: bool  # each gradient is freed as soon as it is complete
    goes_home: bool  # gradients of what is parked leave memory: they are not counted
    watch: Callable[[nn.Module], None] | None = None  # is called with each copy before it runs
    workspaces: Callable[[Products], int] | None = None  # what the library keeps for products

    def __call__(self, layout: ParkedLayout, activations: Activations) -> Counted:
        """The step of this layout; CannotTileError where the model's code asks for values."""
        seen = self.seen
        meta_copy, decisions = make_meta_copy(seen.model), _with_grids(seen.decisions, layout)
        meta_copy.train(seen.trains)
        for _, found in list(tileables(meta_copy)):
            if found.stack is not None and found.stack.reads_values:
                found.stack.owner.adopt(found.module)
        if any(decision.tiled for decision in decisions):
            _park(meta_copy, decisions)
        set_deferring_of(meta_copy, True)
        set_checkpointing(meta_copy, activations.recomputed)
        if activations.mlps_in_tiles:
            put_mlps_in_tiles(meta_copy)
        pieces = CountedPieces()
        if activations.parked:
            park_each_forward(meta_copy, pieces)
        if self.watch is not None:
            self.watch(meta_copy)
        try:
            counted = count_step(
                meta_copy, seen.work, drops_gradients=self.drops_gradients, goes_home=self.goes_home
            )
        except MemtileError:
            raise
        except Exception as error:  # the model's own code, which may do anything
            raise CannotTileError(
                f"a step of {type(seen.model).__name__} cannot be counted with shapes alone "
                f"({type(error).__name__}: {error}); give work=…, a forward that needs no values, "
                "or tile it without a plan, with memtile.tile(model, max_tile_bytes=…, home=…)"
            ) from error
        counted = replace(counted, parked_bytes=pieces.nbytes, largest_parked=pieces.largest)
        if self.workspaces is None:
            return counted
        return replace(counted, workspace_bytes=self.workspaces(counted.products))


class CountedPieces(SavedPieces):
    """Pieces of a meta model's activations.

    Attributes:
        nbytes: of all of them, in whole pages.
        largest: of the largest one.
    """

    are_counted = True

    def __init__(self) -> None:
        super().__init__(DeviceHome("meta"))
        self.nbytes = self.largest = 0

    def store(self, tensor: Tensor, start: int, stop: int, label: str) -> SavedPiece:
        """A piece that is nowhere; one of ids, whose values are needed, stays in memory."""
        with torch._C._DisableTorchDispatch():
            allocation = self.home.allocate((stop - start,), torch.uint8)
        self.nbytes += allocation.room
        self.largest = max(self.largest, allocation.room)
        piece = SavedPiece(self, allocation, tensor.device)
        if not tensor.is_meta:
            piece.held = bytes_of(tensor, start, stop), None
        return piece

    def values(self, piece: SavedPiece) -> Tensor:
        """Bytes in memory, as those of a mapped piece are, until no node needs them any more."""
        if piece.held is None:
            with torch._C._DisableTorchDispatch():
                like = piece.allocation.tensor()
            piece.held = torch.empty_like(like), None
        return piece.held[0]


def make_meta_copy(model: nn.Module) -> nn.Module:
    """A copy whose parameters are on the meta device, tied as they are; buffers are shared."""
    memo: dict[int, object] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        meta = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(meta, parameter.requires_grad)
    return copy.deepcopy(model, memo)


def _park(meta_copy: nn.Module, decisions: Sequence[TilingDecision]) -> None:
    """Tile a meta copy in place, its tiles parked in a home on the meta device."""
    home = DeviceHome("meta")
    replace_chosen(meta_copy, decisions, home)
    for module in meta_copy.modules():
        weight = module._parameters.get("weight") if isinstance(module, ParkedModule) else None
        if weight is not None and not is_parked(weight):
            register(weight, home.allocate(weight.shape, weight.dtype))


def _with_grids(decisions: Sequence[TilingDecision], layout: ParkedLayout) -> list[TilingDecision]:
    grids = {name: layout.grid_of(weight) for weight in layout.weights for name in weight.names}
    return [
        replace(decision, tiled=grids[decision.name] is not None, grid=grids[decision.name])
        for decision in decisions
    ]

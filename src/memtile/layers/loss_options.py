"""What a loss over tiles of the vocabulary is given, and the checks of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memtile import ops
from memtile.errors import (
    ArgumentError,
    TileDtypeError,
    TileIndexError,
    TileShapeError,
    check_whole_number,
)
from memtile.layers.head_tiles import NAME, Head, classes_of, head_sums

Blocks = tuple[int | None, int | None]  # rows and classes


@dataclass(frozen=True)
class LossOptions:
    """How losses are made of sums of logits."""

    weight: Tensor | None
    reduction: str
    ignore_index: int
    label_smoothing: float
    num_items: int | Tensor | None
    z_loss: float

    def check(self, classes: int) -> None:
        """Raise where one is outside its range."""
        if self.reduction not in ("mean", "sum", "none"):
            raise ArgumentError(f'reduction={self.reduction!r} must be "mean", "sum" or "none"')
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ArgumentError(f"label_smoothing={self.label_smoothing} must be from 0 to 1")
        if self.weight is not None and self.weight.shape != (classes,):
            raise TileShapeError(
                f"{NAME}: weight is {tuple(self.weight.shape)}, one factor for each class: "
                f"({classes},)"
            )
        if self.num_items is not None and self.reduction != "mean":
            raise ArgumentError(
                f"num_items={self.num_items} is what the mean divides by, and "
                f'reduction={self.reduction!r} divides by nothing; use reduction="mean"'
            )


@dataclass(frozen=True)
class Logits:
    """A head, and what its logits go through."""

    head: Head
    bias: Tensor | None
    softcap: float | None
    scale: float

    def check_options(self) -> None:
        """Raise where one is outside its range."""
        if self.softcap is not None and not self.softcap > 0.0:
            raise ArgumentError(f"softcap={self.softcap} must be above 0; None: logits as they are")

    def check(self, input: Tensor) -> int:
        """How many classes there are; raises where an option or the bias does not fit."""
        self.check_options()
        classes = classes_of(self.head)
        if input.dim() == 0:
            raise TileShapeError(f"{NAME}: the input has no dimensions; it must be (…, features)")
        if self.bias is not None and self.bias.shape != (classes,):
            raise TileShapeError(
                f"{NAME}: linear_bias is {tuple(self.bias.shape)}; it must be ({classes},)"
            )
        return classes

    def sums(self, input: Tensor, query: ops.LogitQuery, blocks: Blocks) -> ops.LogitSums:
        """Those of the logits of the input (…, H), of each token (N,)."""
        for name, size in zip(("block_rows", "block_classes"), blocks, strict=True):
            if size is not None:
                check_whole_number(name, size, 1)
        asked = query.through(self.scale, self.softcap)
        return head_sums(self.head, self.bias, rows_of(input), asked, *blocks)


def rows_of(input: Tensor) -> Tensor:
    """The tokens (N, H) of an input (…, H)."""
    return input.reshape(-1, input.shape[-1])


def check_classes(target: Tensor, lead: Sequence[int], classes: int, ignore_index: int) -> None:
    """Raise where the target is no class for each token of an input (lead…, H)."""
    if target.dtype not in (torch.int64, torch.int32, torch.uint8):
        raise TileDtypeError(
            f"{NAME}: the target is {target.dtype}; classes are int64, int32 or uint8, "
            "probabilities floating point"
        )
    if target.shape != torch.Size(lead):
        raise TileShapeError(
            f"{NAME}: the target is {tuple(target.shape)}; classes of an input (…, features) must "
            f"be {tuple(lead)}"
        )
    if ops.transformed() or target.is_meta or not target.numel():
        return
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if not target.is_cpu:  # without waiting for the device
        torch._assert_async(~wrong.any())
    elif wrong.any():
        raise TileIndexError(
            f"{NAME}: a target is {int(target[wrong][0])}, the classes are 0 to {classes - 1}; "
            f"tokens to leave out are ignore_index={ignore_index}"
        )

"""Ranks that act together: an error of one is raised on all; models and options are compared."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from memtile.errors import EngineError, MemtileError
from memtile.layers import whole_shape

T = TypeVar("T")


class Ranks:
    """The ranks of a process group (None: all), or this process alone where there is no group."""

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.group = group
        self.is_alone = not (dist.is_available() and dist.is_initialized())
        self.number = 0 if self.is_alone else dist.get_rank(group)

    def each(self, act: Callable[[], T]) -> T:
        """The result of `act` on this rank, once it has succeeded on every rank.

        Where it failed, every rank raises the error of the first such rank.
        """
        result, failure = self._attempt(act)
        for found in self._gathered(failure):
            if found is not None:
                raise found
        value: T = result
        return value

    def check_same(self, what: str, value: object) -> None:
        """Raise EngineError on every rank where `str(value)` differs between ranks."""
        first, *others = self._gathered(str(value))
        for rank, theirs in enumerate(others, 1):
            if theirs != first:
                raise EngineError(
                    f"rank {rank} was given {what} {theirs}, and rank 0 {first}: give the same on "
                    "each rank"
                )

    def first(self, act: Callable[[], T]) -> T:
        """The result, or the error, of `act` on the first rank, which alone runs it."""
        answers: list[Any] = [self._attempt(act) if self.number == 0 else None]
        if not self.is_alone:
            source = 0 if self.group is None else dist.get_global_rank(self.group, 0)
            with self.answering():
                dist.broadcast_object_list(answers, src=source, group=self.group)
        result, failure = answers[0]
        if failure is not None:
            raise failure
        value: T = result
        return value

    def _gathered(self, value: T) -> list[T]:
        if self.is_alone:
            return [value]
        with self.answering():
            return of_all_ranks(value, self.group)

    @contextmanager
    def answering(self, *, collectives_only: bool = False) -> Iterator[None]:
        """Raise EngineError in place of torch's RuntimeError about a rank that is gone.

        Every RuntimeError is taken for one, or only what a collective raises.
        """
        try:
            yield
        except MemtileError:
            raise
        except RuntimeError as error:
            of_collective = isinstance(error, dist.DistError) or "gloo" in str(error)
            if collectives_only and not of_collective:
                raise
            raise EngineError(
                f"rank {self.number} waits for another one that was killed, or did not answer "
                f"within the process group's timeout ({error}); start all ranks again"
            ) from error

    def _attempt(self, act: Callable[[], Any]) -> tuple[Any, MemtileError | None]:  # of any act
        try:
            return act(), None
        except MemtileError as error:
            return None, error
        except Exception as error:
            if self.is_alone:
                raise
            failure = EngineError(f"rank {self.number} failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            return None, failure


def of_all_ranks(value: T, group: ProcessGroup | None = None) -> list[T]:
    """The values that all ranks give, in the order of ranks; each can be pickled."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def check_process_group() -> None:
    """Raise EngineError where there is no process group."""
    if not dist.is_initialized():
        raise EngineError(
            "there is no process group: start the script with torchrun, and call "
            "torch.distributed.init_process_group() first"
        )


def check_agreement(
    model: nn.Module, options: object, groups: Sequence[ProcessGroup | None] = (None,)
) -> None:
    """Raise EngineError on every rank where models, or the `repr` of options, differ.

    Such ranks would wait for each other forever. `groups` together reach every rank; None: all.
    """
    parameters = [
        (name, whole_shape(parameter), str(parameter.dtype), parameter.requires_grad)
        for name, parameter in model.named_parameters()
    ]
    digest = hashlib.sha256(repr((parameters, options)).encode()).hexdigest()
    known = {dist.get_rank(): digest}
    for group in groups:
        known = dict(item for each in of_all_ranks(known, group) for item in each.items())
    odd = sorted(rank for rank, theirs in known.items() if theirs != known[min(known)])
    if odd:
        raise EngineError(
            f"ranks {odd} have another model, other tiles or other arguments than rank "
            f"{min(known)}: make the same model with the same grids on each rank"
        )

"""The processes of a group as one: what fails on one of them is raised by all, and none waits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from memtile.errors import EngineError, MemtileError

T = TypeVar("T")


class Ranks:
    """The ranks of a process group, or this process alone where there is none.

    Args:
        group: None: all ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.is_alone = not (dist.is_available() and dist.is_initialized())
        self.number = 0 if self.is_alone else dist.get_rank(group)

    def each(self, act: Callable[[], T]) -> T:
        """What `act` gives on this rank, once it has worked on every rank.

        Raises:
            MemtileError: it failed somewhere; on each rank what the first of them raised.
            EngineError: a rank is gone.
        """
        result, failure = self._attempt(act)
        failures: list[Any] = [failure]  # exceptions and None
        if not self.is_alone:
            failures = [None] * dist.get_world_size(self.group)
            with self.answering():
                dist.all_gather_object(failures, failure, group=self.group)
        for found in failures:
            if found is not None:
                raise found
        assert result is not None
        return result[0]

    def check_same(self, what: str, value: object) -> None:
        """Refuse to go on where ranks were given different things.

        Raises:
            EngineError: they were; on each rank.
        """
        theirs = self.first(lambda: str(value))

        def compare() -> None:
            if str(value) != theirs:
                raise EngineError(
                    f"rank {self.number} was given {what} {value}, and rank 0 {theirs}: give the "
                    "same on each rank"
                )

        self.each(compare)

    def first(self, act: Callable[[], T]) -> T:
        """What `act` gives on the first rank, on all of them.

        Raises:
            MemtileError: it failed there; on each rank.
            EngineError: a rank is gone.
        """
        told: list[Any] = [self._attempt(act) if self.number == 0 else None]
        if not self.is_alone:
            source = 0 if self.group is None else dist.get_global_rank(self.group, 0)
            with self.answering():
                dist.broadcast_object_list(told, src=source, group=self.group)
        result, failure = told[0]
        if failure is not None:
            raise failure
        value: T = result[0]
        return value

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Inside, what torch raises where another rank is gone becomes one error that says so.

        Raises:
            EngineError: it is.
        """
        try:
            yield
        except MemtileError:
            raise
        except RuntimeError as error:
            raise self._gone(error) from error

    @contextmanager
    def missing_none(self) -> Iterator[None]:
        """As `answering`, for code that does more than wait: only what a collective raises.

        Raises:
            EngineError: another rank is gone.
        """
        try:
            yield
        except MemtileError:
            raise
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or "gloo" in str(error):
                raise self._gone(error) from error
            raise

    def _gone(self, error: RuntimeError) -> EngineError:
        return EngineError(
            f"rank {self.number} waits for another one that was killed, or did not answer "
            f"within the process group's timeout ({error}); start all ranks again"
        )

    def _attempt(self, act: Callable[[], T]) -> tuple[tuple[T] | None, MemtileError | None]:
        try:
            return (act(),), None
        except MemtileError as error:
            return None, error
        except Exception as error:
            if self.is_alone:
                raise
            failure = EngineError(f"rank {self.number} failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            return None, failure

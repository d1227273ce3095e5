"""The errors of the command line: one sentence each, with the way out in it."""

from memtile.errors import MemtileError


class CommandError(MemtileError, ValueError):
    """An option, a file or a folder that the command cannot work with."""


class Interrupted(MemtileError):
    """A signal asked the command to stop; `code` is the exit code that says which."""

    def __init__(self, sentence: str, code: int) -> None:
        super().__init__(sentence)
        self.code = code


class WorkerError(MemtileError, RuntimeError):
    """A process of the demo that ended without a result; `log` holds what it printed."""

    def __init__(self, sentence: str, log: str) -> None:
        super().__init__(sentence)
        self.log = log

"""Processes forked from one server that has imported torch, DeepSpeed and memtile already.

A process that imports them itself takes seconds before its first line. The server has run no
operation, so it has no threads that a fork would lose; it is started with the first process.
"""

import functools
import gc
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch

from memtile.cli import main

_PRELOADED = [
    "memtile.cli.app",
    "memtile.engines.torch_fsdp2",
    "memtile.engines.distributed_checkpoints",
    "transformers.models.llama.modeling_llama",
    "torch._dynamo",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # imports torch's compiler: three seconds
]

os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed asks for it when it is imported
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(_PRELOADED)


def start_ranks(run: Callable[..., None], world: int, *arguments: object) -> None:
    """Call `run` with (rank, *arguments) in so many processes, and wait for all of them.

    Raises:
        torch.multiprocessing.ProcessRaisedException: one of them raised; the others are ended.
    """
    torch.multiprocessing.start_processes(
        _rank, (run, arguments), nprocs=world, start_method="forkserver"
    )


def _rank(rank: int, run: Callable[..., None], arguments: tuple[object, ...]) -> None:
    _begun(run, rank, *arguments)


def started(run: Callable[..., None], *arguments: object) -> BaseProcess:
    """A process that calls `run` with the arguments."""
    process = context.Process(target=_begun, args=(run, *arguments))
    process.start()
    return process


def _begun(run: Callable[..., None], *arguments: object) -> None:
    _begin()
    run(*arguments)


def _begin() -> None:
    """Spare the process what no test is about, and what takes half of its time.

    The search for garbage among all that the server imported, of which every page is copied then:
    DeepSpeed collects for each optimizer. A process that it starts for each gradient it reduces, to
    ask for the cores of this machine. And its sums in shared memory: a minute to compile.
    """
    gc.freeze()
    if torch_of_deepspeed := sys.modules.get("deepspeed.comm.torch"):
        torch_of_deepspeed.build_shm_op = lambda: None  # type: ignore[attr-defined]
        numa = sys.modules["deepspeed.utils.numa"]
        numa.get_numa_cores = functools.cache(numa.get_numa_cores)  # type: ignore[attr-defined]


def launched(words: Sequence[object], world: int) -> "list[Command]":
    """`memtile WORDS…` in so many processes, with the environment that torchrun gives its ranks."""
    return [Command(words, rank) for rank in torchrun_environments(world)]


def torchrun_environments(world: int) -> list[dict[str, str]]:
    """The variables that torchrun gives each of so many ranks on one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    sizes = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world))
    return [{**address, **sizes, **rank} for rank in ranks]


class Program:
    """A function in a process of its own, with further variables of the environment.

    Attributes:
        process: the process; its `exitcode` is the function's once it has ended.
        output: what it prints to both streams, as a file of lines.
    """

    def __init__(
        self,
        run: Callable[..., object],
        *arguments: object,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        ours, theirs = context.Pipe(duplex=False)
        self.process = started(_printing_to, theirs, dict(environment or {}), run, *arguments)
        theirs.close()
        self.output = os.fdopen(os.dup(ours.fileno()), encoding="utf-8")

    def wait(self) -> str:
        """Wait for its end; gives what it printed that nobody has read."""
        with self.output:
            rest = self.output.read()
        self.process.join()
        return rest


class Command(Program):
    """`memtile WORDS…` as such a process."""

    def __init__(
        self, words: Sequence[object], environment: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(_command, [str(word) for word in words], environment=environment)


def _printing_to(
    output: Connection, environment: dict[str, str], run: Callable[..., object], *arguments: object
) -> None:
    os.environ |= environment
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    run(*arguments)


def _command(words: list[str]) -> None:
    sys.exit(main(words))


def killed(write: Callable[..., None], *arguments: object, after: int, seconds: float) -> list[int]:
    """Kill a process some seconds after it sent so many numbers; gives all that it sent.

    Calls `write` with the connection to send them through, and the arguments.
    """
    ours, theirs = context.Pipe(duplex=False)
    process = started(write, theirs, *arguments)
    theirs.close()
    sent = [ours.recv() for _ in range(after)]
    time.sleep(seconds)
    process.kill()
    process.join()
    while True:
        try:
            sent.append(ours.recv())
        except EOFError:
            return sent

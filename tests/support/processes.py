"""Processes forked from one server that has imported torch, DeepSpeed and memtile already.

A process that imports them itself takes seconds before its first line. The server has run no
operation, so it has no threads that a fork would lose; it is started with the first process.
"""

import multiprocessing
import os
import time
from collections.abc import Callable

import torch

_PRELOADED = [
    "memtile.cli",
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
    torch.multiprocessing.start_processes(run, arguments, nprocs=world, start_method="forkserver")


def killed(write: Callable[..., None], *arguments: object, after: int, seconds: float) -> list[int]:
    """Kill a process some seconds after it sent so many numbers; gives all that it sent.

    Calls `write` with the connection to send them through, and the arguments.
    """
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=write, args=(theirs, *arguments))
    process.start()
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

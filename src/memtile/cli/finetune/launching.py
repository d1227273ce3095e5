"""How a run over ranks is started: what its launcher leaves in the environment."""

import os
from typing import Final

from memtile.cli.errors import CommandError

ENGINES: Final = ("fsdp2", "zero3")


def check_launched() -> None:
    """Refuse to go on in a process that no launcher started.

    Raises:
        CommandError: it was started by itself.
    """
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        raise CommandError(
            "--engine trains over ranks, and this is one process by itself: start it with "
            "torchrun --nproc-per-node 2 -m memtile.cli finetune … (any number of processes)."
        )


def is_first_rank() -> bool:
    """Whether this is the process that talks."""
    return os.environ.get("RANK", "0") == "0"

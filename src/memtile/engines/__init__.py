"""Tiles over several ranks, with FSDP2, ZeRO-3 or data parallelism; users import the one they use.

`import memtile` registers only what must be there before: inside `deepspeed.zero.Init` tiles are
partitioned while their layer is being made.
"""

from memtile.convert import ShardedCheckpoints, register_sharded
from memtile.engines.zero3_values import register_zero3_gatherer

__all__ = ["register_engines"]


def register_engines() -> None:
    """Let layers read ZeRO-3's tiles, and `memtile.save_checkpoint` and its like save shards."""
    register_zero3_gatherer()
    register_sharded(_functions)


def _functions() -> ShardedCheckpoints:
    # not at the top: torch's distributed checkpoints are imported by who uses them
    from memtile.engines import dense_files, distributed_checkpoints

    return ShardedCheckpoints(
        dense_files.save_checkpoint,
        dense_files.load_checkpoint,
        distributed_checkpoints.save,
        distributed_checkpoints.load,
    )

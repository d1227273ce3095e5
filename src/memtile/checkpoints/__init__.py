"""Checkpoint files: safetensors, read and written a few MiB at a time, whole or not at all."""

from memtile.checkpoints.home import CheckpointHome
from memtile.checkpoints.opening import Checkpoint, OnePath, Paths
from memtile.checkpoints.publishing import new_file, rename, sole_writer, sync_folder, write_text
from memtile.checkpoints.steps import training_folder
from memtile.checkpoints.stored import PIECE_BYTES, StoredFile, StoredTensor
from memtile.checkpoints.writing import SHARD_BYTES, Outgoing, write_checkpoint

__all__ = [
    "PIECE_BYTES",
    "SHARD_BYTES",
    "Checkpoint",
    "CheckpointHome",
    "OnePath",
    "Outgoing",
    "Paths",
    "StoredFile",
    "StoredTensor",
    "new_file",
    "rename",
    "sole_writer",
    "sync_folder",
    "training_folder",
    "write_checkpoint",
    "write_text",
]

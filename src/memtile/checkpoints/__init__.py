"""Checkpoints as safetensors files, read and written a few MiB at a time."""

from memtile.checkpoints.file_maps import StoredPiece
from memtile.checkpoints.home import CheckpointHome
from memtile.checkpoints.opening import Checkpoint, OnePath, Paths
from memtile.checkpoints.publishing import replace_file, sole_writer
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
    "StoredPiece",
    "StoredTensor",
    "replace_file",
    "sole_writer",
    "training_folder",
    "write_checkpoint",
]

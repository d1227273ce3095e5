"""Checkpoints as files: safetensors, read and written piece by piece, whole or not at all."""

from memtile.checkpoints.home import CheckpointHome
from memtile.checkpoints.opening import GGUF_WAY_OUT, Checkpoint
from memtile.checkpoints.publishing import new_file, rename, sole_writer, sync_folder, write_text
from memtile.checkpoints.steps import training_folder
from memtile.checkpoints.stored import PIECE_BYTES, StoredFile, StoredTensor
from memtile.checkpoints.writing import SHARD_BYTES, Outgoing, write_checkpoint, write_file

__all__ = [
    "GGUF_WAY_OUT",
    "PIECE_BYTES",
    "SHARD_BYTES",
    "Checkpoint",
    "CheckpointHome",
    "Outgoing",
    "StoredFile",
    "StoredTensor",
    "new_file",
    "rename",
    "sole_writer",
    "sync_folder",
    "training_folder",
    "write_checkpoint",
    "write_file",
    "write_text",
]

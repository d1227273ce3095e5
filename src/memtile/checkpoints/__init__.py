"""Checkpoints as files: safetensors, read and written piece by piece, whole or not at all."""

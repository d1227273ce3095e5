"""Doors to the engines that keep tiles as shards over ranks; each is imported where it is used.

Only what ZeRO-3 does to parameters is known from the start: inside `deepspeed.zero.Init` tiles are
partitioned while their layer is being made.
"""

from memtile.engines.zero3_values import register_zero3_gatherer

__all__ = ["register_zero3_gatherer"]

"""Doors to other libraries; importing them loads none: each looks at what is loaded already."""

from memtile.convert import register_integration
from memtile.integrations.peft import PEFT, write_dense_adapters
from memtile.integrations.transformers import TRANSFORMERS, write_dense_checkpoints
from memtile.layers import watch_tiles


def register_all() -> None:
    """Make `memtile.tile` and `memtile.untile` know the models of these libraries."""
    for integration in (TRANSFORMERS, PEFT):
        register_integration(integration)
    for watcher in (write_dense_checkpoints, write_dense_adapters):
        watch_tiles(watcher)

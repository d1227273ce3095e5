"""Doors to other libraries; importing them loads none: each looks at what is loaded already."""

from memtile.convert import register_integration
from memtile.integrations.peft import PEFT, teach_peft
from memtile.integrations.transformers import TRANSFORMERS, teach_transformers
from memtile.layers import watch_tiles


def register_all() -> None:
    """Make `memtile.tile` and `memtile.untile` know the models of these libraries."""
    for integration in (TRANSFORMERS, PEFT):
        register_integration(integration)
    for watcher in (teach_transformers, teach_peft):
        watch_tiles(watcher)

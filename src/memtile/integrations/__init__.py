"""Support for models of other libraries; importing it loads none of them."""

from memtile.convert import register_integration
from memtile.integrations.peft import PEFT, patch_peft
from memtile.integrations.transformers import TRANSFORMERS, patch_transformers
from memtile.layers import watch_tiles


def register_all() -> None:
    """Let `memtile.tile` and `memtile.untile` take models of transformers and PEFT."""
    for integration in (TRANSFORMERS, PEFT):
        register_integration(integration)
    for watcher in (patch_transformers, patch_peft):
        watch_tiles(watcher)

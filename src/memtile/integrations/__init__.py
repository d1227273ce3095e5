"""Support for models of other libraries; importing it loads none of them."""

from memtile.convert import register_integration
from memtile.integrations.peft import PEFT, low_rank, patch_peft
from memtile.integrations.transformers import TRANSFORMERS, patch_transformers
from memtile.layers import register_low_rank, watch_tiles


def register_all() -> None:
    """Let `memtile.tile` and `memtile.untile` take models of transformers and PEFT."""
    for integration, patch in ((TRANSFORMERS, patch_transformers), (PEFT, patch_peft)):
        register_integration(integration)
        watch_tiles(integration.library, patch)
    register_low_rank(low_rank)

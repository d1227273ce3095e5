"""Doors to other libraries; importing them loads none: each looks at what is loaded already."""

from memtile.convert import register_integration
from memtile.integrations.peft import PEFT
from memtile.integrations.transformers import TRANSFORMERS


def register_all() -> None:
    """Make `memtile.tile` and `memtile.untile` know the models of these libraries."""
    for integration in (TRANSFORMERS, PEFT):
        register_integration(integration)

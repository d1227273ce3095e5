"""Doors to other libraries. Importing them loads none: each looks only at what is loaded already."""

from memtile.convert import register_integration
from memtile.integrations.peft import PEFT
from memtile.integrations.transformers import TRANSFORMERS


def register_all() -> None:
    """Make `memtile.tile` and `memtile.untile` know the models of these libraries."""
    for integration in (TRANSFORMERS, PEFT):
        register_integration(integration)

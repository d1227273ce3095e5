"""The demo behind `memtile demo`: a real model, dense and tiled, trained side by side.

`run_both` starts two workers (`python -m memtile.cli.demo`) and compares what they measured; `show`
prints it. torch and transformers are loaded in the workers only.
"""

from memtile.cli.demo.records import Outcome, Settings
from memtile.cli.demo.sides import ensure_runnable, run_both, smollm2_folder
from memtile.cli.demo.smollm2 import default_cache
from memtile.cli.demo.tables import show
from memtile.cli.demo.text import SHIPPED_TEXT, text_of

__all__ = [
    "SHIPPED_TEXT",
    "Outcome",
    "Settings",
    "default_cache",
    "ensure_runnable",
    "run_both",
    "show",
    "smollm2_folder",
    "text_of",
]

"""Fine-tuning within a budget of memory: what `memtile finetune` does.

torch and transformers are loaded only when a run begins.
"""

from memtile.cli.finetune.log import NAME as LOG
from memtile.cli.finetune.log import PICTURE, Entry
from memtile.cli.finetune.sequences import check_texts
from memtile.cli.finetune.settings import Settings, digests, holds_run, weight_files

__all__ = [
    "LOG",
    "PICTURE",
    "Entry",
    "Settings",
    "check_texts",
    "digests",
    "holds_run",
    "weight_files",
]

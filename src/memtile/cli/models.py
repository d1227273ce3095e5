"""A transformers folder as the commands use it: checked, its tokenizer, its model without weights.

Nothing is downloaded and no code of a checkpoint is run.
"""

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from memtile.checkpoints.opening import tokenizer_files
from memtile.checkpoints.publishing import put
from memtile.cli.errors import CommandError
from memtile.errors import BudgetError, CheckpointWarning, NewWeightsWarning
from memtile.planning import format_byte_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_folder(folder: Path) -> None:
    """Refuses what is no transformers folder, before anything slow begins.

    Raises:
        CommandError: It is none.
    """
    if not folder.is_dir():
        raise CommandError(
            f"MODEL {folder} is no folder: give one that save_pretrained wrote or that was "
            "downloaded from the Hub."
        )
    if (folder / "adapter_config.json").is_file():
        raise CommandError(
            f"MODEL {folder} holds adapters, not a model: merge them into their base with peft "
            "(merge_and_unload, save_pretrained) and give that folder."
        )
    if not (folder / "config.json").is_file():
        raise CommandError(
            f"MODEL {folder} holds no config.json: give a folder that save_pretrained wrote, with "
            "its tokenizer."
        )


def load_transformers(folder: Path) -> None:
    """Loads transformers with the model's own module, and has it print nothing by itself.

    Raises:
        CommandError: It is not installed, or the folder's config.json cannot be read.
        CheckpointError: The folder's weights are quantized.
    """
    try:
        import transformers
        from transformers.utils import logging
    except ImportError as error:
        raise CommandError(
            "This command needs transformers: pip install 'memtile[finetune]'"
        ) from error
    warnings.simplefilter("ignore")  # a command's output is not the place to learn of deprecations
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    for name in _architectures(folder):
        getattr(transformers, name, None)  # loads its module: an import, no memory of the run's
    from memtile.integrations.pretrained import check_files

    check_files(folder)


def _architectures(folder: Path) -> list[str]:
    try:
        found = json.loads((folder / "config.json").read_bytes())
        return [str(name) for name in found.get("architectures") or []]
    except (OSError, ValueError, AttributeError) as error:
        raise CommandError(
            f"MODEL {folder}: its config.json cannot be read ({error}): take another copy of it."
        ) from error


@contextmanager
def within(budget: int, used: int) -> Iterator[int]:
    """What is left of a budget for the model itself, once other things took some of it.

    Raises:
        CommandError: Nothing.
        BudgetError: A plan made inside does not fit in it.
    """
    before = (
        f"--budget {format_byte_size(budget)}, of which tokenizer, texts and adapters took "
        f"{format_byte_size(used)}"
    )
    if used >= budget:
        raise CommandError(f"{before}: nothing is left for the model; give more.")
    try:
        yield budget - used
    except BudgetError as error:
        raise BudgetError(f"{before}: {error}") from error


def tokenizer_of(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a folder.

    Raises:
        CommandError: It has none that can be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CommandError(
            f"MODEL {folder} has no tokenizer that can be loaded ({_first_line(error)}): copy "
            "tokenizer.json and tokenizer_config.json of the model into it."
        ) from error


def carry_tokenizer(folder: Path, out: Path) -> None:
    """Copy what makes the tokenizer of a folder into another one, as it is.

    Written anew by this transformers, its class has a name that older readers refuse.

    Raises:
        CheckpointWriteError: The system could not.
    """
    for name, path in tokenizer_files(folder).items():
        put(out / name, path)


def empty_of(folder: Path) -> "PreTrainedModel":
    """The causal language model of a folder, its parameters on the meta device.

    Raises:
        CommandError: The model is of another kind, or transformers does not know it.
        CannotTileError: A buffer of it has no values before its parameters do.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from memtile import empty_model
    from memtile.integrations.pretrained import dtype_of

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        dtype = dtype_of(config, folder)
        model = empty_model(lambda: AutoModelForCausalLM.from_config(config, dtype=dtype))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CommandError(
            f"MODEL {folder} is no causal language model of this transformers: "
            f"{_first_line(error)}."
        ) from error
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.config._name_or_path = str(folder)
    return model


@contextmanager
def told(*, trains: bool = True) -> Iterator[None]:
    """Says what a folder and a model do not have in common, a line each, on stderr.

    Args:
        trains: whether weights that the folder lacks may be made anew.

    Raises:
        CommandError: They were, and are not trained.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CheckpointWarning)
        yield
    for warning in caught:
        if isinstance(warning.message, NewWeightsWarning) and not trains:
            raise CommandError(f"{warning.message}; fine-tune it first, or give another folder.")
        if isinstance(warning.message, CheckpointWarning):
            sys.stderr.write(f"memtile: {warning.message}\n")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")

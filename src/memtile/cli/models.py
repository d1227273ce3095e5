"""Checks a transformers folder, and loads its tokenizer and its model without weights.

Nothing is downloaded, and no code of a folder is run unless the user says so.
"""

import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from memtile.checkpoints import Checkpoint
from memtile.checkpoints.header import NO_GGUF
from memtile.checkpoints.opening import tokenizer_files, way_to
from memtile.checkpoints.publishing import replace_file
from memtile.cli.errors import CommandError, first_line, is_our_bug
from memtile.convert import empty_model
from memtile.convert.name_matching import find
from memtile.costmodel import format_byte_size
from memtile.errors import BudgetError, CheckpointWarning, MemtileError, NewWeightsWarning
from memtile.home_names import parse_home

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Folder = Annotated[Path, typer.Argument(help="A transformers folder with safetensors.")]
TrustsCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that the folder brings with it (auto_map): read it first.",
    ),
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Refuse a folder that holds more than the model has.")
]

TOKENS: Final = 128
"""Of a step, where the command line gives none."""

_WEIGHTS: Final = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "*.gguf")
_NO_MODEL: Final = "is no causal language model of this transformers"
_TOKENIZERS: Final = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
_TOKENIZER_WAY_OUT: Final = "copy tokenizer.json and tokenizer_config.json of the model into it"
_CAUSAL: Final = "AutoModelForCausalLM"


def check_home(word: str, *more: str) -> str:
    """The word if it names a home: "disk", "disk:FOLDER", "host", or one of the others."""
    parse_home(word, "--home ", ("disk", "disk:FOLDER", "host", *more), more=".")
    return word


def check_folder(folder: Path, *, name: str = "MODEL", needs_weights: bool = True) -> None:
    """Refuses what is no transformers folder that can be read; messages call it `name`."""
    if not folder.is_dir():
        raise CommandError(f"{name} {_no_folder(folder)}")
    if (folder / "adapter_config.json").is_file():
        raise CommandError(
            f"{name} {folder} holds adapters, not a model: merge them into their base with peft "
            "(merge_and_unload, save_pretrained) and give that folder."
        )
    has_config = (folder / "config.json").is_file()
    if _has_weights(folder) or (has_config and needs_weights):
        Checkpoint.open(folder)
    if not has_config:
        raise CommandError(
            f"{name} {folder} holds no config.json: give a folder that save_pretrained wrote, with "
            "its tokenizer."
        )


def _no_folder(path: Path) -> str:
    if path.is_file():
        if path.suffix == ".gguf":
            return f"{path} is a GGUF file, and safetensors are read here: {NO_GGUF}."
        return f"{path} is a file: give the folder that holds it, with its config.json."
    way_out = way_to(path, "give one that save_pretrained wrote or that was downloaded")
    return f"{path} is no folder: {way_out}."


def load_transformers(folder: Path) -> None:
    """Loads transformers with the model's own module, and has it print nothing of its own.

    A folder whose config.json cannot be read or whose weights are quantized is refused.
    """
    try:
        import transformers
    except ImportError as error:
        raise CommandError(
            "This command needs transformers: pip install 'memtile[finetune]'"
        ) from error
    from memtile.integrations.pretrained import check_files

    quieten()
    try:
        config = json.loads((folder / "config.json").read_bytes())
        architectures = [str(name) for name in config.get("architectures") or []]
    except (OSError, ValueError, AttributeError) as error:
        raise CommandError(
            f"MODEL {folder}: its config.json cannot be read ({error}): take another copy of it."
        ) from error
    for name in architectures:
        getattr(transformers, name, None)  # loads its module: an import, no memory of the run's
    check_files(folder)


def quieten() -> None:
    """Turns off the bars, logs and warnings of transformers."""
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    logging.set_verbosity_error()


@contextmanager
def within(budget: int, used: int, others: str) -> Iterator[int]:
    """Yields what is left of a budget for the model; a BudgetError inside says what others took."""
    before = f"--budget {format_byte_size(budget)}, of which {others} took {format_byte_size(used)}"
    if used >= budget:
        raise CommandError(f"{before}: nothing is left for the model; give more.")
    try:
        yield budget - used
    except BudgetError as error:
        raise BudgetError(f"{before}: {error}") from error


def budget_note(budget: int, used: int, others: str) -> str:
    """Says why a plan is for less than the budget."""
    return (
        f"{others} took {format_byte_size(used)} of {format_byte_size(budget)}; the plan is for "
        f"the other {format_byte_size(budget - used)}"
    )


def tokenizer_of(folder: Path, trusts_code: bool = False) -> "PreTrainedTokenizerBase":
    """The tokenizer of a folder that has a config."""
    from transformers import AutoTokenizer

    _config_of(folder, trusts_code)  # which transformers looks at for a tokenizer too
    if not has_tokenizer(folder):
        raise CommandError(f"MODEL {folder} holds no tokenizer: {_TOKENIZER_WAY_OUT}.")
    with reading(folder, "has no tokenizer that can be loaded", _TOKENIZER_WAY_OUT):
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trusts_code
        )
    return found


def copy_tokenizer(folder: Path, out: Path) -> None:
    """Copies a tokenizer's files: written anew, its class has a name that older readers refuse."""
    for name, path in tokenizer_files(folder).items():
        replace_file(out / name, path)


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder has files of a tokenizer."""
    return any(True for pattern in _TOKENIZERS for _ in folder.glob(pattern))


def empty_of(
    folder: Path,
    trusts_code: bool = False,
    classes: Sequence[str] = (_CAUSAL,),
    *,
    named: bool = False,
) -> "PreTrainedModel":
    """The model of a folder that has a config, parameters on the meta device.

    Its class is the one that the config names, where `named` asks for that and transformers has it;
    else what the first of these `classes` of transformers makes that knows the config. Weights that
    are not those of the config are refused.
    """
    from transformers import AutoModelForCausalLM

    from memtile.integrations.pretrained import architecture, auto_class, dtype_of

    config = _config_of(folder, trusts_code)
    cls, dtype = architecture(config) if named else None, dtype_of(config, folder)
    if cls is not None and type(config) is not cls.config_class:
        cls = None  # the folder's own config has a class of its own
    if cls is None:
        _check_writes(config, folder, classes)
    with reading(folder, _NO_MODEL, _way_out(classes)):
        model: PreTrainedModel = empty_model(
            lambda: (
                cls._from_config(config, dtype=dtype)
                if cls is not None
                else (auto_class(config, classes) or AutoModelForCausalLM).from_config(
                    config, dtype=dtype, trust_remote_code=trusts_code
                )
            )
        )
    model.config._name_or_path = str(folder)
    if _has_weights(folder):
        _check_weights(model, folder)
    return model


def _check_writes(config: Any, folder: Path, classes: Sequence[str]) -> None:  # of transformers
    """Refuses models that would write with a part of them, or that see what they are to write."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    from memtile.integrations.pretrained import auto_class

    if auto_class(config, classes) not in (None, auto_class(config, [_CAUSAL])):
        return
    given = next(iter(config.architectures or ()), type(config).__name__)
    if config.is_encoder_decoder:
        raise CommandError(
            f"MODEL {folder} is a {given}, whose encoder this command cannot use: "
            f"{_way_out(classes)}."
        )
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and getattr(config, "is_decoder", None) is False:
        raise CommandError(
            f"MODEL {folder} is a {given}, in which each token sees those after it: give a model "
            "that continues a text, or set is_decoder in its config.json."
        )


@contextmanager
def printing_warnings(*, trains: bool = True) -> Iterator[None]:
    """Prints what a folder and a model do not have in common, a line each, on stderr.

    Weights that were made anew are refused, unless they are to be trained.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CheckpointWarning)
        yield
    for warning in caught:
        if isinstance(warning.message, NewWeightsWarning) and not trains:
            raise CommandError(f"{warning.message}; fine-tune it first, or give another folder.")
        if isinstance(warning.message, CheckpointWarning):
            sys.stderr.write(f"memtile: {warning.message}\n")


def _way_out(classes: Sequence[str]) -> str:
    return f"give a model that {' or '.join(classes)} of transformers makes"


def _config_of(folder: Path, trusts_code: bool) -> Any:  # of transformers
    from transformers import AutoConfig

    with reading(folder, _NO_MODEL, _way_out([_CAUSAL])):
        # None in place of False would ask, and believe a pipe
        return AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trusts_code
        )


def check_length(model: "PreTrainedModel", tokens: int, given: str) -> None:
    """Refuses a sequence that is longer than the model reads at once; `given` says what made it."""
    longest = getattr(model.config, "max_position_embeddings", None) or tokens
    if tokens > longest:
        raise CommandError(
            f"{given}: {tokens} tokens are more than the model reads at once, {longest}: give less."
        )


def _check_weights(model: "PreTrainedModel", folder: Path) -> None:
    """Refuses weights whose names or shapes are not the model's."""
    found = find(model, Checkpoint.open(folder))
    wrong = [*found.problems, *(f"{name} is missing" for name in found.missing)]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise CommandError(
            f"MODEL {folder}: its weights are not those of its config.json ({wrong[0]}{more}): "
            "take another copy of both."
        )


def _has_weights(folder: Path) -> bool:
    return any(True for pattern in _WEIGHTS for _ in folder.glob(pattern))


def read_settings(model: "PreTrainedModel", folder: Path) -> None:
    """Gives a model the generation settings of its folder."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        problem = "has a generation_config.json that cannot be used"
        with reading(folder, problem, "correct it, or remove it"):
            model.generation_config = GenerationConfig.from_pretrained(folder)


@contextmanager
def reading(
    folder: Path, problem: str, way_out: str, kinds: tuple[type[Exception], ...] = (Exception,)
) -> Iterator[None]:
    """Turns errors of transformers about a folder's files into one sentence."""
    try:
        yield
    except kinds as error:
        if isinstance(error, MemtileError) or is_our_bug(error):
            raise
        from memtile.integrations.pretrained import code_of

        if "trust_remote_code" in str(error) and (code := code_of(folder)):
            raise CommandError(
                f"MODEL {folder} needs Python code from that folder, and none is run by default: "
                f"{code}; read it, and give --trust-remote-code to memtile plan, generate or "
                "finetune."
            ) from error
        raise CommandError(f"MODEL {folder} {problem} ({first_line(error)}): {way_out}.") from error

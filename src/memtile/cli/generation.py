"""Text from a model straight from its folder, within a budget of memory."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

import memtile
from memtile.cli import models
from memtile.cli.errors import CommandError, first_line, is_our_bug
from memtile.errors import MemtileError
from memtile.testing import PeakMemory

_SETTINGS: Final = "generation_config.json"
_OTHERS: Final = "tokenizer and prompt"


@dataclass(frozen=True)
class Request:
    """What to generate.

    Args:
        model: the folder.
        prompt: the text to go on from.
        tokens: new ones, at most.
        budget: bytes above the imports.
        home: where tiles live: "checkpoint" (the folder's own files), "disk", "disk:FOLDER" or
            "host".
        temperature: 0: the likeliest token each time.
        seed: of the draws.
        chat: whether the prompt is a user's message, put into the model's chat template.
        strict: refuse a folder that holds more than the model has.
        trusts_code: whether code of the folder may run.
    """

    model: Path
    prompt: str
    tokens: int
    budget: int
    home: str
    temperature: float
    seed: int
    chat: bool
    strict: bool = False
    trusts_code: bool = False


@dataclass(frozen=True)
class Generated:
    """What came of it.

    Attributes:
        text: the new text.
        token_ids: the new tokens.
        seconds: from the first pass to the last token.
        peak_bytes: the most memory, above the imports.
    """

    text: str
    token_ids: list[int]
    seconds: float
    peak_bytes: int


def generate(
    request: Request, note: Callable[[str], None], say: Callable[[str], None]
) -> Generated:
    """Generates text by the settings of the model's folder, and says it as it comes.

    Args:
        request: what to generate.
        note: called with what the plan comes to, and with each setting that is not followed.
        say: called with each new stretch of text.

    Raises:
        CommandError: the folder is none that text can be generated with.
        BudgetError: nothing fits in the budget.
        CheckpointError: the checkpoint is damaged.
    """
    with PeakMemory() as memory:
        tokenizer = models.tokenizer_of(request.model, request.trusts_code)
        prompt = _encoded(request, tokenizer)
        model = _loaded(request, prompt.shape[1], memory, note)
        streams = _beams(model) == 1
        torch.manual_seed(request.seed)
        started = time.perf_counter()
        with torch.inference_mode(), _settings_that_work(request.model):
            found = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=request.tokens,
                pad_token_id=_padding(tokenizer),
                streamer=_streamer(tokenizer, say) if streams else None,
                tokenizer=tokenizer,  # for stop_strings
                num_return_sequences=1,
                return_dict_in_generate=False,
                **_drawing(request.temperature),
            )
        seconds = time.perf_counter() - started
        new = found[0, prompt.shape[1] :].tolist()
        text = str(tokenizer.decode(new, skip_special_tokens=True))
        if not streams:
            say(text)
    return Generated(text, new, seconds, memory.nbytes)


def _encoded(request: Request, tokenizer: Any) -> torch.Tensor:
    """The prompt's token ids (1, length)."""
    if request.chat and not getattr(tokenizer, "chat_template", None):
        raise CommandError(
            f"--chat: the tokenizer of {request.model} has no chat template: leave --chat out."
        )
    if request.chat:
        messages = [{"role": "user", "content": request.prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    else:
        ids = tokenizer(request.prompt).input_ids
    if not ids:
        raise CommandError("--prompt is empty: give the beginning of a text.")
    return torch.tensor([ids])


def _loaded(
    request: Request, prompt_tokens: int, memory: PeakMemory, note: Callable[[str], None]
) -> Any:  # a transformers model, which is not imported to name its type
    model = models.empty_of(request.model, request.trusts_code)
    models.read_settings(model, request.model)
    models.check_length(
        model, prompt_tokens + request.tokens, f"--prompt with --tokens {request.tokens}"
    )
    is_stored = request.home == "checkpoint"
    with models.within(request.budget, memory.nbytes, _OTHERS) as left:
        plan = memtile.plan(
            model,
            budget=left,
            tokens=(prompt_tokens + request.tokens) * _beams(model),
            batch=_beams(model),
            optimizer=None,
            home="disk" if is_stored else request.home,
        )
    note(plan.summary)
    note(models.taken(request.budget, request.budget - left, _OTHERS))
    _note_settings(model, note)
    home = "checkpoint" if is_stored and plan.parked_layers else None
    with models.told(trains=False):
        memtile.tile(model, plan, checkpoint=request.model, home=home, strict=request.strict)
    return model.requires_grad_(False).eval()


def _beams(model: Any) -> int:  # of transformers
    return _count(model, "num_beams")


def _count(model: Any, name: str) -> int:  # of transformers
    """A setting that is a number of texts; 1 where nothing is set."""
    value = getattr(model.generation_config, name)
    if value is not None and not (type(value) is int and value >= 1):
        raise CommandError(f"{name}={value!r} in {_SETTINGS} is no number of texts: give 1, say.")
    return value or 1


def _note_settings(model: Any, note: Callable[[str], None]) -> None:  # of transformers
    """Say which settings of the folder are followed in another way than a reader may expect."""
    if _beams(model) > 1:
        note(f"num_beams={_beams(model)} in {_SETTINGS}: the text is printed when it is whole")
    texts = _count(model, "num_return_sequences")
    if texts > 1:
        note(f"num_return_sequences={texts} in {_SETTINGS}: one text is printed")


@contextmanager
def _settings_that_work(folder: Path) -> Iterator[None]:
    """What transformers refuses of a folder's settings, as one sentence."""
    try:
        yield
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        if isinstance(error, MemtileError) or is_our_bug(error):
            raise
        raise CommandError(
            f"MODEL {folder}: transformers cannot generate by its {_SETTINGS} "
            f"({first_line(error)}): change that setting, or remove the file."
        ) from error


def _padding(tokenizer: Any) -> int:
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(token for token in known if token is not None))


def _drawing(temperature: float) -> dict[str, Any]:
    if temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": temperature}


def _streamer(tokenizer: Any, say: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Saying(TextStreamer):  # type: ignore[misc]  # transformers is not checked here
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            """Passes a stretch of text on."""
            say(text)

    return Saying(tokenizer, skip_prompt=True, skip_special_tokens=True)


def say_at_once(text: str) -> None:
    """Prints a stretch of text without waiting for a line's end."""
    sys.stdout.write(text)
    sys.stdout.flush()

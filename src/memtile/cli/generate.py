"""`memtile generate`: generates text with a model that need not fit in memory."""

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Final

import torch
import typer
from rich.console import Console

import memtile
from memtile.cli import models
from memtile.cli.errors import CommandError, check_at_least, check_seed
from memtile.cli.terminal import AsJson, Trace, saved_trace, with_options
from memtile.costmodel import format_byte_size, parse_byte_size
from memtile.homes import allocation_of
from memtile.integrations.pretrained import WRITERS
from memtile.integrations.step_inputs import text_work
from memtile.observing import check_trace_path, observe
from memtile.testing import PeakMemory
from memtile.transfer import rings_of

_SETTINGS: Final = "generation_config.json"
_OTHERS: Final = "tokenizer and prompt"
_REFUSALS: Final = (ValueError, TypeError, ImportError, NotImplementedError)  # of settings

Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What to generate, and how the model is loaded; the fields are the command's options."""

    model: models.Folder
    prompt: Annotated[str, typer.Option(help="The text to continue.")]
    budget: Annotated[str, typer.Option(help="Memory to use above the imports, such as 2GiB.")] = (
        "2GiB"
    )
    tokens: Annotated[int, typer.Option(help="New tokens, at most.")] = 64
    home: Annotated[
        str,
        typer.Option(
            help="Where tiles live: checkpoint (the folder's own files), disk, disk:FOLDER, host."
        ),
    ] = "checkpoint"
    temperature: Annotated[float, typer.Option(help="0: the likeliest token; above: drawn.")] = 0.0
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a message: use the chat template.")
    ] = False
    strict: models.Strict = False
    trace: Trace = None
    as_json: AsJson = False
    trust_remote_code: models.TrustsCode = False

    @property
    def budget_bytes(self) -> int:
        """Of memory above the imports."""
        return parse_byte_size(self.budget, "--budget")


@with_options(Request)
def run_generate(request: Request) -> int:
    """Generate text straight from the unmodified safetensors, printed as it comes.

    A model with an encoder reads the prompt there; one with images is given none.
    """
    _check(request)
    models.load_transformers(request.model)
    console = Console(stderr=True, highlight=False, quiet=request.as_json)

    def note(words: str) -> None:
        console.print(words, style="dim", soft_wrap=True)

    def say(text: str) -> None:
        if not request.as_json:
            print(text, end="", flush=True)

    found = generate(request, note, say)
    if request.as_json:
        print(json.dumps(asdict(found), indent=2))
        return 0
    print()
    note(
        f"{len(found.token_ids)} tokens in {found.seconds:.1f} s, peak memory "
        f"{format_byte_size(found.peak_bytes)} of {format_byte_size(request.budget_bytes)}"
    )
    if found.read_bytes:
        note(_reading(found))
    return 0


def _check(request: Request) -> None:
    check_at_least("--tokens", request.tokens, 1)
    check_seed(request.seed)
    temperature = request.temperature
    if not (math.isfinite(temperature) and temperature >= 0):
        raise CommandError(f"--temperature {temperature} is no temperature: give 0 or more.")
    parse_byte_size(request.budget, "--budget")  # refuses what is no size
    models.check_home(request.home, "checkpoint")
    models.check_folder(request.model)
    if request.trace is not None:
        check_trace_path(request.trace)


def _reading(found: "Generated") -> str:
    """What was read, in words."""
    a_token = format_byte_size(found.read_bytes // max(1, len(found.token_ids)))
    words = f"read {a_token} of weights a token, the prompt's included"
    if found.kept_experts is not None:
        words += f"; {found.kept_experts:.0%} of the experts asked for were kept in memory"
    return words


@dataclass(frozen=True)
class Generated:
    """The new text, and what it took.

    Args:
        text: without the prompt.
        token_ids: of the text.
        seconds: that they took.
        peak_bytes: the peak memory above the imports.
        read_bytes: read from the home, for the prompt too.
        kept_experts: the part of the experts asked for that was kept in memory; None: no experts.
    """

    text: str
    token_ids: list[int]
    seconds: float
    peak_bytes: int
    read_bytes: int
    kept_experts: float | None


def generate(request: Request, note: Say, say: Say) -> Generated:
    """Generates text by the settings of the model's folder.

    `note` gets the plan's summary and each setting that is not followed, `say` each new stretch of
    text.
    """
    with PeakMemory() as memory:
        tokenizer = models.tokenizer_of(request.model, request.trust_remote_code)
        prompt = _encoded(request, tokenizer)
        model = _loaded(request, prompt.shape[1], memory, note)
        streams = _count(model, "num_beams") == 1
        torch.manual_seed(request.seed)
        seen = None if request.trace is None else observe()
        started = time.perf_counter()
        with seen or nullcontext():
            new = _new_tokens(model, tokenizer, request, prompt, say if streams else None)
        seconds = time.perf_counter() - started
        text = str(tokenizer.decode(new, skip_special_tokens=True))
        if not streams:
            say(text)
        read, kept = _moved(model)
    if seen is not None and request.trace is not None:
        note(str(seen))
        note(saved_trace(seen, request.trace))
    return Generated(text, new, seconds, memory.nbytes, read, kept)


def _new_tokens(
    model: Any,  # of transformers, as the tokenizer
    tokenizer: Any,
    request: Request,
    prompt: torch.Tensor,
    say: Say | None,
) -> list[int]:
    """The ids of the new text; `say` gets it as it comes, unless it is None."""
    padding = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    problem = f"cannot generate by its {_SETTINGS}"
    way_out = "change that setting, or remove the file"
    with torch.inference_mode(), models.reading(request.model, problem, way_out, _REFUSALS):
        found = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=request.tokens,
            pad_token_id=next(token for token in padding if token is not None),
            streamer=None if say is None else _streamer(tokenizer, say),
            tokenizer=tokenizer,  # for stop_strings
            num_return_sequences=1,
            return_dict_in_generate=False,
            **_drawing(request.temperature),
        )
    read = 1 if model.config.is_encoder_decoder else prompt.shape[1]  # a decoder's start token
    new: list[int] = found[0, read:].tolist()
    return new


def _drawing(temperature: float) -> dict[str, Any]:
    """The settings of transformers for it: 0 takes the likeliest token."""
    if temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": temperature}


def _moved(model: torch.nn.Module) -> tuple[int, float | None]:
    """Bytes read from the model's homes, and the part of its experts that was kept."""
    allocations = (allocation_of(parameter) for parameter in model.parameters())
    homes = {allocation.home for allocation in allocations if allocation is not None}
    kept = [rings_of(home).kept for home in homes]
    used, hit = sum(each.used_bytes for each in kept), sum(each.hit_bytes for each in kept)
    return sum(home.traffic.read_bytes for home in homes), hit / used if used else None


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
    request: Request, prompt_tokens: int, memory: PeakMemory, note: Say
) -> Any:  # a transformers model, which is not imported to name its type
    model = models.empty_of(request.model, request.trust_remote_code, WRITERS)
    models.read_settings(model, request.model)
    beams, texts = _count(model, "num_beams"), _count(model, "num_return_sequences")
    sequences = [prompt_tokens + request.tokens]
    if model.config.is_encoder_decoder:  # two sequences, the decoder's with its start token
        sequences = [prompt_tokens, 1 + request.tokens]
    models.check_length(model, max(sequences), f"--prompt with --tokens {request.tokens}")
    with models.within(request.budget_bytes, memory.nbytes, _OTHERS) as left:
        plan = memtile.plan(
            model,
            budget=left,
            tokens=sum(sequences) * beams,
            batch=beams,
            optimizer=None,
            work=text_work(model, beams, *sequences),
            home=request.home,
        )
    note(plan.summary)
    allowed = request.budget_bytes
    note(models.budget_note(allowed, allowed - left, _OTHERS))
    if beams > 1:
        note(f"num_beams={beams} in {_SETTINGS}: the text is printed when it is whole")
    if texts > 1:
        note(f"num_return_sequences={texts} in {_SETTINGS}: one text is printed")
    with models.printing_warnings(trains=False):
        memtile.tile(model, plan, checkpoint=request.model, strict=request.strict)
    return model.requires_grad_(False).eval()


def _count(model: Any, name: str) -> int:  # of transformers
    """A setting that is a number of texts; 1 where nothing is set."""
    value = getattr(model.generation_config, name)
    if value is not None and not (type(value) is int and value >= 1):
        raise CommandError(f"{name}={value!r} in {_SETTINGS} is no number of texts: give 1, say.")
    return value or 1


def _streamer(tokenizer: Any, say: Say) -> Any:
    from transformers import TextStreamer

    class Saying(TextStreamer):  # type: ignore[misc]  # transformers is not checked here
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            """Passes a stretch of text on."""
            say(text)

    return Saying(tokenizer, skip_prompt=True, skip_special_tokens=True)

"""Turns texts, conversations, and prompts with their completions into tokens.

A token that does not count in the loss is given as its complement, ~id.
"""

import json
import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from itertools import islice, takewhile
from typing import Any, Final

from memtile.cli.errors import CommandError, first_line
from memtile.cli.finetune.data_files import DataRow
from memtile.cli.finetune.tokens import document_tokens, ids_of

_ROLES: Final = ("system", "developer", "user", "assistant", "tool")
_MARKS: Final = re.compile(r"{%-?\s*generation\s*-?%}")
_TOGETHER: Final = 64  # texts or conversations that are tokenized at once, in several threads
_LONG: Final = 1 << 14  # characters, from which on a text is tokenized in pieces
_THREADS: Final = 16  # each holds a piece with some hundred bytes a token
_PIECE: Final = 1 << 16
_RENDERED: Final = {"add_special_tokens": False}  # a template writes them itself

Tokenizer = Any  # of transformers, which is not imported to name its type
Message = dict[str, Any]  # JSON
Part = tuple[list[int], bool]
"""Tokens, and whether an example ends with them; an example of no tokens is an empty one."""


def encoder(
    columns: tuple[str, ...], tokenizer: Tokenizer
) -> Callable[[Iterable[DataRow]], Iterator[Part]]:
    """The function from rows with these columns to tokens; refuses a tokenizer that cannot."""
    if columns == ("text",):
        return lambda rows: _texts(rows, tokenizer)
    if columns == ("messages",):
        _check_template(tokenizer)
        return lambda rows: ((ids, True) for ids in _conversations(rows, tokenizer))
    return lambda rows: ((_pair(row, tokenizer), True) for row in rows)


def _texts(rows: Iterable[DataRow], tokenizer: Tokenizer) -> Iterator[Part]:
    held: list[str] = []
    for row in rows:
        text = _string(row, "text")
        if not text.strip():
            yield [], True
        elif len(text) > _LONG:
            yield from _together(held, tokenizer)
            held = []
            pieces = (text[start : start + _PIECE] for start in range(0, len(text), _PIECE))
            yield from document(pieces, tokenizer)
        else:
            held.append(text)
        if len(held) == _TOGETHER:
            yield from _together(held, tokenizer)
            held = []
    yield from _together(held, tokenizer)


def document(pieces: Iterable[str], tokenizer: Tokenizer) -> Iterator[Part]:
    """The tokens of a text that is given piece by piece."""
    for ids in document_tokens(pieces, tokenizer, min(os.cpu_count() or 1, _THREADS)):
        yield ids, False
    yield [], True


def _together(texts: list[str], tokenizer: Tokenizer) -> Iterator[Part]:
    """The same tokens as `document` gives for each, for less work."""
    if texts:
        for ids in tokenizer(texts, verbose=False).input_ids:
            yield [*ids, *_end(ids, tokenizer)], True


def _end(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """The end-of-text token, if there is one and the tokens do not end with it."""
    end = tokenizer.eos_token_id
    return [] if end is None or ids[-1:] == [end] else [end]


def _pair(row: DataRow, tokenizer: Tokenizer) -> list[int]:
    """The completion counts, from the first token on that the prompt alone does not have.

    So it is where the two merge into one token, or a template renders the prompt alone otherwise.
    """
    prompt, completion = row.values["prompt"], row.values["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        before = ids_of(prompt, tokenizer)
        ids = ids_of(prompt + completion, tokenizer)
        ids += _end(ids, tokenizer)
    elif isinstance(prompt, list) and isinstance(completion, list):
        _check_template(tokenizer)
        turns = [*_messages(row, "prompt"), *_messages(row, "completion")]
        asked = _rendered(turns[: len(prompt)], row, tokenizer, reply=True)
        before = ids_of(asked, tokenizer, **_RENDERED)
        ids = ids_of(_rendered(turns, row, tokenizer), tokenizer, **_RENDERED)
    else:
        raise CommandError(
            f"{row.place}: its prompt is {_type(prompt)} and its completion {_type(completion)}: "
            "write two strings, or two lists of messages."
        )
    pairs = zip(before, ids, strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return [~id for id in ids[:shared]] + ids[shared:]


def _conversations(rows: Iterable[DataRow], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """The assistant's turns count: what the template marks, else what it renders for each."""
    rows = iter(rows)
    while group := list(islice(rows, _TOGETHER)):
        tools = [_tools(row) for row in group]
        if not all(_MARKS.search(tokenizer.get_chat_template(tools=each)) for each in tools):
            yield from _unmarked(group, tokenizer)
        elif any(tools):  # of each row its own
            for row in group:
                yield from _marked([row], tokenizer)
        else:
            yield from _marked(group, tokenizer)


def _marked(group: list[DataRow], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Of a template with marks; the tools are those of the first row."""
    messages = [_messages(row, "messages") for row in group]
    try:
        found = tokenizer.apply_chat_template(
            messages,
            tools=_tools(group[0]),
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
        )
    except Exception as error:  # a template may raise any
        if len(group) == 1:
            raise _refusal(group[0], error) from error
        for row in group:  # which of them it is
            yield from _marked([row], tokenizer)
        return
    for ids, marks in zip(found["input_ids"], found["assistant_masks"], strict=True):
        yield [id if mark else ~id for id, mark in zip(ids, marks, strict=True)]


def _unmarked(group: list[DataRow], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """A token counts that has a character of a turn, as in transformers."""
    messages = [_messages(row, "messages") for row in group]
    texts = [_rendered(each, row, tokenizer) for each, row in zip(messages, group, strict=True)]
    found = tokenizer(texts, verbose=False, **_RENDERED)
    for number, row in enumerate(group):
        ids, place = found.input_ids[number], found.encodings[number].token_to_chars
        tokens, counted = range(len(ids)), [~id for id in ids]
        for begin, end in _spans(texts[number], messages[number], row, tokenizer):
            first = bisect_right(tokens, begin, key=lambda token: place(token)[1])
            last = bisect_left(tokens, end, key=lambda token: place(token)[0])
            counted[first:last] = ids[first:last]
        yield counted


def _spans(
    text: str, messages: list[Message], row: DataRow, tokenizer: Tokenizer
) -> Iterator[tuple[int, int]]:
    """First and last character of each assistant's turn, without the header that asks for it.

    A turn is what its conversation up to it has more than the one before, which is right where each
    is a prefix of the whole.
    """
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _rendered(messages[:number], row, tokenizer, reply=True) if number else ""
        until = _rendered(messages[: number + 1], row, tokenizer)
        if not (until.startswith(before) and text.startswith(until)):
            raise CommandError(
                f"{row.place}: the chat template renders message {number + 1} otherwise where "
                "later ones follow, so the assistant's tokens cannot be told from it: put one with "
                "{% generation %} marks, such as TRL's for training, into MODEL's "
                "chat_template.jinja."
            )
        yield len(before), len(until)


def _rendered(
    messages: list[Message], row: DataRow, tokenizer: Tokenizer, *, reply: bool = False
) -> str:
    """The text of messages, with the header of the assistant's `reply` if it is to follow."""
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tools=_tools(row), tokenize=False, add_generation_prompt=reply
        )
    except Exception as error:  # a template may raise any
        raise _refusal(row, error) from error
    return text


def _refusal(row: DataRow, error: Exception) -> CommandError:
    return CommandError(
        f"{row.place}: the chat template refuses its messages ({first_line(error)}): change them, "
        "or the template in MODEL."
    )


def _check_template(tokenizer: Tokenizer) -> None:
    if not tokenizer.chat_template:
        raise CommandError(
            "MODEL has no chat template, and DATA has conversations: put a chat_template.jinja "
            "into its folder, such as that of the model's chat release."
        )
    if not tokenizer.is_fast:
        raise CommandError(
            "The tokenizer of MODEL is written in Python and does not say where its tokens begin, "
            "which conversations need: put a tokenizer.json into its folder."
        )


def _messages(row: DataRow, column: str) -> list[Message]:
    """Messages without keys that are null, as Parquet has them; checked."""
    found, where = row.values[column], f"{row.place}, {column}"
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise CommandError(
            f"{where}: {_type(found)}: give a list of objects with role and content."
        )
    if not found:
        raise CommandError(f"{where}: it is empty: leave the row out.")
    messages = [{k: v for k, v in each.items() if v is not None} for each in found]
    for number, message in enumerate(messages, 1):
        _check_message(message, f"{where}, message {number}")
    return messages


def _check_message(message: Message, where: str) -> None:
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        said = f"role {role!r}" if "role" in message else f"no role but {', '.join(message)}"
        raise CommandError(f"{where} has {said}: the roles are {', '.join(_ROLES)}.")
    is_call = role == "assistant" and message.get("tool_calls")
    if not isinstance(content, str) and not (content is None and is_call):
        raise CommandError(f"{where}: its content is {_type(content)}: only text is trained on.")


def _tools(row: DataRow) -> Any:  # JSON schemas, as the template takes them
    tools = row.values.get("tools")
    return json.loads(tools) if isinstance(tools, str) else tools or None


def _string(row: DataRow, column: str) -> str:
    value = row.values[column]
    if not isinstance(value, str):
        raise CommandError(f"{row.place}: its {column} is {_type(value)}: give a string.")
    return value


def _type(value: object) -> str:
    names = {str: "a string", list: "a list", dict: "an object", bool: "a boolean"}
    numbers = {int: "a number", float: "a number", type(None): "null"}
    return {**names, **numbers}.get(type(value), f"a {type(value).__name__}")

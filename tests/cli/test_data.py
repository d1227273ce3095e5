"""Chats, completions, JSON lines and Parquet as sequences: which tokens count, and what is said."""

import json
import random

import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers

from memtile.cli.errors import CommandError
from memtile.cli.finetune.data_files import find_data
from memtile.cli.finetune.sequences import read_sequences

CHATML = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role }}"
    "{%- if message.role == 'assistant' %}{% generation %}"
    "{{ '\n' + message.content + '<|im_end|>\n' }}{% endgeneration %}"
    "{%- else %}{{ '\n' + message.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% if loop.index0 == 0 %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}"
    "{{ message.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
FORGETFUL = (  # as Qwen3: what was thought is rendered in the last turn only
    "{% for message in messages %}<|im_start|>{{ message.role + '\n' }}"
    "{% if loop.last and message.role == 'assistant' %}{{ '<think></think>' }}{% endif %}"
    "{{ message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": " Yes. "},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "No"},
]


def letters(*special, template=None, **more):
    """A tokenizer of one token a letter, with special ones besides."""
    alphabet = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = tokenizers.Tokenizer(models.BPE({each: i for i, each in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(special))
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **more)
    made.chat_template = template
    return made


def chatml(template=CHATML):
    return letters("<|im_start|>", "<|im_end|>", template=template, eos_token="<|im_end|>")


def llama3():
    special = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    return letters(*special, template=LLAMA3, bos_token=special[0], eos_token=special[3])


def lines(folder, *rows, name="data.jsonl"):
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def sequences_of(file, tokenizer, tokens=200, packs=False, said=None, **more):
    return read_sequences(
        find_data([file], "DATA"),
        tokenizer,
        tokens,
        None,
        packs=packs,
        cache=file.parent / "cache",
        key=more.pop("key", "key"),
        on_stored=(said if said is not None else []).append,
        **more,
    )


def counted(inputs, tokenizer):
    """The texts of the stretches that count in the loss."""
    ids, labels = inputs["input_ids"][0], inputs["labels"][0]
    assert torch.equal(labels[labels >= 0], ids[labels >= 0])
    stretches, before = [], -1
    for place in (labels >= 0).nonzero().flatten().tolist():
        if place != before + 1 or not stretches:
            stretches.append([])
        stretches[-1].append(int(ids[place]))
        before = place
    return [tokenizer.decode(stretch) for stretch in stretches]


# Conversations


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (chatml(), ["\n Yes. <|im_end|>\n", "\nNo<|im_end|>\n"]),
        (llama3(), ["Yes.<|eot_id|>", "No<|eot_id|>"]),
    ],
    ids=["marked", "without marks"],
)
def test_the_tokens_that_count_are_those_of_trl(tmp_path, tokenizer, expected):
    """The stretches are what TRL 1.16's SFTTrainer has with `assistant_only_loss=True`.

    It was run on this conversation with its qwen2_5_training.jinja, of which CHATML has the form,
    and with llama3.jinja, for which it takes one with marks of its own.
    """
    inputs = sequences_of(lines(tmp_path, {"messages": CHAT}), tokenizer).inputs(0)

    assert counted(inputs, tokenizer) == expected
    whole = tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    assert inputs["input_ids"][0, : len(whole)].tolist() == whole
    assert inputs["attention_mask"].sum() == len(whole)
    assert not inputs["attention_mask"][0, len(whole) :].any()


def test_a_template_that_changes_earlier_turns_is_refused(tmp_path):
    """Its tokens cannot be told, and the sentence says what to do; one turn alone is taken."""
    tokenizer = chatml(FORGETFUL)
    one = sequences_of(lines(tmp_path, {"messages": CHAT[:3]}), tokenizer)

    assert counted(one.inputs(0), tokenizer) == ["<think></think> Yes. <|im_end|>\n"]
    with pytest.raises(CommandError, match=r"line 1: .* renders message 3 otherwise .*TRL's"):
        sequences_of(lines(tmp_path, {"messages": CHAT}), tokenizer, key="other")


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"messages": []}, "line 1, messages: it is empty"),
        ({"messages": "Hi"}, "messages: a string: give a list of objects"),
        ({"messages": [{"role": "human", "content": "Hi"}]}, "message 1 has role 'human': the rol"),
        ({"messages": [{"from": "human", "value": "Hi"}]}, "has no role but from, value"),
        ({"messages": [{"role": "user", "content": [{}]}]}, "content is a list: only text"),
        ({"messages": [{"role": "user"}]}, "content is null"),
        ({"prompt": "Hi", "completion": [CHAT[2]]}, "prompt is a string and its completion a list"),
        ({"prompt": 3, "completion": 4}, "prompt is a number"),
        ({"text": None}, "its text is null: give a string"),
        ({"words": "Hi", "id": 3}, "no column that is trained on (its columns: words, id)"),
    ],
)
def test_a_row_of_wrong_form_is_one_sentence(tmp_path, row, sentence):
    """It names the file, the line, what is there, and what should be; nothing is kept."""
    file = lines(tmp_path, row)

    with pytest.raises(CommandError, match=r"data\.jsonl line 1") as raised:
        sequences_of(file, chatml())
    assert sentence in str(raised.value)
    assert not list((tmp_path / "cache").glob("tokens/*"))


def test_what_a_template_refuses_is_one_sentence(tmp_path):
    """Its own words are in it, with the line."""
    tokenizer = chatml("{{ raise_exception('roles must alternate') }}")

    with pytest.raises(CommandError, match=r"line 1: the chat template refuses .*must alternate"):
        sequences_of(lines(tmp_path, {"messages": CHAT}), tokenizer)


def test_a_missing_template_is_one_sentence(tmp_path):
    """Conversations need one; so do completions that are messages."""
    for name, row in (
        ("a", {"messages": CHAT}),
        ("b", {"prompt": CHAT[:2], "completion": CHAT[2:]}),
    ):
        with pytest.raises(CommandError, match=r"no chat template.*chat_template\.jinja"):
            sequences_of(lines(tmp_path, row), chatml(None), key=name)


def test_keys_that_are_null_are_no_keys(tmp_path):
    """Columns of files give each message all keys; a template sees those that have a value."""
    template = (
        "{% for m in messages %}{{ '!' if m.tool_calls is defined else m.content }}{% endfor %}"
    )
    chat = [{**message, "tool_calls": None} for message in CHAT[:3]]
    tokenizer = chatml(template)

    found = sequences_of(lines(tmp_path, {"messages": chat}), tokenizer)

    assert counted(found.inputs(0), tokenizer) == [" Yes. "]


# Prompts with completions


def test_the_completion_counts(tmp_path):
    """The prompt does not; an end of text follows; messages get the template's header."""
    tokenizer = chatml()
    rows = [
        {"prompt": "2+2=", "completion": "4"},
        {"prompt": "3", "completion": "3<|im_end|>"},
    ]
    messages = {"prompt": CHAT[:2], "completion": CHAT[2:3]}

    strings = sequences_of(lines(tmp_path, *rows), tokenizer, key="strings")
    chats = sequences_of(lines(tmp_path, messages), tokenizer, key="chats")

    assert counted(strings.inputs(0), tokenizer) == ["4<|im_end|>"]
    assert counted(strings.inputs(1), tokenizer) == ["3<|im_end|>"]
    assert counted(chats.inputs(0), tokenizer) == [" Yes. <|im_end|>\n"]


def test_what_is_cut_or_skipped_is_counted(tmp_path):
    """Examples are cut at the end; one that has nothing left to learn is skipped."""
    tokenizer, said = chatml(), []
    rows = [
        {"prompt": "ab", "completion": "cdefgh"},
        {"prompt": "abcdefgh", "completion": "ij"},
        {"prompt": "a", "completion": "b"},
        {"prompt": "", "completion": ""},
    ]

    found = sequences_of(lines(tmp_path, *rows), tokenizer, tokens=6, said=said)

    assert [counted(found.inputs(n), tokenizer) for n in range(2)] == [["cdef"], ["b<|im_end|>"]]
    assert len(found) == 2
    assert "DATA: 2 completions, 9 tokens; 1 skipped that are empty" in said[0]
    assert "1 cut to --tokens 6; 1 skipped whose answer lies beyond --tokens 6" in said[0]
    with pytest.raises(CommandError, match="none of its completions is left"):
        sequences_of(lines(tmp_path, rows[1]), tokenizer, tokens=6, key="none")


# Texts


def test_rows_are_packed_as_files_are(tmp_path):
    """JSON lines give the tokens of their texts, short and long, in order; blank ones have none."""
    tokenizer, drawn = chatml(), random.Random(0)
    texts = ["".join(drawn.choices("ab c", k=count)) for count in (5, 20_000, 1, 70_000, 12)]
    blank = [{"text": " \n"}, {"text": ""}]
    said = []

    found = sequences_of(
        lines(tmp_path, *({"text": text} for text in texts), *blank),
        tokenizer,
        tokens=10,
        packs=True,
        said=said,
    )

    stream = torch.cat([found.at(n)[0] for n in range(len(found))]).tolist()
    expected = [id for text in texts for id in [*tokenizer(text).input_ids, 1]]
    assert stream == expected[: len(expected) // 10 * 10]
    assert "5 documents" in said[0]
    assert "2 skipped that are empty" in said[0]


def test_without_packing_each_text_is_a_sequence(tmp_path):
    """It is cut or padded to the length; padding and byte order marks do not count."""
    tokenizer = chatml()
    for name, text in (("a.txt", "\ufeffabc"), ("b.txt", "abcdefgh"), ("c.txt", " ")):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / name).write_text(text)

    found = sequences_of(tmp_path / "texts", tokenizer, tokens=6)

    assert len(found) == 2
    assert counted(found.inputs(0), tokenizer) == ["abc<|im_end|>"]
    assert counted(found.inputs(1), tokenizer) == ["abcdef"]
    assert found.inputs(0)["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0]]
    assert found.inputs(0)["labels"].tolist()[0][4:] == [-100, -100]


# Files


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"text": "a"}\n{"text": \n', "line 2 is not valid JSON"),
        (b'{"text": "a"}\n["a"]\n', "line 2 is no object but a list"),
        (b'[\n{"text": "a"}\n]\n', "line 1 begins a JSON array, and one object a line is read: jq"),
        (b'[\n{"text": "a"}\n]\n', "data.jsonl > data-lines.jsonl"),  # not onto itself
        (b'{"text": "a"}\n{"texts": "b"}\n', "line 2 has no column text (its columns: texts)"),
        (b'{"text": "\xff"}\n', "line 1 is not valid JSON"),
        (b"\n", "is empty: give a file with rows"),
    ],
)
def test_wrong_json_names_its_line(tmp_path, content, sentence):
    """The sentence says what is there; blank lines are no rows."""
    file = tmp_path / "data.jsonl"
    file.write_bytes(content)

    with pytest.raises(CommandError) as raised:
        sequences_of(file, chatml(), tokens=2, packs=True)
    assert sentence in str(raised.value)


def test_parquet_has_the_sequences_of_json_lines(tmp_path):
    """The same rows give the same tensors, whatever the file."""
    parquet, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    rows = [{"messages": CHAT[:n]} for n in (3, 5)] * 140
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "data [1].parquet")
    tokenizer = chatml()

    ours = sequences_of(tmp_path / "data [1].parquet", tokenizer, key="parquet")
    theirs = sequences_of(lines(tmp_path, *rows), tokenizer, key="lines")

    assert len(ours) == len(theirs) == 280
    for number in (0, 1, 279):
        for name, tensor in ours.inputs(number).items():
            assert torch.equal(tensor, theirs.inputs(number)[name])


def test_damaged_parquet_is_one_sentence(tmp_path):
    """The file is named."""
    pytest.importorskip("datasets")
    (tmp_path / "data.parquet").write_bytes(b"PAR1 and no more")

    with pytest.raises(CommandError, match=r"data\.parquet is no Parquet that can be read"):
        find_data([tmp_path / "data.parquet"], "DATA")


def test_without_the_extra_parquet_says_what_to_install(tmp_path, monkeypatch):
    """Text and JSON lines need nothing more."""
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "data.parquet").write_bytes(b"")

    with pytest.raises(CommandError, match=r"pip install 'memtile\[data\]'"):
        find_data([tmp_path / "data.parquet"], "DATA")
    assert len(sequences_of(lines(tmp_path, {"text": "abc"}), chatml(), tokens=4, packs=True)) == 1


def test_a_folder_is_its_files_of_one_kind(tmp_path):
    """In the order of their names, hidden ones left out; several kinds are refused."""
    folder = tmp_path / "data"
    (folder / "more").mkdir(parents=True)
    for name in ("b.txt", "more/a.txt", ".hidden", "a.txt"):
        (folder / name).write_text("word")

    assert [f.relative_to(folder).as_posix() for f in find_data([folder], "DATA").files] == [
        "a.txt",
        "b.txt",
        "more/a.txt",
    ]
    lines(folder, {"text": "word"})
    with pytest.raises(CommandError, match=r"several kinds of files: JSON lines .*, text .*a\.txt"):
        find_data([folder], "DATA")


# The cache


def test_tokens_are_made_once(tmp_path, monkeypatch):
    """The same key finds them, with what was counted; a file that failed half-way is made anew."""
    file, said = lines(tmp_path, {"text": "abcdef"}, {"text": ""}), []
    first = sequences_of(file, chatml(), tokens=3, packs=True, said=said)
    monkeypatch.setattr("memtile.cli.finetune.sequences.rows", lambda *_: pytest.fail("read again"))

    again = sequences_of(file, chatml(), tokens=3, packs=True, said=said)

    assert torch.equal(first.at(1), again.at(1))
    assert again.largest_id == first.largest_id > 0
    assert said[1] == said[0].replace("kept in", "found in")
    (tmp_path / "cache" / "tokens" / "key" / "counts.json").unlink()  # as a killed run leaves it
    monkeypatch.undo()
    anew = sequences_of(file, chatml(), tokens=3, packs=True)
    assert torch.equal(anew.at(1), first.at(1))
    assert len(anew) == len(first)


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    """The sentence says which option to give."""
    (tmp_path / "cache").write_text("")

    with pytest.raises(CommandError, match=r"cannot be kept in .*cache.*another --cache"):
        sequences_of(lines(tmp_path, {"text": "abc"}), chatml(), tokens=2, packs=True)

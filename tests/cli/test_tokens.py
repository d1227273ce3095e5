"""Texts as tokens: the same as tokenized whole, with what the tokenizer adds once a document."""

import io
import random
from itertools import chain
from pathlib import Path

import pytest
import tokenizers
import transformers
from rich.console import Console
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from memtile.cli.demo.training import cut_batches
from memtile.cli.errors import CommandError
from memtile.cli.finetune.data_files import find_data
from memtile.cli.finetune.display import Display
from memtile.cli.finetune.sequences import read_sequences, shuffled, text_pieces
from memtile.cli.finetune.tokens import OVERLAP, TokenFile, document_tokens

SPECIAL = ["<unk>", "<s>", "</s>"]


def some_text(characters, seed=0):
    """Words of few letters, numbers, spaces in a row, lines, and letters of several bytes."""
    drawn = random.Random(seed)
    words = ["".join(drawn.choices("abcdeé漢", k=drawn.randint(1, 9))) for _ in range(200)]
    words += ["   ", "\n\n", "12345", "don't", "🙂"]
    parts = [drawn.choice(words) + drawn.choice(" .\n") for _ in range(characters // 2)]
    return "".join(parts)[:characters]


def byte_level():
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return inner, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet)


def spaces_before_the_text():
    """As Llama 2: no words, a space put before each text, unknown letters as bytes."""
    inner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return inner, trainers.BpeTrainer(vocab_size=400, max_token_length=8)


def unigram():
    inner = tokenizers.Tokenizer(models.Unigram())
    inner.normalizer = normalizers.NFKC()
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    return inner, trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>")


def words():
    inner = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return inner, trainers.WordLevelTrainer()


def trained(kind, begin="<s> ", end="", **more):
    """A tokenizer of transformers that puts these around a text."""
    inner, trainer = kind()
    trainer.special_tokens = SPECIAL
    inner.train_from_iterator([some_text(3000)], trainer)
    inner.post_processor = processors.TemplateProcessing(
        single=f"{begin}$A{end}", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **more)


def pieces_of(text, characters):
    return [text[start : start + characters] for start in range(0, len(text), characters)]


def joined(text, tokenizer, characters):
    return list(chain(*document_tokens(pieces_of(text, characters), tokenizer)))


@pytest.mark.parametrize("kind", [byte_level, spaces_before_the_text, unigram, words])
def test_pieces_give_the_tokens_of_the_whole(kind):
    """Wherever the text was cut, in words, spaces or letters of several bytes, for every kind."""
    tokenizer, text = trained(kind), some_text(5 * OVERLAP + 77, seed=1)

    found = joined(text, tokenizer, OVERLAP + 131)
    threads = list(chain(*document_tokens(pieces_of(text, OVERLAP + 131), tokenizer, 3)))

    assert found == threads == tokenizer(text).input_ids


@pytest.mark.parametrize(
    ("begin", "end", "more", "expected"),
    [
        ("<s> ", "", {"eos_token": "</s>"}, [[1], [2]]),
        ("<s> ", " </s>", {"eos_token": "</s>"}, [[1], [2]]),
        ("", " </s>", {"eos_token": "</s>"}, [[], [2]]),
        ("", "", {"eos_token": "</s>"}, [[], [2]]),
        ("<s> ", "", {}, [[1], []]),
        ("", "", {}, [[], []]),
    ],
)
def test_special_tokens_are_there_once_a_document(begin, end, more, expected):
    """What the tokenizer adds is at the ends, once, and a text's end is marked."""
    tokenizer = trained(byte_level, begin, end, **more)
    text = some_text(3 * OVERLAP)

    found = joined(text, tokenizer, OVERLAP + 1)

    bare = tokenizer(text, add_special_tokens=False).input_ids
    assert found == [*expected[0], *bare, *expected[1]]


def test_the_demo_takes_the_document_whole_too():
    """Its first batch begins as `generate` begins a text, and no other one does."""
    tokenizer, text = trained(words), some_text(1000)

    batches = cut_batches(text, tokenizer, batches=2, tokens=9)

    first, second = batches.at(0), batches.at(1)
    assert [*first[0], *second[0]] == tokenizer(text).input_ids[:18]
    assert first[0, 0] == 1


def test_a_word_without_an_end_is_cut():
    """Where two pieces have no joint, all characters are tokenized all the same."""
    tokenizer, text = trained(byte_level, begin=""), "ab" * 3 * OVERLAP

    found = joined(text, tokenizer, OVERLAP + 5)

    assert tokenizer.decode(found) == text


def test_a_tokenizer_without_places_gets_lines():
    """One written in Python is given whole lines, and what it adds is there once."""

    class InPython(transformers.PythonBackend):
        vocab_size = 300

        def get_vocab(self):
            return {}

        def _tokenize(self, text, **kwargs):
            return text.split()

        def _convert_token_to_id(self, token):
            return len(token)

        def build_inputs_with_special_tokens(self, ids, pair=None):
            return [299, *ids]

    tokenizer, text = InPython(), "\n".join("a" * (1 + n % 7) for n in range(50))

    found = joined(text, tokenizer, 37)

    assert found == [299, *(1 + n % 7 for n in range(50))]


def test_a_text_is_read_a_piece_at_a_time(tmp_path):
    """Pieces have the size that was asked for, and join to the whole text."""
    file, text = tmp_path / "text.txt", some_text(30_000)
    file.write_text(text, newline="\r\n")

    pieces = list(text_pieces(file, "TEXT", 1000))

    assert {len(piece) for piece in pieces} == {1000}
    assert "".join(pieces) == text


def test_tokens_come_as_the_text_is_read():
    """Tokens lag the text by at most two pieces, so memory does not grow with it."""
    tokenizer, taken = trained(byte_level), []
    text = some_text(8 * OVERLAP)

    def pieces():
        for piece in pieces_of(text, OVERLAP):
            taken.append(piece)
            yield piece

    ahead = []
    came = 0
    for ids in document_tokens(pieces(), tokenizer):
        came += len(tokenizer.decode(ids, skip_special_tokens=True))
        ahead.append(OVERLAP * len(taken) - came)

    assert len(ahead) > 8
    assert max(ahead) < 2 * OVERLAP


def test_texts_are_packed_one_after_another(tmp_path):
    """Sequences are stretches of all texts, each with its end; how far reading is was said."""
    tokenizer = trained(byte_level, eos_token="</s>")
    files, texts, heard = [], [some_text(150_000, seed=2), some_text(900, seed=3)], []
    for number, text in enumerate(texts):
        files.append(tmp_path / f"{number}.txt")
        files[-1].write_text(text, newline="\n")

    found = read_sequences(
        find_data(files, "DATA"),
        tokenizer,
        30,
        0,
        packs=True,
        cache=tmp_path / "cache",
        key="key",
        on_read=lambda *now: heard.append(now),
    )

    stream = [id for text in texts for id in [*tokenizer(text).input_ids, 2]]
    expected = [stream[start : start + 30] for start in range(0, len(stream) - 29, 30)]
    assert sorted(found.at(step)[0].tolist() for step in range(len(found))) == sorted(expected)
    assert found.largest_id == max(stream)
    size = sum(file.stat().st_size for file in files)
    assert heard == sorted(heard)
    assert len(heard) > 3
    assert heard[-1] == (size, size)


def test_a_log_says_how_far_reading_is():
    """Each 16 MiB of text is a line in a log; a short text prints nothing."""
    said = io.StringIO()
    with Display(Console(file=said), steps=1) as display:
        for done in (1, 15, 17, 31, 33, 40):
            display.reading(done << 20, 40 << 20)

    assert said.getvalue().splitlines() == [
        "reading the data: 17.0 MiB of 40.0 MiB",
        "reading the data: 33.0 MiB of 40.0 MiB",
    ]


def test_a_folder_that_takes_no_tokens_is_named():
    """The message says how much room is needed."""
    with pytest.raises(CommandError, match=r"cannot be kept in /proc .*4 bytes a token"):
        TokenFile(Path("/proc"))


@pytest.mark.parametrize("count", [1, 2, 3, 97, 256, 1000])
def test_an_epoch_takes_each_sequence_once(count):
    """In an order that only the key decides, and that is another one for another key."""
    order = [shuffled(place, count, "0 0") for place in range(count)]

    assert sorted(order) == list(range(count))
    assert order == [shuffled(place, count, "0 0") for place in range(count)]
    assert count < 90 or order != [shuffled(place, count, "0 1") for place in range(count)]
    assert count < 90 or sum(o == place for place, o in enumerate(order)) < count / 10

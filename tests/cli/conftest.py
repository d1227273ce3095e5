"""A model, a tokenizer and a text that are small enough to train in under a second."""

import json
from pathlib import Path

import pytest

WORDS = [f"word{number}" for number in range(97)]


@pytest.fixture(autouse=True)
def token_cache(tmp_path_factory, monkeypatch) -> Path:
    """Gives the folder that `memtile finetune` keeps tokens in, of one test alone."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("memtile.cli.finetune.command.cache_folder", lambda: folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Gives a folder with a random Llama of 97 + 2 words, tied, with ragged widths.

    Its texts are as older releases of transformers write them.
    """
    import tokenizers
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("tiny-model")
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<pad>", *WORDS])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=24,
        intermediate_size=41,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    older = {
        "rope_theta": 10000.0,
        "torch_dtype": "float32",
        "rope_parameters": None,
        "dtype": None,
    }
    rewrite(folder / "config.json", older)
    older = {"tokenizer_class": "PreTrainedTokenizerFast", "backend": None}
    rewrite(folder / "tokenizer_config.json", older)
    (folder / "LICENSE").write_bytes(b"Do as you like.\r\n")
    return folder


def rewrite(file: Path, changes: dict[str, object]) -> None:
    """Change words of a JSON file, None for those that go, and write it in one line."""
    found = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory) -> Path:
    """Gives a file of 320 words, no two batches of which are alike."""
    file = tmp_path_factory.mktemp("tiny-text") / "text.txt"
    file.write_text(" ".join(WORDS[(7 * n + n // 13) % len(WORDS)] for n in range(320)))
    return file

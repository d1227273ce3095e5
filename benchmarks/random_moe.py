"""Writes a random Qwen3-MoE of three billion parameters in bfloat16, as the Hub's folders are.

Tensors have the Hub's names, one for each projection of each expert, and are made and written one
by one. Rows of the head are the embedding's, moved on by one: the likeliest next token is mostly
the next word, so that texts do not repeat themselves and experts are hit as by any text.

    python benchmarks/random_moe.py /var/tmp/moe
"""

import argparse
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import tokenizers
import torch
import transformers
from torch import Tensor

from memtile.checkpoints.writing import Outgoing, write_checkpoint

SHARD_BYTES = 1_000_000_000
STEP = 1031  # words from a token to its likeliest follower
EMBEDDING = "model.embed_tokens.weight"


def config_of(args: argparse.Namespace) -> transformers.Qwen3MoeConfig:
    """The model's config: every feed-forward is of experts, 4 of them for each token."""
    return transformers.Qwen3MoeConfig(
        vocab_size=args.words,
        hidden_size=args.hidden,
        moe_intermediate_size=args.intermediate,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 256,
        head_dim=64,
        num_experts=args.experts,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"],
    )


def stored_shapes(config: transformers.Qwen3MoeConfig) -> Iterator[tuple[str, torch.Size]]:
    """The Hub's names and shapes, in order."""
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(config)
    width, hidden = config.moe_intermediate_size, config.hidden_size
    for name, tensor in model.state_dict().items():
        stack, _, kind = name.rpartition(".")
        if kind == "gate_up_proj":
            for expert in range(config.num_experts):
                yield f"{stack}.{expert}.gate_proj.weight", torch.Size([width, hidden])
                yield f"{stack}.{expert}.up_proj.weight", torch.Size([width, hidden])
                yield f"{stack}.{expert}.down_proj.weight", torch.Size([hidden, width])
        elif kind != "down_proj":
            yield name, tensor.shape


def values(name: str, shape: torch.Size) -> list[Tensor]:
    """What a tensor of this name holds, drawn by its name alone."""
    if len(shape) == 1:
        return [torch.ones(shape, dtype=torch.bfloat16)]
    drawn = EMBEDDING if name == "lm_head.weight" else name
    generator = torch.Generator().manual_seed(zlib.crc32(drawn.encode()))
    found = torch.randn(shape, generator=generator).mul_(0.25 if drawn == EMBEDDING else 0.02)
    found = found.roll(STEP, 0) if name == "lm_head.weight" else found
    return [found.to(torch.bfloat16)]


def write_tokenizer(folder: Path, words: int) -> None:
    """A tokenizer of so many words, "word0" and so on."""
    vocabulary = {"<unk>": 0} | {f"word{number}": number for number in range(1, words)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token="<unk>"
    ).save_pretrained(folder)


def write_model(folder: Path, args: argparse.Namespace) -> int:
    """Writes the folder; how many parameters the model has."""
    config = config_of(args)
    tensors = [
        Outgoing(name, torch.bfloat16, shape, partial(values, name, shape))
        for name, shape in stored_shapes(config)
    ]
    write_checkpoint(folder, tensors, max_shard_bytes=SHARD_BYTES)
    config.save_pretrained(folder)
    write_tokenizer(folder, args.words)
    return sum(tensor.shape.numel() for tensor in tensors)


def sizes(parser: argparse.ArgumentParser) -> None:
    """Options for the model's sizes; the defaults make three billion parameters."""
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=768, help="of one expert")
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--words", type=int, default=4096)


def main() -> None:
    """Write a model into a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    sizes(parser)
    args = parser.parse_args()
    print(f"{write_model(args.folder, args):,} parameters in {args.folder}")


if __name__ == "__main__":
    main()

"""A ragged Llama of 64 hidden units for trainers: in float32, tiled on disk, and as the truth."""

from collections.abc import Iterable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset

import memtile

VOCABULARY, HIDDEN = 211, 64
TILE_BYTES = 9000  # 35 rows of the embedding, which has 211; the small projections stay whole


def llama(tied: bool = True, **config: Any) -> Any:
    """A model with seeded weights; in training it draws random numbers unless dropout is 0."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 150,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    made = transformers.LlamaConfig(**{**sizes, **config}, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(made)


def on_disk(model: Any) -> Any:
    """The same model, tiled, in a home on disk."""
    return memtile.tile(model, max_tile_bytes=TILE_BYTES, home=memtile.DiskHome())


def as_truth(model: Any) -> Any:
    """The same model computing in float64, also where transformers goes by way of float32."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = nn.RMSNorm(HIDDEN, eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(parent, name, norm)
    model.loss_function = _loss64
    return model.double()


def _loss64(
    logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Any = None, **_: Any
) -> Tensor:
    reduction = "mean" if num_items_in_batch is None else "sum"
    flat, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    loss = nn.functional.cross_entropy(flat, targets, reduction=reduction)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


class Sentences(Dataset[dict[str, Tensor]]):
    """Seeded random sentences of 17 tokens, with themselves as labels."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._ids = torch.randint(3, VOCABULARY, (count, 17), generator=generator)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {"input_ids": self._ids[number], "labels": self._ids[number]}


def batch_of_sentences(count: int = 3) -> dict[str, Tensor]:
    """Seeded sentences as one batch."""
    sentences = Sentences(count, seed=4)
    ids = torch.stack([sentences[number]["input_ids"] for number in range(count)])
    return {"input_ids": ids, "labels": ids}


def dense_values(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all values under dense names."""
    return {name: value.clone() for name, value in memtile.dense_state_dict(model)}


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """All elements in one row."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def assert_same_values(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """The same names, and the same bits."""
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert different == []


def assert_losses_as_accurate(ours: list[float], dense: list[float], truth: list[float]) -> None:
    """As far off as twice the dense run's, and the rounding of a loss itself."""
    a, b, t = (torch.tensor(losses, dtype=torch.float64) for losses in (ours, dense, truth))
    assert len(ours) == len(dense) == len(truth) > 0
    rounding = torch.finfo(torch.float32).eps * t.norm()
    assert (a - t).norm() <= 2 * (b - t).norm() + rounding

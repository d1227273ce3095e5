"""More and fewer tokens, ties and new starting values of tiled transformers models."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from small_experts import experts_model
from small_models import KINDS, SIZES
from torch import nn

import memtile
from memtile.errors import CannotTileError, HomeFullError, ParkedCopyWarning
from memtile.homes import DiskHome, is_parked
from memtile.layers import TiledModule

# BART's positions are an embedding of a class of its own.
pytestmark = pytest.mark.filterwarnings(
    "ignore:2 parameters stay above:memtile.errors.TileSizeWarning"
)
TILE_BYTES = 700
_BERT: dict[str, Any] = {name: SIZES[name] for name in SIZES if name != "num_key_value_heads"}
_BART = {
    **{"vocab_size": 131, "d_model": 24, "pad_token_id": 1, "max_position_embeddings": 64},
    **{f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in
       (("layers", 1), ("attention_heads", 4), ("ffn_dim", 52))},
}  # fmt: skip


def _bart(**options: Any) -> nn.Module:
    config = transformers.BartConfig(**_BART, scale_embedding=True, dropout=0.0, **options)
    return transformers.BartForConditionalGeneration(config)


def _gptj() -> nn.Module:
    return transformers.GPTJForCausalLM(
        transformers.GPTJConfig(
            vocab_size=131, n_embd=24, n_layer=1, n_head=4, n_positions=64, rotary_dim=4
        )
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{kind: KINDS[kind] for kind in ("llama", "llama-tied", "gemma3", "t5")},
    "bart": _bart,
    "bart-untied": lambda: _bart(tie_word_embeddings=False),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**_BERT)),
    "bert-untied": lambda: transformers.BertForMaskedLM(
        transformers.BertConfig(**_BERT, tie_word_embeddings=False)
    ),
    "gptj": _gptj,
}
RESIZES: dict[str, dict[str, Any]] = {
    "larger": {"new_num_tokens": 150},
    "larger, drawn": {"new_num_tokens": 150, "mean_resizing": False},
    "padded": {"pad_to_multiple_of": 64},
    "larger, padded": {"new_num_tokens": 133, "pad_to_multiple_of": 8},
    "smaller": {"new_num_tokens": 97},
    "one": {"new_num_tokens": 1},
    "equal": {"new_num_tokens": 131},
}


def pair(kind: str, home: Any = None, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A seeded model, and its tiled form."""
    torch.manual_seed(0)
    dense: Any = MODELS[kind]().to(dtype).eval()
    return dense, memtile.tile(copy.deepcopy(dense), max_tile_bytes=TILE_BYTES, home=home)


def resize(model: Any, **options: Any) -> Any:
    """`resize_token_embeddings` with a seed of its own."""
    torch.manual_seed(7)
    return model.resize_token_embeddings(**{"new_num_tokens": None, **options})


def tiled_layers(model: nn.Module) -> list[TiledModule]:
    """The tiled layers of a model."""
    return [module for module in model.modules() if isinstance(module, TiledModule)]


def assert_equal_models(tiled: Any, dense: Any) -> None:
    """Every tensor of the checkpoint is the same; untiled, so are names, ties and attributes."""
    state = dict(memtile.dense_state_dict(tiled))
    assert state.keys() == dense.state_dict().keys()
    for name, tensor in dense.state_dict().items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor), name
    memtile.untile(tiled)
    theirs = dict(dense.named_parameters())
    assert {n: p.requires_grad for n, p in tiled.named_parameters()} == {
        n: p.requires_grad for n, p in theirs.items()
    }
    modules = dense.named_modules(remove_duplicate=False)
    for ours, (name, module) in zip(
        tiled.named_modules(remove_duplicate=False), modules, strict=True
    ):
        assert (ours[0], type(ours[1])) == (name, type(module))
        for attribute in ("num_embeddings", "padding_idx", "out_features", "in_features"):
            assert getattr(ours[1], attribute, None) == getattr(module, attribute, None), name


@pytest.mark.parametrize(
    ("kind", "home", "how"),
    [
        *((kind, "disk", "larger") for kind in MODELS),
        *((kind, None, "larger") for kind in ("llama-tied", "bart", "bert-untied")),
        *(
            (kind, "disk", how)
            for kind in ("gemma3", "bert", "bert-untied")
            for how in RESIZES
            if how != "larger"
        ),
    ],
)
def test_a_resized_model_is_the_dense_one_bit_for_bit(kind: str, home: Any, how: str) -> None:
    """Values of the same seed, config, ties and attributes; tiles no larger, and still at home."""
    dense, tiled = pair(kind, home)
    largest = max(p.numel() for layer in tiled_layers(tiled) for p in layer.parameters())

    resize(dense, **RESIZES[how])
    drawn_next = torch.rand(3)
    returned = resize(tiled, **RESIZES[how])

    assert torch.equal(torch.rand(3), drawn_next)
    assert returned is tiled.get_input_embeddings()
    assert tiled.config.vocab_size == dense.config.vocab_size == returned.num_embeddings
    weights = [p for layer in tiled_layers(tiled) for p in layer.tile_parameters("weight").values()]
    assert max(p.numel() for p in weights) <= largest
    assert all(is_parked(p) for p in weights) == (home is not None)
    assert_equal_models(tiled, dense)


@pytest.mark.parametrize("kind", ["llama", "bert", "bart"])
def test_sixteen_bits_in_host_memory(kind: str) -> None:
    """The dtype stays, and so does the home."""
    dense, tiled = pair(kind, "host", torch.bfloat16)

    resize(tiled, new_num_tokens=150)
    resize(dense, new_num_tokens=150)

    assert is_parked(tiled.get_input_embeddings().tile(0, 0).weight)
    assert_equal_models(tiled, dense)


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gptj", "bert"])
def test_frozen_layers_stay_frozen(kind: str) -> None:
    """`requires_grad` of the resized embedding and head follow transformers' rule."""
    dense, tiled = pair(kind)
    for model in (dense, tiled):
        model.get_output_embeddings().requires_grad_(False)
        resize(model, new_num_tokens=150)

    assert_equal_models(tiled, dense)


@pytest.mark.parametrize("kind", ["llama-tied", "gptj", "bart"])
def test_an_optimizer_made_afterwards_trains_the_new_rows(kind: str) -> None:
    """One AdamW step on a batch with the new tokens is the dense model's."""
    dense, tiled = pair(kind, "disk")
    ids = torch.tensor([[3, 140, 149, 5]])
    for model in (dense, tiled):
        resize(model, new_num_tokens=150)
    optimizers = [
        torch.optim.AdamW(dense.parameters(), lr=0.01),
        memtile.TileOptimizer(tiled, torch.optim.AdamW, lr=0.01),
    ]
    for model, optimizer in zip((dense, tiled), optimizers, strict=True):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    trained = tiled.get_input_embeddings().weight
    torch.testing.assert_close(trained + 0, dense.get_input_embeddings().weight.detach())


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "bert", "bart"])
def test_plain_transformers_loads_the_saved_folder(kind: str, tmp_path: Any) -> None:
    """`save_pretrained` after a resize: the new vocabulary, and equal values."""
    _, tiled = pair(kind, "disk")
    resize(tiled, new_num_tokens=150)

    tiled.save_pretrained(tmp_path)
    loaded = type(tiled).from_pretrained(tmp_path)

    assert loaded.config.vocab_size == 150
    assert_equal_models(tiled, loaded)


def test_an_optimizer_of_before_is_warned_of() -> None:
    """It holds the tiles of the old vocabulary."""
    _, tiled = pair("llama")
    optimizer = torch.optim.SGD(tiled.parameters(), lr=0.1)
    resize(tiled, new_num_tokens=150)

    with pytest.warns(memtile.errors.ReplacedParametersWarning, match="resize_token_embeddings"):
        optimizer.step()


def test_hooks_of_the_embedding_stay() -> None:
    """`enable_input_require_grads` of before goes on working."""
    _, tiled = pair("llama", "disk")
    tiled.requires_grad_(False)
    tiled.enable_input_require_grads()
    embedding = resize(tiled, new_num_tokens=150)

    assert embedding(torch.tensor([149])).requires_grad


def test_a_full_home_leaves_the_model_as_it_was(monkeypatch: Any) -> None:
    """HomeFullError, and the old rows, config and logits are there."""
    home, ids = DiskHome(), torch.tensor([[3, 4, 5]])
    _, tiled = pair("llama", home)
    before = tiled(ids).logits

    def full(*given: object) -> None:
        raise HomeFullError("full")

    monkeypatch.setattr(home, "allocate", full)
    with pytest.raises(HomeFullError):
        resize(tiled, new_num_tokens=150)

    assert tiled.config.vocab_size == 131
    assert torch.equal(tiled(ids).logits, before)


def test_in_the_files_of_a_checkpoint_the_resized_layer_is_in_memory(tmp_path: Any) -> None:
    """They are only read; a warning says so, with the way out."""
    dense, _ = pair("llama-tied")
    dense.save_pretrained(tmp_path)
    tiled = memtile.empty_model(lambda: MODELS["llama-tied"]())
    memtile.tile(tiled, max_tile_bytes=TILE_BYTES, checkpoint=tmp_path, home="checkpoint")
    tiled.requires_grad_(False)

    with pytest.warns(ParkedCopyWarning, match='embed_tokens .*home="disk"'):
        resize(tiled, new_num_tokens=150)
    resize(dense, new_num_tokens=150)

    assert not is_parked(tiled.lm_head.tile(0, 0).weight)
    assert_equal_models(tiled, dense.requires_grad_(False))


def test_tiles_with_hooks_are_refused() -> None:
    """What someone put on a tile would be lost."""
    _, tiled = pair("llama")
    tiled.lm_head.tile(0, 0).register_forward_hook(print)

    with pytest.raises(CannotTileError, match=r"lm_head cannot be resized: its tile \(0, 0\)"):
        resize(tiled, new_num_tokens=150)


def test_the_base_of_an_adapter_is_resized() -> None:
    """PEFT's wrapper hands the call to its base, whose adapters stay."""
    dense, _ = pair("llama-tied")
    torch.manual_seed(1)
    dense = peft.get_peft_model(dense, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    tiled = memtile.tile(copy.deepcopy(dense), max_tile_bytes=TILE_BYTES, home="disk")
    for model in (dense, tiled):
        resize(model, new_num_tokens=150)

    assert_equal_models(tiled, dense)


# Ties


@pytest.mark.parametrize("kind", ["llama", "bert-untied"])
def test_ties_that_the_config_asks_for_later(kind: str) -> None:
    """`tie_word_embeddings=True` and `tie_weights()`: one set of tiles, as one dense weight."""
    dense, tiled = pair(kind, "disk")
    for model in (dense, tiled):
        model.config.tie_word_embeddings = True
        model.tie_weights()

    head, embedding = tiled.get_output_embeddings(), tiled.get_input_embeddings()
    assert head.tile(0, 0).weight is embedding.tile(0, 0).weight
    assert_equal_models(tiled, dense)


def test_a_dense_embedding_in_a_tiled_model_ties_its_head() -> None:
    """The head becomes dense: both have the given weight."""
    _, tiled = pair("llama-tied", "disk")
    new = nn.Embedding(131, 24)
    tiled.set_input_embeddings(new)
    assert tiled.get_input_embeddings() is new
    tiled.tie_weights()

    assert tiled.lm_head.weight is new.weight
    assert tiled(torch.tensor([[3]])).logits.shape == (1, 1, 131)


def test_a_dense_head_is_tied_to_a_tiled_embedding() -> None:
    """The head becomes tiles, those of the embedding."""
    _, tiled = pair("llama-tied", "disk")
    tiled.set_output_embeddings(nn.Linear(24, 131, bias=False))
    tiled.tie_weights()

    assert tiled.lm_head.tile(0, 0).weight is tiled.get_input_embeddings().tile(0, 0).weight
    assert tiled.lm_head.full_name() == "lm_head"


def test_what_has_no_tiled_form_cannot_be_tied_to_tiles() -> None:
    """A head of a class of its own."""

    class Head(nn.Linear):
        pass

    _, tiled = pair("llama-tied")
    tiled.set_output_embeddings(Head(24, 131, bias=False))

    with pytest.raises(CannotTileError, match=r"Head has no tiled form; .*untile"):
        tiled.tie_weights()


# Starting values


@pytest.mark.parametrize("home", [None, "disk"])
@pytest.mark.parametrize("kind", [*MODELS, "gpt2"])
def test_starting_values_are_those_of_the_dense_model(
    kind: str, home: Any, monkeypatch: Any
) -> None:
    """`init_weights()` draws whole layers: equal numbers of the same seed."""
    monkeypatch.setitem(MODELS, "gpt2", KINDS["gpt2"])
    dense, tiled = pair(kind, home)
    for model in (dense, tiled):
        for module in model.modules():
            module._is_hf_initialized = False
        torch.manual_seed(3)
        model.init_weights()

    assert_equal_models(tiled, dense)


@pytest.mark.parametrize("name", ["qwen3", "gpt-oss"])
def test_stacks_of_experts_are_drawn_as_the_dense_ones(name: str) -> None:
    """A stack's values come from the rule for its owner."""
    dense = experts_model(name)
    tiled = memtile.tile(copy.deepcopy(dense), max_tile_bytes=TILE_BYTES, home="disk")
    for model in (dense, tiled):
        for module in model.modules():
            module._is_hf_initialized = False
        torch.manual_seed(3)
        model.init_weights()

    assert_equal_models(tiled, dense)


def test_initialised_layers_are_not_drawn_again() -> None:
    """transformers marks what is initialised; tiles keep the mark."""
    dense, tiled = pair("llama")
    tiled.init_weights()

    assert_equal_models(tiled, dense)

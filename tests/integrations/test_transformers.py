"""transformers models go on working when they are tiled."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_models import KINDS, WRITERS, build, inputs, pair
from torch import Tensor

import memtile
from memtile.convert import select_linears

# ViT's patches are cut by a convolution, which stays as it is and is named in a warning.
pytestmark = pytest.mark.filterwarnings(
    "ignore:2 parameters stay above:memtile.errors.TileSizeWarning"
)
CUTS = [{"max_tile_bytes": 700}, {"out_splits": 3, "in_splits": 2}]
RAGGED = {"max_tile_bytes": 700}


def loss_and_logits(model: Any, kind: str) -> tuple[Tensor, Tensor]:
    """A loss that reaches every logit, and the logits."""
    logits = model(**inputs(kind)).logits
    return logits.square().mean(), logits


def double_inputs(kind: str) -> dict[str, Tensor]:
    """The batch for a float64 model."""
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs(kind).items()}


def assert_as_close(ours: Tensor, dense: Tensor, truth: Tensor) -> None:
    """Ours is off the float64 truth by no more than twice the dense model's own error."""
    floor = torch.finfo(torch.float32).eps * truth.norm()
    assert (ours - truth).norm() <= 2 * (dense - truth).norm() + floor


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_backward(kind: str, cut: dict[str, int]) -> None:
    """Logits and every gradient are as accurate as the dense model's."""
    dense, tiled = pair(kind)
    truth = copy.deepcopy(dense).double()
    memtile.tile(tiled, **cut)

    truth_logits = truth(**double_inputs(kind)).logits
    truth_logits.square().mean().backward()
    dense_loss, dense_logits = loss_and_logits(dense, kind)
    tiled_loss, tiled_logits = loss_and_logits(tiled, kind)
    dense_loss.backward()
    tiled_loss.backward()
    memtile.untile(tiled)

    assert_as_close(tiled_logits, dense_logits, truth_logits)
    scale = max(p.grad.norm() for p in truth.parameters() if p.grad is not None)
    for (name, a), b, t in zip(
        tiled.named_parameters(), dense.parameters(), truth.parameters(), strict=True
    ):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            floor = torch.finfo(torch.float32).eps * scale
            assert (a.grad - t.grad).norm() <= 2 * (b.grad - t.grad).norm() + floor, name


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_and_embedding_that_is_large_enough_is_tiled(kind: str) -> None:
    """Layers of these models stay dense only for their size."""
    decisions = select_linears(build(kind), **RAGGED)

    assert sum(decision.tiled for decision in decisions) >= 11
    assert all(
        "fit in max_tile_bytes" in decision.reason for decision in decisions if not decision.tiled
    )


@pytest.mark.parametrize("kind", WRITERS)
def test_generate_gives_the_same_tokens(kind: str) -> None:
    """Greedy generation, with and without a key-value cache, is the dense model's."""
    dense, tiled = pair(kind)
    memtile.tile(tiled, **RAGGED)
    prompt = {key: value for key, value in inputs(kind).items() if key != "labels"}

    for use_cache in (True, False):
        options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "use_cache": use_cache}
        expected = dense.generate(**prompt, **options)
        got = tiled.generate(**prompt, **options)

        assert torch.equal(got, expected)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing(kind: str, reentrant: bool) -> None:
    """gradient_checkpointing_enable recomputes the tiles and gives the same gradients."""
    plain, checkpointed = pair(kind)
    for model in (plain, checkpointed):
        memtile.tile(model.double(), **RAGGED).train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant and kind != "vit":
        checkpointed.enable_input_require_grads()

    for model in (plain, checkpointed):
        model(**double_inputs(kind)).logits.square().mean().backward()

    for (name, a), b in zip(checkpointed.named_parameters(), plain.parameters(), strict=True):
        if reentrant and a.grad is None:
            assert kind == "vit", name  # its pixels need no grad: reentrant checkpoints drop them
            continue
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            # In float64 only the order of sums may differ; a wrong gradient would be far off.
            assert (a.grad - b.grad).norm() <= torch.finfo(torch.float32).eps * b.grad.norm(), name


@pytest.mark.parametrize("safe_shards", ["5GB", "20KB"])
@pytest.mark.parametrize("kind", KINDS)
def test_save_pretrained_writes_what_plain_transformers_loads(
    kind: str, safe_shards: str, tmp_path: Path
) -> None:
    """The folder holds the dense checkpoint: dense names, dense shapes, every bit, ties once."""
    dense, tiled = pair(kind)
    memtile.tile(tiled, **RAGGED)

    tiled.save_pretrained(tmp_path, max_shard_size=safe_shards)

    loaded = type(dense).from_pretrained(tmp_path)
    expected = dense.state_dict()
    assert list(loaded.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


def test_save_pretrained_takes_the_state_dict_that_a_trainer_passes(tmp_path: Path) -> None:
    """A state dict with tile names, possibly changed, is written under dense names."""
    dense, tiled = pair("llama-tied")
    memtile.tile(tiled, **RAGGED)
    doubled = {name: value * 2 for name, value in tiled.state_dict().items()}

    tiled.save_pretrained(tmp_path, state_dict=doubled)

    loaded = type(dense).from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, 2 * dense.lm_head.weight)


def test_saving_survives_deepcopy_and_pickle(tmp_path: Path) -> None:
    """A copy of a tiled model saves its own weights, not the original's."""
    tiled = memtile.tile(build("llama"), **RAGGED)

    for copied in (copy.deepcopy(tiled), pickle.loads(pickle.dumps(tiled))):
        with torch.no_grad():
            copied.lm_head.tile(0, 0).weight.fill_(3.0)
        copied.save_pretrained(tmp_path)
        loaded = type(tiled).from_pretrained(tmp_path)

        assert loaded.lm_head.weight[0].eq(3.0).all()
        assert not tiled.lm_head.tile(0, 0).weight.eq(3.0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_from_pretrained_then_tile_then_load_dense(kind: str, tmp_path: Path) -> None:
    """A loaded model tiles; a dense checkpoint loads into the tiled model under its own names."""
    dense = build(kind)
    dense.save_pretrained(tmp_path)

    tiled = memtile.tile(type(dense).from_pretrained(tmp_path), **RAGGED)
    with torch.no_grad():
        for parameter in tiled.parameters():
            parameter.zero_()
    tiled.load_state_dict(dense.state_dict())
    memtile.untile(tiled)

    expected = dense.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in tiled.state_dict().items())
    assert "save_pretrained" not in vars(tiled)


@pytest.mark.parametrize("kind", KINDS)
def test_tie_weights_and_init_weights_change_nothing(kind: str) -> None:
    """tie_weights is a no-op on tiled ties; init_weights draws nothing that is initialised anew."""
    tiled = memtile.tile(build(kind), **RAGGED)
    before = {name: value.clone() for name, value in tiled.state_dict().items()}
    parameters = [id(parameter) for parameter in tiled.parameters()]

    tiled.tie_weights()
    tiled.init_weights()

    assert [id(parameter) for parameter in tiled.parameters()] == parameters
    assert all(torch.equal(value, before[name]) for name, value in tiled.state_dict().items())


def test_tie_weights_of_a_head_with_a_bias_of_its_own_changes_nothing() -> None:
    """transformers pads such a bias to the height of its weight, which tiles have already."""
    config = transformers.ElectraConfig(
        vocab_size=131,
        embedding_size=24,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    tiled = memtile.tile(transformers.ElectraForMaskedLM(config), out_splits=3)
    head, embedding = tiled.generator_lm_head, tiled.get_input_embeddings()

    tiled.tie_weights()

    assert head.tile(0, 0).weight is embedding.tile(0, 0).weight
    assert head.bias.shape == (131,)


def test_init_weights_draws_tiles_that_are_not_initialised() -> None:
    """Where transformers would initialise a linear, it initialises the tiles, with its own std."""
    config = transformers.LlamaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=1)
    tiled = memtile.tile(transformers.LlamaForCausalLM(config), out_splits=3)
    for module in tiled.modules():
        if hasattr(module, "_is_hf_initialized"):
            del module._is_hf_initialized
    with torch.no_grad():
        for parameter in tiled.lm_head.parameters():
            parameter.zero_()

    tiled.init_weights()

    std = torch.cat([p.flatten() for p in tiled.lm_head.parameters()]).std()
    assert abs(std - config.initializer_range) < 0.05 * config.initializer_range


def test_reading_weights_as_models_do() -> None:
    """dtype, device, shape and lookups by name give what the dense model's give."""
    dense, tiled = pair("t5")
    memtile.tile(tiled, **RAGGED)

    wo = tiled.encoder.block[0].layer[1].DenseReluDense.wo
    assert wo.weight.dtype == torch.float32
    assert isinstance(wo.weight, torch.nn.Parameter)
    assert tiled.get_parameter("lm_head.weight").shape == dense.lm_head.weight.shape
    assert tiled.get_input_embeddings().weight.shape == (131, 24)
    assert tiled.dtype == dense.dtype
    assert tiled.device == dense.device
    assert tiled.num_parameters() == dense.num_parameters()


def test_berts_decoder_is_tied_by_weight_and_shares_its_bias(tmp_path: Path) -> None:
    """Most weights are parked; the saved model loads in plain transformers and trains."""
    config = transformers.BertConfig(
        vocab_size=131, hidden_size=24, num_hidden_layers=1, num_attention_heads=4
    )
    dense = transformers.BertForMaskedLM(config).eval()
    tiled = memtile.tile(copy.deepcopy(dense), home="host")
    tiled.tie_weights()
    tiled.save_pretrained(tmp_path)

    head = tiled.cls.predictions
    loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path).eval()
    ids = inputs("llama")["input_ids"]
    assert head.decoder.tile(0, 0).weight is tiled.get_input_embeddings().tile(0, 0).weight
    assert head.decoder.bias is head.bias
    torch.testing.assert_close(tiled(ids).logits, dense(ids).logits)
    assert torch.equal(loaded(ids).logits, dense(ids).logits)


def test_inputs_have_the_names_that_transformers_gives_them() -> None:
    """`Conv1D` takes `x`, a scaled embedding `input_ids`; so do their tiled forms."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    embedding = Gemma3TextScaledWordEmbedding(11, 5, 0, embed_scale=2.0)
    linear = transformers.pytorch_utils.Conv1D(7, 5)
    ids, x = torch.tensor([3, 9]), torch.randn(4, 5)
    expected = embedding(input_ids=ids), linear(x=x)
    tiled = memtile.tile(torch.nn.ModuleList([embedding, linear]), out_splits=3)

    torch.testing.assert_close((tiled[0](input_ids=ids), tiled[1](x=x)), expected)


def test_what_is_no_linear_is_named_in_a_warning() -> None:
    """ViT's convolution stays above the tile size, and tile warns of it."""
    with pytest.warns(memtile.errors.TileSizeWarning, match="patch_embeddings.*no linear"):
        memtile.tile(build("vit"), **RAGGED)

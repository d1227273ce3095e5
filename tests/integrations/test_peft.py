"""A PEFT-wrapped model tiles: frozen base linears become tiles, adapters stay."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from small_models import build, inputs

import memtile
from memtile.convert import select_linears


def wrapped(kind: str = "llama-tied") -> Any:
    """A model with LoRA adapters whose B is not zero, so that they matter."""
    torch.manual_seed(0)
    targets = ["c_attn"] if kind == "gpt2" else ["q_proj", "down_proj"]
    config = peft.LoraConfig(r=2, target_modules=targets, fan_in_fan_out=kind == "gpt2")
    model = peft.get_peft_model(build(kind), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2"])
def test_base_linears_become_tiles_and_adapters_stay(kind: str) -> None:
    """Every base linear is tiled and frozen; every adapter is the module that it was."""
    model = wrapped(kind)
    adapters = [m for n, m in model.named_modules() if "lora_" in n]

    decisions = {c.name: c for c in select_linears(model, out_splits=3)}
    memtile.tile(model, out_splits=3)

    assert [m for n, m in model.named_modules() if "lora_" in n] == adapters
    for name, decision in decisions.items():
        if "lora_" in name:
            assert not decision.tiled
            assert "PEFT adapter" in decision.reason
        else:
            assert decision.tiled, decision
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2"])
def test_adapters_train_as_on_the_dense_model(kind: str) -> None:
    """Logits and adapter gradients are the dense model's, and frozen tiles get no gradient."""
    dense = wrapped(kind)
    tiled = copy.deepcopy(dense)
    memtile.tile(tiled, out_splits=3, in_splits=2)

    for model in (dense, tiled):
        model(**inputs(kind)).logits.square().mean().backward()

    expected = {n: p.grad for n, p in dense.named_parameters() if p.requires_grad}
    for name, parameter in tiled.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name])
        else:
            assert parameter.grad is None, name


def test_adapter_checkpoints_hold_adapters_only(tmp_path: Path) -> None:
    """save_pretrained of the PEFT model writes what the dense model's would."""
    dense = wrapped()
    tiled = copy.deepcopy(dense)
    memtile.tile(tiled, out_splits=3)

    tiled.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build("llama-tied"), tmp_path)

    expected = {n: p for n, p in dense.named_parameters() if "lora_" in n}
    assert expected
    for name, parameter in loaded.named_parameters():
        if name in expected:
            assert torch.equal(parameter, expected[name])


@pytest.mark.parametrize("home", [None, "disk"])
def test_merging_writes_the_tiles_of_the_base(home: str | None) -> None:
    """Merged weights are those of the dense model, bit for bit, and ties are kept."""
    model = wrapped()
    dense = copy.deepcopy(model).merge_and_unload()
    memtile.tile(model, out_splits=3, home=home)

    merged = model.merge_and_unload()

    assert merged.config.tie_word_embeddings
    state = dict(memtile.dense_state_dict(merged))
    assert state.keys() == dense.state_dict().keys()
    for name, tensor in dense.state_dict().items():
        assert torch.equal(state[name], tensor), name

"""Parked models under transformers and PEFT: adapters train, text is generated, as when dense."""

import copy

import peft
import pytest
import torch
from leftovers import check_nothing_is_left
from parked_layers import HOMES, home_called, weights_of
from small_models import build, inputs

import memtile

nothing_is_left = pytest.fixture(autouse=True)(check_nothing_is_left)


@pytest.mark.parametrize("wrapped_first", [True, False])
def test_adapters_train_over_a_parked_base(wrapped_first):
    """LoRA gradients are those over the dense base, whether it is wrapped before or after."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    dense = peft.get_peft_model(build("llama-tied"), config)
    with torch.no_grad():
        for name, p in dense.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    parked = copy.deepcopy(dense)
    base = parked if wrapped_first else parked.base_model.model
    memtile.tile(base, out_splits=3, home=memtile.homes.DiskHome())

    for _ in range(2):
        for model in (dense, parked):
            model(**inputs("llama-tied")).logits.square().mean().backward()

    expected = {n: p.grad for n, p in dense.named_parameters() if p.requires_grad}
    found = {n: p.grad for n, p in parked.named_parameters() if p.requires_grad}
    assert expected.keys() == found.keys()
    assert weights_of(parked)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])
    assert all(p.grad is None for p in weights_of(parked).values())


@pytest.mark.parametrize("home", HOMES)
def test_generation_gives_the_dense_models_tokens(home):
    """Greedy, with a cache, before and after a training step."""
    dense, batch = build("llama-tied").eval(), inputs("llama-tied")
    parked = memtile.tile(copy.deepcopy(dense), out_splits=3, home=home_called(home))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    for _ in range(2):
        expected = dense.generate(**batch, **options)
        assert torch.equal(parked.generate(**batch, **options), expected)
        for model in (dense, parked):
            model.zero_grad()
            model(**batch).logits.square().mean().backward()
            torch.optim.SGD(model.parameters(), lr=0.01).step()

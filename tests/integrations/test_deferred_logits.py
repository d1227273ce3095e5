"""Models of transformers and PEFT whose losses need no logits: what else they do is unchanged."""

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from leftovers import check_nothing_is_left
from tiny_llama import Sentences, llama, on_disk
from torch import nn

import memtile
from memtile.convert import set_checkpointing
from memtile.layers import DeferredLogits, deferring_head

nothing_is_left = pytest.fixture(autouse=True)(check_nothing_is_left)


@pytest.fixture(autouse=True)
def defer_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few logits are deferred too."""
    monkeypatch.setattr(deferring_head, "LEAST_LOGITS", 0)


def batch() -> dict[str, Any]:
    sentences = Sentences(3, seed=4)
    ids = torch.stack([sentences[number]["input_ids"] for number in range(3)])
    labels = ids.clone()
    labels[0, 9:] = -100
    return {"input_ids": ids, "labels": labels}


def assert_same_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize("tied", [True, False])
def test_a_parked_model_trains_and_writes(tied: bool):
    """Loss, gradients, `output.logits` and generated texts are the dense model's."""
    dense, parked = llama(tied), on_disk(llama(tied))
    for options in ({}, {"num_items_in_batch": 57}, {"shift_labels": batch()["labels"]}):
        found, truth = (model(**batch(), **options) for model in (parked, dense))
        torch.testing.assert_close(found.loss, truth.loss, rtol=1e-6, atol=0)
    found.loss.backward()
    truth.loss.backward()
    assert type(found.logits) is DeferredLogits
    torch.testing.assert_close(found.logits + 0, truth.logits)
    ids = batch()["input_ids"][:, :5]
    models = [model.eval() for model in (dense, parked)]
    texts = [each.generate(ids, max_new_tokens=6, do_sample=False) for each in models]
    assert torch.equal(*texts)

    assert_same_gradients(memtile.untile(parked), dense)
    assert type(parked.lm_head) is nn.Linear


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_that_is_not_tiled(checkpointing: bool):
    """`defer_logits` alone, with a head tied to the embedding, and recomputed activations."""
    models = [llama(attention_dropout=0.1).train() for _ in range(2)]
    memtile.defer_logits(models[0])
    outputs = []
    for model in models:
        set_checkpointing(model, checkpointing)
        torch.manual_seed(3)
        outputs.append(model(**batch(), logits_to_keep=17))
        outputs[-1].loss.backward()

    assert type(outputs[0].logits) is DeferredLogits
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=1e-6, atol=0)
    assert_same_gradients(*models)


def test_copies_pickles_and_files(tmp_path: Path):
    """They are those of the dense model, and copies defer their logits too."""
    dense, model = llama(), memtile.tile(llama(), out_splits=3)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        output = each(**batch())
        assert type(output.logits) is DeferredLogits
        torch.testing.assert_close(output.loss, dense(**batch()).loss, rtol=1e-6, atol=0)
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[k], v) for k, v in dense.state_dict().items())
    found = pickle.loads(pickle.dumps(output))
    assert type(found.logits) is torch.Tensor


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize(
    ("options", "defers"),
    [
        ({"target_modules": ["q_proj"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),
        ({"target_modules": ["q_proj", "lm_head"]}, False),
    ],
    ids=["adapters", "a trained head", "an adapted head"],
)
def test_peft(options: Any, defers: bool):
    """Adapters elsewhere, a trained copy of the head, and a head whose adapters need its logits."""
    models = []
    for _ in range(2):
        model = peft.get_peft_model(llama(False), peft.LoraConfig(r=3, **options))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.02)  # equal ones would cancel out in the loss
        models.append(model)
    torch.manual_seed(0)
    state = models[0].state_dict()
    models[1].load_state_dict(state)
    outputs = [model(**batch()) for model in (memtile.tile(models[0], out_splits=3), models[1])]
    for output in outputs:
        output.loss.backward()

    assert (type(outputs[0].logits) is DeferredLogits) == defers
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=1e-6, atol=0)
    assert_same_gradients(memtile.untile(models[0]), models[1])

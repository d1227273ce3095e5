"""empty_model: parameters on the meta device, buffers real."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import transformers
from small_models import KINDS, build
from torch import nn

import memtile
from memtile.errors import ArgumentError, CannotTileError
from memtile.testing import LargestAllocation


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_made_without_its_parameters(kind):
    """Names, shapes, dtypes, ties and modes are the model's; buffers have its values."""
    whole = build(kind)

    model = memtile.empty_model(lambda: build(kind))

    described = [(n, p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()]
    assert described == [
        (n, p.shape, p.dtype, p.requires_grad) for n, p in whole.named_parameters()
    ]
    assert all(parameter.is_meta for parameter in model.parameters())
    buffers = dict(model.named_buffers())
    assert buffers.keys() == dict(whole.named_buffers()).keys()
    assert all(torch.equal(buffers[n], b) for n, b in whole.named_buffers())
    assert list(model.state_dict()) == list(whole.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transformers_config_is_enough(dtype):
    """from_config makes it in the dtype that is asked for, with real rotary tables."""
    config = build("llama").config

    model = memtile.empty_model(
        lambda: transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    )

    assert {p.dtype for p in model.parameters()} == {dtype}
    truth = transformers.AutoModelForCausalLM.from_config(config).model.rotary_emb
    assert torch.equal(model.model.rotary_emb.inv_freq, truth.inv_freq)


def test_no_memory_is_taken_for_parameters():
    """A linear of 400 MB takes no memory."""
    with LargestAllocation() as largest:
        memtile.empty_model(lambda: nn.Sequential(nn.Linear(10_000, 10_000)))

    assert largest.nbytes < 1000


def test_a_tie_stays_a_tie():
    """One parameter under two names is one on the meta device too."""

    def tied():
        model = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 7, bias=False))
        model[1].weight = model[0].weight
        return model

    model = memtile.empty_model(tied)

    assert model[0].weight is model[1].weight


class Scaled(nn.Module):
    """A module with a buffer that is made in this way."""

    def __init__(self, make):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("scale", make(self))


@pytest.mark.parametrize(
    "make",
    [lambda self: self.weight.detach() * 2, lambda self: torch.empty(3).fill_(1)],
    ids=["of a parameter", "of empty memory"],
)
def test_a_buffer_without_values_is_refused_by_name(make):
    """What is computed from parameters has no values before they do."""
    with pytest.raises(CannotTileError, match=r"the buffer 0\.scale of Sequential"):
        memtile.empty_model(lambda: nn.Sequential(Scaled(make)))


def test_a_factory_that_makes_no_module_is_refused():
    """The message shows the right call."""
    with pytest.raises(ArgumentError, match="the factory gave a int"):
        memtile.empty_model(lambda: 3)


def test_modules_are_made_as_ever_afterwards():
    """Modules and tensors are made on the CPU again, also after the factory failed."""

    def fails():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        memtile.empty_model(fails)

    assert not nn.Linear(2, 3).weight.is_meta
    assert not torch.empty(2).is_meta


@pytest.mark.parametrize("threads", [1, 2])
def test_other_threads_build_models_as_ever(threads):
    """While one thread makes a model without parameters, those of other threads stay real."""
    register = nn.Module.register_parameter
    begun, built = threading.Barrier(threads + 1), threading.Barrier(threads + 1)
    turns = [threading.Event() for _ in range(threads)]

    def make(turn):
        begun.wait(60)
        built.wait(60)
        turn.wait(60)
        return nn.Sequential(nn.Linear(5, 3), Scaled(lambda self: torch.ones(2)))

    with ThreadPoolExecutor(threads) as pool:
        empty = [pool.submit(memtile.empty_model, partial(make, turn)) for turn in turns]
        begun.wait(60)
        real = nn.Sequential(nn.Linear(5, 3), Scaled(lambda self: torch.ones(2)))
        built.wait(60)
        for turn, made in zip(turns, empty, strict=True):
            turn.set()
            made.result(60)

    assert not any(parameter.is_meta for parameter in real.parameters())
    assert all(p.is_meta for made in empty for p in made.result().parameters())
    assert nn.Module.register_parameter is register


SIZES = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 31}
KEPT = {
    "t5": (torch.float16, lambda: build("t5").config),
    "gpt-oss": (
        torch.float16,
        lambda: transformers.GptOssConfig(
            **SIZES, num_hidden_layers=1, intermediate_size=20, num_local_experts=2, head_dim=6
        ),
    ),
    "deepseek": (
        torch.bfloat16,
        lambda: transformers.DeepseekV3Config(
            **SIZES,
            num_hidden_layers=1,
            first_k_dense_replace=0,
            intermediate_size=20,
            moe_intermediate_size=12,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=2,
        ),
    ),
}


@pytest.mark.parametrize("kind", KEPT)
def test_what_transformers_keeps_in_float32_is_float32(kind, tmp_path):
    """Dtypes of parameters and buffers are those that from_pretrained gives, in 16 bits too."""
    dtype, config = KEPT[kind]
    auto = transformers.AutoModelForSeq2SeqLM if kind == "t5" else transformers.AutoModelForCausalLM
    auto.from_config(config(), dtype=dtype).save_pretrained(tmp_path)
    theirs = auto.from_pretrained(tmp_path, dtype=dtype).state_dict()

    model = memtile.empty_model(lambda: auto.from_config(config(), dtype=dtype))

    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert dtypes == {name: tensor.dtype for name, tensor in theirs.items()}
    assert set(dtypes.values()) >= {dtype, torch.float32}
    assert memtile.empty_model(lambda: auto.from_config(config()).half()).dtype == torch.float16

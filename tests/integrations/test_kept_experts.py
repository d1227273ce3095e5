"""Experts in a checkpoint's files: only hits are read, and what a budget has left keeps some."""

import functools
import math
import re

import peft
import pytest
import tokenizers
import torch
import transformers
from given_rates import RATES
from leftovers import check_nothing_is_left
from small_experts import EXPERTS, experts_model, tokens
from torch import nn

import memtile
from memtile.cli import main
from memtile.costmodel import Plan
from memtile.costmodel.budget import usable
from memtile.homes import allocation_of
from memtile.layers import TiledStack
from memtile.transfer import rings_of

nothing_is_left = pytest.fixture(autouse=True)(check_nothing_is_left)

BUDGET = "29MiB"
STEPS = 20


def larger():
    """A model of 28 MiB, 24 of which are 16 experts in each of two layers."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=500,
        hidden_size=256,
        moe_intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.Qwen3MoeForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Gives the folder that the larger model was saved to, with a tokenizer of 500 words."""
    found = tmp_path_factory.mktemp("experts")
    larger().save_pretrained(found)
    vocabulary = {"<unk>": 0} | {f"word{number}": number for number in range(1, 500)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    wrapped.save_pretrained(found)
    return found


def empty(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    return memtile.empty_model(lambda: transformers.Qwen3MoeForCausalLM(config))


def planned(folder, budget=BUDGET, **options):
    options = {"optimizer": None, "home": "checkpoint", **options}
    return memtile.plan(empty(folder), budget=budget, tokens=16, rates=RATES, **options)


def home_of(model):
    stack = next(module for module in model.modules() if isinstance(module, TiledStack))
    return allocation_of(stack.tile(0, 0).weight).home


def generated(model, seed):
    ids = torch.randint(500, (1, 4), generator=torch.Generator().manual_seed(seed))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options).tolist()


class Chosen:
    """Counts the bytes of the experts that routers choose, each once in a forward."""

    def __init__(self, model):
        self.nbytes = 0
        for module in model.modules():
            if type(module).__name__ == "Qwen3MoeTopKRouter":
                module.register_forward_hook(self.count)

    def count(self, module, given, chosen):
        self.nbytes += chosen[-1].unique().numel() * 3 * 256 * 256 * 4


def test_what_the_budget_leaves_over_is_for_experts(folder):
    """All stacks are parked, an expert a tile; the rest of the budget is a term of the plan."""
    plan = planned(folder)

    assert {layer.tiles for layer in plan.parked_layers} == {16}
    assert len(plan.parked_layers) == 4
    assert 0 < plan.kept_bytes < 24 << 20
    assert plan.peak_bytes == usable(29 << 20)
    assert plan.bytes_of("disk") == 0
    assert Plan.from_json(plan.to_json()) == plan


def test_nothing_is_kept_of_a_model_that_fits(folder):
    """With room for the whole model nothing is parked, and nothing kept."""
    plan = planned(folder, "1GiB")

    assert plan.kept_bytes == 0
    assert plan.parked_layers == ()


@pytest.mark.usefixtures("in_slabs")
def test_plans_keep_experts_on_disk(folder):
    """All of the budget's rest in inference; in training what whole stacks leave of it."""
    plan = planned(folder, home="disk")
    sgd = {"optimizer": torch.optim.SGD, "options": {"lr": 0.1}}
    training = planned(folder, "40MiB", home="disk", **sgd)

    assert 0 < plan.kept_bytes < 24 << 20
    assert len(plan.parked_layers) == 4
    assert plan.peak_bytes == usable(29 << 20)
    assert training.parked_layers
    assert 0 < training.kept_bytes < 2 * 16 * 256 * 256 * 4  # less than another stack
    assert training.peak_bytes == usable(40 << 20)


def test_weights_that_train_are_not_parked_in_files(folder):
    """Files are only read: a plan for training keeps what trains in memory."""
    plan = planned(folder, "1GiB", optimizer=torch.optim.SGD, options={"lr": 0.1})

    assert plan.parked_layers == ()
    assert all("only read" in layer.reason for layer in plan.layers)


@pytest.mark.usefixtures("in_slabs")
@pytest.mark.parametrize("where", ["checkpoint", "disk"])
def test_only_hits_that_are_not_kept_are_read(folder, where):
    """Bytes read are those of the experts chosen without those kept; tokens are the model's own."""
    plain, model = larger(), empty(folder)
    memtile.tile(model, planned(folder, home=where), checkpoint=folder)
    model.requires_grad_(False).eval()
    chosen, home = Chosen(model), home_of(model)
    before = home.traffic.read_bytes

    for seed in range(2):
        assert generated(model, seed) == generated(plain, seed)

    kept = rings_of(home).kept
    assert home.kept_bytes > 0
    assert kept.used_bytes == chosen.nbytes
    assert home.traffic.read_bytes - before == pytest.approx(
        chosen.nbytes - kept.hit_bytes, rel=0.03
    )
    assert kept.hit_bytes > 0.1 * chosen.nbytes


def test_generate_says_what_a_token_read(folder, capsys, monkeypatch):
    """A line on stderr has the bytes of a token and the part of experts that was in memory."""
    plan = functools.partial(memtile.plan, rates=RATES)
    monkeypatch.setattr(memtile, "plan", lambda *a, **k: plan(*a, **k | {"budget": BUDGET}))

    code = main(["generate", str(folder), "--prompt", "word1 word2", "--tokens", "4"])

    said = capsys.readouterr()
    assert code == 0
    found = re.search(r"read ([\d.]+) MiB of weights a token.*; (\d+)% of the experts", said.err)
    assert found is not None, said.err
    assert 0 < float(found[1]) < 24
    assert 0 < int(found[2]) < 100


def adapted(model):
    """The model with seeded adapters on its attention, whose base does not train."""
    torch.manual_seed(2)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return wrapped.train()


def trained(model: nn.Module) -> torch.Tensor:
    """The adapters after some steps of AdamW, in one row."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, eps=1e-3)
    for step in range(STEPS):
        ids = tokens(seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


@pytest.mark.usefixtures("in_slabs")
@pytest.mark.parametrize(
    ("where", "kept_stacks"), [("checkpoint", 0), ("checkpoint", 1), ("disk", 1)]
)
def test_lora_over_parked_experts_is_the_dense_run(tmp_path, where, kept_stacks):
    """Twenty steps of adapters on attention over frozen experts, kept ones too: 1e-5 from dense."""
    experts_model("qwen3").save_pretrained(tmp_path)
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    dense.set_experts_implementation("batched_mm")
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    model = memtile.empty_model(lambda: transformers.Qwen3MoeForCausalLM(config))
    stacks = [name for name, p in dense.named_parameters() if p.dim() == 3]
    memtile.tile(model, modules=stacks, out_splits=EXPERTS, checkpoint=tmp_path, home=where)
    home = home_of(model)
    home.kept_bytes = kept_stacks * math.prod(dense.get_parameter(stacks[0]).shape) * 4

    ours, theirs = trained(adapted(model)), trained(adapted(dense))

    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    assert (rings_of(home).kept.hit_bytes > 0) == bool(kept_stacks)


def moved_by(home):
    return home.traffic.read_bytes + home.traffic.written_bytes


def train_some(model, optimizer):
    """Eight steps of 16 tokens; the values afterwards."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(8):
        ids = torch.randint(500, (1, 16), generator=generator)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.clone() for name, value in memtile.dense_state_dict(model)}


@pytest.mark.usefixtures("in_slabs")
def test_experts_that_train_are_kept_with_their_state(folder):
    """By a plan: the bits of a run that keeps nothing, and less traffic; 1e-5 from dense."""
    mode = "in_backward"
    adamw = {"optimizer": torch.optim.AdamW, "options": {"lr": 1e-3}, "mode": mode}
    plan = planned(folder, "75MiB", home="disk", **adamw)
    values, moved = [], []
    for kept_bytes in (plan.kept_bytes, 0):
        model = memtile.tile(empty(folder), plan, checkpoint=folder)
        home = home_of(model)
        home.kept_bytes, before = kept_bytes, moved_by(home)
        optimizer = memtile.TileOptimizer(model, torch.optim.AdamW, mode=mode, lr=1e-3)
        values.append(train_some(model, optimizer))
        moved.append(moved_by(home) - before)
        assert kept_bytes // 2 <= optimizer._kept.nbytes <= kept_bytes
        del optimizer, model
    dense = larger()
    truth = train_some(dense, torch.optim.AdamW(dense.parameters(), lr=1e-3))

    assert plan.kept_bytes > 0
    assert moved[0] < 0.9 * moved[1]
    for name, value in truth.items():
        assert torch.equal(values[0][name], values[1][name])
        assert (values[0][name] - value).norm() <= 1e-5 * value.norm()

"""The MLPs of transformers models without their intermediate activation: losses and gradients."""

import copy
import pickle
from typing import Any

import families
import pytest
import torch
from family_steps import batch_of, loss_and_result
from leftovers import check_nothing_is_left
from tiny_llama import batch_of_sentences, llama
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM
from watched_home import WatchedHome

import memtile
from memtile.convert import select_mlps, set_checkpointing, tiled_layers
from memtile.homes import allocation_of
from memtile.layers import mlp_in_tiles, mlp_pairs
from memtile.planner.operation_count import count_step
from memtile.planner.step_count import make_meta_copy
from memtile.testing import peak_allocated_bytes

nothing_is_left = pytest.fixture(autouse=True)(check_nothing_is_left)
pytestmark = [
    pytest.mark.filterwarnings("ignore::memtile.errors.TileSizeWarning"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning"),
]

ADAMW: dict[str, Any] = {"lr": 1e-2, "eps": 1e-2}
MLP = "model.layers.0.mlp"
TAKEN = {  # how many MLPs
    "GPT-2": 1,
    "GPT-NeoX": 1,
    "Falcon": 1,
    "Llama": 1,
    "Mistral": 1,
    "Qwen3": 1,
    "Gemma-2": 2,
    "Phi": 1,
    "Phi-3": 1,
    "GLM": 1,
    "GLM-4": 1,
    "ModernBERT": 1,
    "StarCoder2": 1,
    "T5": 2,
    "mT5": 2,
    "DistilBERT": 1,
    "ViT": 1,
    "CLIP": 2,
    "PaliGemma": 3,
    "OPT": 1,
    "BERT": 1,
    "RoBERTa": 1,
    "ELECTRA": 1,
    "ALBERT": 1,
    "BART": 2,
    "Whisper": 2,
    "MPT": 1,
}
NOT_TAKEN = {
    "BERT": ("BertSelfAttention", "its forward gives a tuple, no tensor"),
    "BLOOM": ("BloomMLP", "its forward does not take one input"),
    "DeepSeek-V4": ("DeepseekV4MLP", "its forward gives down something else than the product"),
}
WAYS: dict[str, Any] = {
    "whole": memtile.tile_mlps,
    "in tiles": lambda model: memtile.tile(model, out_splits=3, tile_mlps=True),
    "parked": lambda m: memtile.tile(m, max_tile_bytes=2200, home="host", tile_mlps=True),
}


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One number for each MLP that `tiled_mlp` computes: the rows of its input."""
    seen: list[int] = []

    def counted(x: Tensor, *layers: Any, **options: Any) -> Tensor:
        seen.append(x[..., 0].numel())
        return memtile.tiled_mlp(x, *layers, **options)

    for module in (mlp_in_tiles, mlp_pairs):
        monkeypatch.setattr(module, "tiled_mlp", counted)
    return seen


def in_float64(family: str) -> tuple[Any, dict[str, Any]]:
    """A model without dropout, and a batch."""
    model = families.build(family).double()
    batch = batch_of(model)
    return model, {name: as_float64(value) for name, value in batch.items()}


def as_float64(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """All gradients under dense names."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, layer in tiled_layers(model):
        for own in ("weight", "bias"):
            if layer.tile_parameters(own):
                found[f"{name}.{own}"] = layer.dense_gradient(own)
    return found


def assert_same_gradients(ours: nn.Module, theirs: nn.Module, tolerance: float) -> None:
    expected, found = gradients(theirs), gradients(ours)
    for name, truth in expected.items():
        assert (found[name] - truth).norm() <= tolerance * truth.norm() + 1e-14, name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", TAKEN)
def test_trains_like_the_dense_model(family: str, way: str, calls: list[int]):
    """Loss and every gradient in float64; names of a dense state dict are as they were."""
    dense, batch = in_float64(family)
    ours = WAYS[way](copy.deepcopy(dense))
    losses = [loss_and_result(model, batch)[0] for model in (ours, dense)]
    for loss in losses:
        loss.backward()

    assert len(calls) == TAKEN[family] == sum(each.taken for each in select_mlps(ours))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    assert_same_gradients(ours, dense, 1e-6)  # some of their norms compute in float32
    values = dict(memtile.dense_state_dict(ours))
    assert values.keys() == dense.state_dict().keys()
    if way == "whole":
        assert [*ours.state_dict()] == [*dense.state_dict()]


@pytest.mark.parametrize("family", NOT_TAKEN)
def test_what_is_no_mlp_is_left_alone_with_the_reason(family: str):
    """Those whose two linears belong to different modules, or stand beside others."""
    model = families.build(family)
    name, reason = NOT_TAKEN[family]
    listed = select_mlps(model)
    found = [each for each in listed if type(model.get_submodule(each.name)).__name__ == name]

    assert found
    for each in found:
        assert not each.taken
        assert each.reason.startswith(reason)


@pytest.mark.parametrize("parked", [True, False])
def test_inference_gives_the_same_bits(parked: bool, calls: list[int]):
    """Where the intermediate activation is small, the model's own forward is called."""
    dense = llama()
    ours = copy.deepcopy(dense)
    if parked:
        memtile.tile(ours, max_tile_bytes=9000, home="host", tile_mlps=True)
        memtile.tile(dense, max_tile_bytes=9000, home="host", tile_mlps=True)
        memtile.tile_mlps(dense, False)
    else:
        memtile.tile_mlps(ours)
    batch = batch_of_sentences()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(ours(**batch).logits + 0, dense(**batch).logits + 0)
    texts = [each.generate(batch["input_ids"], max_new_tokens=4) for each in (ours, dense)]
    assert torch.equal(*texts)
    assert calls == []


def test_inference_of_many_rows_is_tiled(calls: list[int], monkeypatch: pytest.MonkeyPatch):
    """Under `no_grad` and in inference mode too."""
    monkeypatch.setattr(mlp_in_tiles, "FEWEST_BYTES", 50 * 150 * 4)
    model = llama()
    batch = batch_of_sentences()
    with torch.no_grad():
        truth = model(**batch).logits + 0
    memtile.tile_mlps(model)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(model(**batch).logits + 0, truth)

    assert calls == [51] * 4


@pytest.mark.parametrize("checkpointing", [True, False])
def test_each_tile_is_read_once_in_each_pass(checkpointing: bool):
    """Forward and backward, where the optimizer steps it too; in checkpoints no third forward.

    That is as often as by the model's own forward. The steps are the dense model's.
    """
    ours, dense = in_watched_home(checkpointing, tile_mlps=True), llama()
    theirs = in_watched_home(checkpointing, tile_mlps=False)
    reads = [count_reads(model) for model in (ours, theirs)]
    optimizer = torch.optim.AdamW(dense.parameters(), **ADAMW)
    for _ in range(3):
        dense(**batch_of_sentences()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    counts = [sorted(each.values()) for each in reads]
    assert len(counts[0]) == 2 * 3 * 5
    assert counts[0][: 12 if checkpointing else -3] == [2] * (12 if checkpointing else 27)
    assert max(counts[0]) <= 3  # those of the turn are still in slabs
    assert sum(counts[0]) <= sum(counts[1]) + 3
    values = dict(memtile.dense_state_dict(ours))
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(values[name], parameter, rtol=1e-4, atol=1e-6)
    for model in (ours, theirs):
        home_of(model).close()


def home_of(model: Any) -> Any:
    return allocation_of(model.get_parameter(f"{MLP}.gate_proj.linears.0.0.weight")).home


def in_watched_home(checkpointing: bool, tile_mlps: bool) -> Any:
    model = memtile.tile(llama(), max_tile_bytes=9000, home=WatchedHome(), tile_mlps=True)
    set_checkpointing(model, checkpointing)
    return memtile.tile_mlps(model, tile_mlps)


def count_reads(model: Any) -> dict[str, int]:
    """How often each tile of an MLP is read in a step that trains it in backward."""
    optimizer = memtile.TileOptimizer(model, torch.optim.AdamW, mode="in_backward", **ADAMW)
    names = [name for name, _ in model.named_parameters() if ".mlp." in name]
    home = home_of(model)
    for name in names:
        allocation_of(model.get_parameter(name)).label = name
    for _ in range(3):  # in the first ones the order is learnt
        home.clear()
        model(**batch_of_sentences()).loss.backward()
        optimizer.step()
    read = home.labels()
    return {name: read.count(name) for name in names}


def test_copies_and_undoing():
    """`deepcopy`, pickle, a second call and `untile`; a saved model loads into a dense one."""
    model = memtile.tile_mlps(memtile.tile_mlps(llama()))
    cls = type(model.model.layers[0].mlp)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(made.model.layers[1].mlp) is cls
        assert sum(each.taken for each in select_mlps(made)) == 2
    assert issubclass(cls, type(llama().model.layers[0].mlp))
    llama().load_state_dict(model.state_dict())

    memtile.untile(model)

    assert type(model.model.layers[0].mlp) is type(llama().model.layers[0].mlp)
    assert vars(model.model.layers[0].mlp).keys() == vars(llama().model.layers[0].mlp).keys()


def test_a_hook_inside_the_activation_is_part_of_it():
    """It changes what is computed, as it does in the dense model."""
    dense = nn.Sequential(nn.Linear(8, 32), nn.Sequential(nn.SiLU()), nn.Linear(32, 8)).double()
    ours = memtile.tile_mlps(copy.deepcopy(dense))
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for model in (dense, ours):
        model[1][0].register_forward_hook(lambda module, given, result: 2 * result)

    torch.testing.assert_close(ours(x), dense(x))


def test_both_row_tiles_and_tiled_mlps(calls: list[int]):
    """In either order, undone in either order."""
    for first in (True, False):
        model = llama().double()
        batch = batch_of_sentences()
        mlp = model.model.layers[0].mlp
        dense = type(mlp)
        if first:
            memtile.tile_mlps(model)
        memtile.tile_rows(mlp, rows=20)
        if first:
            calls.clear()
            model(**batch).loss.backward()
            truth = llama().double()
            truth(**batch).loss.backward()
            assert_same_gradients(model, truth, 1e-6)
            assert max(calls) == 51
            assert 17 in calls
            memtile.tile_mlps(model, False)
        else:
            assert "no" in str(select_mlps(model)[2])
        assert "rows=20" in mlp.extra_repr()
        memtile.untile(model)
        assert type(mlp) is dense


def test_wrong_inputs():
    """Messages say what is wrong and what to do."""
    with pytest.raises(memtile.errors.ArgumentError, match="has no MLP that can be computed by"):
        memtile.tile_mlps(families.build("BLOOM"))
    with pytest.raises(memtile.errors.ArgumentError, match=r"the model is a str"):
        memtile.tile_mlps("model")
    with pytest.raises(memtile.errors.ArgumentError, match="on='no' must be True or False"):
        memtile.tile_mlps(llama(), "no")
    with pytest.raises(memtile.errors.ArgumentError, match=r"in_splits=2.*along its intermediate"):
        memtile.tile(llama(), out_splits=2, in_splits=2, tile_mlps=True)
    model = families.build("BLOOM")
    with pytest.raises(memtile.errors.ArgumentError, match="BloomForCausalLM has no MLP"):
        memtile.tile(model, out_splits=2, tile_mlps=True)
    assert not [*tiled_layers(model)]
    model = memtile.tile_mlps(llama())
    with pytest.raises(memtile.errors.TileShapeError, match=r"tiled_mlp: the input is 5 wide"):
        model.model.layers[0].mlp(torch.zeros(2, 5))


def opt() -> Any:
    """An OPT of one layer, whose linears stand beside attention."""
    torch.manual_seed(0)
    config = OPTConfig(vocab_size=211, hidden_size=64, ffn_dim=4096, num_attention_heads=4)
    config.num_hidden_layers, config.word_embed_proj_dim, config.dropout = 1, 64, 0.0
    return OPTForCausalLM(config)


@pytest.mark.parametrize("family", ["Llama", "OPT"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plan_counts_what_a_step_takes(dtype: torch.dtype, family: str):
    """Its blocks instead of the intermediate activation, and the products that are done again."""
    made = opt() if family == "OPT" else llama(intermediate_size=4096, num_hidden_layers=1)
    model, again = made.to(dtype).train(), 1 if family == "OPT" else 2
    ids = torch.randint(211, (4, 256), generator=torch.Generator().manual_seed(1))

    def work(model: Any) -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        return loss

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    counted = {}
    for on in (False, True):
        meta = memtile.tile_mlps(make_meta_copy(memtile.tile_mlps(model)), on)
        counted[on] = count_step(meta, work, drops_gradients=True, goes_home=True)
    work(model).backward()
    model.zero_grad()
    hooks = [p.register_post_accumulate_grad_hook(drop) for p in model.parameters()]
    peak = peak_allocated_bytes(lambda: work(model).backward())

    near = 10 << 10 if family == "OPT" else 0  # of its masks and positions, dense too
    assert counted[True].peak_bytes == pytest.approx(peak, abs=near)
    assert peak < 0.5 * counted[False].peak_bytes
    assert counted[True].flops - counted[False].flops == again * 2 * ids.numel() * 64 * 4096
    for hook in hooks:
        hook.remove()

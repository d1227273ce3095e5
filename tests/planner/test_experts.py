"""Plans of mixtures of experts: grids, bytes read, and the memory of a step."""

import pytest
import torch

pytest.importorskip("transformers")

from given_rates import RATES
from small_experts import EXPERTS, experts_model, tokens

import memtile
from memtile.convert import Cut, choose
from memtile.costmodel.model_records import Weight
from memtile.costmodel.tile_grids import tile_grid
from memtile.errors import TileSizeWarning
from memtile.planner.operation_count import count_step, live_peak
from memtile.planner.step_count import _park, make_meta_copy


def stack(experts=8, used=2, rows=6, columns=10):
    """A frozen float32 stack."""
    shape = (experts * rows, columns)
    return Weight(("experts",), shape, "float32", 4, False, True, "", experts, used)


@pytest.mark.parametrize("nbytes", [1, 39, 40, 100, 240, 1000, 1 << 20])
def test_no_tile_holds_more_than_one_expert(nbytes):
    """Whatever size is allowed: a token of one expert reads no other."""
    grid = tile_grid(stack(), nbytes)

    assert all(span.start // 6 == (span.stop - 1) // 6 for span in grid.out_spans)
    assert grid.in_splits == 1
    assert max(span.size for span in grid.out_spans) * 40 <= max(40, nbytes)


def test_a_step_is_expected_to_hit_some_experts():
    """1 - (1 - k/E)^T of them; all of what is no stack."""
    assert stack().hit_share(1) == pytest.approx(2 / 8)
    assert stack().hit_share(2) == pytest.approx(1 - (6 / 8) ** 2)
    assert stack().hit_share(10_000) == 1
    linear = Weight(("linear",), (48, 10), "float32", 4, False, False, "")
    assert linear.hit_share(1) == 1


@pytest.mark.parametrize(
    ("optimizer", "implementation", "budget"),
    [
        (torch.optim.AdamW, "eager", "440KiB"),
        (None, "eager", "143KiB"),
        (None, "batched_mm", "143KiB"),
        (None, "grouped_mm", "143KiB"),
    ],
)
def test_a_model_is_planned_and_tiled_by_its_plan(tmp_path, optimizer, implementation, budget):
    """Each expert of a parked stack is a tile, whatever computes the dense model."""
    options = {"tokens": 24, "optimizer": optimizer, "rates": RATES, "home": f"disk:{tmp_path}"}
    options |= {"checkpointing": False} if optimizer else {}
    model = experts_model("qwen3", implementation)

    plan = memtile.plan(model, budget=budget, **options)
    layers = {layer.name: layer for layer in plan.layers}
    expected = experts_model("qwen3")(input_ids=tokens()).logits
    memtile.tile(model, plan)

    for kind, rows in (("gate_up_proj", 28), ("down_proj", 24)):
        layer = layers[f"model.layers.0.mlp.experts.{kind}"]
        assert layer.shape[0] == EXPERTS * rows
        assert layer.grid is None or layer.grid.out_splits % EXPERTS == 0
    assert any("experts" in name for name, layer in layers.items() if layer.grid)
    torch.testing.assert_close(model(input_ids=tokens()).logits, expected)


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("name", ["qwen3", "gpt-oss", "mixtral", "jetmoe"])
def test_the_counted_memory_of_a_step_is_what_a_step_takes(name, trains, tmp_path):
    """In training to the byte; in inference within a tenth, as experts have unequal tokens."""
    model, ids = experts_model(name).train(trains), tokens(4, 40)

    def work(model):
        if trains:
            return model(input_ids=ids, labels=ids, use_cache=False).loss
        model(input_ids=ids, use_cache=True)
        return None

    def step():
        with torch.set_grad_enabled(trains):
            loss = work(model)
            if loss is not None:
                loss.backward()

    meta_copy = make_meta_copy(model)
    _park(meta_copy, choose(meta_copy, Cut(parks=True), None))
    counted = count_step(meta_copy, work, drops_gradients=True, goes_home=True).peak_bytes
    memtile.tile(model, home=memtile.DiskHome(tmp_path))
    if trains:
        memtile.TileOptimizer(model, torch.optim.SGD, lr=0.0, mode="in_backward")

    measured = live_peak(step)

    assert measured == counted if trains else abs(measured - counted) <= 0.1 * counted


def test_experts_that_stay_whole_are_named():
    """A plan has them as a part of its memory; tiling warns of them, with all their bytes."""
    sizes = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
    transformers = pytest.importorskip("transformers")
    config = transformers.Llama4TextConfig(
        vocab_size=97, intermediate_size=20, num_hidden_layers=2, num_local_experts=4, **sizes
    )
    model = transformers.Llama4ForCausalLM(config)
    name, shape = "model.layers.0.feed_forward.experts.gate_up_proj", (4, 24, 40)
    assert model.get_parameter(name).shape == shape
    experts = 2 * 4 * (24 * 40 + 20 * 24) * 4

    plan = memtile.plan(model, budget="1GiB", tokens=8, optimizer=None, rates=RATES, home="host")

    (term,) = (term for term in plan.terms if term.name.startswith("whole: "))
    assert term.name == f"whole: {name} and 3 more, no linear, embedding or known stack"
    assert term.nbytes == experts
    assert term.name in str(plan)
    with pytest.warns(TileSizeWarning, match=f"{experts} bytes together; the largest is {name}"):
        memtile.tile(model, max_tile_bytes=1900)


def test_positions_with_a_rule_of_their_own_stay_whole_with_the_reason():
    """BART's learned positions add an offset to their ids."""
    transformers = pytest.importorskip("transformers")
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 32, "vocab_size": 97}
    config = transformers.BartConfig(**sizes, max_position_embeddings=64)
    model = transformers.BartForConditionalGeneration(config)

    plan = memtile.plan(model, budget="1GiB", tokens=8, optimizer=None, rates=RATES, home="host")

    (layer,) = (each for each in plan.layers if each.name == "model.encoder.embed_positions")
    assert layer.grid is None
    assert "BartLearnedPositionalEmbedding is a class of its own" in layer.reason

"""The work of a step, counted on shapes."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import families
import pytest
import torch
from family_steps import batch_of, loss_and_result
from given_rates import RATES
from tiny_llama import llama
from torch import Tensor, nn
from torch.nn import functional

import memtile
from memtile.costmodel.memory_model import Rings, Setting, terms
from memtile.costmodel.model_records import (
    Counted,
    ParkedLayout,
    Products,
    Rest,
    StateSizes,
    Weight,
)
from memtile.geometry import Grid
from memtile.homes import DeviceHome, register
from memtile.ops import logit_tiles, mlp, products
from memtile.planner.known_shapes import KnownShapes
from memtile.planner.operation_count import count_step
from memtile.planner.step_count import make_meta_copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alike_parts_are_counted_once(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype):
    """Work and memory of a step in blocks and strips are those of a count of each of them."""
    model = llama(intermediate_size=5000, num_hidden_layers=1, vocab_size=5003).to(dtype).train()
    ids = torch.randint(5003, (3, 431), generator=torch.Generator().manual_seed(1))

    def work(model: Any) -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        return loss

    def count() -> Any:
        meta = memtile.defer_logits(memtile.tile_mlps(make_meta_copy(model)))
        return count_step(meta, work, drops_gradients=True, goes_home=True)

    def every(parts: Iterable[Any], like: Tensor) -> Iterator[Any]:
        seen.append(len([*parts]))
        yield from parts

    few, seen = count(), list[int]()
    for module in (logit_tiles, mlp, products):
        monkeypatch.setattr(module, "counted_parts", every)
    each = count()

    assert max(seen) > 3
    assert few.peak_bytes == pytest.approx(each.peak_bytes, rel=2e-3)
    assert few.flops == each.flops
    assert few.touched_bytes == pytest.approx(each.touched_bytes, rel=0.01)


@pytest.mark.parametrize("family", ["Llama", "OPT", "BERT", "GPT-2", "Mixtral", "ViT", "Whisper"])
@pytest.mark.parametrize("trains", [True, False])
def test_known_shapes_change_no_count(family: str, trains: bool, monkeypatch: pytest.MonkeyPatch):
    """Each figure is that of a count in which torch computes the shapes of each operation."""
    model = families.build(family).train(trains)
    batch = batch_of(model)

    def count() -> Counted:
        meta = make_meta_copy(model)
        work = partial(loss_and_result, batch=batch)
        return count_step(meta, lambda m: work(m)[0], drops_gradients=True, goes_home=True)

    calls = list[Any]()

    def computed(self: Any, func: Any, given: Any, args: Any, kwargs: Any) -> Any:
        calls.append(func)
        return func(*args, **kwargs)

    found = count()
    monkeypatch.setattr(KnownShapes, "__call__", computed)
    assert found == count()
    assert len(calls) > 40


def test_numbers_of_another_type_are_other_arguments():
    """And views, writes and results of several tensors are torch's own."""
    known, x = KnownShapes(), torch.zeros(3, 4, dtype=torch.int64, device="meta")
    aten = torch.ops.aten
    for _ in range(2):
        assert known(aten.mul.Scalar, [x], (x, 2), {}).dtype == torch.int64
        assert known(aten.mul.Scalar, [x], (x, 2.0), {}).dtype == torch.float32
        view = known(aten.t.default, [x], (x,), {})
        assert view.untyped_storage()._cdata == x.untyped_storage()._cdata
        assert known(aten.add_.Tensor, [x, x], (x, x), {}) is x
        made = known(aten.add.Tensor, [x, x], (x, x), {})
        assert made.untyped_storage()._cdata != x.untyped_storage()._cdata
        turned = known(aten.t_.default, [x], (x,), {})
        assert turned.shape == x.shape
        top = known(aten.topk.default, [x], (x, 2), {})
        assert [each.shape[-1] for each in top] == [2, 2]
        known(aten.t_.default, [x], (x,), {})
    assert x.shape == (3, 4)


@pytest.mark.parametrize(("queries", "keys"), [(64, 64), (7, 64), (64, 7)])
@pytest.mark.parametrize("causal", [True, False])
def test_causal_attention_is_less_work(queries: int, keys: int, causal: bool):
    """Forward and backward, by the keys that each query has."""
    linear = nn.Linear(4, 4, device="meta")

    def work(model: nn.Module) -> Tensor:
        q, k = torch.zeros(1, 2, queries, 8), torch.zeros(1, 2, keys, 8)
        q, k = (each.to("meta").requires_grad_() for each in (q, k))
        return functional.scaled_dot_product_attention(q, k, k, is_causal=causal).sum()

    counted = count_step(linear, work, drops_gradients=False, goes_home=False)
    pairs = sum(min(query + 1, keys) if causal else keys for query in range(queries))
    assert counted.flops == (2 + 5) * 2 * 2 * pairs * 8


class Tied(nn.Module):
    """An embedding whose weight is the head's too, and a wide layer between."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(50, 8, device="meta"))
        self.wide, self.back = nn.Linear(8, 640, device="meta"), nn.Linear(640, 8, device="meta")

    def forward(self, ids: Tensor) -> Tensor:
        h = self.back(torch.tanh(self.wide(functional.embedding(ids, self.table))))
        return functional.linear(h, self.table).logsumexp(-1).sum()


@pytest.mark.parametrize(("parked", "early"), [("table", False), ("back.weight", True)])
def test_what_is_held_when_a_parked_tile_is_stepped(parked: str, early: bool):
    """The table at the end of backward, when nothing is kept any more; others before."""
    model, home = Tied(), DeviceHome("meta")
    weight = model.get_parameter(parked)
    register(weight, home.allocate(weight.shape, weight.dtype))
    ids = torch.arange(50).repeat(4)

    counted = count_step(model, lambda m: m(ids), drops_gradients=True, goes_home=True)
    unknown = count_step(model, lambda m: m(ids), drops_gradients=False, goes_home=True)

    kept = 4 * 640 * len(ids)  # of tanh
    assert counted.peak_bytes > kept
    ((elements, held),) = counted.held_at_steps
    assert elements == weight.numel()
    assert (held > kept) is early
    assert held <= counted.peak_bytes
    assert unknown.held_at_steps == ((elements, unknown.peak_bytes),)


@pytest.mark.parametrize("held", [0, 1 << 24])
@pytest.mark.parametrize("stored", [1 << 20, 20 << 20])
def test_pages_of_steps_and_of_stored_activations_take_turns(held: int, stored: int):
    """In the page cache: the larger of both, and of a step what is more than the peak then."""
    setting = Setting(
        tokens=8,
        rest=Rest(0, (), 0, 0),
        state=StateSizes(((4, (4, 4)),), 0),
        mode="in_backward",
        in_place=False,
        in_files=False,
        place="host",
        rings=Rings(1, 1, 1, 1, 4096, 0),
        rates=RATES,
        imports=False,
    )
    weight = Weight(("0",), (512, 512), "float32", 4, True, False, "")
    layout = ParkedLayout((weight,), {"0": Grid((0, 512), (0, 512))})
    peak = 1 << 24
    counted = Counted(
        peak, 0, 0, 0, 0, Products((), 0), ((weight.elements, held),), largest_parked=stored
    )
    found = {term.name: term.nbytes for term in terms(setting, layout, counted)}
    steps = 8 * weight.elements if held == peak else 0

    assert found.get("slabs of optimizer steps", 0) == steps
    assert found.get("slabs of activations", 0) == max(0, stored - steps)

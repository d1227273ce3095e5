"""ZeRO-3 holds and sends over gloo the bytes that plans for ranks predict."""

from importlib.util import find_spec

import pytest
from cases import chosen, with_slow
from rank_zero3_worker import (
    CASES,
    CONTROL,
    KEPT,
    gathered_at_most,
    planned,
    reduced_at_most,
    spawn,
)

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed here"
)
NAMES = with_slow(CASES, quick=("tied", "a loss without logits"))
AT_FOUR = ("tied", "rows", "recomputed", "whole layers", "columns, 16 bits", "16 bits, offloaded")
_WORLDS = [2, *(pytest.param(world, marks=pytest.mark.slow) for world in (1, 4))]
_NEVER_FULL = ("whole layers", "columns, 16 bits")
"""Here the bucket never leaves full, or with the padding of the smallest parameters."""


@pytest.fixture(scope="module", params=_WORLDS)
def measured(request):
    """What each rank measured of each case."""
    return spawn(request.param, chosen(request))


@pytest.mark.parametrize("name", NAMES)
def test_each_rank_holds_the_planned_bytes(measured, name):
    """Partitions, their gradients, masters, moments and the bucket: to the byte, on every rank."""
    plan = planned(CASES[name], len(measured))

    for rank in measured:
        for kind, term in KEPT.items():
            assert getattr(rank[name], kind) == plan.term(term), kind


@pytest.mark.parametrize("name", NAMES)
def test_each_rank_sends_the_planned_bytes(measured, name):
    """Forward, backward, recomputation and step, tied and frozen: to the byte, on every rank.

    Besides there are agreements of a few elements, and nothing else.
    """
    plan = planned(CASES[name], len(measured))

    for rank in measured:
        for kind in ("all-gather", "reduce-scatter"):
            assert rank[name].sent.get(kind, 0) == plan.moved(kind), kind
        assert rank[name].other <= CONTROL


@pytest.mark.parametrize("name", NAMES)
def test_no_more_is_gathered_at_once_than_planned(measured, name):
    """Units and those on their way; one rank on a CPU uses its own, offloaded or not."""
    predicted = gathered_at_most(planned(CASES[name], len(measured)))

    for rank in measured:
        if len(measured) == 1:
            assert rank[name].gathered == 0
        else:
            assert rank[name].gathered <= predicted <= 1.05 * rank[name].gathered


@pytest.mark.parametrize("name", NAMES)
def test_no_more_gradients_are_whole_at_once_than_planned(measured, name):
    """A unit's gradient, and the padded copy of the bucket that leaves."""
    predicted = reduced_at_most(planned(CASES[name], len(measured)))

    for rank in measured:
        assert rank[name].reduced <= predicted
        if name not in _NEVER_FULL:
            assert predicted <= 1.1 * rank[name].reduced

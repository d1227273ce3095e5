"""FSDP2 holds and sends over gloo the bytes that plans for ranks predict."""

import pytest
from cases import chosen, with_slow
from rank_worker import CASES, gathered_at_most, planned, reduced_at_most, spawn

QUICK = ("rows", "recomputed", "columns, 16 bits", "a loss without logits")
NAMES = with_slow(CASES, QUICK)
AT_FOUR = (*QUICK, "whole layers", "tied", "offloaded", "neighbours together")
_WORLDS = [2, *(pytest.param(world, marks=pytest.mark.slow) for world in (1, 4))]
_UNEVEN = ("whole layers", "recomputed", *(name for name in CASES if "MLP" in name))
"""Here the largest unit is next to a smaller one; the plan assumes two of the largest."""
_OVER = {"MLP, plain, adapters, recomputed": 1.27}
"""While its tiles are recomputed, no unit waits for its backward in one rank."""


@pytest.fixture(scope="module", params=_WORLDS)
def measured(request):
    """What each rank measured of each case."""
    return spawn(request.param, chosen(request))


@pytest.mark.parametrize("name", NAMES)
def test_the_fullest_rank_holds_the_planned_shards(measured, name):
    """Parameters, gradients and moments of ragged tiles, to the byte; no rank holds more."""
    plan = planned(CASES[name], len(measured))

    for kind, term in (
        ("parameters", "shards of parameters"),
        ("gradients", "gradients of shards"),
        ("state", "optimizer's state of shards"),
    ):
        assert max(getattr(rank[name], kind) for rank in measured) == plan.term(term), kind


@pytest.mark.parametrize("name", NAMES)
def test_each_rank_sends_the_planned_bytes(measured, name):
    """Forward, backward and recomputation, tied and frozen: to the byte, on every rank."""
    plan = planned(CASES[name], len(measured))

    for rank in measured:
        for kind in ("all-gather", "reduce-scatter"):
            assert rank[name].sent.get(kind, 0) == plan.moved(kind), kind


@pytest.mark.parametrize("name", NAMES)
def test_no_more_is_gathered_at_once_than_planned(measured, name):
    """Units, those on their way and their buffers: to the byte where the largest are neighbours."""
    predicted = gathered_at_most(planned(CASES[name], len(measured)))

    for rank in measured:
        if name in _UNEVEN:
            assert rank[name].gathered <= predicted <= _OVER.get(name, 1.05) * rank[name].gathered
        else:
            assert rank[name].gathered == predicted


@pytest.mark.parametrize("name", NAMES)
def test_no_more_gradients_are_whole_at_once_than_planned(measured, name):
    """A unit's gradient and its buffer; beside it, one of another unit may be a row smaller."""
    predicted = reduced_at_most(planned(CASES[name], len(measured)))

    for rank in measured:
        assert rank[name].reduced <= predicted <= 1.05 * rank[name].reduced

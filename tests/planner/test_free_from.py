"""From how many tokens a home is free: what the model of a step's time says, solved for tokens."""

from dataclasses import replace

import pytest
from given_rates import RATES

from memtile.costmodel.memory_model import Rings, Setting
from memtile.costmodel.model_records import (
    Activations,
    Counted,
    ParkedLayout,
    Rest,
    StateSizes,
    Weight,
)
from memtile.costmodel.time_model import FREE, FREE_TILE, floors, free_from, moved
from memtile.geometry import Grid

ADAMW = StateSizes(((4, (4, 4)), (2, (4, 4, 4))), 0)
SLOW_DISK = replace(RATES, read_bytes=2e8, written_bytes=1e8)


def step_seconds(rates, home, tokens, trains, element_bytes):
    """The time of a step of one weight, a tile at home or (home None) in memory."""
    rows = FREE_TILE // element_bytes // 1024
    name = "float32" if element_bytes == 4 else "bfloat16"
    weight = Weight(("0",), (rows, 1024), name, element_bytes, trains, False, "")
    setting = Setting(
        tokens=tokens,
        rest=Rest(0, (), 0, 0),
        state=ADAMW if trains else None,
        mode="in_backward",
        in_place=home == "host",
        in_files=False,
        place="host",
        rings=Rings(3, 2, 3, 3, 4096, 0),
        rates=rates,
        imports=False,
    )
    layout = ParkedLayout((weight,), {"0": Grid((0, rows), (0, 1024))} if home else {})
    flops = (6 if trains else 2) * tokens * weight.elements
    counted = Counted(
        **{**dict.fromkeys(Counted.__dataclass_fields__, 0), "flops": flops},
    )
    moves = moved(setting, layout, Activations())
    found = floors(setting, layout, counted, moves, cached=home == "page cache")
    return max(floor.seconds for floor in found)


@pytest.mark.parametrize("rates", [RATES, SLOW_DISK], ids=["even", "slow-disk"])
@pytest.mark.parametrize("home", ["host", "page cache", "direct"])
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("element_bytes", [4, 2])
def test_it_is_the_first_number_that_the_time_model_calls_free(rates, home, trains, element_bytes):
    """A step of so many tokens takes at most a tenth more than in memory, one token less more."""

    def slowdown(tokens):
        here = step_seconds(rates, home, tokens, trains, element_bytes)
        return here / step_seconds(rates, None, tokens, trains, element_bytes)

    tokens = free_from(rates, home, trains=trains, element_bytes=element_bytes)

    assert tokens is not None
    assert slowdown(tokens) <= FREE * (1 + 1e-9)
    assert tokens == 1 or slowdown(tokens - 1) > FREE


def test_a_disk_alone_is_hidden_by_hand_computed_products():
    """4 bytes at 1e9 a second are hidden by 2T/1e10 seconds, times 1.1, from 19 tokens on."""
    rates = replace(RATES, product_flops=((16, 1e10),), tile_seconds=0.0)

    assert free_from(rates, "direct", trains=False, element_bytes=4) == 19


def test_a_home_that_was_not_measured_is_never_free():
    """A disk without rates: None."""
    rates = replace(RATES, read_bytes=0.0, mapped_bytes=0.0)

    assert free_from(rates, "direct", trains=False, element_bytes=4) is None
    assert free_from(rates, "page cache", trains=True, element_bytes=2) is None


def test_products_that_lose_speed_with_tokens_end_in_one_number():
    """Where a rate falls between two points, all larger numbers are free all the same."""
    rates = replace(RATES, product_flops=((16, 1e9), (64, 4e11), (1024, 5e10)))

    tokens = free_from(rates, "direct", trains=False, element_bytes=4)

    assert tokens is not None
    for more in range(tokens, 4 * tokens):
        here = step_seconds(rates, "direct", more, False, 4)
        assert here / step_seconds(rates, None, more, False, 4) <= FREE * (1 + 1e-9)

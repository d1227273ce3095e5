"""Plans and rates as JSON."""

import json

import pytest
from given_rates import RATES
from torch import nn

import memtile
from memtile.costmodel import MachineProfile, Plan
from memtile.errors import ArgumentError


def a_plan() -> Plan:
    model = nn.Sequential(nn.Linear(70, 900), nn.Linear(900, 301))
    return memtile.plan(model, budget="5MiB", tokens=9, rates=RATES)


def test_a_plan_comes_back_as_it_was():
    """Every field survives, grids and budget too."""
    plan = a_plan()

    assert Plan.from_json(plan.to_json()) == plan
    assert str(Plan.from_json(plan.to_json())) == str(plan)


def test_rates_come_back_as_they_were():
    """Every rate survives."""
    assert MachineProfile.from_json(RATES.to_json()) == RATES


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{}", "{", "[" * 100_000, '{"memtile": "Rates"}', "7"]
)
def test_what_is_no_plan_is_refused(text):
    """Text that is no plan is refused with a clear error."""
    with pytest.raises(ArgumentError, match="Plan"):
        Plan.from_json(text)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens", "many"),
        ("tokens", -1),
        ("tokens", True),
        ("mode", "fast"),
        ("layers", {}),
        ("layers", [{"name": "x"}]),
        ("terms", [["a", 1, "host"]]),
        ("budget", {"host": 1}),
        ("checkpointing", 1),
        ("version", 99),
    ],
)
def test_a_field_of_another_kind_is_refused_by_name(field, value):
    """The message names the field."""
    document = {**json.loads(a_plan().to_json()), field: value}

    with pytest.raises(ArgumentError, match=field):
        Plan.from_json(json.dumps(document))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens", 0),
        ("batch", 4),
        ("device", "cuda"),
        ("home", "disk:"),
        ("home", "moon"),
        ("home", "host:/tmp"),
    ],
)
def test_a_field_that_contradicts_the_rest_is_refused(field, value):
    """A plan that was edited by hand is checked like a new one."""
    document = {**json.loads(a_plan().to_json()), field: value}

    with pytest.raises(ArgumentError, match=field):
        Plan.from_json(json.dumps(document))


@pytest.mark.parametrize(
    "edit",
    [
        {"grid": [[0, 100], [0, 70]], "place": "parked"},
        {"grid": [[0, 900], [0, 71]], "place": "parked"},
        {"grid": None, "place": "parked"},
        {"grid": [[0, 900], [0, 70]], "place": "resident"},
        {"place": "moon"},
    ],
)
def test_a_layer_that_contradicts_itself_is_refused_by_name(edit):
    """Grids must end where the weight does, and what is cut must be parked."""
    document = json.loads(a_plan().to_json())
    document["layers"][0].update(edit)

    with pytest.raises(ArgumentError, match="0: "):
        Plan.from_json(json.dumps(document))


def test_a_layer_that_is_named_twice_is_refused():
    """A module may be named only once."""
    document = json.loads(a_plan().to_json())
    document["layers"].append(document["layers"][0])

    with pytest.raises(ArgumentError, match="twice"):
        Plan.from_json(json.dumps(document))


@pytest.mark.parametrize("grid", [[[0, 5], [1, 3]], [[0, 5, 5], [0, 3]], [[0], [0, 3]], "4×1", [1]])
def test_a_grid_that_is_none_is_refused(grid):
    """Bounds must begin at 0 and rise."""
    document = json.loads(a_plan().to_json())
    document["layers"][0]["grid"] = grid

    with pytest.raises(ArgumentError, match=r"layers\[0\]\.grid"):
        Plan.from_json(json.dumps(document))


def test_missing_and_unknown_fields_are_refused():
    """Nothing is guessed and nothing is ignored."""
    document = json.loads(a_plan().to_json())
    less = {key: value for key, value in document.items() if key != "home"}

    with pytest.raises(ArgumentError, match="lacks 'home'"):
        Plan.from_json(json.dumps(less))
    with pytest.raises(ArgumentError, match="unknown 'cellar'"):
        Plan.from_json(json.dumps({**document, "cellar": 1}))

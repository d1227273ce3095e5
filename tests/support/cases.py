"""Cases of a matrix: a few in every run and all where slow tests run, or enough for every pair."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import pytest


def with_slow(cases: Iterable[str], quick: Collection[str]) -> list[Any]:
    """Parameters for `pytest.mark.parametrize`: all but the quick ones are marked slow."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in cases]


def in_pairs(
    first: Iterable[Any], second: Iterable[Any], third: Sequence[Any]
) -> list[tuple[Any, Any, Any]]:
    """Triples in which any two values of two axes meet: a Latin square, in place of the product.

    The third axis must be the shortest one.
    """
    seconds = list(second)
    return [
        (one, two, third[(row + column) % len(third)])
        for row, one in enumerate(first)
        for column, two in enumerate(seconds)
    ]


def chosen(request: pytest.FixtureRequest) -> list[str]:
    """The cases that tests of this module run with this fixture's value, by their "name"."""
    names = (
        item.callspec.params.get("name")
        for item in request.session.items
        if item.path == request.path
        and isinstance(item, pytest.Function)
        and hasattr(item, "callspec")
        and item.callspec.params.get(request.fixturename) == request.param
    )
    return list(dict.fromkeys(name for name in names if name is not None))

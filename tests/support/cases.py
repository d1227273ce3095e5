"""Cases of a matrix of processes: a few in every run, all of them where slow tests run."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def with_slow(cases: Iterable[str], quick: Collection[str]) -> list[Any]:
    """Parameters for `pytest.mark.parametrize`: all but the quick ones are marked slow."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in cases]


def chosen(request: pytest.FixtureRequest) -> list[str]:
    """The cases that tests of this module are about to run, by their parameter "name"."""
    names = (
        item.callspec.params.get("name")
        for item in request.session.items
        if item.path == request.path
        and isinstance(item, pytest.Function)
        and hasattr(item, "callspec")
    )
    return list(dict.fromkeys(name for name in names if name is not None))

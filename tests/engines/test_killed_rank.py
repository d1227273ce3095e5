"""A rank that dies in the middle of a step ends the others, with a reason."""

import signal
from importlib.util import find_spec

import pytest
from killed_rank import ENGINES, killed


@pytest.mark.parametrize("engine", ENGINES)
def test_the_others_end_with_an_error_when_a_rank_is_killed_in_a_step(engine):
    """They raise within the group's timeout, in the collective that waits for the killed rank."""
    if engine == "zero3" and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed here")
    exits, told = killed(engine)

    assert exits == [7, -signal.SIGKILL]
    assert "connection" in told.lower() or "timed out" in told.lower(), told

"""A rank that dies in the middle of a step ends the others, with a reason."""

import signal

from killed_rank import killed


def test_the_others_end_with_an_error_when_a_rank_is_killed_in_a_step():
    """Within the group's timeout, in the collective that waits for the dead one."""
    exits, told = killed()

    assert exits == [7, -signal.SIGKILL]
    assert "connection" in told.lower() or "timed out" in told.lower(), told

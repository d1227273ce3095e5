"""The examples run with two processes, which have the environment that torchrun gives them."""

import re
import runpy
from pathlib import Path

import pytest
from processes import Program, torchrun_environments

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*/*.py"))


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.parent.name)
def test_an_example_learns_something(script):
    """Its last loss is below its first, and nothing is said on the way but losses."""
    ranks = [
        Program(runpy.run_path, str(script), None, "__main__", environment=environment)
        for environment in torchrun_environments(2)
    ]
    printed = "".join(rank.wait() for rank in ranks)

    assert [rank.process.exitcode for rank in ranks] == [0, 0], printed
    losses = [float(found) for found in re.findall(r"loss (\d+\.\d+)", printed)]
    assert len(losses) >= 5
    assert losses[-1] < losses[0]


def test_there_are_examples():
    """One of each engine."""
    assert {script.parent.name for script in EXAMPLES} == {"fsdp2", "zero3"}

"""The examples run as their first lines say, with two processes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from compiled_ops import WITHOUT_SUMS

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*/*.py"))


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.parent.name)
def test_an_example_learns_something(script):
    """Its last loss is below its first, and nothing is said on the way but losses."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    # Twice in some twenty runs of the suite a rank of ZeRO-3 aborted after its work, while the
    # interpreter ended ("terminate called without an active exception"): torchrun starts it again.
    launcher += ["--max-restarts", "1"]
    command = [str(script)]
    if script.parent.name == "zero3":
        launcher += ["--no-python"]
        code = WITHOUT_SUMS + "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
        command = [sys.executable, "-c", code, str(script)]
    run = subprocess.run(
        [sys.executable, *launcher, *command],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )

    assert run.returncode == 0, run.stderr
    losses = [float(found) for found in re.findall(r"loss (\d+\.\d+)", run.stdout)]
    assert len(losses) >= 5
    assert losses[-1] < losses[0]


def test_there_are_examples():
    """One of each engine."""
    assert {script.parent.name for script in EXAMPLES} == {"fsdp2", "zero3"}

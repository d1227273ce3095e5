"""Which of DeepSpeed's operators are compiled here already, and how one is compiled."""

import os
import subprocess
import sys
from importlib.util import find_spec

_SECONDS = 600
_FOLDER = """
from pathlib import Path
from torch.utils.cpp_extension import _get_build_directory
from deepspeed.ops.op_builder import {builder} as Builder
builder = Builder()
folder = Path(_get_build_directory(builder.name, verbose=False))
lock = folder / "lock"
"""
_STATE = """
found = builder.is_compatible(verbose=False)
compiled = (folder / (builder.name + ".so")).exists() and not lock.exists()
print("STATE", "compiled" if found and compiled else "possible" if found else "impossible")
"""
# torch waits for ever for a lock that a killed process left: who compiles keeps it open.
_COMPILE = """
import os
def target(file):
    try:
        return os.readlink(file)
    except OSError:
        return None
files = Path("/proc").glob("[0-9]*/fd/*")
if lock.exists() and str(lock.resolve()) not in map(target, files):
    lock.unlink()
builder.load()
"""


def state_of(builder: str) -> str:
    """Whether an operator is "compiled", or to compile it is "possible" or "impossible".

    Compiles nothing, and in a process of its own: DeepSpeed changes torch for the whole of it.
    """
    if find_spec("deepspeed") is None:
        return "impossible"
    said = _run((_FOLDER + _STATE).format(builder=builder)).stdout
    return said.rpartition("STATE ")[2].strip() if "STATE " in said else "impossible"


def compile_once(builder: str) -> None:
    """Compile an operator into torch's cache of extensions, where the next process finds it."""
    ran = _run((_FOLDER + _COMPILE).format(builder=builder))
    if ran.returncode != 0:
        raise RuntimeError(f"{builder} was not compiled: {ran.stderr[-2000:]}")


def _run(code: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
        stdin=subprocess.DEVNULL,
    )

"""What the library of products keeps for the float32 products of a step, measured for their shapes.

MKL keeps what it allocated for a product, and a later one uses it only where it is large enough and
the same thread asks. How much it is follows from the CPU's kernels and from the number of threads
(torch 2.13 with MKL 2024.2 on an Intel CPU with AMX, two threads, its buffers freed between
products; rows × depth × columns):

- by its kernels for AVX2 (MKL_ENABLE_INSTRUCTIONS=AVX2): a panel 192 deep and at most 20 000
  columns wide, from 600 rows on: 9.4 MiB for 12 000 columns, 15.2 at most. With the widest product
  first, the others add almost nothing.
- by its kernels for AVX-512: the panel is 384 deep, from 200 rows on: 18.5 MiB for 12 000
  columns, 30.4 at most; 576 columns deep it is two of 288: 13.9. So the widest may take less than
  another. With two threads, products with few rows are cut along their depth, and the second
  thread has a result of its own: 256 × 2048 × 64 000 leaves 63 MiB, 64 × 576 × 64 000 leaves 16,
  and 160 × 576 × 64 000 half a MiB.

No formula holds on both, and the order matters: nine products of 64 and 300 rows left 21.6 to 28.7
MiB on the second kind. So the different products of the step are made in a fresh process: the
widest first, as `tile(model, plan)` does, then all of them in the step's order, for two steps.
"""

import hashlib
import json
import os
import subprocess
import sys
from typing import Final

import torch

from memtile.convert import multiply, take_workspace
from memtile.homes import keep_freed_memory_out, trim_heap
from memtile.planner.machine_rates import MeasuringError, child_environment, private_bytes
from memtile.planning import Products

_CODE: Final = "import memtile.planner.product_memory as product_memory; product_memory.serve()"
_SMALL: Final = 1 << 20
_STEPS: Final = 2  # the second adds a little; a third nothing, measured


class Workspaces:
    """Gives the bytes that a step's products leave behind.

    The process that measures is started when it is first needed, and ended with the block.

    Args:
        known: the digest of shapes → bytes, as measured before; what is measured is added.
    """

    def __init__(self, known: dict[str, int]) -> None:
        self.known = known
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Workspaces":
        return self

    def __exit__(self, *raised: object) -> None:
        if self._process is not None:
            self._process.communicate()  # no more lines: it ends
            self._process = None

    def __call__(self, products: Products) -> int:
        """The bytes; no process is started for products that are too small to keep a MiB.

        Raises:
            MeasuringError: the process that measures ended without an answer.
        """
        copies = _copied_bytes(products)
        if copies < _SMALL:
            return copies
        text = json.dumps(products.shapes)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        if digest not in self.known:
            self.known[digest] = self._measured(text)
        return self.known[digest]

    def _measured(self, text: str) -> int:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CODE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=child_environment(),
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(text + "\n")
        self._process.stdin.flush()
        try:
            return int(self._process.stdout.readline())
        except ValueError as error:
            raise MeasuringError(
                "the memory that products keep could not be measured: the process that makes them "
                "ended without an answer; give rates=… instead"
            ) from error


def _copied_bytes(products: Products) -> int:
    """Of factors and results, for each thread: no library has a use for more."""
    elements = sum(m * k + k * n + m * n for m, k, n in products.shapes)
    return 4 * elements * torch.get_num_threads()


def serve() -> None:
    """Answer each line of shapes by a line of bytes: what the process runs."""
    keep_freed_memory_out()
    for line in sys.stdin:
        shapes = tuple(map(tuple, json.loads(line)))
        print(_in_a_fork(Products(shapes, 0)), flush=True)


def _in_a_fork(products: Products) -> int:
    """In a process that has made no product yet, so that nothing is kept there."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writing, str(_kept_bytes(products)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return int(text)


def _kept_bytes(products: Products) -> int:
    torch.mm(torch.ones(1, 1024), torch.ones(1024, 1024))  # threads, and what all products use
    before = private_bytes()
    take_workspace(products)
    for shape in products.shapes * _STEPS:
        multiply(*shape)
    trim_heap()  # where the results were
    return max(0, private_bytes() - before)

"""Measures what the matrix library keeps in memory for the float32 products of a step.

MKL keeps what it allocated for a product; a later product uses it only if it is large enough and
runs in the same thread. The size depends on the CPU's kernels and on the number of threads (torch
2.13 with MKL 2024.2 on an Intel CPU with AMX, two threads, its buffers freed between products;
rows × depth × columns):

- AVX2 kernels (MKL_ENABLE_INSTRUCTIONS=AVX2): a panel 192 deep and at most 20 000 columns wide,
  from 600 rows on: 9.4 MiB for 12 000 columns, 15.2 at most. After the widest product, the others
  add almost nothing.
- AVX-512 kernels: the panel is 384 deep, from 200 rows on: 18.5 MiB for 12 000 columns, 30.4 at
  most; with depth 576 it is two of 288: 13.9. So the widest may take less than another. With two
  threads, products with few rows are cut along their depth, and the second thread has a result of
  its own: 256 × 2048 × 64 000 leaves 63 MiB, 64 × 576 × 64 000 leaves 16, and 160 × 576 × 64 000
  half a MiB.

No formula holds for both, and the order matters: nine products of 64 and 300 rows left 21.6 to 28.7
MiB with AVX-512. So the different products of the step are made in a new process: the widest first,
as `tile(model, plan)` does, then all of them in the step's order, for two steps.
"""

import hashlib
import json
import os
import subprocess
import sys
from typing import Final

import torch

from memtile.convert import multiply, take_workspace
from memtile.costmodel import Products
from memtile.homes import keep_freed_memory_out, trim_heap
from memtile.planner.machine_rates import MeasuringError, child_environment, private_bytes

_CODE: Final = "import memtile.planner.product_memory as product_memory; product_memory.serve()"
_SMALL: Final = 1 << 20
_STEPS: Final = 2  # the second adds a little; a third nothing, measured


class Workspaces:
    """Gives the bytes that a step's products leave in memory.

    The process that measures starts when it is first needed, and ends with the `with` block. What
    is measured is added to `known`, by the digest of shapes.
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
        """The bytes; products that are too small to keep a MiB are not measured."""
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
    """Bytes of factors and results for each thread: the most that a library can use."""
    elements = sum(m * k + k * n + m * n for m, k, n in products.shapes)
    return 4 * elements * torch.get_num_threads()


def serve() -> None:
    """Answer each line of shapes with a line of bytes: the measuring process runs this."""
    keep_freed_memory_out()
    for line in sys.stdin:
        shapes = tuple(map(tuple, json.loads(line)))
        print(_in_a_fork(Products(shapes, 0)), flush=True)


def _in_a_fork(products: Products) -> int:
    """Measured in a fork, which has made no product yet and so keeps nothing."""
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

"""`MachineProfile`: what a machine does in a second, and what memory its libraries take."""

import math
from dataclasses import dataclass
from typing import ClassVar, Final

from memtile.costmodel.json_form import JsonRecord
from memtile.costmodel.model_records import Products
from memtile.errors import ArgumentError

WORKSPACE_SHAPE: Final = (1024, 512, 8192)


@dataclass(frozen=True)
class MachineProfile(JsonRecord):
    """Measured rates; `memtile.plan` measures them, a JSON file or a user gives others.

    Args:
        product_flops: (rows, flop/s) of float32 products with so many rows, ascending.
        product_flops_16: the same for bfloat16.
        touched_bytes: bytes a second that other operations read and write.
        read_bytes: bytes a second from the disk, past the page cache.
        written_bytes: bytes a second to it.
        mapped_bytes: bytes a second that are mapped from the page cache, to work on them there.
        stepped_elements: elements a second that AdamW steps.
        tile_seconds: what one visit of a tile costs besides its product.
        inference_use_bytes: memory that libraries take when a forward first runs: code, workspaces.
        first_use_bytes: the same of a step that trains.
        workspace_bytes: what the library keeps for a float32 product of `WORKSPACE_SHAPE`.
        sixteen_bit_bytes: what the first product in 16 bits takes.
        sixteen_bit_kind_bytes: what each further kind of them takes.
        import_bytes: memory of what torch imports only when an optimizer first steps.
        layer_memory: bytes of the objects of one layer, with what planning it left behind.
        tile_memory: the same of each of its tiles.
        trained_layer_memory: of a layer that an optimizer steps.
        trained_tile_memory: of such a tile.
    """

    _json_name: ClassVar[str] = "Rates"
    _json_version: ClassVar[int] = 1

    product_flops: tuple[tuple[int, float], ...]
    product_flops_16: tuple[tuple[int, float], ...]
    touched_bytes: float
    read_bytes: float
    written_bytes: float
    mapped_bytes: float
    stepped_elements: float
    tile_seconds: float
    inference_use_bytes: int
    first_use_bytes: int
    workspace_bytes: int
    sixteen_bit_bytes: int
    sixteen_bit_kind_bytes: int
    import_bytes: int
    layer_memory: int
    tile_memory: int
    trained_layer_memory: int
    trained_tile_memory: int

    def __post_init__(self) -> None:
        curves = (self.product_flops, self.product_flops_16)
        flat = [number for curve in curves for point in curve for number in point]
        for value in (*flat, *(v for v in vars(self).values() if not isinstance(v, tuple))):
            if not math.isfinite(value) or value < 0:
                raise ArgumentError(
                    f"rates hold {value!r}: every rate is a finite number of 0 or more; leave "
                    "rates out, and they are measured"
                )
        if not all(curves):
            raise ArgumentError("rates hold no product_flops: give (rows, flop/s) at least once")

    def flops(self, rows: int, element_bytes: int) -> float:
        """Flop/s of products with so many rows, between the points that were measured."""
        curve = self.product_flops if element_bytes > 2 else self.product_flops_16
        below = [point for point in curve if point[0] <= rows]
        above = [point for point in curve if point[0] > rows]
        if not below or not above:
            return (below[-1:] or above[:1])[0][1]
        (low, slow), (high, fast) = below[-1], above[0]
        part = math.log(rows / low) / math.log(high / low)
        return slow + part * (fast - slow)

    def workspaces(self, products: Products) -> int:
        """An estimate of what the library keeps for products that cannot be measured here.

        As much as for the product that was measured, or less in proportion to fewer columns.
        """
        columns, measured = (products.widest or (0, 0, 0))[2], WORKSPACE_SHAPE[2]
        return self.workspace_bytes * min(columns, measured) // measured

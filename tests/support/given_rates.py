"""A machine profile as it could be: tests of plans measure none."""

from memtile.costmodel import MachineProfile

RATES = MachineProfile(
    product_flops=((16, 1e10), (1024, 5e10)),
    product_flops_16=((16, 1e10), (1024, 1e11)),
    touched_bytes=3e9,
    read_bytes=1e9,
    written_bytes=1e9,
    mapped_bytes=5e9,
    stepped_elements=1e8,
    tile_seconds=1e-4,
    inference_use_bytes=0,
    first_use_bytes=0,
    workspace_bytes=0,
    sixteen_bit_bytes=0,
    sixteen_bit_kind_bytes=0,
    import_bytes=0,
    layer_memory=1000,
    tile_memory=1000,
    trained_layer_memory=1000,
    trained_tile_memory=1000,
)

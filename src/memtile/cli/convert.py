"""`memtile convert`: writes a new checkpoint, dense or with tiles of any grid."""

from pathlib import Path
from typing import Annotated

import typer

from memtile.cli.errors import CommandError
from memtile.convert import TilingSpec, convert_checkpoint
from memtile.costmodel import format_byte_size, parse_byte_size


def run_convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A checkpoint's folder or file.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    modules: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Linears to cut, such as '*.mlp.*'; none: dense."),
    ] = None,
    out_splits: Annotated[int, typer.Option(help="Rows of tiles.")] = 1,
    in_splits: Annotated[int, typer.Option(help="Columns of tiles.")] = 1,
    max_tile: Annotated[
        str | None, typer.Option(help="The largest tile, such as 16MiB, in place of splits.")
    ] = None,
    max_shard: Annotated[str, typer.Option(help="The largest file.")] = "5GB",
) -> int:
    """Join the tiles of a checkpoint into dense tensors, or cut linears into tiles.

    Tiles have the names of DeepSpeed's tiled linear. Values stay bit for bit; a few MiB are in
    memory at a time.
    """
    tile_bytes = None if max_tile is None else parse_byte_size(max_tile, "--max-tile")
    if not modules and (tile_bytes or out_splits != 1 or in_splits != 1):
        raise CommandError(
            "--modules is missing: name the linears to cut, such as --modules '*.mlp.*'."
        )
    _check_target(source, target)
    recut = TilingSpec(modules, out_splits, in_splits, tile_bytes) if modules else None
    changed = convert_checkpoint(
        source, target, recut, max_shard_bytes=parse_byte_size(max_shard, "--max-shard")
    )
    size = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    act = "linears cut into tiles" if modules else "layers joined from tiles"
    print(f"{len(changed)} {act}; {format_byte_size(size)} in {target}")
    return 0


def _check_target(source: Path, target: Path) -> None:
    is_other = target.resolve() != source.resolve()  # which has a sentence of its own
    if is_other and target.is_dir() and any(target.iterdir()):
        raise CommandError(f"OUT {target} is not empty: give a new folder.")

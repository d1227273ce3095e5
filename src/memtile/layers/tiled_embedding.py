"""`TiledEmbedding`: its tiles are rows of the vocabulary, which a tiled head can share."""

import re
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from memtile import ops
from memtile.errors import ArgumentError, TileDeviceError, TileDtypeError, TileIndexError
from memtile.geometry import Grid
from memtile.homes import Home, resolve_home
from memtile.layers.checks import is_plain
from memtile.layers.parked import ParkedEmbedding, uninitialised
from memtile.layers.tiled_module import TiledModule
from memtile.layers.values import gathered
from memtile.transfer import layer_call

Self = TypeVar("Self", bound="TiledEmbedding")


class TiledEmbedding(TiledModule):
    """An embedding cut into `out_splits` tiles of consecutive rows; tile o is `embeddings[o]`.

    `share_tiles_with` (of this layer or of a `TiledLinear` with in_splits=1) ties it to a head: one
    set of tiles, which gets the gradients of both.

    Args:
        num_embeddings: rows of the vocabulary.
        embedding_dim: width of a row.
        padding_idx: a row that gets no gradient from lookups and starts at zero; negative counts
            from the end.
        max_norm: refused: it rewrites looked-up rows in place during forward.
        norm_type: as in `nn.Embedding`; unused without `max_norm`.
        scale_grad_by_freq: divide each row's gradient by how often its id occurs in the batch.
        sparse: refused: a sparse gradient would have to be cut along its tiles.
        out_splits: tiles, 1 to num_embeddings.
        device: of the tiles.
        dtype: of the tiles.
        home: where the tiles are parked: a `Home`, "disk", "disk:FOLDER", "host" or
            "device"; None: not parked.

    Raises:
        SplitsError: `out_splits` is outside its range.
        HomeFullError: the home has no room for the tiles.
        ArgumentError: `max_norm` or `sparse` is given, or `padding_idx` is no row.

    Examples:
        >>> embedding = memtile.TiledEmbedding(50_000, 64, out_splits=8)
        >>> embedding(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 64])
    """

    tile_pattern: ClassVar[re.Pattern[str]] = re.compile(
        r"embeddings\.(?P<row>\d+)\.(?P<name>weight)"
    )

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        *,
        out_splits: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        home: Home | str | None = None,
    ) -> None:
        super().__init__()
        self.grid = Grid.uniform(num_embeddings, embedding_dim, out_splits)
        self.num_embeddings, self.embedding_dim = self.grid.out_features, self.grid.in_features
        self.out_splits = self.grid.out_splits
        self.padding_idx = _row_of_padding(padding_idx, num_embeddings)
        _refuse_options(max_norm, sparse)
        self.max_norm, self.norm_type = None, norm_type
        self.scale_grad_by_freq, self.sparse = scale_grad_by_freq, False
        parked: Any = {} if home is None else {"home": resolve_home(home, device)}
        self.embeddings = nn.ModuleList()
        for span in self.grid.out_spans:
            tile = uninitialised(
                ParkedEmbedding if parked else nn.Embedding,
                span.size,
                embedding_dim,
                padding_idx=self._padding_inside(span.start, span.stop),
                scale_grad_by_freq=scale_grad_by_freq,
                device=device,
                dtype=dtype,
                **parked,
            )
            self.embeddings.append(tile)
        self.reset_parameters()

    def _padding_inside(self, start: int, stop: int) -> int | None:
        padding = self.padding_idx
        return None if padding is None or not start <= padding < stop else padding - start

    def tile(self, row: int, column: int) -> nn.Module:
        """The tile with the rows of span `row`."""
        return self.embeddings[row]

    @staticmethod
    def tile_path(row: int, column: int) -> str:
        """The name of the tile below this layer."""
        return f"embeddings.{row}"

    def extra_repr(self) -> str:
        """Rows, width, padding and tiles."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        rows, columns = self.grid.rect(0, 0).shape
        return (
            f"{self.num_embeddings}, {self.embedding_dim}{padding}, grid={self.grid}, "
            f"largest tile {rows}×{columns}"
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new rows from `nn.Embedding`'s distribution; the padding row is zero."""
        for index, weight in self.writable_parameters("weight").items():
            padding = self.tile(*index).padding_idx
            with gathered([weight], write=True):
                nn.init.normal_(weight)
                if padding is not None:
                    weight[padding].fill_(0)  # type: ignore[index]  # an nn.Embedding's, an int

    @classmethod
    def from_embedding(cls: type[Self], embedding: nn.Embedding, out_splits: int = 1) -> Self:
        """A tiled embedding with the values, dtype, device, requires_grad, mode of another."""
        shape = embedding.num_embeddings, embedding.embedding_dim
        return cls.from_dense(embedding, Grid.uniform(*shape, out_splits))

    @classmethod
    def from_dense(
        cls: type[Self],
        dense: nn.Module,
        grid: Grid,
        tied_to: TiledModule | None = None,
        home: Home | None = None,
    ) -> Self:
        """`from_embedding` for a given grid; tiles may be those of `tied_to`, or in `home`."""
        assert isinstance(dense, nn.Embedding)
        layer = cls(
            grid.out_features,
            grid.in_features,
            dense.padding_idx,
            dense.max_norm,
            dense.norm_type,
            dense.scale_grad_by_freq,
            dense.sparse,
            out_splits=grid.out_splits,
            device="meta",
            home=home,
        )
        layer.take_over(dense, tied_to)
        return layer

    def to_embedding(self) -> nn.Embedding:
        """An untiled `nn.Embedding` with the same values, dtype, device, requires_grad, mode."""
        embedding = self.to_dense()
        assert isinstance(embedding, nn.Embedding)
        return embedding

    def to_dense(self, weight: nn.Parameter | None = None) -> nn.Module:
        """The untiled module that this layer replaces, with `weight` where it is tied."""
        embedding = nn.Embedding(
            self.num_embeddings,
            self.embedding_dim,
            padding_idx=self.padding_idx,
            norm_type=self.norm_type,
            scale_grad_by_freq=self.scale_grad_by_freq,
            device="meta",
        )
        self.hand_over(embedding, weight)
        return embedding

    def forward(self, input: Tensor) -> Tensor:
        """The rows of the ids.

        Args:
            input: whole numbers in [0, num_embeddings), any shape.

        Returns:
            (…, embedding_dim), bit-identical to the dense lookup.

        Raises:
            TileDtypeError: the ids are no int32 or int64 tensor.
            TileDeviceError: they are on another device than the tiles.
            TileIndexError: an id is outside the vocabulary; of one tile on an accelerator, and
                under compilers and transforms, torch raises its own error.
            ArgumentError: `scale_grad_by_freq` in training under a compiler or a transform.
        """
        tiles, spans = list(self.embeddings), self.grid.out_spans
        _check_ids(self.full_name(), input, tiles[0])
        static = ops.transformed() or input.is_meta or type(input) is not Tensor
        if not static and (input.is_cpu or len(tiles) > 1):  # an accelerator would be waited for
            _check_range(self.full_name(), input, self.num_embeddings)
        if len(tiles) == 1:
            rows: Tensor = tiles[0](input)
            return rows
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if static:
            self._check_static(trained)
            return ops.gather_rows_statically(input, tiles, spans)
        # Tiles may be skipped only where no engine or hook counts on their calls.
        skips = not trained and all(is_plain(tile, type(tile)) for tile in tiles)
        gather = ops.gather_some_rows if skips else ops.gather_rows
        with layer_call():
            return gather(input, tiles, spans, self.embedding_dim)

    def _check_static(self, trained: bool) -> None:
        """Refuse `scale_grad_by_freq`: static lookups give every tile all ids, not only its own."""
        if self.scale_grad_by_freq and trained:
            raise ArgumentError(
                f"{self.full_name()}: scale_grad_by_freq=True cannot be trained under a compiler "
                "or transform, since ids of other tiles would be counted; leave this layer out of "
                "it (torch.compiler.disable), or use one tile"
            )


def _row_of_padding(padding_idx: int | None, rows: int) -> int | None:
    if padding_idx is None:
        return None
    if not -rows <= padding_idx < rows:
        raise ArgumentError(f"padding_idx={padding_idx} must be a row of num_embeddings={rows}")
    return padding_idx % rows


def _refuse_options(max_norm: Any, sparse: bool) -> None:
    if max_norm is not None:
        raise ArgumentError(
            f"max_norm={max_norm} is not supported: it rewrites looked-up rows in place during "
            "forward, which a tile that may be shared or live elsewhere cannot bear; normalise "
            "the output, or leave this embedding untiled"
        )
    if sparse:
        raise ArgumentError(
            "sparse=True is not supported: a sparse gradient would have to be cut along the tiles; "
            "tiles bound the dense gradient already; pass sparse=False, or leave it untiled"
        )


def _check_ids(name: str, ids: object, tile: nn.Module) -> None:
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
        kind = ids.dtype if isinstance(ids, Tensor) else f"a {type(ids).__name__}"
        raise TileDtypeError(
            f"{name}: the ids are {kind}; they must be a tensor of whole numbers, int32 or int64; "
            "convert them with ids.long()"
        )
    weight = tile._parameters.get("weight")
    if is_plain(tile, nn.Embedding) and weight is not None and ids.device != weight.device:
        raise TileDeviceError(
            f"{name}: the ids are on {ids.device}, the tiles on {weight.device}; move one of them"
        )


def _check_range(name: str, ids: Tensor, rows: int) -> None:
    if not ids.numel():
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= rows:
        raise TileIndexError(
            f"{name}: the ids reach from {low} to {high}, the vocabulary from 0 to {rows - 1}; "
            "check the tokenizer against num_embeddings"
        )

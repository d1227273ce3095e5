"""`TiledLinearReturnBias`: tiles that return their bias instead of adding it."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from memtile import ops
from memtile.errors import TileClassError
from memtile.layers import checks
from memtile.layers.paths import Results, own_hook
from memtile.layers.tiled_linear import TiledLinear
from memtile.layers.values import Index


class TiledLinearReturnBias(TiledLinear):
    """A `TiledLinear` of a `linear_cls` whose forward returns `(output, bias)`.

    Megatron's linears with `skip_bias_add` do. Outputs are summed, returned biases are not:
    `forward` gives `(output, bias)` with the biases of the rows joined, or None when no tile
    returns one; without `combine_out_splits` a list of such pairs.

    Examples:
        >>> layer = memtile.TiledLinearReturnBias(64, 96, out_splits=2, linear_cls=SkipBiasLinear)
        >>> output, bias = layer(torch.zeros(8, 64))
        >>> bias.shape
        torch.Size([96])
    """

    def _can_fuse(self, whole: list[Any], tiles: list[nn.Module]) -> bool:
        """Never: a plain tile returns no pair, which the composed path reports."""
        return False

    def _operands(self, chunks: Sequence[Any], tiles: Sequence[nn.Module]) -> None:
        """None: likewise for a parked one."""

    def _composed_path(self, results: Results) -> Any:
        biases: list[Tensor | None] = [None] * self.out_splits

        def keep_bias(pair: tuple[Index, Any]) -> tuple[Index, Tensor]:
            index, (output, bias) = pair[0], self._check_pair(*pair)
            biases[index[0]] = bias if bias is not None else biases[index[0]]
            return index, output

        output = super()._composed_path(map(keep_bias, results))
        if self.combine_out_splits:
            return output, _join_biases(biases)
        return list(zip(output, biases, strict=True))

    def _check_pair(self, index: Index, result: Any) -> tuple[Tensor, Tensor | None]:
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], Tensor)):
            raise TileClassError(
                f"{self.full_name()}: tile {index} returned a {type(result).__name__}, not "
                "(output, bias); a linear_cls that returns one tensor belongs in TiledLinear"
            )
        checks.check_width(self.full_name(), index, self.tile(*index), self.grid, result[0])
        return result

    @own_hook
    def _reduce_local_output(self, in_id: int, out_id: int, current_out: Any, new_out: Any) -> Any:
        """Add outputs; keep the bias that a column returned."""
        output, bias = self._check_pair((out_id, in_id), new_out)
        before, kept = (None, None) if current_out is None else current_out
        total = super()._reduce_local_output(in_id, out_id, before, output)
        return total, kept if bias is None else bias

    @own_hook
    def _combine_output_splits(self, outputs: Sequence[Any]) -> Any:
        """Join outputs and biases of the rows."""
        joined = super()._combine_output_splits([output for output, _ in outputs])
        return joined, _join_biases([bias for _, bias in outputs])


def _join_biases(biases: Sequence[Tensor | None]) -> Tensor | None:
    found = [bias for bias in biases if bias is not None]
    return ops.join_rows(found) if found else None

"""Parked tiles: a linear and an embedding whose weight lives in a home.

The weight is an ordinary `nn.Parameter` on the CPU whose memory is the home's, so code that reads
or writes parameters works as usual. Its values are read into a slab for each product. A tensor
found in its place (`functional_call`, `.data = …`, a swapped parameter) is used as it is, and never
replaced by the home's bytes. Biases are never parked.
"""

import copy
import copyreg
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from memtile import ops
from memtile.errors import ParkedCopyWarning, ParkedError
from memtile.geometry import Grid
from memtile.homes import (
    Home,
    allocate_copy,
    allocation_of,
    evict,
    is_parked,
    register,
    resolve_home,
    tensor_of,
)
from memtile.layers import checks
from memtile.transfer import ParkedSource, catch_up, layer_call

_NAME = "ParkedLinear"  # in messages: a tile does not know its name


class ParkedModule(nn.Module):
    """A tile whose weight is parked; subclasses are their resident class too."""

    resident_class: ClassVar[type[nn.Module]]  # of copies and pickles
    home: Home  # where the weight lives

    def _park_weight(self, home: Home | str, shape: Sequence[int], device: Any, dtype: Any) -> None:
        """Give the tile its home, and memory there unless it is on the meta device."""
        self.home = resolve_home(home, device)
        if torch.empty(0, device=device).is_meta:
            return
        allocation = self.home.allocate(shape, dtype or torch.get_default_dtype())
        self._parameters["weight"] = parameter_of(tensor_of(allocation), True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move what is not parked; a parked weight stays at home, where its dtype may change."""
        weight = self._parameters.get("weight")  # none where it is pruned or parametrized
        if weight is None or not is_parked(weight):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
            self._park_what_was_meta(weight)
            return self
        wanted = fn(torch.empty(0, dtype=weight.dtype)).dtype
        if wanted != weight.dtype:
            _cast_at_home(weight, wanted)
        self._parameters["weight"] = None
        try:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        finally:
            self._parameters["weight"] = weight

    def extra_repr(self) -> str:
        """As of the class that is not parked, and the home."""
        return f"{super().extra_repr()}, home={getattr(self, 'home', None)}"

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        resident = self.resident_class.__new__(self.resident_class)
        memo[id(self)] = resident
        resident.__dict__.update(copy.deepcopy(self._resident_state(), memo))
        return resident

    def __reduce_ex__(self, protocol: Any) -> Any:
        # not copyreg.__newobj__, which pickle refuses for another class than the object's own
        made = copyreg._reconstructor, (self.resident_class, object, None)  # type: ignore[attr-defined]  # stubs leave it out
        return *made, self._resident_state()

    def _resident_state(self) -> dict[str, Any]:
        warnings.warn(
            "a copy or a pickle of a parked tile is an ordinary layer in memory; park the copy "
            "with memtile.tile(copy, …, home=…) after memtile.untile(copy)",
            ParkedCopyWarning,
            stacklevel=3,
        )
        catch_up(self.parameters(recurse=False))
        return {name: value for name, value in self.__dict__.items() if name != "home"}

    def _save_to_state_dict(self, *given: Any) -> None:
        """torch's own hook for one module's part of a state dict."""
        catch_up(self.parameters(recurse=False))
        super()._save_to_state_dict(*given)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        """torch's own hook; `assign=True` copies the values home too, and keeps no tensor."""
        weight = self._parameters.get("weight")
        if weight is not None and is_parked(weight):
            local_metadata = {**local_metadata, "assign_to_params_buffers": False}
            catch_up((weight,))  # of its state: the values are replaced
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        self._park_what_was_meta(weight)
        evict(weight)

    def _park_what_was_meta(self, before: Tensor | None) -> None:
        """Move a weight home that has just got memory."""
        weight = self._parameters.get("weight")
        if before is not None and before.is_meta and weight is not None and not weight.is_meta:
            parked = allocate_copy(self.home, weight.detach())
            self._parameters["weight"] = parameter_of(parked, weight.requires_grad)


class ParkedLinear(ParkedModule, nn.Linear):
    """An `nn.Linear` whose weight is parked; a `linear_cls` for `TiledLinear`.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        bias: whether it has one, in ordinary memory.
        device: of the bias; of the weight too where `home` is "device".
        dtype: of both.
        home: a `Home`, "disk", "disk:FOLDER", "host" or "device".

    Raises:
        HomeFullError: the home has no room.
    """

    resident_class: ClassVar[type[nn.Module]] = nn.Linear
    multiplies_floats: ClassVar[bool] = True  # see `layers.gathered_calls`

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,  # as torch takes it
        dtype: torch.dtype | None = None,
        *,
        home: Home | str = "host",
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device="meta", dtype=dtype)
        self._park_weight(home, (out_features, in_features), device, dtype)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        self.reset_parameters()
        evict(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """(…, out_features) of (…, in_features), the weight in memory for the product only.

        Raises:
            TileShapeError: wrong width or rank.
            TileDtypeError: the input is of another dtype than the weight, without autocast.
            HomeIOError: the weight could not be read.
            HomeError: the home is closed.
        """
        weight: Any = self.weight  # functional_call and parametrizations put other tensors there
        bias: Tensor | None = self.bias
        if ops.transformed() or not is_parked(weight) or not weight.numel():
            return functional.linear(input, weight, bias)
        cast = ops.autocast_dtype(checks.check_tensor(_NAME, input))
        if cast or input.dtype != weight.dtype or input.shape[-1] != weight.shape[1]:
            checks.split_sizes(_NAME, input.shape[-1], 1, [weight.shape[1]])
            checks.check_dtypes_and_devices(_NAME, [input], weight, same_device=False)
        x = input if cast is None else input.to(cast)
        with layer_call():
            bias = None if bias is None else bias.to(x.dtype)
            return ops.parked_linear(x, weight, bias, ParkedSource(weight))


class ParkedEmbedding(ParkedModule, nn.Embedding):
    """An `nn.Embedding` whose rows are parked; a lookup reads only the pages of its rows.

    Args:
        num_embeddings: rows.
        embedding_dim: width of a row.
        padding_idx: a row that gets no gradient from lookups.
        scale_grad_by_freq: divide each row's gradient by how often its id occurs.
        device: where the rows are parked, where `home` is "device".
        dtype: of the rows.
        home: a `Home`, "disk", "disk:FOLDER", "host" or "device".

    Raises:
        HomeFullError: the home has no room.
    """

    resident_class: ClassVar[type[nn.Module]] = nn.Embedding

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        scale_grad_by_freq: bool = False,
        device: Any = None,  # as torch takes it
        dtype: torch.dtype | None = None,
        home: Home | str = "host",
    ) -> None:
        nn.Embedding.__init__(
            self,
            num_embeddings,
            embedding_dim,
            padding_idx,
            scale_grad_by_freq=scale_grad_by_freq,
            device="meta",
            dtype=dtype,
        )
        self._park_weight(home, (num_embeddings, embedding_dim), device, dtype)
        self.reset_parameters()
        evict(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """The rows (…, embedding_dim) of the ids."""
        weight: Any = self.weight  # as above
        if ops.transformed() or not is_parked(weight):
            return super().forward(input)
        source = ParkedSource(weight)
        with layer_call():
            rows = ops.parked_embedding(
                input, weight, self.padding_idx, self.scale_grad_by_freq, source
            )
        evict(weight)
        return rows


@torch.no_grad()
def _cast_at_home(parameter: nn.Parameter, dtype: torch.dtype) -> None:
    """Give a parked parameter and its gradient the dtype, in new room of the same home.

    As in `nn.Module.to`, the parameter object stays, with its ties and hooks. The parameter is in
    memory once meanwhile, and its old room is free afterwards. HomeFullError, and nothing is
    changed, where the home lacks the room; ParkedError where it is only read.
    """
    allocation = allocation_of(parameter)
    assert allocation is not None
    home = allocation.home
    if home.is_read_only:
        raise ParkedError(
            f"a parked tile of shape {tuple(parameter.shape)} is {parameter.dtype} in the files of "
            f"a checkpoint, which are only read, and cannot become {dtype} there; use "
            'home="disk", or write a checkpoint of that dtype: '
            "memtile.save_checkpoint(model, folder, dtype=…)"
        )
    catch_up((parameter,))  # idle steps are of the old dtype
    tensors = [parameter] if parameter.grad is None else [parameter, parameter.grad]
    new = []
    for tensor in tensors:
        values = tensor.detach().to(dtype)
        new.append(allocate_copy(home, values) if is_parked(tensor) else values)
        evict(tensor)
    for tensor, values in zip(tensors, new, strict=True):
        tensor.data = values
        found = allocation_of(values)
        if found is not None:
            register(tensor, found)
            found.label = allocation.label if tensor is parameter else None
    torch.autograd.graph.increment_version(parameter)


def parameter_of(values: Tensor, requires_grad: bool) -> nn.Parameter:
    """A parameter in the memory of the values, parked if they are."""
    parameter = nn.Parameter(values, requires_grad=requires_grad)
    allocation = allocation_of(values)
    if allocation is not None:
        register(parameter, allocation)
    return parameter


_FORWARD = ParkedLinear.forward


@lru_cache(maxsize=1024)
def _shapes(grid: Grid) -> tuple[torch.Size, ...]:
    return tuple(torch.Size(grid.rect(*index).shape) for index in grid.indices())


def operands_of(
    tiles: Sequence[nn.Module], grid: Grid
) -> list[tuple[nn.Parameter, Tensor | None]] | None:
    """Weights and biases of the tiles of a grid, row by row; None where one is to be called.

    A tile is not called where it is a plain `ParkedLinear`, and its weight what the grid says.
    """
    found: list[tuple[nn.Parameter, Tensor | None]] = []
    if checks.hooked_globally() or ParkedLinear.forward is not _FORWARD:
        return None
    for tile, shape in zip(tiles, _shapes(grid), strict=True):
        if not checks.is_plain(tile, ParkedLinear):
            return None
        weight: Any = tile._parameters["weight"]  # it has one, or it would not be plain
        if weight.shape != shape or weight.dtype is not tiles[0].weight.dtype:
            return None
        found.append((weight, tile._parameters["bias"]))
    return found


# Made at import: contexts such as DeepSpeed's zero.Init patch classes that are made inside them.
_WITHOUT_DRAWING: dict[type[nn.Module], type[nn.Module]] = {
    cls: type(cls.__name__, (cls,), {"reset_parameters": lambda self: None})
    for cls in (nn.Linear, nn.Embedding, ParkedLinear, ParkedEmbedding)
}


def uninitialised(cls: type[nn.Module], *args: Any, **options: Any) -> nn.Module:
    """An uninitialised linear or embedding, resident or parked, to be filled by the caller."""
    module: nn.Module = _WITHOUT_DRAWING[cls](*args, **options)  # Any: as the class takes them
    module.__class__ = cls
    return module

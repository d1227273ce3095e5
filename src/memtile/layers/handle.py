"""`DenseHandle`: what reading a tiled layer's `.weight` or `.bias` gives, a tensor without data.

Shape, dtype, device and the like cost nothing; the first operation on the handle assembles the
dense tensor, differentiably. In-place operations (`nn.init`, `copy_`, `weight[0] = …`, `.data` and
`.grad` too) assemble it, work on it, and copy it back to the tiles, so that random numbers are the
dense layer's; one dense tensor is in memory meanwhile. So do those on views that are taken without
a graph: of `.data`, of `.detach()`, under `no_grad`. What can't reach the tiles raises HandleError:
other shapes and dtypes, storages, hooks, `torch.autograd.grad`. Not detected: writing into an
alias that is no view (`weight.float()`) and `backward(inputs=[layer.weight])`. Under a compiler a
read gives the assembled tensor itself, which the graph drops if it is unused.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from memtile.errors import HandleError
from memtile.homes import evict
from memtile.layers.values import Values

Layer = Any  # a TiledModule, whose file imports this one
View = Callable[[Tensor], Tensor]

_FREE_PROPERTIES = (
    {"shape", "ndim", "layout", "dtype", "device", "itemsize", "nbytes", "names"}
    | {"requires_grad", "is_leaf", "grad_fn", "output_nr"}
    | {"is_cpu", "is_cuda", "is_meta", "is_mps", "is_xpu"}
    | {"is_nested", "is_quantized", "is_sparse", "is_sparse_csr"}
)
_FREE_METHODS = (
    {"size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "storage_offset"}
    | {"is_contiguous", "is_floating_point", "is_complex", "is_signed", "is_inference"}
    | {"get_device", "__len__", "__hash__", "type"}
)
_REFUSED = (
    {"data_ptr", "untyped_storage", "storage", "_typed_storage", "share_memory_"}
    | {"register_hook", "register_post_accumulate_grad_hook", "retain_grad", "torch.autograd.grad"}
    | {"detach_", "rename_", "set_", "resize_", "resize_as_", "t_", "transpose_", "swapaxes_"}
    | {"swapdims_", "squeeze_", "unsqueeze_", "as_strided_", "apply_", "map_", "map2_"}
)
_IN_PLACE = (
    {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__"}
    | {"__imod__", "__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__"}
)  # fmt: skip
_VIEWS = (
    {"__getitem__", "select", "narrow", "view", "view_as", "reshape", "flatten", "unflatten"}
    | {"t", "T", "mT", "transpose", "swapaxes", "permute", "squeeze", "unsqueeze", "expand"}
)  # fmt: skip
_MARKS = ("_is_hf_initialized",)  # what libraries set on parameters, and read from them

_OF_C_BASE = vars(Tensor.__base__)  # its getset descriptors, which stubs lack
_READ_GRADIENT, _READ_VERSION = _OF_C_BASE["grad"].__get__, _OF_C_BASE["_version"].__get__
_READ_DATA, READ_BASE = _OF_C_BASE["data"].__get__, _OF_C_BASE["_base"].__get__


FREE = frozenset(
    [getattr(Tensor, name).__get__ for name in _FREE_PROPERTIES if hasattr(Tensor, name)]
    + [getattr(Tensor, name) for name in _FREE_METHODS]
    + [getattr(torch, name) for name in _FREE_METHODS & set(torch.__all__)]
)


class DenseHandle(Tensor):
    """The dense `.weight` or `.bias` of a tiled layer, assembled when it is used."""

    _layer: Layer
    _name: str
    _of_gradient: bool
    _of_data: bool
    _views: tuple[View, ...]

    @staticmethod
    def __new__(
        cls,
        layer: Layer,
        name: str,
        of_gradient: bool = False,
        of_data: bool = False,
        views: tuple[View, ...] = (),
    ) -> "DenseHandle":
        """A handle of the layer's "weight" or "bias", of its gradient, of `.data`, or of a view."""
        is_values = of_gradient or of_data
        parameters = list(layer.tile_parameters(name).values())
        like = _viewed(torch.empty(layer.dense_shape(name), device="meta"), views)
        handle: DenseHandle = Tensor._make_wrapper_subclass(
            cls,
            like.shape,
            strides=like.stride(),
            storage_offset=like.storage_offset(),
            dtype=parameters[0].dtype,
            device=parameters[0].device,
            requires_grad=not is_values and any(p.requires_grad for p in parameters),
        )
        handle._layer, handle._name, handle._views = layer, name, views
        handle._of_gradient, handle._of_data = of_gradient, of_data
        handle._is_param = not is_values  # libraries check isinstance(handle, nn.Parameter)
        return handle

    def __getattr__(self, name: str) -> Any:  # whatever the library has set
        if name in _MARKS:
            return all(getattr(tile, name, False) for tile in self._tiles())
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:  # type: ignore[override]  # torch adds a keyword that nothing passes
        return (
            f"DenseHandle({self.full_name()}, shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"device={self.device})"
        )

    def full_name(self) -> str:
        """What the handle stands for, for messages."""
        gradient = ".grad" if self._of_gradient else ""
        data = ".data" if self._of_data else ""
        return f"{self._layer.full_name()}.{self._name}{gradient}{data}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.assemble().detach().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.assemble().detach().__reduce_ex__(protocol)

    def assemble(self) -> Tensor:
        """The dense tensor, differentiable with respect to the tiles where gradients are on."""
        read = self._layer.dense_gradient if self._of_gradient else self._layer.dense_tensor
        with torch.no_grad() if self._of_data else nullcontext():
            values: Tensor | None = read(self._name)
        if values is None:
            raise HandleError(f"{self.full_name()}: the gradient is gone; read it again")
        return _viewed(values.contiguous(), self._views) if self._views else values

    def copy_for_writing(self) -> tuple[Tensor, Tensor]:
        """A dense copy for `write_back`, and the handle's view of it."""
        whole = DenseHandle(self._layer, self._name, self._of_gradient, True).assemble()
        whole = whole.contiguous()  # random numbers are drawn in this order
        return whole, _viewed(whole, self._views)

    def write_back(self, whole: Tensor) -> None:
        """Copy a dense tensor to the tiles, or to their gradients."""
        layer, name = self._layer, self._name
        values = Values.dense(layer.transposed(name, whole))
        if not self._of_gradient:
            layer.copy_values(name, values)
            return
        for index, tile in layer.tile_parameters(name).items():
            values.write_to(tile.grad, layer.tile_rect(name, index))
            evict(tile.grad)

    def without_graph(self, *views: View) -> "DenseHandle":
        """The handle of the values alone, or of a view of them."""
        views = (*self._views, *views)
        return DenseHandle(self._layer, self._name, self._of_gradient, True, views)

    def set_requires_grad(self, yes: bool) -> None:
        """Freeze the tiles, or train them."""
        with torch._C.DisableTorchFunctionSubclass():
            self.requires_grad_(yes)
        for tile in self._tiles():
            tile.requires_grad_(yes)

    def drop_gradient(self) -> None:
        """Set the tiles' gradients to None."""
        for tile in self._tiles():
            tile.grad = None

    @property
    def is_parameter(self) -> bool:
        """Whether it stands for the weight or bias, and not for a gradient, `.data` or a view."""
        return not (self._of_gradient or self._of_data)

    @property
    def layer_of_weight(self) -> Layer | None:
        """The layer whose whole weight it is, with a graph; None for anything else."""
        is_weight = self.is_parameter and self._name == "weight" and not self._views
        return self._layer if is_weight else None

    def _tiles(self) -> list[nn.Parameter]:
        return list(self._layer.tile_parameters(self._name).values())

    def is_of_tiles(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether the handle stands for exactly these parameters, in this order."""
        return [*map(id, self._tiles())] == [*map(id, parameters)]

    def stands_for_same(self, other: "DenseHandle") -> bool:
        """Whether both handles stand for the same tiles."""
        return self.is_of_tiles(other._tiles())

    def is_same_memory(self, other: "DenseHandle") -> bool:
        """Whether both are one dense tensor, with or without a graph."""
        is_whole = not (self._views or other._views) and self._of_gradient == other._of_gradient
        return is_whole and self.stands_for_same(other)

    def _gradient(self) -> "DenseHandle | None":
        if not self.is_parameter or any(tile.grad is None for tile in self._tiles()):
            return None
        return DenseHandle(self._layer, self._name, of_gradient=True)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in FREE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func == _READ_GRADIENT:
            return args[0]._gradient()
        if func == _READ_DATA:
            return args[0].without_graph()
        if func == _READ_VERSION:  # grows whenever a tile is written to
            return sum(tile._version for tile in args[0]._tiles())
        view = _view_without_graph(func, args, kwargs)
        if view is not None:
            return view
        name, written = written_by(func, args, kwargs)
        handles = [leaf for leaf in tree_leaves(written) if isinstance(leaf, DenseHandle)]
        if handles:
            return _write(func, name, handles, args, kwargs)
        return func(*tree_map(_assembled, tuple(args)), **tree_map(_assembled, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub lacks the function argument
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*tree_map(_assembled, tuple(args)), **tree_map(_assembled, kwargs or {}))


def _assembled(value: Any) -> Any:
    return value.assemble() if isinstance(value, DenseHandle) else value


def _viewed(tensor: Tensor, views: Iterable[View]) -> Tensor:
    for view in views:
        tensor = view(tensor)
    return tensor


def _view_without_graph(
    func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> DenseHandle | None:
    """The handle of a view that in-place operations may go through; None where there is none."""
    name = getattr(func, "__name__", "")
    name = getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name
    handle = args[0] if args else None
    if not isinstance(handle, DenseHandle):
        return None
    if name == "detach":
        return handle.without_graph()
    others = tree_leaves((args[1:], kwargs))
    is_recorded = handle.requires_grad and torch.is_grad_enabled()
    if name not in _VIEWS or is_recorded or any(isinstance(each, DenseHandle) for each in others):
        return None
    if name == "__getitem__" and any(isinstance(each, Tensor | list) for each in others):
        return None  # a copy
    whole = torch.empty_strided(handle.shape, handle.stride(), device="meta")
    view = func(whole, *args[1:], **kwargs)
    if view.untyped_storage()._cdata != whole.untyped_storage()._cdata:
        return None
    return handle.without_graph(lambda tensor: func(tensor, *args[1:], **kwargs))


def written_by(
    func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[str, Any]:
    """The function's name, and the arguments that it writes to or whose memory it exposes."""
    name = getattr(func, "__name__", "")
    if name in {"__get__", "__set__"}:
        attribute = getattr(getattr(func, "__self__", None), "__name__", name)
        return attribute, args[:1] if name == "__set__" or attribute in _REFUSED else ()
    if func is torch.autograd.grad:  # the graph holds the tiles, not an assembled copy
        return "torch.autograd.grad", (args[1:2], kwargs.get("inputs"))
    is_in_place = name.endswith("_") and not name.endswith("__")
    if is_in_place or name in _REFUSED or name in _IN_PLACE:
        return name, (args[:1], kwargs.get("tensor"), kwargs.get("input"), kwargs.get("self"))
    return name, kwargs.get("out")


def _write(
    func: Callable[..., Any],
    name: str,
    handles: Sequence[DenseHandle],
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> Any:
    """Do on dense copies what writes to handles, and copy the results to the tiles."""
    handle = handles[0]
    if name in _REFUSED or getattr(func, "__name__", "") == "__set__" or name == "requires_grad_":
        return _set(handle, name, args[1] if len(args) > 1 else kwargs.get("requires_grad", True))
    _check_write(func, name, handles)
    copies = {id(each): each.copy_for_writing() for each in handles}

    def instead(value: Any) -> Any:
        return copies[id(value)][1] if id(value) in copies else _assembled(value)

    with torch.no_grad():
        result = func(*tree_map(instead, tuple(args)), **tree_map(instead, kwargs))
        for each in handles:
            each.write_back(copies[id(each)][0])
    own = {id(copies[id(each)][1]): each for each in handles}
    return tree_map(lambda value: own.get(id(value), value), result)


def _set(handle: DenseHandle, name: str, value: Any) -> Any:
    """Set `.data`, `.requires_grad` or `.grad = None` of the tiles; HandleError for all others."""
    if name in ("requires_grad", "requires_grad_") and handle.is_parameter:
        handle.set_requires_grad(value)
        return handle
    if name == "grad" and value is None and handle.is_parameter:
        return handle.drop_gradient()
    if name == "data" and handle.is_parameter and isinstance(value, Tensor):
        if isinstance(value, DenseHandle) and handle.is_same_memory(value):
            return None  # what `weight.data += …` assigns at its end
        if (value.shape, value.dtype) == (handle.shape, handle.dtype):
            return handle.write_back(_assembled(value))
        name = f"data = {tuple(value.shape)} {value.dtype}"
    raise HandleError(
        f"{handle.full_name()}: '{name}' is refused: the {handle._name} of a tiled layer has no "
        "memory of its own, its tiles do, of this shape and dtype. Write values in place or with "
        "layer.copy_params_from(linear), work on each tile of layer.parameters(), or call "
        "memtile.untile(model) first"
    )


def _check_write(func: Callable[..., Any], name: str, handles: Sequence[DenseHandle]) -> None:
    """Raise HandleError where torch would for the dense tensors, or a result would be lost."""
    initialises = getattr(func, "__module__", "") == nn.init.__name__
    for number, handle in enumerate(handles):
        if handle.requires_grad and torch.is_grad_enabled() and not initialises:
            raise HandleError(
                f"{handle.full_name()}: '{name}' is refused: it requires grad, and a leaf that "
                "does is not written in place under a graph; do it inside torch.no_grad()"
            )
        if any(handle.stands_for_same(other) for other in handles[:number]):
            raise HandleError(
                f"{handle.full_name()}: '{name}' is refused: it is to be written twice in one "
                "call; call it once for each"
            )

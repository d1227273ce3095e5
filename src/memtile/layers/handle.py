"""`DenseHandle`: what reading a tiled layer's `.weight` or `.bias` gives, a tensor without data.

Shape, dtype, device and the like cost nothing; the first operation on the handle assembles the
dense tensor, differentiably. What would change only a copy (in-place operations, `nn.init`,
assignments to `.data` and `.grad`) raises HandleError, also on the handles that `.grad` and `.data`
give, and so does `torch.autograd.grad` with respect to it. Not detected: writing into
`layer.weight[0]`, a slice of an assembled copy, and `backward(inputs=[layer.weight])`. Under a
compiler a read gives the assembled tensor itself, which the graph drops if it is unused.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from memtile.errors import HandleError

Layer = Any  # a TiledModule, whose file imports this one

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
    | {"register_hook", "register_post_accumulate_grad_hook", "retain_grad", "__setitem__"}
    | {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__"}
    | {"__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__"}
)

_OF_C_BASE = vars(Tensor.__base__)  # its getset descriptors, which stubs lack
_READ_GRADIENT, _READ_VERSION = _OF_C_BASE["grad"].__get__, _OF_C_BASE["_version"].__get__
_READ_DATA = _OF_C_BASE["data"].__get__


_FREE = frozenset(
    [getattr(Tensor, name).__get__ for name in _FREE_PROPERTIES if hasattr(Tensor, name)]
    + [getattr(Tensor, name) for name in _FREE_METHODS]
)


class DenseHandle(Tensor):
    """The dense `.weight` or `.bias` of a tiled layer, assembled when it is used."""

    _layer: Layer
    _name: str
    _of_gradient: bool
    _of_data: bool

    @staticmethod
    def __new__(
        cls, layer: Layer, name: str, of_gradient: bool = False, of_data: bool = False
    ) -> "DenseHandle":
        """A handle of the layer's "weight" or "bias", of its gradient, or of the `.data` of one."""
        is_values = of_gradient or of_data
        parameters = list(layer.tile_parameters(name).values())
        handle: DenseHandle = Tensor._make_wrapper_subclass(
            cls,
            layer.dense_shape(name),
            dtype=parameters[0].dtype,
            device=parameters[0].device,
            requires_grad=not is_values and any(p.requires_grad for p in parameters),
        )
        handle._layer, handle._name = layer, name
        handle._of_gradient, handle._of_data = of_gradient, of_data
        handle._is_param = not is_values  # libraries check isinstance(handle, nn.Parameter)
        return handle

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
        return values

    def _tiles(self) -> list[nn.Parameter]:
        return list(self._layer.tile_parameters(self._name).values())

    def is_of_tiles(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether the handle stands for exactly these parameters, in this order."""
        return [*map(id, self._tiles())] == [*map(id, parameters)]

    def stands_for_same(self, other: "DenseHandle") -> bool:
        """Whether both handles stand for the same tiles."""
        return self.is_of_tiles(other._tiles())

    def _gradient(self) -> "DenseHandle | None":
        is_values = self._of_gradient or self._of_data
        if is_values or any(tile.grad is None for tile in self._tiles()):
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
        if func in _FREE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func == _READ_GRADIENT:
            return args[0]._gradient()
        if func == _READ_DATA:
            of = args[0]
            return DenseHandle(of._layer, of._name, of._of_gradient, of_data=True)
        if func == _READ_VERSION:  # grows whenever a tile is written to
            return sum(tile._version for tile in args[0]._tiles())
        _refuse_writes(func, args, kwargs)
        return func(*tree_map(_assembled, tuple(args)), **tree_map(_assembled, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub lacks the function argument
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*tree_map(_assembled, tuple(args)), **tree_map(_assembled, kwargs or {}))


def _assembled(value: Any) -> Any:
    return value.assemble() if isinstance(value, DenseHandle) else value


def _refuse_writes(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    name, written = _written(func, args, kwargs)
    handles = [leaf for leaf in tree_leaves(written) if isinstance(leaf, DenseHandle)]
    if not handles:
        return
    raise HandleError(
        f"{handles[0].full_name()}: '{name}' is refused: the {handles[0]._name} of a tiled layer "
        "has no memory of its own, its tiles do, so it would change nothing. Write with "
        "layer.copy_params_from(linear), layer.reset_parameters() or layer.load_state_dict(…), "
        "freeze with layer.requires_grad_(False), work on each tile of layer.parameters(), or "
        "call memtile.untile(model) first"
    )


def _written(
    func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[str, Any]:
    """The function's name, and the arguments that it writes to or whose memory it exposes."""
    name = getattr(func, "__name__", "")
    if name in {"__get__", "__set__"}:
        attribute = getattr(getattr(func, "__self__", None), "__name__", name)
        return attribute, args[:1] if name == "__set__" or attribute in _REFUSED else ()
    if func is torch.autograd.grad:  # the graph holds the tiles, not an assembled copy
        return "torch.autograd.grad", (args[1:2], kwargs.get("inputs"))
    if name in _REFUSED or (name.endswith("_") and not name.endswith("__")):
        return name, (args[:1], kwargs.get("tensor"), kwargs.get("input"), kwargs.get("self"))
    return name, kwargs.get("out")

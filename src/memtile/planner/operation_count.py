"""Counts the memory and work of a step, operation by operation, without weights.

Parameters are on the meta device, ids are real: what depends on ids alone (masks, positions, which
rows of which tile) is computed; for what depends on weights only the shape is known. A storage
counts from the operation that makes it until nothing holds it any more.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from memtile.convert import Work
from memtile.costmodel import Products
from memtile.costmodel.model_records import Counted
from memtile.geometry import partition_uniform
from memtile.homes import is_parked
from memtile.layers import DeferredLogits
from memtile.ops import LiveBytes, repeats, tensors_in
from memtile.planner.known_shapes import KnownShapes

_aten = torch.ops.aten
_META: Final = torch.device("meta")
_FLASH: Final = 1  # torch._C._SDPBackend.FLASH_ATTENTION: what `_fused_sdp_choice` answers
_flash = _aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward
_PRODUCTS: Final = (_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm)
_INDEXING: Final = (_aten.index, _aten.index_put, _aten.index_put_)
_TALLEST: Final = 1024  # with more rows no workspace grew, with AVX2 nor with AVX-512 kernels
_grouped = getattr(_aten, "_grouped_mm", None)  # not in torch 2.6


def count_step(model: nn.Module, work: Work, *, drops_gradients: bool, goes_home: bool) -> Counted:
    """Count one step of a model whose parameters, parked tiles included, are on the meta device.

    `drops_gradients`: each gradient is freed as soon as it is complete. `goes_home`: gradients of
    parked tiles leave memory, and are not counted.
    """
    counter = _LiveBytes(model, goes_home)
    hooks = [
        parameter.register_post_accumulate_grad_hook(counter.drop_gradient)
        for parameter in model.parameters()
        if drops_gradients and parameter.requires_grad
    ]
    try:
        with torch.set_grad_enabled(model.training), counter, _AsOnCpu(), _cpu_autocast():
            loss = work(model)
            if isinstance(loss, DeferredLogits):
                loss = loss.computed()
            counter.turn()
            if loss is not None and model.training:
                _run_backward(loss)
            del loss
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in model.parameters():
            parameter.grad = None
    return counter.counted()


def live_peak(act: Callable[[], object]) -> int:
    """The most bytes that the tensors made inside `act` held at once."""
    with _LiveBytes(nn.Module(), False) as counter:
        act()
    return int(counter.counted().peak_bytes)


def _run_backward(loss: Tensor) -> None:
    """`loss.backward()`, but with function modes active, which recomputed activations need."""
    options = {"allow_unreachable": True, "accumulate_grad": True}
    seed = (torch.ones_like(loss),)
    Variable._execution_engine.run_backward((loss,), seed, False, False, (), **options)


class _LiveBytes(LiveBytes):
    """Counts the bytes of the storages that operations made and that are still alive."""

    def __init__(self, model: nn.Module, goes_home: bool) -> None:
        super().__init__()
        parked = [each for each in model.parameters() if is_parked(each)]
        home = parked if goes_home else []
        self._home = {parameter.untyped_storage()._cdata for parameter in home}
        self._to_step = {id(each): each.numel() for each in parked if each.requires_grad}
        self._held: dict[int, int] = {}  # when tiles of so many elements are stepped, at most
        self._kept = 0
        self._flops = self._touched = 0
        self._shapes: dict[tuple[int, int, int], None] = {}  # in order
        self._kinds_16: set[object] = set()
        self._known = KnownShapes()

    def turn(self) -> None:
        """Forward is over."""
        self._kept, self.phase = sum(self.live), 1

    def drop_gradient(self, parameter: Tensor) -> None:
        """Its gradient is complete: an optimizer in backward steps it now."""
        elements = self._to_step.pop(id(parameter), 0)
        if elements:
            self._held[elements] = max(self._held.get(elements, 0), sum(self.live))
        parameter.grad = None

    def counted(self) -> Counted:
        """Everything that was counted so far."""
        products = Products(tuple(self._shapes), len(self._kinds_16))
        unknown = dict.fromkeys(self._to_step.values(), sum(self.peak))
        held = tuple((self._held | unknown).items())
        return Counted(*self.peak, self._kept, self._flops, self._touched, products, held)

    def __torch_dispatch__(
        self,
        func: Any,  # an OpOverload; torch's own base class leaves it untyped
        types: Any,  # a tuple of tensor classes, likewise
        args: tuple[Any, ...] = (),  # whatever the operation takes
        kwargs: dict[str, Any] | None = None,  # whatever the operation takes
    ) -> Any:  # whatever the operation gives
        """Run the operation on shapes, and count what it made."""
        kwargs = kwargs or {}
        given = tensors_in((args, kwargs))
        for tensor in given:
            self.know(tensor, 0)
        result = _shaped(func, given, args, kwargs, self._known)
        made = 0
        leaves = func is _aten.empty_like.default  # the gradient of a parked tile
        leaves = leaves and given[0].untyped_storage()._cdata in self._home
        for tensor in tensors_in(result):
            made += self.know(tensor, 0 if leaves else tensor.untyped_storage().nbytes())
        self._add_work(func, given, args, kwargs, result, made)
        return result

    def _add_work(
        self, func: Any, given: list[Tensor], args: Any, kwargs: Any, result: Any, made: int
    ) -> None:
        flops = touched = 0
        if func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
            self._see_product(func, given, args, result)
        elif func._overloadpacket in (_flash, _flash_backward):
            flops = _attention_flops(func, given, args, kwargs)
        elif func._overloadpacket is _grouped:
            flops = 2 * given[0].numel() * given[1].shape[-1]
        elif made:  # views touch nothing
            touched = made + sum(tensor.nbytes for tensor in given)
        self._flops += flops * repeats()
        self._touched += touched * repeats()

    def _see_product(self, func: Any, given: list[Tensor], args: Any, result: Any) -> None:
        if not isinstance(result, Tensor) or result.dim() < 2:
            return
        if result.dtype.itemsize == 2:
            self._kinds_16.add((func, *((tensor.shape, tensor.stride()) for tensor in given)))
        elif func._overloadpacket in _PRODUCTS:
            left, right = [each for each in args if isinstance(each, Tensor)][-2:]
            self._shapes[min(_TALLEST, left.shape[-2]), right.shape[-2], right.shape[-1]] = None


_counting: Final[list[int]] = []
_counting_lock: Final = threading.Lock()
_autocast = torch.autocast.__init__


@contextlib.contextmanager
def _cpu_autocast() -> Iterator[None]:
    """In this thread, `torch.autocast("meta")`, which torch refuses, is the CPU's.

    PEFT's adapters of experts switch autocast off on their weights' device (0.20, `lora.layer`).
    """
    with _counting_lock:
        _counting.append(threading.get_ident())
        torch.autocast.__init__ = _autocast_of_cpu  # type: ignore[method-assign]  # no other way in
    try:
        yield
    finally:
        with _counting_lock:
            _counting.remove(threading.get_ident())
            if not _counting:
                torch.autocast.__init__ = _autocast  # type: ignore[method-assign]  # as it was


def _autocast_of_cpu(self: torch.autocast, device_type: str, *args: Any, **kwargs: Any) -> None:
    counts = device_type == "meta" and threading.get_ident() in _counting
    _autocast(self, "cpu" if counts else device_type, *args, **kwargs)


class _AsOnCpu(TorchFunctionMode):
    """Counts attention as the kernel that torch chooses on the CPU, and spreads tokens evenly.

    A router that reads how many of its choices (`topk`) went to each expert (JetMoE's) is told that
    they went to all alike.
    """

    def __init__(self) -> None:
        super().__init__()
        self._choices = 0  # of the last `topk`

    def __torch_function__(
        self,
        func: Any,  # as torch gives them
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # whatever the function gives
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is Tensor.tolist and self._choices and _are_counts(args[0]):
            bounds = partition_uniform(self._choices, args[0].numel())
            return [stop - start for start, stop in pairwise(bounds)]
        result = func(*args, **kwargs)
        if func in (Tensor.topk, torch.topk):
            self._choices = result[1].numel()
        return result


def _are_counts(tensor: Tensor) -> bool:
    """Whether it may be how many tokens each expert has, of which the values are not known."""
    return tensor.is_meta and tensor.dim() == 1 and not tensor.is_floating_point()


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    options: Any = {"scale": scale, "enable_gqa": enable_gqa}  # the stubs know no such keywords
    with torch._C._DisableTorchDispatch():
        likes: Any = [None if t is None else _unwritten(t) for t in (query, key, value, attn_mask)]
        choose: Any = torch._fused_sdp_choice  # likewise
        decision = choose(*likes, dropout_p, is_causal, **options)
    if decision != _FLASH:
        options["is_causal"] = is_causal
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, **options
        )
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype, device=_META)
    result: Tensor = _flash(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return result


def _unwritten(tensor: Tensor) -> Tensor:
    """A CPU tensor like this one; its memory is never written, so that it takes none."""
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return made.requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else made


def _attention_flops(func: Any, given: list[Tensor], args: Any, kwargs: Any) -> int:
    """Two products of each query with each of its keys in forward, five in backward.

    A causal query has the keys up to its own; the kernel skips blocks of others.
    """
    forward = func._overloadpacket is _flash
    first, place = (0, 4) if forward else (1, 7)  # the gradient comes before the query
    (batch, heads, queries, width), keys = given[first].shape, given[first + 1].shape[2]
    causal = args[place] if len(args) > place else kwargs.get("is_causal", False)
    early = min(queries, keys) if causal else 0
    pairs = early * (early + 1) // 2 + (queries - early) * keys
    return (2 if forward else 5) * 2 * batch * heads * pairs * width


def _shaped(func: Any, given: list[Tensor], args: Any, kwargs: Any, known: KnownShapes) -> Any:
    """The result: on the meta device if a weight is an argument, real if only ids are."""
    if func._overloadpacket is _grouped:
        return _grouped_result(*given)
    if not any(tensor.is_meta for tensor in given):
        return _of_ids(func, given, args, kwargs)
    if all(tensor.is_meta for tensor in given) and "device" not in kwargs:
        return known(func, given, args, kwargs)
    if func._schema.is_mutable and given[0] is args[0] and not given[0].is_meta:
        return args[0]  # its values depend on weights now and must not be read
    if func._overloadpacket in _INDEXING:
        args = (args[0], _places(args[1]), *args[2:])
    args, kwargs = tree_map_only(Tensor, _as_meta, (args, kwargs))
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": _META}
    return func(*args, **kwargs)


def _grouped_result(left: Tensor, right: Tensor, *ends: Tensor) -> Tensor:
    """The result of experts' products; on the meta device torch computes only bfloat16 ones."""
    shape: tuple[int, ...] = (left.shape[-2], right.shape[-1])
    if left.dim() == right.dim():
        shape = (ends[0].numel() if left.dim() == 2 else left.shape[0], *shape)
    return left.new_empty(shape, device=_META)


def _of_ids(func: Any, given: list[Tensor], args: Any, kwargs: Any) -> Any:
    """Positions and masks requested on the weights' device, meta, are made with values."""
    if func._overloadpacket is _aten.histc and not given[0].is_floating_point():
        # transformers counts ids as ints where weights are not on the CPU, which torch cannot there
        return func(given[0].double(), *args[1:], **kwargs).to(given[0].dtype)
    device = kwargs.get("device")
    if device is None or torch.device(device) != _META:
        return func(*args, **kwargs)
    real = {**kwargs, "device": torch.device("cpu")}
    if given:
        dtype = kwargs.get("dtype") or given[0].dtype
        return func(*args, **(kwargs if dtype.is_floating_point else real))
    result = func(*args, **kwargs)
    is_mask = func._overloadpacket is _aten.ones  # what a decoder makes where it gets none
    is_shape = isinstance(result, Tensor) and result.is_floating_point() and not is_mask
    return result if is_shape else func(*args, **real)


def _places(indices: list[Tensor | None]) -> list[Tensor | None]:
    """The same indices with masks as the places of what is true: so many rows are taken."""
    found: list[Tensor | None] = []
    for index in indices:
        is_mask = index is not None and index.dtype == torch.bool and not index.is_meta
        found.extend(index.nonzero().unbind(1) if is_mask and index is not None else [index])
    return found


def _as_meta(tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_META)

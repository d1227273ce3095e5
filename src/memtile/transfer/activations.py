"""`park_activations`: what autograd keeps for backward is parked in a home until it is needed.

Saved tensors are stored as the piece of memory that they lie in, once for all that share it.
"""

import threading
import weakref
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from memtile.errors import ArgumentError, ParkedError, check_whole_number
from memtile.home_names import RANK_HOMES, parse_home
from memtile.homes import DeviceHome, Home, is_parked, resolve_home
from memtile.transfer.iterations import in_backward, set_parking
from memtile.transfer.saved_pieces import SavedPiece, SavedPieces, SavedView

_SMALLEST: Final = 256 << 10
# DeepSpeed's, and `engines.release`'s
_DETACHING: Final = {"PreBackwardFunctionForModule", "PostBackwardFunctionModule", "_Attach"}
_ALIGNED: Final = 64  # bytes, as PyTorch aligns storages: results may depend on it

_Key = tuple[int, int, int, int]  # address and version, and which bytes of the storage


def park_activations(
    home: Home | str, *, smallest_bytes: int = _SMALLEST, model: nn.Module | None = None
) -> "ParkedActivations":
    """A context manager: what autograd saves for backward inside is parked in a home.

    Put it around the forward; backward may run inside or after it, and gives the same bits. With
    activation checkpointing, what is saved are the inputs of the checkpointed blocks. Tensors that
    share memory are stored once. Left where they are: parameters and other leaves that require a
    gradient, what lies in a home, small tensors, sparse tensors and subclasses, and what is saved
    inside a backward.

    Enter one object in every step, so that the home's room is used again. A tensor that is modified
    in place after it was saved is parked with the values it had then, where PyTorch would raise.

    Args:
        home: "disk", "disk:FOLDER", "host" or a home; it may be the one that weights live in. Host
            memory is of use where the model is on another device.
        smallest_bytes: smaller tensors are left where they are.
        model: its buffers are left where they are too.

    Raises:
        ArgumentError: `home` is no home where anything can be parked, or is the device's memory.
        HomeFullError: in forward: no room. The graph's rooms are free once it is dropped.
        HomeIOError: in forward or backward: the disk failed.
        ParkedError: in backward: a tensor that was left where it is was modified since.

    Examples:
        >>> parked = memtile.park_activations("disk")
        >>> with parked:
        ...     loss = model(torch.randn(8, 64)).sum()
        >>> loss.backward()
    """
    check_whole_number("smallest_bytes", smallest_bytes, least=0)
    if not isinstance(model, nn.Module | None):
        raise ArgumentError(f"model={model!r} must be an nn.Module, whose buffers are left")
    return ParkedActivations(SavedPieces(home_of_activations(home)), smallest_bytes, model)


def home_of_activations(home: Home | str) -> Home:
    """The home; ArgumentError where activations cannot be parked in it."""
    if isinstance(home, str):
        parse_home(home, known=RANK_HOMES)
    found = resolve_home(home)
    if found.is_read_only or isinstance(found, DeviceHome):
        raise ArgumentError(
            f"home={home!r}: activations are parked in memory that is not the device's, and may be "
            "written to: give 'disk', 'disk:FOLDER' or 'host'"
        )
    return found


def park_each_forward(model: nn.Module, pieces: SavedPieces) -> None:
    """Park what each call of the model saves for backward, as the context around it does."""
    set_parking(model, ParkedActivations(pieces, model=model))


class ParkedActivations:
    """What `park_activations` gives; it may be entered any number of times, from any thread.

    Attributes:
        home: where activations are parked.
    """

    def __init__(
        self,
        pieces: SavedPieces,
        smallest_bytes: int = _SMALLEST,
        model: nn.Module | None = None,
    ) -> None:
        self.home = pieces.home
        self._smallest, self._pieces = smallest_bytes, pieces
        self._model: Callable[[], nn.Module | None] = lambda: None
        if model is not None:
            self._model = weakref.ref(model)
        self._staying = frozenset[int]()  # addresses of the model's storages
        self._known = weakref.WeakValueDictionary[_Key, SavedPiece]()

    def __enter__(self) -> "ParkedActivations":
        self.home.check_open()
        model = self._model()
        if model is not None:
            tensors = (*model.parameters(), *model.buffers())
            plain = (each for each in tensors if type(each) in (Tensor, nn.Parameter))
            self._staying = frozenset(_address(each) for each in plain if self._takes(each))
        self._pieces.begin()
        self._hooks().__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        self._hooks().__exit__(*raised)

    def _hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self._pack, lambda packed: packed.unpack())

    def _pack(self, tensor: Tensor) -> "_Left | SavedView":
        # What is saved inside a backward is recomputed there, and needed at once.
        if in_backward() or type(tensor) is not Tensor or not self._takes(tensor):
            return _Left(tensor)
        base = tensor._base if tensor._is_view() else tensor
        start, stop = _span(tensor)
        if base is None or stop - start < self._smallest or self._stays(base):
            return _Left(tensor)
        return SavedView(self._piece(tensor, base, start, stop), tensor, start)

    def _takes(self, tensor: Tensor) -> bool:
        """Whether it is bytes of a storage and nothing else."""
        if tensor.is_meta and not self._pieces.are_counted:
            return False
        is_other = tensor.is_quantized or tensor.is_nested or tensor.layout is not torch.strided
        return not is_other and not tensor.is_conj() and not tensor.is_neg() and tensor.numel() > 0

    def _stays(self, base: Tensor) -> bool:
        return (
            type(base) is not Tensor  # a parameter, say
            or (base.is_leaf and base.requires_grad)
            or is_parked(base)
            or _address(base) in self._staying
        )

    def _piece(self, tensor: Tensor, base: Tensor, start: int, stop: int) -> SavedPiece:
        """The piece with these bytes of the tensor's storage, stored if it was not yet."""
        key = _address(base), tensor._version, start, stop
        piece = self._known.get(key)
        if piece is None or not piece.origin.is_of(base):
            dtype = str(tensor.dtype).removeprefix("torch.")
            label = f"activation {dtype} {tuple(tensor.shape)}"
            piece = self._pieces.store(tensor, start, stop, label)
            piece.origin = _Origin(base)
            self._known[key] = piece
        self._pieces.number(piece)
        return piece


class _Origin:
    """What a piece was stored of: a tensor, and those that engines make of it for their hooks.

    Other tensors with the same storage may be written to without a change of its version:
    `unsafe_chunk` gives such ones, and LSTMs write to each.
    """

    def __init__(self, base: Tensor) -> None:
        self._base, self._made_by = weakref.ref(base), _made_by(base)

    def is_of(self, base: Tensor) -> bool:
        """Whether a tensor at the same address is one of them."""
        found = None if self._base() is base else _made_by(base)
        return found == self._made_by if found else self._base() is base


def _made_by(tensor: Tensor) -> tuple[int, int, int] | None:
    """The node that made a tensor, or what an engine detached it from; None: no node did.

    As numbers, which keep no graph alive: thread, node, and which of its results.
    """
    node, number = tensor.grad_fn, tensor.output_nr
    while node is not None and _is_detaching(node):
        node, number = node.next_functions[0]
    return None if node is None else (threading.get_ident(), node._sequence_nr(), number)


def _is_detaching(node: Any) -> bool:
    """Whether it is of a function of an engine, which gives its input detached, to hook it."""
    function: Any = getattr(type(node), "_forward_cls", object)
    known = function.__module__.startswith(("deepspeed.", "memtile.engines."))
    return known and function.__name__ in _DETACHING


class _Left:
    """A saved tensor that is left where it is."""

    def __init__(self, tensor: Tensor) -> None:
        # An output would keep itself alive, by its node; a leaf has none, and its engine may swap
        # the memory behind it.
        self._tensor = tensor if tensor.is_leaf else tensor.detach()
        self._version = tensor._version

    def unpack(self) -> Tensor:
        """The tensor, if it was not written to: PyTorch does not check that under hooks."""
        now = self._tensor._version
        if now != self._version:
            raise ParkedError(
                f"a tensor of shape {tuple(self._tensor.shape)} that backward needs was modified "
                f"by an in-place operation (version {self._version}, now {now}): gradients would "
                "be wrong; modify a clone of it, or run backward first"
            )
        return self._tensor


def _address(tensor: Tensor) -> int:
    storage = tensor.untyped_storage()
    return storage.data_ptr() or storage._cdata  # which a meta tensor has


def _span(tensor: Tensor) -> tuple[int, int]:
    """From which to which byte of its storage a tensor is stored.

    All of it, where the tensor reaches over half of it: chunks of a fused product then share a
    piece. Otherwise its own bytes only: the storage may be a mapped file of token numbers.
    """
    itemsize, whole = tensor.element_size(), tensor.untyped_storage().nbytes()
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    reach = 1 + sum((size - 1) * stride for size, stride in sides)
    start = int(tensor.storage_offset()) * itemsize
    stop = start + reach * itemsize
    return (0, whole) if 2 * (stop - start) >= whole else (start // _ALIGNED * _ALIGNED, stop)

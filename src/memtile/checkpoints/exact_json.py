"""Small values as JSON and back, bit for bit; values that JSON does not have are marked.

Python writes a finite float with enough digits to read it back exactly.
"""

import math
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from memtile.checkpoints import header
from memtile.errors import CheckpointError

_MARK: Final = "$"

_DICTIONARIES: Final[Mapping[str, type]] = {
    "dict": dict,
    "Counter": Counter,
    "OrderedDict": OrderedDict,
}


def to_json(value: object, where: str) -> Any:  # any JSON
    """The value as `json.dumps` takes it; `where` is its place, for messages.

    CheckpointError for what is not None, a number, a text, a tensor of at most one element, or a
    list, tuple or dictionary of such.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        number = float(value)
        return number if math.isfinite(number) else {_MARK: "float", "text": repr(number)}
    if isinstance(value, Tensor) and value.numel() <= 1:
        return _of_tensor(value)
    if type(value) in (list, tuple):
        return _of_sequence(value, where)
    if type(value) in _DICTIONARIES.values():
        return _of_dictionary(value, where)
    cls = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    kind = f"a {tuple(value.shape)} tensor" if isinstance(value, Tensor) else f"a {cls}"
    raise CheckpointError(
        f"{where} is {kind}, which cannot be saved: only numbers, texts, None, tensors of one "
        "element, and lists, tuples and dictionaries of these can, and pickles are never used; "
        "keep it out of what is saved, or turn it into such values"
    )


def from_json(found: Any) -> Any:  # any JSON
    """The value that `to_json` wrote; ValueError, KeyError or TypeError for anything else."""
    if isinstance(found, list):
        return [from_json(item) for item in found]
    if not isinstance(found, dict):
        return found
    if _MARK not in found:
        return {key: from_json(item) for key, item in found.items()}
    mark = found[_MARK]
    if mark == "float":
        return float(found["text"])
    if mark == "tensor":
        return _to_tensor(found)
    items = [from_json(item) for item in found["items"]]
    return tuple(items) if mark == "tuple" else _DICTIONARIES[mark](dict(items))


def _of_tensor(tensor: Tensor) -> dict[str, Any]:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return {
        _MARK: "tensor",
        "dtype": header.dtype_name(tensor.dtype),
        "shape": list(tensor.shape),
        "bytes": bytes(raw.tolist()).hex(),
    }


def _to_tensor(found: Mapping[str, Any]) -> Tensor:
    dtype, raw = header.DTYPES[found["dtype"]], bytearray.fromhex(found["bytes"])
    if not raw:
        return torch.empty(found["shape"], dtype=dtype)
    return torch.frombuffer(raw, dtype=dtype).reshape(found["shape"]).clone()


def _of_sequence(value: Any, where: str) -> Any:
    items = [to_json(item, f"{where}[{number}]") for number, item in enumerate(value)]
    return items if type(value) is list else {_MARK: "tuple", "items": items}


def _of_dictionary(value: Any, where: str) -> Any:
    items = [(key, to_json(item, f"{where}[{key!r}]")) for key, item in value.items()]
    if type(value) is dict and all(type(key) is str and key != _MARK for key in value):
        return dict(items)
    pairs = [[to_json(key, f"the key {key!r} of {where}"), item] for key, item in items]
    kind = next(name for name, one in _DICTIONARIES.items() if type(value) is one)
    marked = [{_MARK: "tuple", "items": pair} for pair in pairs]
    return {_MARK: kind, "items": marked}

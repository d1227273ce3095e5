"""Frozen dataclasses as JSON text, and back: each field checked against its declared type."""

import dataclasses
import json
import types
import typing
from itertools import pairwise
from typing import Any, TypeVar  # JSON holds anything until it is checked

from memtile.errors import ArgumentError, MemtileError
from memtile.geometry import Grid

Record = TypeVar("Record")


def to_text(record: Any, version: int) -> str:
    """JSON text of a dataclass, in the order of its fields."""
    document = {"memtile": type(record).__name__, "version": version, **_plain(record)}
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)


def from_text(cls: type[Record], text: str, version: int) -> Record:
    """The dataclass that `to_text` wrote.

    Raises:
        ArgumentError: the text is none; the message says where it departs from one.
    """
    name = cls.__name__
    try:
        document = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise ArgumentError(
            f"this is no {name} as JSON ({error}); give the text that to_json() wrote"
        ) from error
    if not isinstance(document, dict) or document.get("memtile") != name:
        raise ArgumentError(f'this JSON is no {name}: it does not begin with "memtile": "{name}"')
    if document.get("version") != version:
        raise ArgumentError(
            f"this {name} is of version {document.get('version')!r}, and {version} is read here; "
            "make it anew"
        )
    fields = {key: value for key, value in document.items() if key not in ("memtile", "version")}
    return typing.cast("Record", _read(cls, fields, name))


def _plain(value: Any) -> Any:
    if isinstance(value, Grid):
        return [list(value.out_parts), list(value.in_parts)]
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def _read(kind: Any, value: Any, path: str) -> Any:
    """The value as its declared type says, or an error that names its path."""
    origin = typing.get_origin(kind)
    if kind is Grid:
        return _grid(value, path)
    if dataclasses.is_dataclass(kind):
        return _record(kind, value, path)
    if origin is tuple:
        return _tuple(typing.get_args(kind), value, path)
    if origin in (types.UnionType, typing.Union):
        some = [each for each in typing.get_args(kind) if each is not type(None)]
        if value is None and len(some) < len(typing.get_args(kind)):
            return None
        fitting = [each for each in some if not isinstance(each, type) or _is(value, each)]
        return _read((fitting or some)[0], value, path)
    if origin is typing.Literal:
        _check(value in typing.get_args(kind), path, f"one of {typing.get_args(kind)}", value)
        return value
    _check(_is(value, kind), path, f"a {kind.__name__}", value)
    return kind(value)


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if dataclasses.is_dataclass(kind):
        return isinstance(value, dict)
    if kind is Grid:
        return isinstance(value, list)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _record(kind: Any, value: Any, path: str) -> Any:
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    _check(isinstance(value, dict), path, f"an object with {', '.join(names)}", value)
    odd = sorted(set(value).symmetric_difference(names))
    if odd:
        what = "lacks" if odd[0] in names else "has an unknown"
        raise ArgumentError(f"{path} {what} {odd[0]!r}: give the text that to_json() wrote")
    fields = {name: _read(hints[name], value[name], f"{path}.{name}") for name in names}
    for name, field in fields.items():
        if isinstance(field, int) and not isinstance(field, bool):
            _check(field >= 0, f"{path}.{name}", "0 or more", field)
    return kind(**fields)


def _tuple(kinds: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    _check(isinstance(value, list), path, "a list", value)
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    _check(len(value) == len(kinds), path, f"a list of {len(kinds)}", value)
    pairs = enumerate(zip(kinds, value, strict=True))
    return tuple(_read(kind, each, f"{path}[{number}]") for number, (kind, each) in pairs)


def _grid(value: Any, path: str) -> Grid:
    bounds = tuple[tuple[int, ...], tuple[int, ...]]
    out_parts, in_parts = _read(bounds, value, path)
    for parts in (out_parts, in_parts):
        rising = all(low < high for low, high in pairwise(parts))
        _check(len(parts) > 1 and parts[0] == 0 and rising, path, "rising bounds from 0", value)
    try:
        return Grid(out_parts, in_parts)
    except MemtileError as error:
        raise ArgumentError(f"{path}: {error}") from error


def _check(fits: bool, path: str, rule: str, value: Any) -> None:
    if not fits:
        said = repr(value)
        said = said if len(said) <= 60 else f"{said[:57]}..."
        raise ArgumentError(f"{path} is {said}, and must be {rule}; give what to_json() wrote")

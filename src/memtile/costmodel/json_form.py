"""Frozen dataclasses as JSON text, and back: each field is checked against its declared type."""

import dataclasses
import json
import types
import typing
from itertools import pairwise
from typing import Any, ClassVar, TypeVar  # JSON holds anything until it is checked

from memtile.errors import ArgumentError, MemtileError
from memtile.geometry import Grid

Record = TypeVar("Record", bound="JsonRecord")


class JsonRecord:
    """A frozen dataclass that is written as JSON text, and read again."""

    _json_name: ClassVar[str]
    _json_version: ClassVar[int]

    def to_json(self) -> str:
        """JSON text for `from_json`, in the order of the fields; a grid is its lists of bounds."""
        fields = dataclasses.asdict(self, dict_factory=_object)  # type: ignore[call-overload]  # a subclass is one
        document = {"memtile": self._json_name, "version": self._json_version, **fields}
        return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls: type[Record], text: str) -> Record:
        """What `to_json` wrote.

        Raises:
            ArgumentError: the text is something else; the message says what is wrong with it.
        """
        name, version = cls._json_name, cls._json_version
        try:
            document = json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise ArgumentError(
                f"this is no {cls.__name__} as JSON ({error}); give the text that to_json() wrote"
            ) from error
        if not isinstance(document, dict) or document.pop("memtile", None) != name:
            raise ArgumentError(
                f'this JSON is no {name}: it does not begin with "memtile": "{name}"'
            )
        found = document.pop("version", None)
        if found != version:
            raise ArgumentError(
                f"this {name} is of version {found!r}, and {version} is read here; make it anew"
            )
        return typing.cast("Record", _record(cls, document, name))


def _object(items: list[tuple[str, Any]]) -> Any:
    found = dict(items)
    return list(found.values()) if found.keys() == {"out_parts", "in_parts"} else found


def _read(kind: Any, value: Any, path: str) -> Any:
    """The value as its declared type says, or an error that names its path."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Grid:
        return _grid(value, path)
    if dataclasses.is_dataclass(kind):
        return _record(kind, value, path)
    if origin is tuple:
        return _tuple(arguments, value, path)
    if origin in (types.UnionType, typing.Union):
        some = [each for each in arguments if each is not types.NoneType]
        if value is None and len(some) < len(arguments):
            return None
        fitting = [each for each in some if len(some) > 1 and _is(value, each)]
        return _read((fitting or some)[0], value, path)
    if origin is typing.Literal:
        _check(value in arguments, path, f"one of {arguments}", value)
        return value
    _check(_is(value, kind), path, f"a {kind.__name__}", value)
    _check(kind is not int or value >= 0, path, "0 or more", value)
    return kind(value)


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _record(kind: Any, value: Any, path: str) -> Any:
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    _check(isinstance(value, dict), path, f"an object with {', '.join(names)}", value)
    odd = sorted(set(value).symmetric_difference(names))
    if odd:
        what = "lacks" if odd[0] in names else "has an unknown"
        raise ArgumentError(f"{path} {what} {odd[0]!r}: give the text that to_json() wrote")
    return kind(**{name: _read(hints[name], value[name], f"{path}.{name}") for name in names})


def _tuple(kinds: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    _check(isinstance(value, list), path, "a list", value)
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    _check(len(value) == len(kinds), path, f"a list of {len(kinds)}", value)
    pairs = enumerate(zip(kinds, value, strict=True))
    return tuple(_read(kind, each, f"{path}[{number}]") for number, (kind, each) in pairs)


def _grid(value: Any, path: str) -> Grid:
    bounds = _read(tuple[tuple[int, ...], tuple[int, ...]], value, path)
    for parts in bounds:
        rising = all(low < high for low, high in pairwise(parts))
        _check(len(parts) > 1 and parts[0] == 0 and rising, path, "rising bounds from 0", value)
    try:
        return Grid(*bounds)
    except MemtileError as error:
        raise ArgumentError(f"{path}: {error}") from error


def _check(fits: bool, path: str, rule: str, value: Any) -> None:
    if not fits:
        said = repr(value)
        said = said if len(said) <= 60 else f"{said[:57]}..."
        raise ArgumentError(f"{path} is {said}, and must be {rule}; give what to_json() wrote")

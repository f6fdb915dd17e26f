"""JSON read into frozen dataclasses: every key and type is checked, and an error says where in the file it is.

A dataclass is its own schema. `read` takes its fields' types (int, float, str, tuples, dictionaries, unions, None and
other dataclasses) and refuses a value of another type. Keys that no field names are ignored, so that a later version
of a file may add some; a key may be missing only where its field's default is None or its metadata `OPTIONAL`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import Field, dataclass, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from car_runtime.errors import PlanError

REST = {"rest": True}
"""Metadata of the one dictionary field that takes the keys which the other fields leave."""
OPTIONAL = {"optional": True}
"""Metadata of a field whose key may be missing; it then has its default."""
_EXACT = 2**53
"""Integers below this are exact as floats."""
_LARGEST = 2**63
_NAMES: dict[Any, str] = {
    int: "an integer",
    float: "a finite number",
    bool: "true or false",
    str: "a string",
    list: "a list",
    dict: "an object",
    NoneType: "null",
}

T = TypeVar("T")


@dataclass(frozen=True)
class Value:
    """A JSON value, the file that it is from, and its path in it ("scales[3].side"; empty: the whole)."""

    raw: Any
    file: str
    remedy: str
    """The remedy that ends an error."""
    path: str = ""

    def refuse(self, problem: str) -> NoReturn:
        """Raise PlanError with the file, a problem that names the path, and the remedy."""
        raise PlanError(f"{self.file}: {problem}; {self.remedy}")

    def read(self, kind: type[T]) -> T:
        """The value as a `kind`: a dataclass, or a type that a field may have. Raises PlanError."""
        value: T = self._read(kind)
        return value

    def _read(self, kind: Any) -> Any:
        if is_dataclass(kind):
            return self._dataclass(kind)
        origin, arguments = get_origin(kind), get_args(kind)
        if origin in (Union, UnionType):
            return self._read(self._alternative(arguments))
        if origin is tuple:
            return tuple(item._read(arguments[0]) for item in self._items())
        if origin is dict:
            return {key: self.at(key)._read(arguments[1]) for key in self._typed(dict)}
        return self.raw if kind is Any else self._typed(kind)

    def at(self, key: str) -> Value:
        """The value at a key of this object, whose name is not a field's: "tensors['pos.0']"."""
        return Value(self.raw[key], self.file, self.remedy, f"{self.path}[{key!r}]")

    def field(self, name: str) -> Value:
        """The value of a field of this object. Raises PlanError if it is missing."""
        path = f"{self.path}.{name}" if self.path else name
        if name not in self._typed(dict):
            self.refuse(f"{path} is missing")
        return Value(self.raw[name], self.file, self.remedy, path)

    def _items(self) -> Iterator[Value]:
        for i, item in enumerate(self._typed(list)):
            yield Value(item, self.file, self.remedy, f"{self.path}[{i}]")

    def _dataclass(self, kind: Any) -> Any:
        types, known = _types_of(kind), fields(kind)
        given = {
            one.name: self._rest(known) if one.metadata == REST else self.field(one.name)._read(types[one.name])
            for one in known
            if one.name in self._typed(dict) or (one.default is not None and one.metadata != OPTIONAL)
        }
        return kind(**given)

    def _rest(self, known: tuple[Field[Any], ...]) -> dict[str, Any]:
        names = {one.name for one in known if one.metadata != REST}
        return {key: item for key, item in self.raw.items() if key not in names}

    def _alternative(self, kinds: tuple[Any, ...]) -> Any:
        """The one of a union's types that the value has; the last one, to be refused, where it has none."""
        for kind in kinds:
            raw_kind = get_origin(kind) or kind
            if type(self.raw) is {tuple: list}.get(raw_kind, raw_kind):
                return kind
        return next(kind for kind in kinds if kind is not NoneType)

    def _typed(self, kind: Any) -> Any:
        value = self.raw
        if type(value) is int and abs(value) >= _LARGEST:
            self.refuse(f"{self.path or 'the whole'} is an integer of {value.bit_length()} bits, of at most 63")
        if type(value) is str and not _is_text(value):
            self.refuse(f"{self.path or 'the whole'} is {value[:40]!r}, which is half a character and no text")
        if kind is float and type(value) is int and abs(value) < _EXACT:
            value = float(value)
        if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
            shown = repr(value)
            shown = shown if len(shown) <= 40 else shown[:37] + "..."
            self.refuse(f"{self.path or 'the whole'} is {shown}, but must be {_NAMES[kind]}")
        return value


def _is_text(value: str) -> bool:
    return value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value)


@cache
def _types_of(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def parse_json(text: str | bytes, file: str, remedy: str) -> Value:
    """The value of a file's text, UTF-8 when bytes. Raises ValueError if it is no JSON; NaN and Infinity are none."""
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        return Value(json.loads(decoded, parse_constant=_refuse_constant), file, remedy)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"it has the number {name}")

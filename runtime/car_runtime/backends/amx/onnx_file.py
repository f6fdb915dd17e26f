"""The little of ONNX that `reader` looks at, from the bytes of a file: nodes with their attributes, and constants.

A model is a protocol buffer: fields of a number and a value, which may be a message of fields itself. This is a
fraction of what the package `onnx` does, which the runtime does without.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

TYPES: dict[int, np.dtype[Any]] = {1: np.dtype("<f4"), 7: np.dtype("<i8"), 10: np.dtype("<f2")}
"""ONNX's number of a type → what its bytes are."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
Value = int | bytes


@dataclass(frozen=True)
class Tensor:
    """A constant: its bytes, or where they are."""

    dims: tuple[int, ...] = ()
    data_type: int = 0
    raw: bytes | None = None
    external: dict[str, str] = field(default_factory=dict)

    def values(self) -> NDArray[Any]:
        """The numbers of a constant that is in the file. ValueError if they aren't."""
        if self.raw is None or self.data_type not in TYPES:
            raise ValueError("the constant's numbers are not in the file")
        return np.frombuffer(self.raw, TYPES[self.data_type]).reshape(self.dims)


@dataclass(frozen=True)
class Node:
    """What does something, with what, and with which settings: numbers, bytes or lists of integers."""

    op_type: str
    input: tuple[str, ...]
    output: tuple[str, ...]
    attributes: dict[str, int | float | bytes | list[int]]


def parse(model: bytes) -> tuple[list[Node], dict[str, Tensor]]:
    """A model's nodes, and its constants by name. ValueError if the bytes are none."""
    nodes: list[Node] = []
    tensors: dict[str, Tensor] = {}
    try:
        for graph in _of(model, 7):
            nodes += [_node(message) for message in _of(graph, 1)]
            tensors |= dict(_tensor(message) for message in _of(graph, 5))
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"no ONNX model: {error}") from error
    return nodes, tensors


def _node(message: bytes) -> Node:
    kind = "".join(_text(value) for value in _of(message, 4))
    inputs, outputs = (tuple(_text(value) for value in _of(message, number)) for number in (1, 2))
    return Node(kind, inputs, outputs, dict(_attribute(value) for value in _of(message, 5)))


def _attribute(message: bytes) -> tuple[str, int | float | bytes | list[int]]:
    name, value, integers = "", None, list[int]()
    for number, given in _fields(message):
        if number == 1 and isinstance(given, bytes):
            name = _text(given)
        elif number == 2 and isinstance(given, bytes):
            value = struct.unpack("<f", given)[0]
        elif number in (3, 4):
            value = given
        elif number == 8:
            integers += _integers(given)
    return name, integers if value is None else value


def _tensor(message: bytes) -> tuple[str, Tensor]:
    dims, name, data_type, raw, external = list[int](), "", 0, None, dict[str, str]()
    for number, given in _fields(message):
        if number == 1:
            dims += _integers(given)
        elif number == 2 and isinstance(given, int):
            data_type = given
        elif isinstance(given, bytes) and number == 8:
            name = _text(given)
        elif isinstance(given, bytes) and number in (4, 7, 9):  # floats, integers as varints, or bytes as they are
            raw = np.array(_integers(given), "<i8").tobytes() if number == 7 else given
        elif isinstance(given, bytes) and number == 13:
            entry = {number: _text(value) for number, value in _fields(given) if isinstance(value, bytes)}
            external[entry.get(1, "")] = entry.get(2, "")
    return name, Tensor(tuple(dims), data_type, raw, external)


def _of(message: bytes, wanted: int) -> Iterator[bytes]:
    """The messages, texts or bytes in the fields of one number."""
    return (value for number, value in _fields(message) if number == wanted and isinstance(value, bytes))


def _fields(message: bytes) -> Iterator[tuple[int, Value]]:
    at, end = 0, len(message)
    while at < end:
        key, at = _varint(message, at)
        if key & 7 == _VARINT:
            value, at = _varint(message, at)
            yield key >> 3, value - (1 << 64) if value >> 63 else value
            continue
        if key & 7 == _BYTES:
            size, at = _varint(message, at)
        elif key & 7 in (_FIXED32, _FIXED64):
            size = 4 if key & 7 == _FIXED32 else 8
        else:
            raise IndexError(f"a field of kind {key & 7}")
        if size > end - at:
            raise IndexError("it ends in the middle of a field")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value & (1 << 64) - 1, at
        if shift > 63:
            raise IndexError("a number of more than 64 bits")


def _integers(given: Value) -> list[int]:
    """One integer, or many that are packed."""
    if isinstance(given, int):
        return [given]
    found, at = [], 0
    while at < len(given):
        value, at = _varint(given, at)
        found.append(value - (1 << 64) if value >> 63 else value)
    return found


def _text(value: bytes) -> str:
    return value.decode()

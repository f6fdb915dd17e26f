"""What a plan's graph may be, checked on the bytes of its file before an engine reads them.

An ONNX file is a protocol buffer: fields of a number and a value, which may be a message of fields itself. The check
walks all of it once and lets through what an export writes, and nothing else: known operators of the standard, no
subgraphs and no functions, constants of the size that their shape says, weights within `weights.bin`, and the ports
of the manifest. A graph that is let through may still be wrong; what it cannot do is name another file, run a loop or
disagree with the sizes of the buffers that the runtime makes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from car_runtime.errors import PlanError
from car_runtime.format.schema import REMEDY, WEIGHTS, Graph, Port

OPERATORS = frozenset(
    "Add And ArgMax ArgMin Cast Clip Concat Conv CumSum DepthToSpace DequantizeLinear Div Expand Floor Gather "
    "GatherElements Gelu Gemm Greater GreaterOrEqual Identity InstanceNormalization LayerNormalization Less "
    "LessOrEqual MatMul Max Min Mul Neg Not Pad Pow QuantizeLinear Range ReduceL2 ReduceMax ReduceMean ReduceMin "
    "ReduceSum Reshape Resize Round SequenceAt Shape Sigmoid Slice Softmax Split SplitToSequence Sqrt Squeeze Sub "
    "Tanh Tile TopK Transpose Unsqueeze Where".split()
)
"""What exports of this version and of earlier ones consist of. None has a graph inside, or state."""
GRAPH_BYTES = 64 * 1024 * 1024
"""A graph's file; weights are elsewhere. A d16's largest has 0.4 MB."""
NODES = 100_000
RANK = 8
ATTRIBUTE = 4096
"""Numbers in a list of an attribute lie in ±4096: kernels, strides, dilations, padding and orders of dimensions."""
ELEMENTS = 2**31
"""A constant shape for Expand or Tile has fewer elements, all of it."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_PORT_TYPES = {1: "float32", 2: "uint8", 7: "int64", 9: "bool", 10: "float16", 16: "bfloat16"}
_TENSOR_BYTES = {1: 4, 2: 1, 3: 1, 6: 4, 7: 8, 9: 1, 10: 2, 16: 2}
"""ONNX's number of a type that constants have → bytes of an element."""
_INT64 = 7

_Fields = list[tuple[int, "int | bytes"]]
_Node = tuple[bytes, "bytes | None"]
"""An operator, and the name of the input that gives it a size where that has to be bounded."""
_Constant = tuple[bytes, "list[int] | None"]
"""A name, and the numbers if they are few and int64: they may be sizes."""


@dataclass(frozen=True)
class Checked:
    """What was found good in one plan, by its bytes: the forms of a step share most of it, and it is read once."""

    nodes: dict[bytes, _Node] = field(default_factory=dict)
    attributes: set[bytes] = field(default_factory=set)
    constants: dict[bytes, _Constant] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A constant in weights.bin."""

    name: str
    kind: int
    """ONNX's number of its type."""
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _TENSOR_BYTES[self.kind]


class _MalformedError(Exception):
    """The bytes are no graph that is let through; says why."""


def check_graph(data: bytes, graph: Graph, weight_bytes: int, checked: Checked) -> None:
    """Raise PlanError unless `data`, the file of a graph, is what the manifest says of it.

    weight_bytes: size of weights.bin. checked: what the plan's other graphs had, for all of which it is the same.
    """
    try:
        if len(data) > GRAPH_BYTES:
            _refuse(f"it has {len(data)} bytes, more than {GRAPH_BYTES}")
        _check_model(data, graph, weight_bytes, checked)
    except _MalformedError as error:
        raise PlanError(f"cannot open {graph.file}: {error}; {REMEDY}") from None
    except (IndexError, UnicodeDecodeError) as error:
        raise PlanError(f"cannot open {graph.file}: it is no ONNX graph; {REMEDY}") from error


def stored_weights(data: bytes) -> Iterator[Weights]:
    """The constants of a graph that lie in weights.bin. Only for bytes that `check_graph` has let through."""
    (content,) = (value for number, value in _fields(data) if number == 7)
    for number, message in _fields(_message(content)):
        fields = _fields(_message(message)) if number == 5 else []
        entries = [dict(_fields(_message(value))) for field, value in fields if field == 13]
        if entries:
            places = {_text(entry[1]): _text(entry[2]) for entry in entries}
            single = dict(fields)
            dims = tuple(size for field, value in fields if field == 1 for size in _integers(value))
            yield Weights(name=_text(single[8]), kind=int(single[2]), shape=dims, offset=int(places.get("offset", 0)))


def conv_strides(data: bytes) -> dict[str, int]:
    """Name of a kernel → the stride of its convolution. Only for bytes that `check_graph` has let through."""
    (content,) = (value for number, value in _fields(data) if number == 7)
    found: dict[str, int] = {}
    for number, message in _fields(_message(content)):
        fields = _fields(_message(message)) if number == 1 else []
        inputs = [_text(value) for field, value in fields if field == 1]
        if (4, b"Conv") not in fields or len(inputs) < 2:
            continue
        attributes = [_fields(_message(value)) for field, value in fields if field == 5]
        strides = [a for a in attributes if (1, b"strides") in a]
        numbers = [size for a in strides for field, value in a if field == 8 for size in _integers(value)]
        found[inputs[1]] = numbers[0] if numbers else 1
    return found


def wide_nodes(data: bytes, most: int) -> list[str]:
    """Names of the nodes with over `most` inputs and outputs. Only for bytes that `check_graph` has let through."""
    (content,) = (value for number, value in _fields(data) if number == 7)
    nodes = [_fields(_message(message)) for number, message in _fields(_message(content)) if number == 1]
    wide = [node for node in nodes if sum(number in (1, 2) for number, _ in node) > most]
    return [_text(value) for node in wide for number, value in node if number == 3]


def _check_model(data: bytes, graph: Graph, weight_bytes: int, checked: Checked) -> None:
    found: bytes | None = None
    for number, value in _fields(data):
        if number == 7 and isinstance(value, bytes) and found is None:
            found = value
        elif number == 8 and isinstance(value, bytes):
            _check_domain(_text(dict(_fields(value)).get(1, b"")))
        elif number not in (1, 2, 3, 4, 5, 6, 14):  # versions, the producer, documentation, properties
            _refuse(f"the model has the field {number}, which no export writes")
    if found is None:
        _refuse("it has no graph")
    _check_content(found, graph, weight_bytes, checked)


def _check_content(content: bytes, graph: Graph, weight_bytes: int, checked: Checked) -> None:
    nodes: list[_Node] = []
    constants: dict[bytes, list[int] | None] = {}
    ports: dict[int, list[Port]] = {11: [], 12: []}
    for number, value in _fields(content):
        if not isinstance(value, bytes) or number not in (1, 2, 5, 10, 11, 12, 13, 16):
            _refuse(f"the graph has the field {number}, which no export writes")
        if number == 1:
            if value not in checked.nodes:
                checked.nodes[value] = _node(value, checked.attributes)
            nodes.append(checked.nodes[value])
        elif number == 5:
            if value not in checked.constants:
                checked.constants[value] = _constant(value, weight_bytes)
            key, numbers = checked.constants[value]
            if key in constants:
                _refuse(f"two constants are called {_text(key)!r}")
            constants[key] = numbers
        elif number in ports:
            ports[number].append(_port(value))
    if len(nodes) > NODES:
        _refuse(f"it has {len(nodes)} nodes, more than {NODES}")
    _check_sizes(nodes, constants)
    for side, have, want in (("inputs", ports[11], graph.inputs), ("outputs", ports[12], graph.outputs)):
        _check_ports(side, have, want)


def _check_domain(domain: str) -> None:
    if domain not in ("", "ai.onnx"):
        _refuse(f"it has operators of {domain!r}, but a plan's are all of the standard")


def _node(message: bytes, attributes: set[bytes]) -> _Node:
    operator, inputs = b"", []
    for number, value in _fields(message):
        if not isinstance(value, bytes):
            _refuse(f"a node has the number {value} as its field {number}")
        if number == 1:
            inputs.append(value)
        elif number == 5:
            if value not in attributes:
                _check_attribute(value)
                attributes.add(value)
        elif number == 4 and not operator:
            operator = value
        elif number == 7:
            _check_domain(_text(value))
        elif number not in (2, 3, 6, 9):  # outputs, name, documentation, properties
            _refuse(f"a node has the field {number}, which no export writes")
    if _text(operator) not in OPERATORS:
        _refuse(f"it has the operator {_text(operator)!r}, which no export writes")
    return operator, inputs[1] if operator in (b"Expand", b"Tile") and len(inputs) > 1 else None


def _check_attribute(message: bytes) -> None:
    numbers: list[int] = []
    for number, value in _fields(message):
        if number == 8:
            numbers += _integers(value)
        elif number not in (1, 2, 3, 4, 7, 13, 20):  # name, a number or text, floats, documentation, type
            _refuse(f"an attribute has the field {number}, a graph or a tensor, which no export writes")
    if any(abs(one) > ATTRIBUTE for one in numbers):
        _refuse(f"an attribute has the numbers {numbers[:8]}, but they must lie in ±{ATTRIBUTE}")


def _constant(message: bytes, weight_bytes: int) -> _Constant:
    dims, single, places = list[int](), dict[int, int | bytes](), dict[str, str]()
    for number, value in _fields(message):
        if number == 1:
            dims += _integers(value)
        elif number == 13 and isinstance(value, bytes):
            entry = dict(_fields(value))
            places[_text(entry.get(1, b""))] = _text(entry.get(2, b""))
        elif number in (2, 8, 9, 14) and number not in single:
            single[number] = value
        elif number not in (12, 16):  # documentation, properties
            _refuse(f"a constant has the field {number}, which no export writes")
    name, kind, raw = single.get(8, b""), single.get(2, 0), single.get(9)
    if not isinstance(name, bytes) or not isinstance(kind, int) or kind not in _TENSOR_BYTES:
        _refuse(f"the constant {_text(name)!r} is of ONNX's type {kind!r:.20}, which no export writes")
    if len(dims) > RANK or any(not 0 <= dim < 2**40 for dim in dims):
        _refuse(f"the constant {_text(name)!r} has the shape {dims[:8]}")
    size = math.prod(dims) * _TENSOR_BYTES[kind]
    if single.get(14, 0) == 1:
        if raw is not None:
            _refuse(f"the constant {_text(name)!r} is in two places")
        _check_place(_text(name), places, size, _TENSOR_BYTES[kind], weight_bytes)
        return name, None
    if not isinstance(raw, bytes) or len(raw) != size or places:
        have = len(raw) if isinstance(raw, bytes) else 0
        _refuse(f"the constant {_text(name)!r} has {have} bytes, but its shape and type make {size}")
    small = kind == _INT64 and size <= RANK * 8
    return name, [int.from_bytes(raw[i : i + 8], "little", signed=True) for i in range(0, size, 8)] if small else None


def _check_place(name: str, places: dict[str, str], size: int, item: int, weight_bytes: int) -> None:
    """External data lies in weights.bin, all of it, as long as its shape and type make it."""
    if places.get("location") != WEIGHTS or not set(places) <= {"location", "offset", "length"}:
        _refuse(f"the weights {name!r} are in {places.get('location')!r:.80}, but a plan's are in {WEIGHTS}")
    numbers = {key: places.get(key, default) for key, default in (("offset", "0"), ("length", str(size)))}
    for key, text in numbers.items():
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            _refuse(f"the weights {name!r} have the {key} {text!r:.40}")
    offset, length = int(numbers["offset"]), int(numbers["length"])
    if length != size or offset % item:
        _refuse(f"the weights {name!r} are {length} bytes at {offset}, but their shape and type make {size}")
    if offset + length > weight_bytes:
        _refuse(f"the weights {name!r} end at byte {offset + length} of {WEIGHTS}, which has {weight_bytes}")


def _check_sizes(nodes: Sequence[_Node], constants: Mapping[bytes, list[int] | None]) -> None:
    for operator, name in nodes:
        sizes = constants.get(name) if name is not None else None
        if sizes and math.prod(max(abs(size), 1) for size in sizes) >= ELEMENTS:
            _refuse(f"a node {_text(operator)} makes the shape {sizes}, of {ELEMENTS} elements or more")


def _port(message: bytes) -> Port:
    """An input or output: a tensor of a known type, whose dimensions are numbers or names."""
    whole = _once(message, {1, 2, 3, 4}, repeated=4)
    tensor = _once(_once(whole.get(2, b""), {1, 6}).get(1, b""), {1, 2})
    dims: list[int | str] = []
    for number, value in _fields(_message(tensor.get(2, b""))):
        if number != 1:
            _refuse(f"a shape has the field {number}, which no export writes")
        dim = _once(value, {1, 2, 3})
        size = dim.get(1, _text(dim.get(2, b"")))
        dims.append(_text(size) if isinstance(size, bytes) else size)
    kind = tensor.get(1, 0)
    dtype = _PORT_TYPES.get(kind) if isinstance(kind, int) else None
    name = _text(whole.get(1, b""))
    if dtype is None:
        _refuse(f"{name!r} is of ONNX's type {kind!r:.20}, which no export writes")
    try:
        return Port(name=name, dtype=dtype, shape=tuple(dims))
    except PlanError:
        _refuse(f"{name!r} has the shape {dims}")


def _check_ports(side: str, have: Sequence[Port], want: Sequence[Port]) -> None:
    given = {port.name: port for port in have}
    named = {port.name: port for port in want}
    if len(given) != len(have) or set(given) != set(named):
        odd = sorted(set(given) ^ set(named)) or ["one of them twice"]
        _refuse(f"its {side} are not the manifest's: {', '.join(odd)[:100]}")
    for name, port in named.items():
        found = given[name]
        if found != port:
            _refuse(
                f"{name} is {found.dtype} {list(found.shape)}, but the manifest says {port.dtype} {list(port.shape)}"
            )


# -- protocol buffers ------------------------------------------------------------------------------------------------


def _fields(message: bytes) -> _Fields:
    """The fields of a message, in order. IndexError where the bytes end early or are of another encoding."""
    found: _Fields = []
    add: Callable[[tuple[int, int | bytes]], None] = found.append
    at, end = 0, len(message)
    while at < end:
        key = message[at]
        at += 1
        if key > 127:
            key, at = _varint(message, at - 1)
        kind = key & 7
        if kind == _BYTES:
            size = message[at]
            at += 1
            if size > 127:
                size, at = _varint(message, at - 1)
        elif kind == _VARINT:
            value = message[at]
            at += 1
            if value > 127:
                value, at = _varint(message, at - 1)
                if value >> 63:
                    value -= 1 << 64
            add((key >> 3, value))
            continue
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise IndexError(f"a field of kind {kind}")
        stop = at + size
        if stop > end:
            raise IndexError("it ends in the middle of a field")
        add((key >> 3, message[at:stop]))
        at = stop
    return found


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value & ((1 << 64) - 1), at
        if shift > 63:
            raise IndexError("a number of more than 64 bits")


def _integers(given: int | bytes) -> list[int]:
    """One integer, or many that are packed."""
    if isinstance(given, int):
        return [given]
    found, at = [], 0
    while at < len(given):
        value, at = _varint(given, at)
        found.append(value - (1 << 64) if value >> 63 else value)
    return found


def _once(value: int | bytes, known: set[int], repeated: int = 0) -> dict[int, int | bytes]:
    """The fields of a message that has each of the `known` ones once at most, `repeated` apart, and no other."""
    found: dict[int, int | bytes] = {}
    for number, one in _fields(_message(value)):
        if (number in found and number != repeated) or number not in known:
            _refuse(f"a port has the field {number} twice, or it is one that no export writes")
        found[number] = one
    return found


def _message(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        _refuse("a number stands where a message should")
    return value


def _text(value: int | bytes) -> str:
    return _message(value).decode()


def _refuse(problem: str) -> NoReturn:
    raise _MalformedError(problem)

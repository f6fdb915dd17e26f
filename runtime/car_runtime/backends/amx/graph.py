"""A plan's graph, to be followed node by node: what reads a value, what gives it, and which constant it is."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from car_runtime.backends.amx import onnx_file
from car_runtime.backends.amx.description import UnsupportedGraphError
from car_runtime.backends.amx.onnx_file import Node

T = TypeVar("T")
_BROKEN = (ValueError, TypeError, LookupError, ArithmeticError, RecursionError, OSError)
"""What a broken file raises, or one made to be."""


def read_graph(file: Path, weights: Path, understand: Callable[[Graph], T]) -> T:
    """What `understand` makes of a plan's graph; its large constants are mapped from the file `weights`, not read.

    UnsupportedGraphError if the file is broken.
    """
    try:
        return understand(Graph(*onnx_file.parse(file.read_bytes()), weights))
    except _BROKEN as error:
        raise UnsupportedGraphError(f"{file.name} can't be read: {error}") from error


class Graph:
    """Nodes by what they do with what, and constants by name."""

    def __init__(self, nodes: Sequence[Node], tensors: Mapping[str, onnx_file.Tensor], weights: Path) -> None:
        self._weights, self._tensors = weights, tensors
        self._readers: dict[str, list[Node]] = defaultdict(list)
        self._producers: dict[str, Node] = {}
        for node in nodes:
            for name in dict.fromkeys(node.input):
                self._readers[name].append(node)
            for name in node.output:
                self._producers[name] = node

    def reader(self, kind: str, *inputs: str | None, **wanted: Any) -> Node:
        """The one node of a kind that takes these inputs (None: any) and has these attributes."""
        at = next(i for i, name in enumerate(inputs) if name is not None)
        found = [node for node in self._readers[inputs[at] or ""] if node.op_type == kind]
        found = [node for node in found if _takes(node, inputs) and _has(node, wanted)]
        if len(found) != 1:
            raise UnsupportedGraphError(
                f"{len(found)} nodes {kind} of {', '.join(name or 'anything' for name in inputs)}"
            )
        return found[0]

    def follow(self, kind: str, *inputs: str | None, **wanted: Any) -> str:
        """The output of that node."""
        return self.reader(kind, *inputs, **wanted).output[0]

    def readers(self, name: str) -> list[Node]:
        """All nodes that take this."""
        return self._readers[name]

    def given_by(self, name: str) -> str:
        """The kind of node that gives this; empty for inputs and constants."""
        node = self._producers.get(name)
        return "" if node is None else node.op_type

    def producer(self, name: str, *kinds: str) -> Node:
        """The node that gives this, of one of these kinds."""
        node = self._producers.get(name)
        if node is None or node.op_type not in kinds:
            raise UnsupportedGraphError(f"{name} is not given by {' or '.join(kinds)}")
        return node

    def constant(self, name: str) -> NDArray[Any]:
        """A constant, also one stored in half precision or transposed; of one that repeats a number, that number."""
        node = self._producers.get(name)
        if node is not None and node.op_type in ("Cast", "Expand"):
            return self.constant(node.input[0])
        if node is not None and node.op_type == "Transpose" and _has(node, {"perm": [1, 0]}):
            turned: NDArray[Any] = self.constant(node.input[0]).T
            return turned
        tensor = self._tensors.get(name)
        if tensor is None or tensor.data_type not in onnx_file.TYPES:
            raise UnsupportedGraphError(f"{name} is no constant of numbers")
        dtype, shape = onnx_file.TYPES[tensor.data_type], tensor.dims
        if not tensor.external:
            return tensor.values()
        offset, size = int(tensor.external.get("offset", 0)), math.prod(shape) * dtype.itemsize
        inside = offset >= 0 and 0 < size <= self._weights.stat().st_size - offset and all(dim > 0 for dim in shape)
        if tensor.external.get("location") != self._weights.name or not inside:
            raise UnsupportedGraphError(f"{name} is not in {self._weights.name}")
        mapped: NDArray[Any] = np.memmap(self._weights, dtype, "r", offset, shape)
        return mapped

    def number(self, name: str) -> float:
        """A constant that is one number."""
        value = self.constant(name)
        if value.size != 1:
            raise UnsupportedGraphError(f"{name} is not one number")
        return float(value.reshape(()))


def _takes(node: Node, inputs: tuple[str | None, ...]) -> bool:
    return len(node.input) >= len(inputs) and all(
        wanted is None or wanted == given for wanted, given in zip(inputs, node.input, strict=False)
    )


def _has(node: Node, wanted: dict[str, Any]) -> bool:
    return all(node.attributes.get(name) == value for name, value in wanted.items())

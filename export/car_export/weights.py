"""`weights.bin`: every weight once, and the graphs' references into it.

torch's exporter hands over graphs whose initializers are the model's own tensors. Here they are written to one file,
each once however many graphs use it, and replaced by ONNX external data: building ten graphs of a model costs its
bytes once, on disk and in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import TensorProto
from torch import Tensor

FILE = "weights.bin"
INLINE = 64
"""Initializers of fewer elements stay in the graph: shape arithmetic and scalars, which engines want to see."""
HALVED = 256
"""Elements from which float32 weights are stored as float16, with half-precision storage.

Small ones keep their digits.
"""
_PAGE = 4096
Place = tuple[int, int]
"""Offset and length in the file."""


class WeightStore:
    """Appends tensors to `weights.bin` and remembers where each went."""

    def __init__(self, directory: Path, half: bool = False, transposed: bool = False, append: bool = False):
        """`half`: float32 weights are stored as float16. `transposed`: see `externalise`. `append`: to a file."""
        self.directory, self.half, self.transposed = directory, half, transposed
        self.file: BinaryIO = (directory / FILE).open("ab" if append else "wb")
        self.offset = self.file.tell()
        self.parameter_bytes = 0
        self._known: dict[tuple[object, ...], ir.ExternalTensor] = {}
        self._keep: list[Tensor] = []  # keys hold addresses: their tensors must stay alive

    def close(self) -> None:
        self.file.close()

    def flush(self) -> None:
        """Let readers of the file see all that was added."""
        self.file.flush()

    def add(self, name: str, tensor: Tensor, transpose: bool = False) -> ir.ExternalTensor:
        """Write a tensor (once), or the transpose of a matrix, and return the reference to it."""
        halve = self.half and tensor.dtype == torch.float32 and tensor.numel() >= HALVED
        key = _key(tensor, transpose)
        if key not in self._known:
            self._keep.append(tensor)
            value = tensor.detach().T if transpose else tensor.detach()
            array = as_array((value.half() if halve else value).cpu())
            self._known[key] = self.add_array(name + (".T" if transpose else ""), array)
            self.parameter_bytes += array.nbytes
        return self._known[key]

    def find(self, tensor: Tensor) -> tuple[ir.ExternalTensor, bool] | None:
        """Where a tensor was stored, and whether transposed; None if no graph holds it as it is."""
        for transposed in (False, True):
            if (found := self._known.get(_key(tensor, transposed))) is not None:
                return found, transposed
        return None

    def know(self, tensor: Tensor, found: ir.ExternalTensor, transposed: bool) -> None:
        """Where a tensor is stored already, whether transposed."""
        self._keep.append(tensor)
        self._known[_key(tensor, transposed)] = found

    def add_array(self, name: str, array: np.ndarray) -> ir.ExternalTensor:
        """Append an array as it is, at its `alignment`."""
        align = alignment(array.nbytes)
        self.file.write(bytes(-self.offset % align))
        self.offset += -self.offset % align
        self.file.write(array.tobytes() if array.nbytes < _PAGE else array.reshape(-1).view(np.uint8).data)
        reference = external(name, array.dtype, array.shape, self.offset, array.nbytes, self.directory)
        self.offset += array.nbytes
        return reference


def _key(tensor: Tensor, transposed: bool) -> tuple[object, ...]:
    """What is the same for one tensor in one form, and for no other that is alive."""
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, transposed)


class WeightCopier:
    """Writes the `weights.bin` of a plan that is made from another: each piece of the old file once, wherever it is
    used."""

    def __init__(self, source: Path, target: Path):
        self._source = np.memmap(source, np.uint8, "r")
        self._file = target.open("wb")
        self._offset = 0
        self._places: dict[Place, Place] = {}
        self._added: set[str] = set()

    def close(self) -> None:
        self._file.close()

    def copy(self, offset: int, length: int, change: Callable[[np.ndarray], np.ndarray] | None = None) -> Place:
        """Copy a piece of the old file, once; returns its (offset, length) in the new one.

        change: from its bytes, uint8 [length], to what is stored instead.
        """
        if (offset, length) not in self._places:
            data = self._source[offset : offset + length]
            self._places[offset, length] = self._append(data if change is None else change(data))
        return self._places[offset, length]

    def move(self, tensors: Iterable[TensorProto]) -> None:
        """Copy what a graph's external tensors hold and let them refer to the new file; those of `add` do already."""
        for tensor in tensors:
            if tensor.data_location == TensorProto.EXTERNAL and tensor.name not in self._added:
                refer(tensor, *self.copy(*place(tensor)))

    def add(self, name: str, array: np.ndarray) -> TensorProto:
        """Append an array to the file; returns the external tensor that refers to it."""
        self._added.add(name)
        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        tensor = TensorProto(name=name, data_type=kind, dims=array.shape)
        refer(tensor, *self._append(array))
        return tensor

    def alias(self, tensor: TensorProto, name: str) -> TensorProto:
        """A tensor of another name that refers to the same bytes as one that was added."""
        twin = TensorProto()
        twin.CopyFrom(tensor)
        twin.name = name
        self._added.add(name)
        return twin

    def array(self, tensor: TensorProto) -> np.ndarray:
        """The values of a tensor of the old plan's graphs; an external one is a view of the mapped file."""
        if tensor.data_location != TensorProto.EXTERNAL:
            return onnx.numpy_helper.to_array(tensor)
        offset, length = place(tensor)
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        return self._source[offset : offset + length].view(kind).reshape(tuple(tensor.dims))

    def _append(self, array: np.ndarray) -> Place:
        self._offset += self._file.write(bytes(-self._offset % alignment(array.nbytes)))
        start = self._offset
        self._offset += self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return start, array.nbytes


def place(tensor: TensorProto) -> Place:
    """Return (offset, length) of an external tensor."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return int(entries["offset"]), int(entries["length"])


def refer(tensor: TensorProto, offset: int, length: int) -> None:
    """Make a tensor external: a reference into `weights.bin`."""
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", FILE), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def alignment(size: int) -> int:
    """Alignment in bytes of an array of `size` bytes: a page from 1 MB on, which can be mapped, or a cache line."""
    return _PAGE if size >= 256 * _PAGE else 64


def as_array(tensor: Tensor) -> np.ndarray:
    """A tensor as a contiguous array; bfloat16, which numpy lacks, in ml_dtypes' type."""
    tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ir.DataType.BFLOAT16.numpy())
    return tensor.numpy()


def external(
    name: str, dtype: np.dtype, shape: tuple[int, ...], offset: int, length: int, directory: Path
) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        FILE,
        offset,
        length,
        ir.DataType.from_numpy(np.dtype(dtype)),
        shape=ir.Shape(shape),
        name=name,
        base_dir=directory,
    )


def externalise(model: ir.Model, store: WeightStore) -> None:
    """Move a traced model's weights into the store, in place.

    Matrices are stored as PyTorch has them, [outputs, inputs], and keep their Transpose: on CPUs engines pack a
    constant matrix in a form of their own, from this one without another copy. With `store.transposed` they are
    stored transposed, as half-precision plans always were; on GPUs neither form was found better. What is stored in
    half for a float32 graph gets a Cast, which engines fold when they open the graph.
    """
    graph = model.graph
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        raw = getattr(tensor, "raw", None)
        if tensor is None or not isinstance(raw, Tensor) or raw.numel() < INLINE:
            continue
        transposes = [n for n, _ in value.uses() if store.transposed and _is_transpose(n)]
        for node in transposes:
            output = node.outputs[0]
            _replace(graph, output, f"{value.name}.T", store.add(str(value.name), raw, transpose=True), raw.dtype)
            graph.remove(node, safe=True)
        if value.uses():
            _replace(graph, value, str(value.name), store.add(str(value.name), raw), raw.dtype)
        elif not value.is_graph_output():
            graph.initializers.pop(str(value.name))


def _is_transpose(node: ir.Node) -> bool:
    """Whether a node transposes a matrix."""
    return node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [1, 0]


def _replace(graph: ir.Graph, old: ir.Value, name: str, tensor: ir.ExternalTensor, wanted: torch.dtype) -> None:
    """Let all users of `old` read the external tensor instead, by way of a Cast if it is stored in another type."""
    cast_needed = wanted == torch.float32 and tensor.dtype == ir.DataType.FLOAT16
    if old.name in graph.initializers:
        graph.initializers.pop(old.name)
    stored = name + ".f16" if cast_needed else name
    if stored in graph.initializers:
        source = graph.initializers[stored]
    else:
        source = ir.Value(name=stored, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.initializers[stored] = source
    if cast_needed:
        node = ir.node("Cast", [source], {"to": ir.DataType.FLOAT}, name=f"cast_{name}")
        node.outputs[0].name = f"{name}.f32"
        node.outputs[0].shape, node.outputs[0].type = tensor.shape, ir.TensorType(ir.DataType.FLOAT)
        graph.insert_before(graph[0], node)
        source = node.outputs[0]
    old.replace_all_uses_with(source)

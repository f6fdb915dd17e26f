"""`weights.bin`: every weight once, and the graphs' references into it.

torch's exporter hands over graphs whose initializers are the model's own tensors. Here they are written to one file,
each once however many graphs use it, and replaced by ONNX external data: building ten graphs of a model costs its
bytes once, on disk and in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

FILE = "weights.bin"
INLINE = 64
"""Initializers of fewer elements stay in the graph: shape arithmetic and scalars, which engines want to see."""
HALVED = 256
"""With half-precision storage, float32 weights from this many elements on are stored as float16.

Small ones keep their digits.
"""
_PAGE = 4096


class WeightStore:
    """Appends tensors to `weights.bin` and remembers where each went."""

    def __init__(self, directory: Path, half: bool = False, transposed: bool = False):
        """`half`: float32 weights are stored as float16. `transposed`: see `externalise`."""
        self.directory, self.half, self.transposed = directory, half, transposed
        self.file: BinaryIO = (directory / FILE).open("wb")
        self.offset = 0
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
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, transpose, halve)
        if key not in self._known:
            self._keep.append(tensor)
            value = tensor.detach().T if transpose else tensor.detach()
            array = as_array((value.half() if halve else value).cpu())
            self._known[key] = self.add_array(name + (".T" if transpose else ""), array)
            self.parameter_bytes += array.nbytes
        return self._known[key]

    def add_array(self, name: str, array: np.ndarray) -> ir.ExternalTensor:
        """Append an array as it is.

        Large ones start at a page, so that they can be mapped; small ones at a cache line.
        """
        align = _PAGE if array.nbytes >= 256 * _PAGE else 64
        self.file.write(bytes(-self.offset % align))
        self.offset += -self.offset % align
        self.file.write(array.tobytes() if array.nbytes < _PAGE else array.reshape(-1).view(np.uint8).data)
        reference = external(name, array.dtype, array.shape, self.offset, array.nbytes, self.directory)
        self.offset += array.nbytes
        return reference


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
        turned = [n for n, _ in value.uses() if store.transposed and _is_transpose(n)]
        for node in turned:
            output = node.outputs[0]
            _replace(graph, output, f"{value.name}.T", store.add(str(value.name), raw, transpose=True), raw.dtype)
            graph.remove(node, safe=True)
        if value.uses():
            _replace(graph, value, str(value.name), store.add(str(value.name), raw), raw.dtype)
        elif not value.is_graph_output():
            graph.initializers.pop(str(value.name))


def _is_transpose(node: ir.Node) -> bool:
    """Of a matrix."""
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

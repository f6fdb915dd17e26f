"""A float32 copy of a bfloat16 plan, for engines that can't compute in bfloat16: exports are verified on it.

Every bfloat16 number is a float32 number, so the copy has the same weights and computes what the plan does, but for
the rounding of intermediate results.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto

from car_runtime import manifest as schema

_BFLOAT16 = ir.DataType.BFLOAT16.numpy()  # numpy has none of its own
_TYPES = {TensorProto.BFLOAT16: TensorProto.FLOAT}


@contextlib.contextmanager
def widened(plan: Path) -> Iterator[Path]:
    """The copy, in a folder beside the plan that is removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix=f".{plan.name}.widened-", dir=plan.parent))
    try:
        _copy(plan, folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _copy(plan: Path, folder: Path) -> None:
    manifest = schema.read_manifest(plan)
    graphs = {name: onnx.load(plan / graph.file, load_external_data=False) for name, graph in manifest.graphs.items()}
    moved = _Weights(plan / schema.WEIGHTS, folder / schema.WEIGHTS)
    tensors = {}
    for name, tensor in manifest.tensors.items():
        offset, _ = moved.place(tensor.offset, tensor.bytes, bfloat16=False)
        tensors[name] = dataclasses.replace(tensor, offset=offset)
    for name, graph in graphs.items():
        _widen_graph(graph.graph, moved)
        (folder / manifest.graphs[name].file).write_bytes(graph.SerializeToString())
    moved.close()

    def ports(side: tuple[schema.Port, ...]) -> tuple[schema.Port, ...]:
        return tuple(dataclasses.replace(p, dtype="float32") if p.dtype == "bfloat16" else p for p in side)

    copied = {
        name: dataclasses.replace(graph, inputs=ports(graph.inputs), outputs=ports(graph.outputs))
        for name, graph in manifest.graphs.items()
    }
    names = [schema.WEIGHTS, *(graph.file for graph in copied.values())]
    whole = dataclasses.replace(
        manifest,
        precision=schema.Precision(compute="fp32", weights="fp32"),
        tensors=tensors,
        graphs=copied,
        engines=(),
        files=schema.describe_files(folder, names, manifest.chunk_bytes),
    )
    schema.write_manifest(folder, whole)


class _Weights:
    """`weights.bin` in float32: each piece once, wherever it is used."""

    def __init__(self, source: Path, target: Path):
        self.source = np.memmap(source, np.uint8, "r")
        self.file = target.open("wb")
        self.offset = 0
        self.places: dict[tuple[int, int], tuple[int, int]] = {}

    def place(self, offset: int, length: int, bfloat16: bool) -> tuple[int, int]:
        """Where a piece of the source is in the copy: (offset, length)."""
        if (offset, length) not in self.places:
            piece = self.source[offset : offset + length]
            data = piece.view(_BFLOAT16).astype(np.float32).view(np.uint8) if bfloat16 else piece
            self.offset += self.file.write(bytes(-self.offset % 64))
            self.places[offset, length] = (self.offset, data.nbytes)
            self.offset += self.file.write(data.data)
        return self.places[offset, length]

    def close(self) -> None:
        self.file.close()


def _widen_graph(graph: onnx.GraphProto, weights: _Weights) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        kind = value.type.tensor_type
        kind.elem_type = _TYPES.get(kind.elem_type, kind.elem_type)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "to":
                attribute.i = _TYPES.get(attribute.i, attribute.i)
            if attribute.type == onnx.AttributeProto.TENSOR:
                _widen_tensor(attribute.t, weights)
    for tensor in graph.initializer:
        _widen_tensor(tensor, weights)


def _widen_tensor(tensor: TensorProto, weights: _Weights) -> None:
    narrow = tensor.data_type == TensorProto.BFLOAT16
    if tensor.data_location == TensorProto.EXTERNAL:
        entry = {e.key: e for e in tensor.external_data}
        offset, length = weights.place(int(entry["offset"].value), int(entry["length"].value), narrow)
        entry["offset"].value, entry["length"].value = str(offset), str(length)
    elif narrow:
        array = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    tensor.data_type = _TYPES.get(tensor.data_type, tensor.data_type)

"""A float32 copy of a bfloat16 plan, for engines that can't compute in bfloat16: exports are verified on it.

Every bfloat16 number is a float32 number, so the copy has the same weights and computes what the plan does, but for
the rounding of intermediate results.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto

from car_export.weights import WeightCopier, place, refer
from car_runtime.format import manifest as schema
from car_train.files import scratch

_BFLOAT16 = ir.DataType.BFLOAT16.numpy()  # numpy has none of its own
_TYPES = {TensorProto.BFLOAT16: TensorProto.FLOAT}


@contextlib.contextmanager
def runnable(plan: Path) -> Iterator[Path]:
    """The plan, or in its place a float32 copy where ONNX Runtime, which has no bfloat16 on CPUs, can't run it.

    What is left to find in that copy is everything but rounding.
    """
    if schema.read_manifest(plan).precision.compute != "bf16":
        yield plan
        return
    with float32_copy(plan) as copy:
        yield copy


@contextlib.contextmanager
def float32_copy(plan: Path) -> Iterator[Path]:
    """A float32 copy of a plan, in a folder next to it that is removed afterwards."""
    with scratch(plan) as folder:
        _copy(plan, folder)
        yield folder


def _copy(plan: Path, folder: Path) -> None:
    manifest = schema.read_manifest(plan)
    graphs = {name: onnx.load(plan / graph.file, load_external_data=False) for name, graph in manifest.graphs.items()}
    weights = WeightCopier(plan / schema.WEIGHTS, folder / schema.WEIGHTS)
    tensors = {}
    for name, tensor in manifest.tensors.items():
        offset, _ = weights.copy(tensor.offset, tensor.bytes)
        tensors[name] = dataclasses.replace(tensor, offset=offset)
    parameters = {}
    for name, one in manifest.parameters.items():
        narrow = one.dtype == "bfloat16"
        offset, size = weights.copy(one.offset, one.bytes, _as_float32 if narrow else None)
        dtype = "float32" if narrow else one.dtype
        parameters[name] = dataclasses.replace(one, dtype=dtype, offset=offset, bytes=size)
    for name, graph in graphs.items():
        _widen_graph(graph.graph, weights)
        (folder / manifest.graphs[name].file).write_bytes(graph.SerializeToString())
    weights.close()

    def ports(side: tuple[schema.Port, ...]) -> tuple[schema.Port, ...]:
        return tuple(dataclasses.replace(p, dtype="float32") if p.dtype == "bfloat16" else p for p in side)

    copied = {
        name: dataclasses.replace(graph, inputs=ports(graph.inputs), outputs=ports(graph.outputs))
        for name, graph in manifest.graphs.items()
    }
    names = [schema.WEIGHTS, *(graph.file for graph in copied.values())]
    files = schema.describe_files(folder, names, manifest.chunk_bytes)
    whole = dataclasses.replace(
        manifest,
        precision=schema.Precision(compute="fp32", weights="fp32"),
        tensors=tensors,
        graphs=copied,
        engines=(),
        files=files,
        parameters=parameters,
        parameters_digest=schema.graphs_digest(copied, files) if parameters else "",
    )
    schema.write_manifest(folder, whole)


def _widen_graph(graph: onnx.GraphProto, weights: WeightCopier) -> None:
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


def _as_float32(data: np.ndarray) -> np.ndarray:
    """bf16 values, as bytes uint8 [n], as float32 [n / 2]."""
    return data.view(_BFLOAT16).astype(np.float32)


def _widen_tensor(tensor: TensorProto, weights: WeightCopier) -> None:
    narrow = tensor.data_type == TensorProto.BFLOAT16
    if tensor.data_location == TensorProto.EXTERNAL:
        refer(tensor, *weights.copy(*place(tensor), _as_float32 if narrow else None))
    elif narrow:
        array = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    tensor.data_type = _TYPES.get(tensor.data_type, tensor.data_type)

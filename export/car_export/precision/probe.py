"""The graphs of a half-precision plan in ONNX Runtime, run by the runtime's own loop: their logits, and how large the
values inside them get.

Shapes: L tokens of an image; V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from car_export.observe import ObservedOrtCpu, load_graph
from car_export.precision.case import Case
from car_export.weights import place
from car_runtime.backends.base import Buffer
from car_runtime.backends.numpy_buffers import array_of
from car_runtime.config import GenerationConfig
from car_runtime.format import manifest as schema
from car_runtime.plan import Plan

WRITERS = re.compile(r"\.(attn\.proj|proj_out|mlp\.fc2|conv2|fusions\.\d+\.linear)\.(weight|bias)(\.T)?$")
"""Parameters whose products are added to a residual stream, the transformer's or the tokenizer's, or are it."""


class ProbedOrtCpu(ObservedOrtCpu):
    """ONNX Runtime that with `probe` keeps the largest |value| of every half-precision tensor in the graphs.

    factor: what the parameters that `WRITERS` names are multiplied by.
    """

    def __init__(self, directory: Path, probe: bool = False, factor: float = 1.0) -> None:
        self.largest: dict[tuple[str, str], float] = {}
        """(graph, tensor) → largest |value| of a half-precision tensor; inf for nan."""
        self.stream = 0.0
        """The largest |value| of the residual stream, which is float32."""
        self.scaled: list[str] = []
        """The parameters that were multiplied."""
        self._probe, self._factor, self._directory = probe, factor, directory
        self._probes: dict[str, list[tuple[str, bool]]] = {}
        self._replaced: dict[str, tuple[list[str], list[ort.OrtValue]]] = {}  # a session reads them from here
        manifest = schema.read_manifest(directory)
        graphs = [name for name in manifest.graphs if not name.startswith("step.")]
        super().__init__(directory, manifest, {name: load_graph(directory, manifest, name) for name in graphs})

    def logits(self, case: Case) -> Tensor:
        """Guided logits f32 [L, V] of the whole chain of graphs, every one fed by the others, on the case's tokens.

        The decoder and the encoder run too. To be called once: the sessions are closed afterwards.
        """
        config = GenerationConfig(
            control=case.control,
            label=case.label,
            cfg=case.cfg,
            known_tokens=case.tokens.numpy(),
            known_mask=np.ones(case.tokens.shape, np.bool_),
        )
        with Plan(self._directory, self._manifest, self, "numerics") as plan:
            scales = list(plan.stream(config, logits=True))
            scales[-1].preview()
            if "encoder" in self._manifest.graphs:
                plan.encode(case.image)
            logits = [torch.from_numpy(scale.logits).flatten(0, 2) for scale in scales]
        return torch.cat(logits)

    def edit(self, graph: str, model: onnx.ModelProto) -> None:
        """Add the probes, and multiply the parameters."""
        self._probes[graph] = add_probes(model) if self._probe else []
        if self._factor != 1:
            self._scale(graph, model)

    def buffers(self, graph: str, inputs: Mapping[str, Buffer]) -> tuple[dict[str, Buffer], dict[str, Buffer]]:
        """A number for each probe."""
        return {}, {f"largest.{name}": np.empty((), np.float32) for name, _ in self._probes[graph]}

    def record(self, graph: str, outputs: Mapping[str, Buffer]) -> None:
        """Keep the largest values."""
        for name, is_stream in self._probes[graph]:
            value = float(array_of(outputs[f"largest.{name}"]))
            value = np.inf if np.isnan(value) else value
            if is_stream:
                self.stream = max(self.stream, value)
            else:
                self.largest[graph, name] = max(self.largest.get((graph, name), 0.0), value)

    def _scale(self, graph: str, model: onnx.ModelProto) -> None:
        """Multiply the parameters in `WRITERS`: small ones in the graph, external ones as a session loads them."""
        external: dict[str, np.ndarray] = {}
        for tensor in model.graph.initializer:
            if WRITERS.search(tensor.name) is None:
                continue
            self.scaled.append(tensor.name)
            if tensor.data_location != TensorProto.EXTERNAL:
                array = numpy_helper.to_array(tensor)
                tensor.CopyFrom(numpy_helper.from_array((array * self._factor).astype(array.dtype), tensor.name))
                continue
            offset, _ = place(tensor)
            dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
            array = np.memmap(self._directory / schema.WEIGHTS, dtype, "r", offset, tuple(tensor.dims))
            external[tensor.name] = (array.astype(np.float32) * self._factor).astype(dtype)
        values = [ort.OrtValue.ortvalue_from_numpy(array) for array in external.values()]
        self._replaced[graph] = list(external), values

    def _options(self, graph: str) -> Any:
        options = super()._options(graph)
        if self._replaced.get(graph, ([], []))[0]:
            options.add_external_initializers(*self._replaced[graph])
        return options


def add_probes(model: onnx.ModelProto) -> list[tuple[str, bool]]:
    """Add an output `largest.NAME`, f32 [], for every half-precision tensor that a node makes, and for the stream.

    Returns (tensor name, whether it is the float32 residual stream: what the norms read).
    """
    inferred = onnx.shape_inference.infer_shapes(model).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.input, *inferred.output)}
    read_by_norms = {node.input[0] for node in model.graph.node if node.op_type == "LayerNormalization"}
    probes = []
    for node in list(model.graph.node):
        for name in filter(None, node.output):
            kind = kinds.get(name)
            is_stream = kind == TensorProto.FLOAT and name in read_by_norms
            if kind != TensorProto.FLOAT16 and not is_stream:
                continue
            probes.append((name, is_stream))
            model.graph.node.extend(
                [
                    helper.make_node("Cast", [name], [f"{name}.as_f32"], to=TensorProto.FLOAT),
                    helper.make_node("Abs", [f"{name}.as_f32"], [f"{name}.abs"]),
                    helper.make_node("ReduceMax", [f"{name}.abs"], [f"largest.{name}"], keepdims=0),
                ]
            )
            model.graph.output.append(helper.make_tensor_value_info(f"largest.{name}", TensorProto.FLOAT, []))
    return probes

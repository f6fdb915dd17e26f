"""Where an int8 plan multiplies INT8: the matrix products and the convolutions of its graphs.

Shapes: K input channels, N output channels, h, w kernel size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from car_runtime.format import manifest as schema

GRAPHS = ("step", "condition", "control", "branch", "decoder")
"""The kinds of graphs that are rewritten; the encoder, which serves editing alone, is not."""
CONV_GRAPHS = ("control", "decoder")
"""Those whose convolutions are quantized; those of the step add to f̂, which keeps its precision."""
MIN_CHANNELS = 32
"""A convolution with at most this many input or output channels stays in float32: images and latents pass there."""


@dataclass(frozen=True, kw_only=True)
class MatMulSite:
    """A MatMul or Gemm whose right side is a weight of the model."""

    node: onnx.NodeProto
    x: str
    """The activation, [..., K]."""
    weight: TensorProto
    transposed: bool
    """Whether the weight is stored [N, K], as PyTorch has it."""

    @property
    def inputs(self) -> int:
        """K."""
        return int(self.weight.dims[1 if self.transposed else 0])


@dataclass(frozen=True, kw_only=True)
class ConvSite:
    """A Conv with kernels of the model, [N, K, h, w], or with kernels that the graph makes of them."""

    node: onnx.NodeProto
    weight: TensorProto
    bias: TensorProto | None
    making: onnx.ModelProto | None
    """The nodes that make the kernels of `weight`, which is their input; None where the Conv takes it as it is."""

    @property
    def name(self) -> str:
        """Of the kernels: several that are made of one weight have different ones."""
        return self.weight.name if self.making is None else str(self.node.input[1])

    def kernels(self, weight: np.ndarray) -> np.ndarray:
        """Float32 [N, K, h, w]; weight: what is stored."""
        if self.making is None:
            return np.asarray(weight, np.float32)
        (made,) = ReferenceEvaluator(self.making).run(None, {self.weight.name: weight})
        return np.asarray(made, np.float32)


def kind_of(graph: str) -> str:
    """The kind of a graph: a branch's have the branch's name behind it."""
    return graph.partition(".")[0]


def matmul_sites(model: onnx.ModelProto, manifest: schema.Manifest) -> list[MatMulSite]:
    """Products with a weight matrix, except those with the few latent channels of f̂, which cost nothing."""
    weights, stored = _weights_of(model)
    found = []
    for node in model.graph.node:
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        name, transposes = stored(node.input[1], ("Transpose", "Cast"))
        transposed = (node.op_type == "Gemm" and _attribute(node, "transB", 0) == 1) ^ (transposes % 2 == 1)
        weight = weights.get(name)
        if weight is None or len(weight.dims) != 2 or node.input[0] in weights:
            continue
        site = MatMulSite(node=node, x=node.input[0], weight=weight, transposed=transposed)
        if site.inputs > manifest.model.latent_channels:
            found.append(site)
    return found


def conv_sites(model: onnx.ModelProto) -> list[ConvSite]:
    """Convolutions with kernels of the model, except those of at most `MIN_CHANNELS` channels."""
    weights, stored = _weights_of(model)
    found = []
    for node in model.graph.node:
        if node.op_type != "Conv":
            continue
        weight, making = weights.get(stored(node.input[1], ("Cast",))[0]), None
        if weight is None:
            weight, making = _making(model, node.input[1], weights)
        if weight is None:
            continue
        has_bias = len(node.input) > 2
        bias = weights.get(stored(node.input[2], ("Cast",))[0]) if has_bias else None
        if min(weight.dims[:2]) > MIN_CHANNELS and (bias is not None or not has_bias):
            found.append(ConvSite(node=node, weight=weight, bias=bias, making=making))
    return found


def _making(
    model: onnx.ModelProto, kernels: str, weights: Mapping[str, TensorProto]
) -> tuple[TensorProto | None, onnx.ModelProto | None]:
    """The stored weight that kernels are made of, and the nodes that make them; None where they depend on an input of
    the graph, or on several weights."""
    needed = {kernels}
    nodes: list[onnx.NodeProto] = []
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            nodes.insert(0, node)
            needed |= set(node.input)
    needed -= {output for node in nodes for output in node.output} | {""}
    stored = [
        weights[name] for name in needed & weights.keys() if weights[name].data_location == TensorProto.EXTERNAL
    ]
    if len(stored) != 1 or not needed <= weights.keys():
        return None, None
    (weight,) = stored
    graph = helper.make_graph(
        nodes,
        "kernels",
        [helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims)],
        [helper.make_tensor_value_info(kernels, TensorProto.FLOAT, None)],
        [weights[name] for name in sorted(needed - {weight.name})],
    )
    return weight, helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def observed_values(graph: str, model: onnx.ModelProto, manifest: schema.Manifest) -> dict[str, int | None]:
    """Values whose ranges calibration needs: inputs of products with their number of channels, K, and inputs and
    outputs of convolutions with None, as those have one range for all channels."""
    values: dict[str, int | None] = {site.x: site.inputs for site in matmul_sites(model, manifest)}
    for site in conv_sites(model) if kind_of(graph) in CONV_GRAPHS else ():
        values |= dict.fromkeys((site.node.input[0], site.node.output[0]))
    return values


def _weights_of(
    model: onnx.ModelProto,
) -> tuple[dict[str, TensorProto], Callable[[str, tuple[str, ...]], tuple[str, int]]]:
    """The initializers by name, and a function that follows a value back through nodes of the given types: it returns
    the name of what they start from, and how many of them are Transposes."""
    makers = {output: node for node in model.graph.node for output in node.output}

    def stored(name: str, through: tuple[str, ...]) -> tuple[str, int]:
        transposes = 0
        while name in makers and makers[name].op_type in through:
            transposes += makers[name].op_type == "Transpose"
            name = makers[name].input[0]
        return name, transposes

    return {tensor.name: tensor for tensor in model.graph.initializer}, stored


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)

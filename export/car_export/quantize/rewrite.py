"""One graph of a float32 plan rewritten to INT8: QuantizeLinear and DequantizeLinear around products and
convolutions, of which ONNX Runtime and OpenVINO make one kernel each (VNNI, AMX).

Shapes: K inputs, N outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper

from car_export.quantize.calibrate import ProductError, QuantParams, activation_params, calibrate, quantize_weights
from car_export.quantize.sites import ConvSite, MatMulSite
from car_export.quantize.statistics import ActivationStats, Floats
from car_export.weights import INLINE, WeightCopier

MAX_ERROR = 0.02
"""Relative error of a product beyond which it stays in float32."""


class GraphQuantizer:
    """Rewrites one graph in place: `quantize_matmul`, `quantize_conv` for each site, then `finish`."""

    def __init__(self, model: onnx.ModelProto, weights: WeightCopier, stats: Mapping[str, ActivationStats]) -> None:
        self.graph, self.weights, self.stats = model.graph, weights, stats
        self.left: list[str] = []
        """Weights whose products stay in float32."""
        self.params: dict[str, QuantParams] = {}
        """Activation → how it is quantized."""
        self._initializers = {tensor.name: tensor for tensor in self.graph.initializer}
        self._makers = {output: node for node in self.graph.node for output in node.output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._before: dict[str, list[onnx.NodeProto]] = {}
        self._after: dict[str, list[onnx.NodeProto]] = {}
        """First output of a node → what goes before it, and after it."""

    def quantize_matmul(self, site: MatMulSite) -> float:
        """Rewrite a product, or leave it in float32 if its error exceeds `MAX_ERROR`; returns that error."""
        node, x, name = site.node, site.x, _parameter_name(site.weight.name)
        stored = self.weights.array(site.weight)
        weight_NK = np.asarray(stored if site.transposed else stored.T, np.float32)
        fold = self._fold(x) if len(self._readers[x]) == 1 else None
        params = self.params.get(x)
        if params is None:
            params = calibrate(weight_NK, self.stats[x], fold is not None)
            error = params.error
        else:  # x is quantized already, for another product
            product = ProductError(weight_NK, self.stats[x])
            error = product.with_smoothing(params.smoothing)(params.scale, params.zero_point)
        if error > MAX_ERROR:
            self.left.append(name)
            return error
        output, *_ = node.output
        before = self._before.setdefault(output, [])
        if x not in self.params:
            self.params[x] = params
            if fold is not None and params.smoothing is not None:
                fold(params.smoothing)
            before += self._quantized(x, f"{x}.int8", params.scale, params.zero_point)
        matrix, scales = quantize_weights(weight_NK if params.smoothing is None else weight_NK * params.smoothing)
        before.append(self._dequantized(name, np.ascontiguousarray(matrix.T), scales, axis=1))
        bias = list(node.input[2:])
        last = helper.make_node("MatMul", [f"{x}.int8", f"{name}.int8"], [output], name=node.name)
        if bias:  # a Gemm's; they have no factors, and no transposes but of the matrix
            last.output[0] = f"{output}.product"
            before.append(last)
            last = helper.make_node("Add", [last.output[0], *bias], [output], name=f"{node.name}_bias")
        node.CopyFrom(last)
        return error

    def quantize_conv(self, site: ConvSite) -> None:
        """Let a convolution take UINT8 and give UINT8, the form that ONNX Runtime has a kernel for."""
        node = site.node
        (x, *_), (output,) = node.input, node.output
        before = self._before.setdefault(output, [])
        scale, zero_point = activation_params(*self.stats[x].range())
        if f"{x}.int8" not in self._makers:
            before += self._quantized(x, f"{x}.int8", scale, zero_point)
            self._makers[f"{x}.int8"] = before[-1]
        kernels, scales = quantize_weights(site.kernels(self.weights.array(site.weight)))
        before.append(self._dequantized_kernels(_parameter_name(site.name), output, kernels, scales))
        inputs = [f"{x}.int8", before[-1].output[0]]
        if site.bias is not None:
            bias = np.asarray(self.weights.array(site.bias), np.float64)
            whole = np.clip(np.round(bias / (np.float64(scale) * scales)), -(2**31), 2**31 - 1).astype(np.int32)
            before.append(self._dequantized(f"{output}.bias", whole, (scale * scales).astype(np.float32), axis=0))
            inputs.append(f"{output}.bias.int8")
        del node.input[:]
        node.input.extend(inputs)
        node.output[0] = f"{output}.sum"
        self._before[node.output[0]] = self._before.pop(output)
        params = activation_params(*self.stats[output].range())
        self._after[node.output[0]] = self._quantized(f"{output}.sum", output, *params)

    def finish(self) -> None:
        """Insert the new nodes, and drop what nobody reads any more."""
        nodes: list[onnx.NodeProto] = []
        for node in self.graph.node:
            (first, *_) = node.output
            nodes += [*self._before.get(first, []), copy.deepcopy(node), *self._after.get(first, [])]
        wanted = {output.name for output in self.graph.output}
        used = []
        for node in reversed(nodes):  # in the order of the graph: readers come after what they read
            if wanted.intersection(node.output):
                used.append(node)
                wanted.update(node.input)
        del self.graph.node[:]
        self.graph.node.extend(reversed(used))
        tensors = [tensor for tensor in self._initializers.values() if tensor.name in wanted]
        del self.graph.initializer[:]
        self.graph.initializer.extend(tensors)

    # -- QuantizeLinear and DequantizeLinear -------------------------------------------------------------------------

    def _quantized(self, x: str, result: str, scale: np.float32, zero_point: np.uint8) -> list[onnx.NodeProto]:
        """Nodes that make `result` of x: x rounded to the nearest of 256 levels."""
        params = [self._add(f"{x}.scale", scale), self._add(f"{x}.zero", zero_point)]
        return [
            helper.make_node("QuantizeLinear", [x, *params], [f"{x}.uint8"], name=f"{x}.round"),
            helper.make_node("DequantizeLinear", [f"{x}.uint8", *params], [result], name=f"{x}.widen"),
        ]

    def _dequantized(self, name: str, numbers: np.ndarray, scales: Floats, axis: int) -> onnx.NodeProto:
        """A node that makes NAME.int8 of stored INT8 or INT32 numbers and their scales."""
        inputs = [self._add(f"{name}.numbers", numbers), self._add(f"{name}.steps", scales)]
        if numbers.dtype == np.int8:  # where they have to become uint8, ONNX Runtime would else give them one for all
            inputs.append(self._add(f"{name}.zeros", np.zeros(len(scales), np.int8)))
        return helper.make_node("DequantizeLinear", inputs, [f"{name}.int8"], axis=axis, name=f"{name}.widen")

    def _dequantized_kernels(self, name: str, output: str, kernels: np.ndarray, scales: Floats) -> onnx.NodeProto:
        """`_dequantized` of a convolution's kernels, which another convolution may have too.

        Each gets names of its own for the same bytes: ONNX Runtime rewrites the kernels of each on CPUs without VNNI,
        and fails where it finds that done.
        """
        if f"{name}.numbers" not in self._initializers:
            return self._dequantized(name, kernels, scales, axis=0)
        twin = f"{output}.kernels"
        inputs = [f"{twin}.{kind}" for kind in ("numbers", "steps", "zeros")]
        for kind, new in zip(("numbers", "steps", "zeros"), inputs, strict=True):
            self._initializers[new] = self.weights.alias(self._initializers[f"{name}.{kind}"], new)
        return helper.make_node("DequantizeLinear", inputs, [f"{twin}.int8"], axis=0, name=f"{twin}.widen")

    # -- smoothing ---------------------------------------------------------------------------------------------------

    def _fold(self, x: str) -> Callable[[Floats], None] | None:
        """A function that divides x by a vector [K] without a node on x itself; None where that is impossible.

        x must come out of a norm with weights, or be LN(h)·(1 + scale) + shift, as AdaLN has it (DiT, arXiv
        2212.09748).
        """
        maker = self._makers.get(x)
        if maker is None:
            return None
        if maker.op_type == "LayerNormalization":
            return self._fold_into_norm(x, maker)
        scaled = self._makers.get(maker.input[0]) if maker.op_type == "Add" else None
        factor = self._makers.get(scaled.input[1]) if scaled is not None and scaled.op_type == "Mul" else None
        if scaled is None or factor is None or factor.op_type != "Add" or self._readers[maker.input[0]] != [maker]:
            return None
        if not all(self._is_modulation(name) for name in (maker.input[1], factor.input[0])):
            return None

        def divide_modulation(divisor: Floats) -> None:
            inverse = self._add(f"{x}.smoothing", (1 / divisor).astype(np.float32))
            for reader in (maker, scaled):
                divided = f"{reader.input[1]}.smooth"
                divide = helper.make_node("Mul", [reader.input[1], inverse], [divided], name=f"{divided}.divide")
                self._before.setdefault(reader.output[0], []).append(divide)
                reader.input[1] = divided

        return divide_modulation

    def _fold_into_norm(self, x: str, norm: onnx.NodeProto) -> Callable[[Floats], None] | None:
        """`_fold` for the output of a LayerNormalization: its own weights are divided."""
        own = [(i, self._constant(name)) for i, name in enumerate(norm.input) if i and name]
        if not own or any(array is None for _, array in own):
            return None

        def divide_weights(divisor: Floats) -> None:
            for i, array in own:
                assert array is not None
                norm.input[i] = self._add(f"{x}.norm{i}", (array / divisor).astype(np.float32))

        return divide_weights

    def _is_modulation(self, name: str) -> bool:
        """Whether a value is a slice of the graph's modulation: one row per image, not per token."""
        maker = self._makers.get(name)
        while maker is not None and maker.op_type in ("Split", "Transpose", "Slice", "Unsqueeze", "Reshape"):
            name, maker = maker.input[0], self._makers.get(maker.input[0])
        return maker is None and name == "modulation"

    # -- initializers ------------------------------------------------------------------------------------------------

    def _constant(self, name: str) -> Floats | None:
        """The float32 value of an initializer, or of one behind a Cast; None for anything else."""
        while name in self._makers and self._makers[name].op_type == "Cast":
            name = self._makers[name].input[0]
        tensor = self._initializers.get(name)
        return None if tensor is None else np.asarray(self.weights.array(tensor), np.float32)

    def _add(self, name: str, value: np.ndarray | np.generic) -> str:
        """Add an initializer, in `weights.bin` unless it is small; returns its name."""
        array = np.asarray(value)
        assert name not in self._initializers, name
        if array.size < INLINE:
            tensor = numpy_helper.from_array(array, name)
        else:
            tensor = self.weights.add(name, array)
        self._initializers[name] = tensor
        return name


def _parameter_name(stored: str) -> str:
    """The model's name of a weight, without the suffixes that storage adds."""
    return stored.removesuffix(".f16").removesuffix(".T")

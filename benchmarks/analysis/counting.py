"""What an image costs by count: operations, weights, K/V and activations of a plan's own graphs. Nothing is run.

The graphs are the plan's (docs/reference/plan-format.md) with every size fixed: the static steps where the plan has
them, else the one with named dimensions, specialised in the same way. Weights are not loaded. Guidance is on: 2B
rows.

An operation is a multiplication or an addition; a matrix product of M×K by K×N has 2·M·N·K. Only products and
convolutions are counted so. All else is given in bytes: what a node reads and writes if nothing is fused, which is
the most that it can be. Nodes on weights alone (casts of stored FP16 or BF16) are an engine's work when it opens a
graph and are left out of both. In a plan of format 2 the default branch is in use, and what a graph of its costs is
counted with the base's. B images; R rows; S side of a scale; T tokens seen; C width.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from benchmarks.harness.errors import BenchmarkError
from car_export.trace import specialise
from car_export.weights import external
from car_runtime.errors import PlanError
from car_runtime.format.manifest import WEIGHTS, Manifest, read_manifest

VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Shape")
"""Nodes that give the same bytes another shape."""
PICKS = ("Gather", "Slice")
"""Nodes that read no more of their first input than they write."""
FUSION = "fusion_"
"""What the names of a step's inputs begin with that are parameters of a branch."""
FUSED = ("Gelu", "LayerNormalization", "InstanceNormalization", "Softmax", "TopK", "CumSum")
"""Nodes that would be several if the exporter wrote them out, and whose number is therefore watched."""


@dataclass(frozen=True)
class Gemm:
    """Matrix products of one size, `batch` of them at once, `count` times in a graph."""

    kind: str
    """"weight": activations by a weight; "activation": by one another (attention); "conv": a convolution as one."""
    batch: int
    M: int
    N: int
    K: int
    count: int = 1

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.M * self.N * self.K * self.count


@dataclass(frozen=True, kw_only=True)
class GraphCount:
    """One run of one graph, or of several that are one stage."""

    graph: str
    nodes: int
    ops: dict[str, int]
    """Nodes of each kind, as they are in the graph."""
    gemms: tuple[Gemm, ...]
    flops_by_op: dict[str, int]
    weights: dict[str, int]
    """Elements that are read of each weight, by its name in the graph: of a table, the rows that are looked up."""
    weight_bytes: int
    """Bytes of these in the type that the graph computes with."""
    stored: dict[int, int]
    """Where the graph's weights lie in weights.bin: offset → bytes."""
    kv_read: int
    """Elements of the past's keys and values."""
    kv_written: int
    kv_bytes: int
    """Both in bytes."""
    io_bytes: int
    """All other inputs and outputs; logits, which an image doesn't need, are left out."""
    activation_bytes: dict[str, int]
    """Bytes that nodes of each kind read and write of activations, unfused."""

    @property
    def flops(self) -> int:
        return sum(self.flops_by_op.values())

    @property
    def weight_elements(self) -> int:
        return sum(self.weights.values())

    def __add__(self, other: GraphCount) -> GraphCount:
        """Both, one after the other; weights of the second are called by its graph where they have the same name."""
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.type == "int"}
        for name in ("ops", "flops_by_op", "activation_bytes"):
            sums[name] = dict(Counter(getattr(self, name)) + Counter(getattr(other, name)))
        renamed = {f"{other.graph}/{k}" if k in self.weights else k: v for k, v in other.weights.items()}
        return GraphCount(
            graph=self.graph,
            gemms=self.gemms + other.gemms,
            weights=self.weights | renamed,
            stored=self.stored | other.stored,
            **sums,
        )


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of an image's way, named as in `Result.timings`."""

    name: str
    count: GraphCount
    runs: int
    """How often its graph runs for one batch: the decoder takes one image at a time."""


@dataclass(frozen=True, kw_only=True)
class ImageCount:
    """All stages of one batch of images that nothing was computed for before."""

    batch: int
    stages: tuple[Stage, ...]

    def total(self, what: str) -> int:
        """Sum of a number over all runs of all graphs."""
        return sum(getattr(s.count, what) * s.runs for s in self.stages)

    def per_op(self, what: str) -> Counter[str]:
        """Sum of `ops`, `flops_by_op` or `activation_bytes` over all runs of all graphs, by operator."""
        found: Counter[str] = Counter()
        for stage in self.stages:
            for op, value in getattr(stage.count, what).items():
                found[op] += value * stage.runs
        return found


# ---- Graphs ----


def open_manifest(plan: Path) -> Manifest:
    """BenchmarkError for what is no plan."""
    try:
        return read_manifest(plan)
    except PlanError as error:
        raise BenchmarkError(str(error)) from error


def static_graph(plan: Path, manifest: Manifest, name: str, batch: int) -> onnx.ModelProto:
    """A graph of the plan for `batch` images with every dimension a number; weights stay where they are.

    name: a graph of the manifest, or "step.KK" or "branch.NAME.KK" for one scale.
    """
    static = f"{name}.b{batch}"
    if static in manifest.graphs:
        return onnx.load(plan / manifest.graphs[static].file, load_external_data=False)
    sizes, constants = {"B": batch, "R": 2 * batch, "m": 1}, {}
    if name.startswith(("step.", "branch.")):
        name, _, k = name.rpartition(".")
        scale = manifest.scales[int(k)]
        sizes |= {"S": scale.side, "P": scale.start, "T": scale.next_side}
        for port, tensor in scale.constants.items():
            t = manifest.tensors[tensor]
            constants[port] = external(tensor, np.dtype(t.dtype), t.shape, t.offset, t.bytes, plan)
    model = onnx.load(plan / manifest.graphs[name].file, load_external_data=False)
    return ir.to_proto(specialise(ir.from_proto(model), sizes, constants))


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    item: int
    """Bytes of an element."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.size * self.item


def _item(elem_type: int) -> int:
    return int(onnx.helper.tensor_dtype_to_np_dtype(elem_type).itemsize)


def _tensors(model: onnx.ModelProto, name: str) -> dict[str, _Tensor]:
    """Every value of a static graph, by ONNX's shape inference. BenchmarkError if one is unknown."""
    del model.graph.value_info[:]
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True, strict_mode=True).graph
    found = {i.name: _Tensor(tuple(i.dims), _item(i.data_type)) for i in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        tensor = value.type.tensor_type
        if all(d.HasField("dim_value") for d in tensor.shape.dim):
            found[value.name] = _Tensor(tuple(d.dim_value for d in tensor.shape.dim), _item(tensor.elem_type))
    unknown = [o for node in graph.node for o in node.output if o and o not in found]
    if unknown:
        raise BenchmarkError(
            f"{name}: the shape of {unknown[0]!r} is unknown; export the plan again with this version"
        )
    return found


def count_graph(model: onnx.ModelProto, name: str) -> GraphCount:
    """Count one static graph."""
    tensors, graph = _tensors(model, name), model.graph
    fixed = {i.name for i in graph.initializer} | {i.name for i in graph.input if i.name.startswith(FUSION)}
    weights: dict[str, int] = {}
    weight_bytes = 0
    flops: Counter[str] = Counter()
    activation: Counter[str] = Counter()
    products: Counter[Gemm] = Counter()
    for node in graph.node:
        if all(i in fixed for i in node.input if i):
            fixed.update(node.output)
            continue
        for read, elements in _weights_of(node, tensors, fixed):
            if read not in weights:
                weights[read] = elements
                weight_bytes += elements * tensors[read].item
        product = _product(node, tensors, fixed)
        if product is not None:
            products[product] += 1
            flops[node.op_type] += product.flops
        activation[node.op_type] += _moved(node, tensors, fixed)
    past = [tensors[v.name] for v in graph.input if v.name.startswith("past_")]
    new = [tensors[v.name] for v in graph.output if v.name.startswith("new_")]
    other = [
        tensors[v.name].bytes
        for v in (*graph.input, *graph.output)
        if not v.name.startswith(("past_", "new_", FUSION)) and v.name != "logits"
    ]
    return GraphCount(
        graph=name,
        nodes=len(graph.node),
        ops=dict(Counter(node.op_type for node in graph.node)),
        gemms=tuple(Gemm(p.kind, p.batch, p.M, p.N, p.K, count) for p, count in products.items()),
        flops_by_op=dict(flops),
        weights=weights,
        weight_bytes=weight_bytes,
        stored=dict(_stored(graph)),
        kv_read=sum(t.size for t in past),
        kv_written=sum(t.size for t in new),
        kv_bytes=sum(t.bytes for t in (*past, *new)),
        io_bytes=sum(other),
        activation_bytes={op: value for op, value in activation.items() if value},
    )


def _weights_of(node: onnx.NodeProto, tensors: Mapping[str, _Tensor], fixed: set[str]) -> Iterator[tuple[str, int]]:
    """Weights that a node reads, with the number of elements; shapes and indices (integers) are none."""
    if node.op_type in VIEWS:
        return
    for position, name in enumerate(node.input):
        if name in fixed and tensors[name].item <= 4:
            looked_up = node.op_type == "Gather" and position == 0
            yield name, min(tensors[name].size, tensors[node.output[0]].size) if looked_up else tensors[name].size


def _product(node: onnx.NodeProto, tensors: Mapping[str, _Tensor], fixed: set[str]) -> Gemm | None:
    if node.op_type not in ("MatMul", "Gemm", "Conv"):
        return None
    a, b, out = (tensors[n].shape for n in (node.input[0], node.input[1], node.output[0]))
    if node.op_type == "Conv":
        groups = next((x.i for x in node.attribute if x.name == "group"), 1)
        return Gemm("conv", groups, out[0] * math.prod(out[2:]), out[1] // groups, math.prod(b[1:]))
    if node.op_type == "Gemm":
        K = a[0] if any(x.name == "transA" and x.i for x in node.attribute) else a[1]
        return Gemm("weight", 1, out[0], out[1], K)
    if len(b) == 2 and node.input[1] in fixed:
        return Gemm("weight", 1, math.prod(a[:-1]), b[1], b[0])
    kind = "weight" if {node.input[0], node.input[1]} & fixed else "activation"
    return Gemm(kind, math.prod(out[:-2]), out[-2], out[-1], a[-1])


def _moved(node: onnx.NodeProto, tensors: Mapping[str, _Tensor], fixed: set[str]) -> int:
    """Bytes of activations that a node reads and writes."""
    if node.op_type in VIEWS:
        return 0
    written = sum(tensors[o].bytes for o in node.output if o)
    if node.op_type in PICKS:
        return 2 * written
    return written + sum(tensors[i].bytes for i in node.input if i and i not in fixed)


def _stored(graph: onnx.GraphProto) -> Iterator[tuple[int, int]]:
    for initializer in graph.initializer:
        where = {entry.key: entry.value for entry in initializer.external_data}
        if "length" in where:
            yield int(where.get("offset", 0)), int(where["length"])


def count_image(plan: Path, batch: int = 1) -> ImageCount:
    """Count the stages of `batch` images of a plan. BenchmarkError for what is no plan, or can't be counted."""
    if batch < 1:
        raise BenchmarkError(f"batch is {batch}; give a number from 1")
    manifest = open_manifest(plan)

    def stage(name: str, graphs: Sequence[str], of: int = batch, runs: int = 1) -> Stage:
        first, *others = (count_graph(static_graph(plan, manifest, graph, of), graph) for graph in graphs)
        return Stage(name=name, count=sum(others, first), runs=runs)

    branch = manifest.model.default_branch
    controls = [name for name in ("control", f"control.{branch}") if name in manifest.graphs]
    conditions = [name for name in ("condition", f"condition.{branch}") if name in manifest.graphs]
    scales = [
        stage(f"scale_{k}", [f"step.{k:02d}", *([f"branch.{branch}.{k:02d}"] if branch is not None else [])])
        for k in range(len(manifest.scales))
    ]
    stages = [*([stage("control", controls)] if controls else []), stage("condition", conditions), *scales]
    stages.append(stage("decoder", ["decoder"], 1, batch))
    return ImageCount(batch=batch, stages=tuple(stages))


def stored_weights(plan: Path, batch: int = 1) -> tuple[int, int]:
    """(bytes of weights.bin that some graph of the plan refers to, each once; bytes of the whole file)."""
    manifest = open_manifest(plan)
    ranges: dict[int, int] = {t.offset: t.bytes for t in manifest.tensors.values()}
    for one in manifest.parameters.values():
        ranges[one.offset] = max(one.bytes, ranges.get(one.offset, 0))
    for graph in manifest.graphs.values():
        for offset, length in _stored(onnx.load(plan / graph.file, load_external_data=False).graph):
            ranges[offset] = max(length, ranges.get(offset, 0))
    covered, end = 0, 0
    for offset, length in sorted(ranges.items()):
        covered += max(0, offset + length - max(offset, end))
        end = max(end, offset + length)
    return covered, manifest.files[WEIGHTS].bytes

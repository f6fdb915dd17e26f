"""What a picture costs by count: operations, weights, K/V and activations of a plan's own graphs. Nothing is run.

    python -m benchmarks.counting d16.plan            # per stage, by kind of node, and what a GPU could do at best
    python -m benchmarks.counting d16.plan --batch 1,4

The graphs are the plan's (docs/reference/plan-format.md) with every size fixed: the static steps where the plan has
them, else the one with named dimensions, specialised in the same way. Weights are not loaded. Guidance is on: 2B
rows.

An operation is a multiplication or an addition; a matrix product of M×K by K×N has 2·M·N·K. Only products and
convolutions are counted so. All else is told in bytes: what a node reads and writes if nothing is fused, which is the
most that it can be. Nodes on weights alone (casts of stored halves) are an engine's work when it opens a graph and
are left out of both. B pictures; R rows; S side of a scale; T tokens seen; C width.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from benchmarks.harness.machine import BenchmarkError, markdown_table
from car_export.trace import specialise
from car_export.weights import external
from car_runtime.errors import PlanError
from car_runtime.format.manifest import WEIGHTS, Manifest, read_manifest

VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Shape")
"""Nodes that give the same bytes another shape."""
PICKS = ("Gather", "Slice")
"""Nodes that read no more of their first input than they write."""
FUSED = ("Gelu", "LayerNormalization", "InstanceNormalization", "Softmax", "TopK", "CumSum")
"""Nodes that would be several if the exporter wrote them out, and whose number is therefore watched."""


@dataclass(frozen=True)
class Product:
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
    """One run of one graph."""

    graph: str
    nodes: int
    ops: dict[str, int]
    """Nodes of each kind, as they are in the graph."""
    products: tuple[Product, ...]
    flops_by_op: dict[str, int]
    weights: dict[str, int]
    """Elements that are read of each weight, by its name in the graph: of a table, the rows that are looked up."""
    weight_bytes: int
    """The same in bytes of the type that the graph computes with."""
    stored: dict[int, int]
    """Where the graph's weights lie in weights.bin: offset → bytes."""
    kv_read: int
    """Elements of the past's keys and values."""
    kv_written: int
    kv_bytes: int
    """Both in bytes."""
    io_bytes: int
    """All other inputs and outputs; logits, which a picture doesn't need, are left out."""
    activation_bytes: dict[str, int]
    """Bytes that nodes of each kind read and write of activations, unfused."""

    @property
    def flops(self) -> int:
        return sum(self.flops_by_op.values())

    @property
    def weight_elements(self) -> int:
        return sum(self.weights.values())


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a picture's way, named as in `Result.timings`."""

    name: str
    count: GraphCount
    runs: int
    """How often its graph runs for one batch: the decoder takes one picture at a time."""


@dataclass(frozen=True, kw_only=True)
class ImageCount:
    """All stages of one batch of pictures that nothing was computed for before."""

    batch: int
    stages: tuple[Stage, ...]

    def total(self, what: str) -> int:
        """Sum of a number over all runs of all graphs."""
        return sum(getattr(s.count, what) * s.runs for s in self.stages)

    def per_op(self, what: str) -> Counter[str]:
        """The same for `ops`, `flops_by_op` and `activation_bytes`."""
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
    """A graph of the plan for `batch` pictures with every dimension a number; weights stay where they are.

    name: a graph of the manifest, or "step.KK" for one scale.
    """
    static = f"{name}.b{batch}"
    if static in manifest.graphs:
        return onnx.load(plan / manifest.graphs[static].file, load_external_data=False)
    sizes, constants = {"B": batch, "R": 2 * batch}, {}
    if name.startswith("step."):
        scale = manifest.scales[int(name.removeprefix("step."))]
        sizes |= {"S": scale.side, "P": scale.start, "T": scale.next_side}
        for port, tensor in scale.constants.items():
            t = manifest.tensors[tensor]
            constants[port] = external(tensor, _numpy_dtype(t.dtype), t.shape, t.offset, t.bytes, plan)
        name = "step"
    model = onnx.load(plan / manifest.graphs[name].file, load_external_data=False)
    return ir.to_proto(specialise(ir.from_proto(model), sizes, constants))


def _numpy_dtype(name: str) -> Any:
    import numpy as np

    return np.dtype(name)


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
    """Every value of a static graph, by ONNX's shape inference. BenchmarkError if one can't be told."""
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
            f"{name}: the shape of {unknown[0]!r} can't be told; export the plan again with this version"
        )
    return found


def count_graph(model: onnx.ModelProto, name: str) -> GraphCount:
    """Count one static graph."""
    tensors, graph = _tensors(model, name), model.graph
    fixed = {i.name for i in graph.initializer}
    weights: dict[str, int] = {}
    weight_bytes = 0
    flops: Counter[str] = Counter()
    activation: Counter[str] = Counter()
    products: Counter[Product] = Counter()
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
        if not v.name.startswith(("past_", "new_")) and v.name != "logits"
    ]
    return GraphCount(
        graph=name,
        nodes=len(graph.node),
        ops=dict(Counter(node.op_type for node in graph.node)),
        products=tuple(Product(p.kind, p.batch, p.M, p.N, p.K, count) for p, count in products.items()),
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


def _product(node: onnx.NodeProto, tensors: Mapping[str, _Tensor], fixed: set[str]) -> Product | None:
    if node.op_type not in ("MatMul", "Gemm", "Conv"):
        return None
    a, b, out = (tensors[n].shape for n in (node.input[0], node.input[1], node.output[0]))
    if node.op_type == "Conv":
        groups = next((x.i for x in node.attribute if x.name == "group"), 1)
        return Product("conv", groups, out[0] * math.prod(out[2:]), out[1] // groups, math.prod(b[1:]))
    if node.op_type == "Gemm":
        K = a[0] if any(x.name == "transA" and x.i for x in node.attribute) else a[1]
        return Product("weight", 1, out[0], out[1], K)
    if len(b) == 2 and node.input[1] in fixed:
        return Product("weight", 1, math.prod(a[:-1]), b[1], b[0])
    kind = "weight" if {node.input[0], node.input[1]} & fixed else "activation"
    return Product(kind, math.prod(out[:-2]), out[-2], out[-1], a[-1])


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
    """Count the stages of `batch` pictures of a plan. BenchmarkError for what is no plan, or can't be counted."""
    if batch < 1:
        raise BenchmarkError(f"batch is {batch}; give a number from 1")
    manifest = open_manifest(plan)

    def stage(name: str, graph: str, of: int, runs: int = 1) -> Stage:
        return Stage(name=name, count=count_graph(static_graph(plan, manifest, graph, of), graph), runs=runs)

    control = [stage("control", "control", batch)] if "control" in manifest.graphs else []
    scales = [stage(f"scale_{k}", f"step.{k:02d}", batch) for k in range(len(manifest.scales))]
    stages = [*control, stage("condition", "condition", batch), *scales, stage("decoder", "decoder", 1, batch)]
    return ImageCount(batch=batch, stages=tuple(stages))


def extrapolate(few: GraphCount, more: GraphCount, steps: int) -> GraphCount:
    """What a graph counts that has `steps` times as much beyond `few` as `more` has.

    Of graphs that differ in depth alone everything counted grows by the same amount with every block: two depths tell
    exactly of each third that lies a whole number of their differences further. Weights come as one sum, without
    places in weights.bin. BenchmarkError if more than the depth differs.
    """

    def beyond(a: int, b: int) -> int:
        return a + steps * (b - a)

    def each(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
        return {key: beyond(a.get(key, 0), b.get(key, 0)) for key in {**a, **b}}

    sizes = [{dataclasses.replace(p, count=1): p.count for p in graph.products} for graph in (few, more)]
    if not sizes[0].keys() == sizes[1].keys():
        raise BenchmarkError(
            f"{few.graph}: {more.graph} has products of other sizes; give two graphs that differ in depth alone"
        )
    return GraphCount(
        graph=few.graph,
        nodes=beyond(few.nodes, more.nodes),
        ops=each(few.ops, more.ops),
        products=tuple(dataclasses.replace(p, count=beyond(n, sizes[1][p])) for p, n in sizes[0].items()),
        flops_by_op=each(few.flops_by_op, more.flops_by_op),
        weights={"all": beyond(few.weight_elements, more.weight_elements)},
        weight_bytes=beyond(few.weight_bytes, more.weight_bytes),
        stored={},
        kv_read=beyond(few.kv_read, more.kv_read),
        kv_written=beyond(few.kv_written, more.kv_written),
        kv_bytes=beyond(few.kv_bytes, more.kv_bytes),
        io_bytes=beyond(few.io_bytes, more.io_bytes),
        activation_bytes=each(few.activation_bytes, more.activation_bytes),
    )


def stored_weights(plan: Path, batch: int = 1) -> tuple[int, int]:
    """(bytes of weights.bin that some graph of the plan refers to, each once; bytes of the whole file)."""
    manifest = open_manifest(plan)
    ranges: dict[int, int] = {t.offset: t.bytes for t in manifest.tensors.values()}
    for graph in manifest.graphs.values():
        for offset, length in _stored(onnx.load(plan / graph.file, load_external_data=False).graph):
            ranges[offset] = max(length, ranges.get(offset, 0))
    covered, end = 0, 0
    for offset, length in sorted(ranges.items()):
        covered += max(0, offset + length - max(offset, end))
        end = max(end, offset + length)
    return covered, manifest.files[WEIGHTS].bytes


# ---- What a machine could do at best ----


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU by its maker's figures."""

    name: str
    flops_per_s: float
    bytes_per_s: float
    precision_bytes: int


RTX_4090 = Card(
    name="RTX 4090, FP16 (dense, sums in FP32)", flops_per_s=165e12, bytes_per_s=1.008e12, precision_bytes=2
)
RTX_4090_FP32 = Card(
    name="RTX 4090, FP32 (without TF32)", flops_per_s=82.6e12, bytes_per_s=1.008e12, precision_bytes=4
)


def roofline(
    counts: ImageCount, flops_per_s: float, bytes_per_s: float, precision_bytes: int
) -> list[dict[str, float | str]]:
    """The least time of each stage and of the picture, by count: max(operations ÷ rate, bytes ÷ rate).

    Bytes: every weight, K/V, input and output once, in `precision_bytes` for weights and K/V; activations in between
    are taken to stay in caches. One row per stage, then "image", their sum: {"stage", "compute_s", "memory_s",
    "floor_s", "bound"}. Nothing in it is measured.
    """
    rows: list[dict[str, float | str]] = []
    for stage in counts.stages:
        c = stage.count
        size = (c.weight_elements + c.kv_read + c.kv_written) * precision_bytes + c.io_bytes
        compute, memory = stage.runs * c.flops / flops_per_s, stage.runs * size / bytes_per_s
        floor, bound = max(compute, memory), "compute" if compute > memory else "memory"
        rows.append({"stage": stage.name, "compute_s": compute, "memory_s": memory, "floor_s": floor, "bound": bound})
    sums = {key: sum(float(row[key]) for row in rows) for key in ("compute_s", "memory_s", "floor_s")}
    return [*rows, {"stage": "image", **sums, "bound": ""}]


# ---- Tables ----


def stage_rows(counts: ImageCount) -> list[dict[str, Any]]:
    """One row per stage and their sum: what one batch costs."""
    columns = {
        "GFLOP": lambda c: c.flops / 1e9,
        "weights, MB": lambda c: c.weight_bytes / 1e6,
        "K/V, MB": lambda c: c.kv_bytes / 1e6,
        "inputs and outputs, MB": lambda c: c.io_bytes / 1e6,
        "activations unfused, MB": lambda c: sum(c.activation_bytes.values()) / 1e6,
        "nodes": lambda c: c.nodes,
        "transposes": lambda c: c.ops.get("Transpose", 0),
        "fused nodes": lambda c: sum(c.ops.get(op, 0) for op in FUSED),
    }
    rows = [
        {"stage": s.name} | {name: value(s.count) * s.runs for name, value in columns.items()} for s in counts.stages
    ]
    return [*rows, {"stage": "image"} | {name: sum(row[name] for row in rows) for name in columns}]


def op_rows(counts: ImageCount) -> list[dict[str, Any]]:
    """One row per kind of node, most bytes first."""
    nodes, flops, moved = (counts.per_op(what) for what in ("ops", "flops_by_op", "activation_bytes"))
    return [
        {"node": op, "number": nodes[op], "GFLOP": flops[op] / 1e9, "activations unfused, MB": moved[op] / 1e6}
        for op in sorted(nodes, key=lambda op: -moved[op])
    ]


def roofline_rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What `roofline` found, in milliseconds for a table."""
    return [
        {
            "stage": row["stage"],
            "arithmetic, ms": 1e3 * float(row["compute_s"]),
            "memory, ms": 1e3 * float(row["memory_s"]),
            "at best, ms": 1e3 * float(row["floor_s"]),
            "bound by": row["bound"],
        }
        for row in rows
    ]


def product_rows(counts: ImageCount) -> list[dict[str, Any]]:
    """The matrix products of each stage, by size."""
    return [
        {
            "stage": s.name,
            "kind": p.kind,
            "batch": p.batch,
            "M": p.M,
            "N": p.N,
            "K": p.K,
            "count": p.count * s.runs,
            "GFLOP": p.flops * s.runs / 1e9,
        }
        for s in counts.stages
        for p in s.count.products
    ]


def parse_batches(text: str) -> tuple[int, ...]:
    """ "1,4" as numbers from 1, for argparse."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1 or len(set(numbers)) != len(numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of different numbers from 1; give e.g. 1,4")
    return numbers


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.counting",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("plan", type=Path, help="plan directory")
    parser.add_argument("--batch", type=parse_batches, default=(1,), help="batch sizes, e.g. 1,4 (default: 1)")
    parser.add_argument("--products", action="store_true", help="also every size of matrix product")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        for batch in args.batch:
            counts = count_image(args.plan, batch)
            print(f"\n{args.plan.name}, batch {batch}, guided: counted, per batch\n")
            print(markdown_table(stage_rows(counts)))
            print("\nby kind of node\n")
            print(markdown_table(op_rows(counts)))
            if args.products:
                print("\nmatrix products\n")
                print(markdown_table(product_rows(counts)))
            print(f"\n{RTX_4090.name}: computed from the counts, not measured\n")
            card = (RTX_4090.flops_per_s, RTX_4090.bytes_per_s, RTX_4090.precision_bytes)
            print(markdown_table(roofline_rows(roofline(counts, *card))))
    except BenchmarkError as error:
        print(f"benchmarks.counting: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

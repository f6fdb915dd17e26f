"""The form in which a compiling engine gets a plan's graphs (docs/reference/plan-format.md, "Engines").

Rewrites that change no result by more than rounding. They look at the graph alone: the weights stay references into
`weights.bin`.

Shapes: R rows, B images, H heads, C width, S side of the scale, P past tokens, N = P + S·S keys, V codes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common as common_passes

from car_export.errors import GraphError, TopKError
from car_export.graph_utils import constant, numbers, split_sequences, substitute

TOPK_LIMIT = 3840
"""The most elements that TensorRT's TopK returns."""
KEY_BIAS = "key_bias"
DUMMY_BIAS = -1e9
"""`key_bias` of the dummy past token of the first scale: e to this power is exactly 0 in float32."""


def load_graph(path: Path) -> ir.Model:
    """A graph of a plan. Its weights stay on disk."""
    return ir.load(path)


def to_bytes(model: ir.Model) -> bytes:
    """A graph as ONNX, its weights still references into `weights.bin`: the same bytes for the same graph."""
    return onnx_bytes(ir.to_proto(model))


def onnx_bytes(proto: onnx.ModelProto) -> bytes:
    """A graph as ONNX: the same bytes for the same graph."""
    data: bytes = proto.SerializeToString(deterministic=True)
    return data


def engine_form(model: ir.Model) -> ir.Model:
    """Rewrite any graph of a plan (in place) into what TensorRT's parser reads, and return it.

    - uint8 images become float as they come in, and uint8 as they go out: TensorRT moves no uint8 around.
    - A split into a sequence becomes a Split: TensorRT has no sequences.
    """
    _cast_images(model.graph)
    split_sequences(model.graph)
    common_passes.RemoveUnusedNodesPass()(model)
    return model


def engine_step(model: ir.Model, vocab: int) -> ir.Model:
    """Rewrite the plan's `step` (in place) into the form that engines are built from, and return it.

    - `key_bias` f32 [N], a new last input, is added to the attention scores: the first scale gets one dummy token as
      its past (zeros, with `DUMMY_BIAS`), so that no input is ever empty.
    - A sort of more than `TOPK_LIMIT` codes becomes two of half as many.
    - Rows are always R = 2B: guidance takes halves of the logits, the next input is doubled in format 1 (in format 2
      it is taken by `rows`). Nothing is computed from a shape any more that would have to be copied to the device.
    - Queries, keys and values are split on an axis of their own: an engine holds their matrices once.

    Raises GraphError, or TopKError for a vocabulary that two halves don't hold.
    """
    _add_key_bias(model.graph)
    _split_sorts(model.graph, vocab)
    _halve_rows(model.graph)
    engine_form(model)
    _split_by_segments(model.graph)
    return model


def engine_branch(model: ir.Model) -> ir.Model:
    """Rewrite a graph `branch.NAME` of a plan (in place) as `engine_step` does a step, and return it.

    One without attention has no past, and no `key_bias` either.
    """
    if any(str(value.name).startswith("past_k_") for value in model.graph.inputs):
        _add_key_bias(model.graph)
    engine_form(model)
    _split_by_segments(model.graph)
    return model


# -- Turing ------------------------------------------------------------------------------------------------------


def sum_float_products(model: ir.Model) -> ir.Model:
    """Write float32 matrix products (in place) as products of elements and their sums, and return the model.

    For GPUs whose compiler has no float32 matrix product (Turing, sm75): in a half-precision plan those that are left
    are small, the resizing of f̂ and the distances to the codes.
    """
    graph = model.graph
    inferred = onnx.shape_inference.infer_shapes(ir.to_proto(model)).graph
    floats = {
        value.name
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    }
    floats |= {tensor.name for tensor in inferred.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    products = [n for n in graph if n.op_type == "MatMul" and n.inputs[0] is not None and n.inputs[0].name in floats]
    for node in products:
        name = str(node.name)
        # [.., M, K, 1] · [.., 1, K, N], summed over K.
        sides = []
        for i, (value, axis) in enumerate(zip(node.inputs, (-1, -3), strict=True)):
            axes = constant(graph, f"{name}_axis_{i}", [axis])
            wide = ir.node("Unsqueeze", [value, axes], name=f"{name}_wide_{i}")
            wide.outputs[0].name = f"{name}_wide_{i}"
            sides.append(wide)
        terms = ir.node("Mul", [side.outputs[0] for side in sides], name=f"{name}_terms")
        terms.outputs[0].name = f"{name}_terms"
        over = constant(graph, f"{name}_over", [-2])
        total = ir.node("ReduceSum", [terms.outputs[0], over], {"keepdims": 0}, name=f"{name}_sum")
        total.outputs[0].name = f"{name}_summed"
        graph.insert_before(node, [*sides, terms, total])
        substitute(graph, node, total.outputs[0])
    return model


# -- what the parser reads ---------------------------------------------------------------------------------------


def _cast_images(graph: ir.Graph) -> None:
    for image in [v for v in graph.inputs if v.dtype == ir.DataType.UINT8]:
        users = [(node, i) for node, i in image.uses() if node.op_type not in ("Shape", "Cast")]
        if not users:
            continue
        cast = ir.node("Cast", [image], {"to": ir.DataType.FLOAT}, name=f"{image.name}_cast")
        cast.outputs[0].name = f"{image.name}_float"
        graph.insert_before(graph[0], cast)
        for node, i in users:
            node.replace_input_with(i, cast.outputs[0])
    for image in [v for v in graph.outputs if v.dtype == ir.DataType.UINT8]:
        move = image.producer()
        before = move.inputs[0].producer() if move is not None and move.inputs[0] is not None else None
        if move is None or move.op_type != "Transpose" or before is None or before.op_type != "Cast":
            continue
        moved = ir.node("Transpose", [before.inputs[0]], move.attributes, name=f"{move.name}_float")
        moved.outputs[0].name = f"{image.name}_float"
        cast = ir.node("Cast", moved.outputs, {"to": ir.DataType.UINT8}, name=f"{image.name}_cast")
        graph.insert_before(move, [moved, cast])
        substitute(graph, move, cast.outputs[0])


# -- attention ---------------------------------------------------------------------------------------------------


def _add_key_bias(graph: ir.Graph) -> None:
    """Every softmax over keys that came from the cache gets `key_bias` on its float32 scores."""
    bias = ir.Value(name=KEY_BIAS, shape=ir.Shape(["N"]), type=ir.TensorType(ir.DataType.FLOAT))
    softmaxes = [_attention(value) for value in graph.inputs if str(value.name).startswith("past_k_")]
    if not softmaxes:
        raise GraphError("the step has no past_k inputs; export the plan again")
    for softmax in softmaxes:
        scores = softmax.inputs[0]
        biased = ir.node("Add", [scores, bias], name=f"{softmax.name}_bias")
        biased.outputs[0].name = f"{softmax.name}_biased"
        graph.insert_before(softmax, biased)
        softmax.replace_input_with(0, biased.outputs[0])
    graph.inputs.append(bias)


def _attention(past: ir.Value) -> ir.Node:
    """A layer's softmax, behind its past keys: past → Concat → (Reshape) → Transpose → MatMul → (Cast) → Softmax."""
    node = None
    value: ir.Value = past
    for _ in range(7):
        users = [user for user, _ in value.uses()]
        following = [n for n in users if n.op_type in ("Concat", "Reshape", "Transpose", "MatMul", "Cast", "Softmax")]
        if len(following) != 1:
            break
        node = following[0]
        if node.op_type == "Softmax":
            return node
        value = node.outputs[0]
    at = f"node {node.name!r} ({node.op_type})" if node is not None else "no node"
    raise GraphError(
        f"no softmax was found behind {past.name}: the way ends at {at}; "
        "export the plan again with the versions of torch and onnxscript that the project names",
        node.name if node is not None else None,
    )


def _split_by_segments(graph: ir.Graph) -> None:
    """Products [·, ·, n·C] that are split into n equal parts, queries, keys and values, become [·, ·, n, C] first.

    Split on the last axis, TensorRT for RTX has the parts of a single token's product in another order than those of
    more tokens (values, keys, queries), and holds the matrix in both: 0.15 GB more in a d16's float16 engine.
    """
    for split in [node for node in graph if node.op_type == "Split" and node.attributes.get_int("axis", 0) == 2]:
        product, count = split.inputs[0], len(split.outputs)
        producer = product.producer() if product is not None else None
        sizes = numbers(split.inputs[1]) if len(split.inputs) > 1 else None
        if producer is None or producer.op_type != "MatMul" or (sizes is not None and len(set(sizes.tolist())) > 1):
            continue
        name = str(split.name)
        shape, axis = constant(graph, f"{name}_shape", [0, 0, count, -1]), constant(graph, f"{name}_axis", [2])
        wide = ir.node("Reshape", [product, shape], name=f"{name}_wide")
        wide.outputs[0].name = f"{name}_wide"
        parts = ir.node("Split", wide.outputs, {"axis": 2, "num_outputs": count}, num_outputs=count)
        parts.name = f"{name}_parts"
        graph.insert_before(split, [wide, parts])
        for i, (old, part) in enumerate(zip(split.outputs, parts.outputs, strict=True)):
            part.name = f"{name}_part_{i}"
            flat = ir.node("Squeeze", [part, axis], name=f"{name}_flat_{i}")
            flat.outputs[0].name = f"{name}_flat_{i}"
            graph.insert_before(split, flat)
            old.replace_all_uses_with(flat.outputs[0])
        graph.remove(split, safe=True)


# -- sampling ----------------------------------------------------------------------------------------------------


def _split_sorts(graph: ir.Graph, vocab: int) -> None:
    """TopK over the whole vocabulary, of values alone, in two halves where it is too long for one."""
    if vocab <= TOPK_LIMIT:
        return
    if vocab > 2 * TOPK_LIMIT:
        raise TopKError(
            f"the vocabulary has {vocab} codes, but TensorRT sorts at most {2 * TOPK_LIMIT} "
            f"(two TopK of {TOPK_LIMIT} each); run this plan with --backend ort-cpu or ort-cuda"
        )
    for node in [n for n in graph if n.op_type == "TopK"]:
        if node.outputs[1].uses() or not node.attributes.get_int("largest", 1):
            raise GraphError(
                f"node {node.name!r} (TopK) is not the descending sort of the codes; export the plan again", node.name
            )
        _split_sort(graph, node, vocab)


def _split_sort(graph: ir.Graph, sort: ir.Node, vocab: int) -> None:
    """Largest half, descending, then smallest half, which comes ascending and is reversed.

    Together they are the sorted row exactly, also where values are equal.
    """
    name, values = str(sort.name), sort.inputs[0]
    assert values is not None
    upper = vocab - vocab // 2
    parts, nodes = [], []
    for kind, count, largest in (("upper", upper, 1), ("lower", vocab - upper, 0)):
        k = constant(graph, f"{name}_{kind}_k", [count])
        top = ir.node("TopK", [values, k], {"axis": -1, "largest": largest, "sorted": 1}, num_outputs=2)
        top.name = f"{name}_{kind}"
        top.outputs[0].name, top.outputs[1].name = f"{name}_{kind}_values", f"{name}_{kind}_indices"
        nodes.append(top)
        parts.append(top.outputs[0])
    backward = [constant(graph, f"{name}_{what}", [number]) for what, number in _BACKWARD]
    reverse = ir.node("Slice", [parts[1], *backward], name=f"{name}_reverse")
    reverse.outputs[0].name = f"{name}_lower_descending"
    whole = ir.node("Concat", [parts[0], reverse.outputs[0]], {"axis": -1}, name=f"{name}_whole")
    whole.outputs[0].name = f"{name}_sorted"
    graph.insert_before(sort, [*nodes, reverse, whole])
    substitute(graph, sort, whole.outputs[0])


_BACKWARD = (("start", -1), ("end", np.iinfo(np.int64).min), ("axis", -1), ("step", -1))
"""Slice's inputs that reverse the last axis."""


# -- guidance rows -----------------------------------------------------------------------------------------------


def _halve_rows(graph: ir.Graph) -> None:
    """Replace what is computed from R and B by what it is when R = 2B.

    The first B and the last B rows of x, by Slice, are its halves; x tiled R ÷ B times is x twice. Plans of earlier
    exports have row numbers instead: Gather(x, 0 … B−1), Gather(x, R−B … R−1), and one of 0 … B−1, 0 … B−1.
    """
    halves: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    for node in [n for n in graph if n.op_type in ("Gather", "Slice", "Tile")]:
        kind = _row_kind(node)
        source = node.inputs[0]
        if kind is None or source is None:
            continue
        if kind == "twice":
            twice = ir.node("Concat", [source, source], {"axis": 0}, name=f"{node.name}_twice")
            graph.insert_before(node, twice)
            new = twice.outputs[0]
        else:
            if source not in halves:
                split = ir.node("Split", [source], {"axis": 0, "num_outputs": 2}, num_outputs=2)
                split.name = f"{node.name}_halves"
                split.outputs[0].name, split.outputs[1].name = f"{split.name}_0", f"{split.name}_1"
                graph.insert_before(node, split)
                halves[source] = (split.outputs[0], split.outputs[1])
            new = halves[source][kind == "last"]
        substitute(graph, node, new)
    ranges = [n for n in graph if n.op_type == "Range" and any(True for _ in _readers(n, graph))]
    if ranges:
        raise GraphError(
            f"node {ranges[0].name!r} (Range) still feeds the step's outputs; "
            "export the plan again with the versions of torch and onnxscript that the project names",
            ranges[0].name,
        )


def _row_kind(node: ir.Node) -> str | None:
    """Which rows a node takes by R and B: the "first" B, the "last" B, those B "twice"; None for any other node."""
    ops = [{n.op_type for n in _producers(value)} if value is not None else set[str]() for value in node.inputs]
    if node.op_type == "Tile":
        return "twice" if "Div" in ops[1] else None
    if node.op_type == "Slice":
        start, end = ops[1], ops[2]
        return "last" if "Sub" in start else "first" if "Shape" in end and not start else None
    if node.attributes.get_int("axis", 0) != 0 or "Range" not in ops[1]:
        return None
    return "twice" if "Where" in ops[1] else "last" if "Add" in ops[1] else "first"


def _producers(value: ir.Value) -> Iterator[ir.Node]:
    """The nodes that a value is computed by, all the way up."""
    seen: set[ir.Node] = set()
    waiting = [value.producer()]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [v.producer() for v in node.inputs if v is not None]


def _readers(node: ir.Node, graph: ir.Graph) -> Iterable[ir.Value]:
    """The graph outputs that depend on a node."""
    seen: set[ir.Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        for value in current.outputs:
            if value.is_graph_output():
                yield value
            waiting += [user for user, _ in value.uses()]

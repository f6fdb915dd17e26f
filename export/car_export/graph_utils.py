"""Small edits of ONNX graphs, by onnx_ir."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from car_export.errors import GraphError


def split_sequences(graph: ir.Graph) -> None:
    """SplitToSequence whose parts are all picked by SequenceAt: a Split."""
    for node in [n for n in graph if n.op_type == "SplitToSequence"]:
        picks = [user for user, _ in node.outputs[0].uses()]
        wanted = [numbers(pick.inputs[1]) for pick in picks if pick.op_type == "SequenceAt"]
        sizes = numbers(node.inputs[1]) if len(node.inputs) > 1 else None
        if sizes is None or None in wanted or len(wanted) != len(picks) or not node.attributes.get_int("keepdims", 1):
            raise GraphError(
                f"node {node.name!r} (SplitToSequence) has no fixed parts; export the plan again", node.name
            )
        places = [int(number[0]) for number in wanted if number is not None]
        # One size for all parts, or one each.
        counts = np.repeat(sizes, max(places) + 1) if len(sizes) == 1 else sizes
        parts = ir.node(
            "Split",
            [node.inputs[0], constant(graph, f"{node.name}_sizes", counts.tolist())],
            {"axis": node.attributes.get_int("axis", 0)},
            num_outputs=len(counts),
            name=f"{node.name}_parts",
        )
        for i, value in enumerate(parts.outputs):
            value.name = f"{node.name}_part_{i}"
        graph.insert_before(node, parts)
        for pick, place in zip(picks, places, strict=True):
            substitute(graph, pick, parts.outputs[place])
        graph.remove(node, safe=True)


def plain_shape(graph: ir.Graph, reshape: ir.Node) -> None:
    """Let a Reshape read its shape from a constant, if what is computed there can be written with 0 (as in the input)
    and one −1 (the rest).

    An engine can then infer all shapes of a run before it starts: OpenVINO stops for each that is computed.
    """
    (source, target), result = reshape.inputs, reshape.outputs[0]
    if source is None or source.shape is None or result.shape is None or numbers(target) is not None:
        return
    before, after = ([dim if isinstance(dim, int) else str(dim.value) for dim in v.shape] for v in (source, result))
    shape = [
        dim if isinstance(dim, int) else 0 if i < len(before) and before[i] == dim else -1
        for i, dim in enumerate(after)
    ]
    if shape.count(-1) > 1 or 0 in after:
        return
    reshape.replace_input_with(1, constant(graph, f"{reshape.name}_shape", shape))
    reshape.attributes.pop("allowzero", None)


def numbers(value: ir.Value | None) -> np.ndarray | None:
    """A small constant, flat."""
    tensor = value.const_value if value is not None else None
    return None if tensor is None or isinstance(tensor, ir.ExternalTensor) else tensor.numpy().reshape(-1)


def substitute(graph: ir.Graph, node: ir.Node, new: ir.Value) -> None:
    """Let `new` stand for the first output of `node`, which goes; a graph output keeps its name and shape."""
    old = node.outputs[0]
    if old.is_graph_output():
        new.name, new.shape, new.type = old.name, old.shape, old.type
        old.name = f"{old.name}_before"
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def constant(graph: ir.Graph, name: str, numbers: list[int]) -> ir.Value:
    """A small int64 initializer."""
    tensor = ir.tensor(np.array(numbers, np.int64), name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(ir.DataType.INT64), const_value=tensor)
    graph.initializers[name] = value
    return value

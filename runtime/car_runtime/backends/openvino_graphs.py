"""What the `openvino` backend makes of a plan's step before it is compiled. No rewrite changes more than rounding.

Shapes: R rows, H heads of width d, G = R·H independent attentions, N tokens of this scale, T of all so far, V codes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Model = Any
"""An `openvino.Model`."""
Node = Any

LOGITS, RANKED = "logits", "ranked"
"""What the second part of a step takes instead of computing it: f32 [B, S, S, V], as they are and descending."""


class Attention(NamedTuple):
    """softmax(q·kᵀ)·v on three dimensions: what comes in, as [N or T, G, d], and the node that gives [N, G, d]."""

    q: Node
    k: Node
    v: Node
    out: Node


def transpose_in_products(ov: Any, model: Model) -> None:
    """Let the product q·kᵀ read k row by row, [G, T, d], instead of transposing its last dimension first.

    A third of the time that transposes take in a d16's last scale is left. Only the form of today's exports is known.
    """
    op = ov.opset13
    softmaxes = [node for node in model.get_ordered_ops() if node.get_type_name() == "Softmax"]
    rows = op.constant([1, 0, 2], ov.Type.i64)
    for attention in filter(None, map(_attention, softmaxes)):
        q_GNd, k_GTd, v_GTd = (op.transpose(x, rows) for x in (attention.q, attention.k, attention.v))
        weights_GNT = ov.opset8.softmax(op.matmul(q_GNd, k_GTd, False, True), -1)
        out_NGd = op.transpose(op.matmul(weights_GNT, v_GTd, False, False), rows)
        attention.out.output(0).replace(out_NGd.output(0))


def _attention(softmax: Node) -> Attention | None:
    scores, out = _producer(softmax, 0), _only_reader(softmax)
    if scores.get_type_name() != "MatMul" or out is None or out.get_type_name() != "MatMul":
        return None
    q, k, v, transposed = _producer(scores, 0), _producer(scores, 1), _producer(out, 1), _only_reader(out)
    if [_order(node) for node in (q, k, v, transposed)] != [[1, 0, 2], [1, 2, 0], [1, 0, 2], [1, 0, 2]]:
        return None
    q_NGd, k_TGd, v_TGd = (node.input(0).get_source_output() for node in (q, k, v))
    return Attention(q_NGd, k_TGd, v_TGd, transposed)


def keep_cache_in_bfloat16(ov: Any, model: Model) -> Model:
    """K and V come in and go out as bfloat16, in which they are multiplied: half the bytes, and no conversions."""
    ports = ov.preprocess.PrePostProcessor(model)
    for port in model.inputs:
        if port.get_any_name().startswith("past_"):
            ports.input(port.get_any_name()).tensor().set_element_type(ov.Type.bf16)
    for port in model.outputs:
        if port.get_any_name().startswith("new_"):
            ports.output(port.get_any_name()).tensor().set_element_type(ov.Type.bf16)
    return ports.build()


def split_at_sort(ov: Any, model: Model) -> tuple[Model, Model] | None:
    """A step as two models, up to the logits and from the sorted logits on; None if it doesn't sort all of them.

    numpy sorts a scale of 256 × 4096 logits in 3 ms on one core, OpenVINO on two in 47.
    """
    sorts = [node for node in model.get_ordered_ops() if node.get_type_name() == "TopK"]
    if len(sorts) != 1 or not _sorts_everything(sorts[0]):
        return None
    (sort,) = sorts
    logits = sort.input(0).get_source_output()
    results = {next(iter(result.input(0).get_source_output().get_names())): result for result in model.get_results()}
    given = {LOGITS: _parameter(ov, logits, LOGITS), RANKED: _parameter(ov, logits, RANKED)}
    sort.output(0).replace(given[RANKED].output(0))
    for reader in list(logits.get_target_inputs()):
        if reader.get_node().get_type_name() not in ("Result", "TopK"):
            reader.replace_source_output(given[LOGITS].output(0))
    drawn = [results[name] for name in ("tokens", "f_hat_out", "next_x")]
    first = [result for name, result in results.items() if result not in drawn]
    return _model(ov, first), _model(ov, drawn)


def _sorts_everything(topk: Node) -> bool:
    wanted, codes = topk.get_attributes(), [shape[len(shape) - 1] for shape in _shapes(topk)]
    return (
        wanted["mode"] == "max"
        and wanted["sort"] == "value"
        and wanted["axis"] in (-1, len(topk.input(0).get_partial_shape()) - 1)
        and all(V.is_static for V in codes)
        and codes[0].get_length() == codes[1].get_length()
        and not topk.output(1).get_target_inputs()
    )


def _shapes(node: Node) -> tuple[Any, Any]:
    return node.input(0).get_partial_shape(), node.output(0).get_partial_shape()


def _parameter(ov: Any, like: Any, name: str) -> Node:
    parameter = ov.opset13.parameter(like.get_partial_shape(), like.get_element_type(), name=name)
    parameter.output(0).set_names({name})
    return parameter


def _model(ov: Any, results: list[Node]) -> Model:
    """What leads to these results, with the inputs that it needs."""
    parameters, seen, waiting = [], set[str](), list(results)
    while waiting:
        node = waiting.pop()
        if node.get_name() in seen:
            continue
        seen.add(node.get_name())
        if node.get_type_name() == "Parameter":
            parameters.append(node)
        waiting += [source.get_source_output().get_node() for source in node.inputs()]
    return ov.Model(results, parameters, "step")


def _producer(node: Node, position: int) -> Node:
    return node.input(position).get_source_output().get_node()


def _only_reader(node: Node) -> Node | None:
    readers = list(node.output(0).get_target_inputs())
    return readers[0].get_node() if len(readers) == 1 else None


def _order(node: Node | None) -> list[int] | None:
    """The order of dimensions that a Transpose gives, or None."""
    if node is None or node.get_type_name() != "Transpose" or _producer(node, 1).get_type_name() != "Constant":
        return None
    return [int(axis) for axis in _producer(node, 1).get_data()]

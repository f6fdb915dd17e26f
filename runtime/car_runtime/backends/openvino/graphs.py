"""What the `openvino` backend makes of a plan's step before it is compiled. No rewrite changes more than rounding.

Shapes: R rows, H heads of width d, G = R·H independent attentions, N tokens of this scale, T of all so far, V codes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Model = Any
"""An `openvino.Model`."""
Node = Any

LOGITS, BIASED, RANKED = "logits", "biased", "ranked"
"""Outputs and inputs of a step's parts: guided logits; those plus `bias`, of a plan of format 2; these, sorted."""
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


def multiply_matrices_as_stored(ov: Any, model: Model) -> None:
    """Let products read matrices as the plan stores them, [outputs, inputs], instead of a transposed constant.

    The plugin packs that form from the mapped file; of the other it would keep a second copy in bfloat16.
    """
    for product in [node for node in model.get_ordered_ops() if node.get_type_name() == "MatMul"]:
        turned = _producer(product, 1)
        if _order(turned) != [1, 0] or product.get_attributes()["transpose_b"]:
            continue
        stored = turned.input(0).get_source_output()
        direct = ov.opset13.matmul(product.input(0).get_source_output(), stored, False, True)
        product.output(0).replace(direct.output(0))


def split_products(ov: Any, model: Model) -> list[Node]:
    """A product whose result is split becomes one product for each part, so that nothing is copied apart.

    Their matrices are rows of the one that was there, in its memory; columns, copied, of an int8 one. Returns what
    owns that memory, and has to live as long as the model and what is compiled from it.
    """
    owners = []
    for split in [node for node in model.get_ordered_ops() if node.get_type_name() == "Split"]:
        product, parts = _producer(split, 0), split.get_output_size()
        if product.get_type_name() != "MatMul" or _only_reader(product) is None:
            continue
        last = len(split.get_output_partial_shape(0)) - 1
        if _producer(split, 1).get_data().item() not in (-1, last):
            continue
        x, transposed = product.input(0).get_source_output(), product.get_attributes()["transpose_b"]
        matrix, cut = _producer(product, 1), _rows if transposed else _columns
        pieces = cut(ov, matrix, parts)
        for part, piece in zip(split.outputs(), pieces, strict=False):
            part.replace(ov.opset13.matmul(x, piece, False, transposed).output(0))
        if transposed and pieces:
            owners.append(matrix)
    return owners


def _rows(ov: Any, matrix: Node, parts: int) -> list[Node]:
    """Equal parts of a constant matrix [outputs, inputs], in its memory; none if it is no constant."""
    if matrix.get_type_name() != "Constant":
        return []
    outputs, inputs = matrix.get_output_shape(0)
    ends = [(ov.Coordinate([n * outputs // parts, at]) for n, at in ((i, 0), (i + 1, inputs))) for i in range(parts)]
    return [ov.op.Constant(ov.Tensor(matrix.tensor_view, *end), shared_memory=True) for end in ends]


def _columns(ov: Any, matrix: Node, parts: int) -> list[Node]:
    """Equal parts of an int8 matrix [inputs, outputs] with a step size for each output; none if it is no such one."""
    op = ov.opset13
    if matrix.get_type_name() != "Multiply":
        return []
    numbers, steps = _sources(matrix)
    if numbers.get_type_name() == "Subtract":
        numbers, zeros = _sources(numbers)
        if not _is_zero(zeros):
            return []
    if [numbers.get_type_name(), steps.get_type_name()] != ["Convert", "Reshape"]:
        return []
    constants = [_producer(node, 0) for node in (numbers, steps)]
    if [node.get_type_name() for node in constants] != ["Constant", "Constant"]:
        return []
    cut = zip(*(np.split(node.get_data(), parts, -1) for node in constants), strict=True)
    return [
        op.multiply(op.convert(op.constant(np.ascontiguousarray(some)), "f32"), op.constant(sizes[None]))
        for some, sizes in cut
    ]


def _is_zero(node: Node) -> bool:
    """Whether this is a constant of zeros, reshaped or converted."""
    while node.get_type_name() in ("Reshape", "Convert"):
        node = _producer(node, 0)
    return node.get_type_name() == "Constant" and not node.get_data().any()


def _sources(node: Node) -> list[Node]:
    return [source.get_source_output().get_node() for source in node.inputs()]


def fuse_unit_length(ov: Any, model: Model) -> None:
    """x ÷ ‖x‖ of the last axis in the form that the CPU plugin makes one kernel of: an RMS norm with weights 1/√d.

    As nodes of their own the length and the quotient take five times as long. A length that was clamped at 1e-12 has
    1e-24 added under its root instead.
    """
    op, f32, i64 = ov.opset13, ov.Type.f32, ov.Type.i64
    lengths = [node for node in model.get_ordered_ops() if node.get_type_name() == "ReduceL2"]
    for x, out in filter(None, map(_unit_length, lengths)):
        H, d = (x.get_partial_shape()[axis].get_length() for axis in (-2, -1))
        square = op.reduce_mean(op.power(x, op.constant(2.0, f32)), op.constant([-1], i64), True)
        root = op.sqrt(op.add(square, op.constant(1e-24 / d, f32)))
        weights = op.constant([d**-0.5] * d, f32)
        unit = op.multiply(op.multiply(x, op.divide(op.constant(1.0, f32), root)), weights)
        factor = _only_reader(out)
        if factor is not None and factor.get_type_name() == "Multiply":
            # Next to each other both factors would become one, which is no norm's weight any more.
            heads = op.reshape(unit, op.constant([0, 0, 1, H, d], i64), True)
            out, unit = factor, op.multiply(heads, factor.input(1).get_source_output())
        out.output(0).replace(unit.output(0))


def _unit_length(length: Node) -> tuple[Any, Node] | None:
    """x [N, R, H, d] and the node that gives x ÷ ‖x‖, if this ReduceL2 is that ‖x‖."""
    x, out = length.input(0).get_source_output(), _only_reader(length)
    while out is not None and out.get_type_name() in ("Maximum", "Minimum"):
        out = _only_reader(out)
    shape, axes = x.get_partial_shape(), _producer(length, 1).get_data().reshape(-1).tolist()
    if out is None or out.get_type_name() != "Divide" or len(shape) != 4 or axes not in ([-1], [3]):
        return None
    divided = out.input(0).get_source_output()
    same = (divided.get_node().get_name(), divided.get_index()) == (x.get_node().get_name(), x.get_index())
    return (x, out) if same and shape[2].is_static and shape[3].is_static else None


def keep_maps_channels_last(ov: Any, model: Model) -> None:
    """Write group norms as means over a map, so that convolutions on both sides stay in their own layout.

    The plugin's MVN wants a group's values one after the other: two copies of the map around each of a decoder's 39
    norms, a fifth of its time. As there, the squares are those of differences from the mean.
    """
    op, f32, i64 = ov.opset13, ov.Type.f32, ov.Type.i64
    over_map, in_group = op.constant([2, 3], i64), op.constant([2], i64)

    def group_mean(x_BCHW: Any, C: int, G: int) -> Node:
        """The mean of its group, for every channel: [B, C, 1, 1]."""
        mean_BGc = op.reshape(op.reduce_mean(x_BCHW, over_map, True), op.constant([0, G, C // G], i64), True)
        each = op.tile(op.reduce_mean(mean_BGc, in_group, True), op.constant([1, 1, C // G], i64))
        return op.reshape(each, op.constant([0, C, 1, 1], i64), True)

    for norm in filter(None, map(_group_norm, model.get_ordered_ops())):
        centred = op.subtract(norm.x, group_mean(norm.x, norm.channels, norm.groups))
        variance = group_mean(op.multiply(centred, centred), norm.channels, norm.groups)
        root = op.power(op.add(variance, op.constant(norm.eps, f32)), op.constant(-0.5, f32))
        scaled = op.multiply(centred, op.multiply(norm.gamma, root))
        norm.out.output(0).replace(op.add(scaled, norm.beta).output(0))


class GroupNorm(NamedTuple):
    """A group norm of a map [B, C, H, W]: the outputs that go in, and the node that gives the result."""

    x: Any
    gamma: Any
    beta: Any
    out: Node
    channels: int
    groups: int
    eps: float


def _group_norm(mvn: Node) -> GroupNorm | None:
    """The group norm that starts at this node, as exports write it, or None.

    It is an instance norm of [B, G, …] without weights, then γ and β of each channel.
    """
    into = _producer(mvn, 0) if mvn.get_type_name() == "MVN" else None
    if into is None or into.get_type_name() != "Reshape":
        return None
    chain = [mvn]
    for kind in ("Multiply", "Add", "Reshape", "Multiply", "Add"):
        readers = [reader.get_node() for reader in chain[-1].output(0).get_target_inputs()]
        readers = [node for node in readers if node.get_type_name() != "ShapeOf"]  # Reshapes read shapes
        if len(readers) != 1 or readers[0].get_type_name() != kind:
            return None
        chain += readers
    _, ones, zeros, _, scaled, out = chain
    x = into.input(0).get_source_output()
    shapes = x.get_partial_shape(), into.output(0).get_partial_shape()
    if [len(shape) for shape in shapes] != [4, 3] or any(shape[1].is_dynamic for shape in shapes):
        return None
    if not (_is_everywhere(ones, 1.0) and _is_everywhere(zeros, 0.0)):
        return None
    C, G = (shape[1].get_length() for shape in shapes)
    gamma, beta = (node.input(1).get_source_output() for node in (scaled, out))
    return GroupNorm(x, gamma, beta, out, C, G, float(mvn.get_attributes()["eps"]))


def _is_everywhere(node: Node, number: float) -> bool:
    """Whether a sum's or a product's second factor is a constant of this one number, reshaped or not."""
    constant = _producer(node, 1)
    while constant.get_type_name() == "Reshape":
        constant = _producer(constant, 0)
    return constant.get_type_name() == "Constant" and bool((constant.get_data() == number).all())


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
    name = LOGITS if LOGITS in logits.get_names() else BIASED
    given = {name: _parameter(ov, logits, name), RANKED: _parameter(ov, logits, RANKED)}
    sort.output(0).replace(given[RANKED].output(0))
    for reader in list(logits.get_target_inputs()):
        if reader.get_node().get_type_name() not in ("Result", "TopK"):
            reader.replace_source_output(given[name].output(0))
    drawn = [results[name] for name in ("tokens", "f_hat_out", "next_x")]
    first = [result for result in results.values() if result not in drawn]
    if name == BIASED:
        logits.add_names({BIASED})
        first.append(ov.opset13.result(logits))
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

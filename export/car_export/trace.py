"""From a torch module to a small ONNX graph: trace once with named dimensions, then specialise to static shapes.

torch's exporter is slow on a whole transformer, so it runs once per kind of graph; the static step of each scale is
made from that one trace by fixing the dimensions, putting the scale's constants in, and folding the arithmetic on
shapes.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import itertools
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir
import onnxscript.optimizer
import onnxscript.rewriter
import torch
from onnx_ir.passes import common as common_passes
from onnxscript.rewriter.rules import common as rules
from torch import Tensor, nn

from car_export.graph_utils import plain_shape, split_sequences
from car_export.weights import INLINE

OPSET = 20
"""The first with Gelu, which engines fuse; every engine in use reads it."""
Names = tuple[str | int | None, ...]
STRUCTURAL = (
    rules.cast_cast_rule,
    rules.no_op_cast_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.reshape_reshape_rule,
    rules.materialize_reshape_shape_rule,
    rules.no_op_expand_rule,
    rules.mul_by_1_rule,
    rules.div_by_1_rule,
)
"""Rewrites that look at the graph alone: torch's default set would read the weights."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns about packages that are not installed and about its own internals.

    Meanwhile nothing is collected: almost all of its many small objects live on, and looking through them took 14 %
    of the time.
    """
    logger = logging.getLogger("torch.onnx")
    level, collecting = logger.level, gc.isenabled()
    logger.setLevel(logging.ERROR)
    gc.disable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
            if collecting:
                gc.enable()


def trace(
    module: nn.Module,
    inputs: Sequence[Tensor],
    input_names: Sequence[str],
    output_names: Sequence[str],
    dims: Mapping[str, Names],
) -> ir.Model:
    """Trace a module whose forward takes `*inputs`.

    `dims` names the dynamic axes of inputs: None or a number is static. Outputs get the names of the inputs' axes
    that they have; one that is computed is named here too.
    The result's initializers are still the module's own tensors (`weights.externalise` comes next).
    """
    known = {
        name: torch.export.Dim(name, min=0 if name == "P" else 1, max=1 << 20)
        for axes in dims.values()
        for name in axes
        if isinstance(name, str)
    }
    shapes = [{i: known[n] for i, n in enumerate(dims.get(name, ())) if isinstance(n, str)} for name in input_names]
    parameters = inspect.signature(module.forward).parameters.values()
    variadic = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
    with _quiet(), torch.no_grad():
        program = torch.export.export(
            module, tuple(inputs), dynamic_shapes=(tuple(shapes),) if variadic else tuple(shapes), strict=False
        )
        onnx_program = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(input_names),
            output_names=list(output_names),
            optimize=False,
            verbose=False,
        )
    assert onnx_program is not None
    model = onnx_program.model
    for node in [node for node in model.graph if node.op_type == "Reshape"]:
        plain_shape(model.graph, node)
    _name_dimensions(model, dims)
    return model


def _name_dimensions(model: ir.Model, dims: Mapping[str, Names]) -> None:
    """Give the exporter's symbols (s21, s1**2) our names (R, S*S), on inputs and outputs.

    The shapes in between are forgotten.
    """
    symbols: dict[str, str] = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        for axis, name in zip(value.shape, dims.get(str(value.name), ()), strict=False):
            if isinstance(name, str):
                symbols[str(axis.value if isinstance(axis, ir.SymbolicDim) else axis)] = name
                symbols[f"{axis.value if isinstance(axis, ir.SymbolicDim) else axis}**2"] = f"{name}*{name}"
    ends = {id(v) for v in (*model.graph.inputs, *model.graph.outputs)}
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.shape is not None
        value.shape = ir.Shape(
            [
                name
                if isinstance(name, str)
                else d
                if isinstance(d, int)
                else symbols.get(str(d.value), str(d.value))
                for d, name in itertools.zip_longest(value.shape, dims.get(str(value.name), ()))
            ]
        )
    for node in model.graph:
        for output in node.outputs:
            if id(output) not in ends:
                output.shape = None


def optimise(model: ir.Model) -> None:
    """Fold constants and drop what is unused, without ever reading a weight."""

    def foldable(node: ir.Node) -> bool | None:
        reads_weight = any(v is not None and isinstance(v.const_value, ir.ExternalTensor) for v in node.inputs)
        return False if reads_weight else None

    cleaning = ir.passes.PassManager(
        [
            common_passes.RemoveUnusedNodesPass(),
            common_passes.CommonSubexpressionEliminationPass(),
            common_passes.RemoveUnusedOpsetsPass(),
        ]
    )
    with _quiet():
        common_passes.InlinePass()(model)
        for _ in range(2):
            onnxscript.optimizer.fold_constants(model, onnx_shape_inference=True, should_fold=foldable)
            onnxscript.rewriter.rewrite(model, STRUCTURAL)
            cleaning(model)
        common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        # Tensors from INLINE elements on are external, and must not be read: weights.bin is still being written.
        common_passes.DeduplicateInitializersPass(size_limit=INLINE - 1)(model)
        common_passes.NameFixPass()(model)
    split_sequences(model.graph)
    for value in [v for v in model.graph.initializers.values() if not v.uses() and not v.is_graph_output()]:
        model.graph.initializers.pop(str(value.name))
    model.graph.doc_string = None
    model.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None


def specialise(model: ir.Model, sizes: Mapping[str, int], constants: Mapping[str, ir.ExternalTensor]) -> ir.Model:
    """A static copy: every named dimension gets its size, every constant input becomes an initializer.

    With P = 0 the past is left out altogether, inputs and concatenations: a zero-length tensor is legal but no
    engine's favourite.
    """
    static = ir.from_proto(ir.to_proto(model))
    for value in static.graph.initializers.values():
        source = model.graph.initializers[str(value.name)].const_value
        if isinstance(source, ir.ExternalTensor):
            value.const_value = source
    for value in list(static.graph.inputs):
        name = str(value.name)
        if name in constants:
            constant: ir.TensorProtocol = constants[name]
            if constant.size < INLINE:  # such a one is never external: engines want to see it
                constant = ir.tensor(constant.numpy(), name=name)
            new = ir.Value(name=name, shape=constants[name].shape, type=value.type, const_value=constant)
            value.replace_all_uses_with(new)
            static.graph.inputs.remove(value)
            static.graph.initializers[name] = new
        else:
            assert value.shape is not None
            value.shape = ir.Shape([_size(d, sizes) for d in value.shape])
    optimise(static)
    for value in [v for v in static.graph.inputs if sizes.get("P") == 0 and str(v.name).startswith("past_")]:
        _drop_past(static.graph, value)
    for value in static.graph.outputs:
        assert value.shape is not None
        value.shape = ir.Shape([_size(d, sizes) for d in value.shape])
    return static


def _drop_past(graph: ir.Graph, past: ir.Value) -> None:
    for node, _ in list(past.uses()):
        assert node.op_type == "Concat", f"{past.name} feeds {node.op_type}, not the cache's Concat"
        node.outputs[0].replace_all_uses_with(node.inputs[1])
        graph.remove(node, safe=True)
    graph.inputs.remove(past)


def _size(dim: int | ir.SymbolicDim, sizes: Mapping[str, int]) -> int:
    if isinstance(dim, int):
        return dim
    size = 1
    for factor in str(dim.value).split("*"):
        size *= sizes[factor]
    return size

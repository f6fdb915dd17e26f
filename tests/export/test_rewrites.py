"""The engine form of a plan's graphs computes what the plan's graphs compute, at every scale."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from car_export import errors
from car_export.tensorrt import build as engines
from car_export.tensorrt import rewrites
from car_runtime.backends.tensorrt.engine_metadata import STATIC
from car_runtime.format import manifest as schema
from fixtures.small_plans import small_plan

Arrays = dict[str, np.ndarray]
KINDS = ("fp16", "fp32")
"""48 codes, and 4096: below and above the limit of TensorRT's TopK."""
TOLERANCE = {"fp32": 1e-6, "fp16": 2e-3}
"""Largest difference over the largest value.

The forms add exact zeros and move nothing else; ONNX Runtime may group float16 products in another order.
"""


@pytest.fixture(params=KINDS)
def plan(request: pytest.FixtureRequest) -> Path:
    return small_plan(request.param)


def session(data: bytes, folder: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def form(plan: Path, graph: str, target: str = "sm89") -> bytes:
    manifest = schema.read_manifest(plan)
    return next(recipe.onnx for recipe in engines.recipes(plan, manifest, target) if recipe.graph == graph)


def original(plan: Path, graph: str) -> bytes:
    return (plan / schema.read_manifest(plan).graphs[graph].file).read_bytes()


def random_feed(
    plan: Path, manifest: schema.Manifest, graph: str, k: int, batch: int, rng: np.random.Generator
) -> Arrays:
    """Inputs of one scale: ordinary numbers, some tokens known, a real past."""
    scale, sizes = manifest.scales[k], {"B": batch, "R": 2 * batch, "m": 1}
    sizes |= {"S": manifest.scales[k].side, "T": scale.next_side, "P": scale.start}
    feed: Arrays = {}
    for port in manifest.graphs[graph].inputs:
        shape = [d if isinstance(d, int) else sizes[d] for d in port.shape]
        feed[port.name] = rng.normal(0, 0.5, shape).astype(port.dtype)
    for name, tensor in scale.constants.items():
        facts = manifest.tensors[tensor]
        feed[name] = np.array(np.memmap(plan / schema.WEIGHTS, facts.dtype, "r", facts.offset, facts.shape))
    grid = (batch, scale.side, scale.side)
    feed["uniforms"] = rng.random(grid, dtype=np.float32)
    feed["known"] = rng.integers(0, manifest.model.vocab, grid)
    feed["known_mask"] = rng.random(grid) < 0.3
    feed |= {"rows": np.tile(np.arange(batch), 2), "twin": np.arange(batch, 2 * batch), "plain": np.arange(batch)}
    names = {port.name for port in manifest.graphs[graph].inputs}
    return {name: values for name, values in feed.items() if name in names}


def assert_same(got: Arrays, expected: Arrays, tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        assert got[name].dtype == want.dtype, name
        assert got[name].shape == want.shape, name
        if want.dtype.kind in "iub":
            np.testing.assert_array_equal(got[name], want, err_msg=name)
        else:
            difference = np.abs(got[name].astype(np.float64) - want).max() / max(float(np.abs(want).max()), 1e-30)
            assert difference <= tolerance, f"{name} {difference:.1e}"


@pytest.mark.parametrize("target", ["sm89", "sm75"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("kind", "format", "graph"),
    [("fp16", 2, "step"), ("fp32", 2, "step"), ("fp16", 2, "branch.sketch"), ("fp16", 1, "step")],
)
def test_the_form_of_a_step_computes_the_step_at_every_scale(
    kind: str, format: int, graph: str, batch: int, target: str
) -> None:
    plan = small_plan(kind, format)
    manifest, rng = schema.read_manifest(plan), np.random.default_rng(5)
    step, engine = session(original(plan, graph), plan), session(form(plan, graph, target), plan)
    names = [port.name for port in manifest.graphs[graph].outputs]
    assert [o.name for o in engine.get_outputs()] == [o.name for o in step.get_outputs()] == names
    assert [i.name for i in engine.get_inputs()] == [*(i.name for i in step.get_inputs()), rewrites.KEY_BIAS]
    vocab = manifest.model.vocab
    for k, scale in enumerate(manifest.scales):
        feed = random_feed(plan, manifest, graph, k, batch, rng)
        sizes = engines.step_sizes(scale, batch)
        bias = np.zeros(sizes["N"], np.float32)
        mine = dict(feed)
        if scale.start == 0:
            bias[0] = rewrites.DUMMY_BIAS
            mine |= {n: np.zeros((1, *a.shape[1:]), a.dtype) for n, a in feed.items() if n.startswith("past_")}
        mine[rewrites.KEY_BIAS] = bias
        settings = ((1, 2.0, 4.0), (vocab // 5, 0.9, 1.5), (vocab, 0.6, 0.0), (vocab, 2.0, 3.0))
        for top_k, top_p, cfg in settings if graph == "step" else settings[:1]:
            values = {"top_k": np.int64(top_k), "top_p": np.float32(top_p), "cfg": np.float32(cfg)}
            sampling = {name: np.full_like(feed[name], value) for name, value in values.items() if name in feed}
            got = dict(zip(names, engine.run(names, mine | sampling), strict=True))
            expected = dict(zip(names, step.run(names, feed | sampling), strict=True))
            assert_same(got, expected, TOLERANCE[manifest.precision.compute])


def test_the_form_holds_no_sort_longer_than_the_limit_and_no_row_numbers(plan: Path) -> None:
    nodes = onnx.load_model_from_string(form(plan, "step")).graph.node
    vocab = schema.read_manifest(plan).model.vocab
    assert sum(n.op_type == "TopK" for n in nodes) == (1 if vocab <= rewrites.TOPK_LIMIT else 2)
    assert not [n.name for n in nodes if n.op_type == "Range"]


@pytest.mark.parametrize("target", ["sm89", "sm75"])
@pytest.mark.parametrize("graph", ["control.sketch", "condition", "condition.sketch", "decoder", "encoder"])
def test_the_forms_of_the_other_graphs_compute_the_same(graph: str, target: str) -> None:
    plan, rng = small_plan("fp16"), np.random.default_rng(2)
    manifest = schema.read_manifest(plan)
    data = form(plan, graph, target)
    feed: Arrays = {}
    for port in manifest.graphs[graph].inputs:
        shape = [{"B": 2, "R": 4}[d] if isinstance(d, str) else d for d in port.shape]
        top = {"uint8": 256, "int64": manifest.model.classes + 1}.get(port.dtype)
        values = rng.normal(0, 1, shape) if top is None else rng.integers(0, top, shape)
        feed[port.name] = values.astype(port.dtype)
    names = [port.name for port in manifest.graphs[graph].outputs]
    got = dict(zip(names, session(data, plan).run(names, feed), strict=True))
    expected = dict(zip(names, session(original(plan, graph), plan).run(names, feed), strict=True))
    assert_same(got, expected, TOLERANCE["fp16"])
    proto = onnx.load_model_from_string(data)
    assert not [n.name for n in proto.graph.node if "Sequence" in n.op_type]
    # TensorRT takes uint8 only from a cast and only into one.
    images = {v.name for v in (*proto.graph.input, *proto.graph.output) if v.type.tensor_type.elem_type == 2}
    touching = {n.op_type for n in proto.graph.node if images & {*n.input, *n.output}}
    assert touching <= {"Cast", "Shape"}


def test_forms_leave_the_weights_where_they_are(plan: Path) -> None:
    for recipe in engines.recipes(plan, schema.read_manifest(plan)):
        proto = onnx.load_model_from_string(recipe.onnx)
        large = [t.name for t in proto.graph.initializer if len(t.raw_data) > 1024]
        assert not large, recipe.graph
        assert any(t.data_location == TensorProto.EXTERNAL for t in proto.graph.initializer), recipe.graph


def test_forms_are_the_same_bytes_each_time(plan: Path) -> None:
    manifest = schema.read_manifest(plan)
    assert [r.onnx for r in engines.recipes(plan, manifest)] == [r.onnx for r in engines.recipes(plan, manifest)]


# -- sorting -----------------------------------------------------------------------------------------------------


def sort_graph(vocab: int) -> ir.Model:
    """A sort as the step has it: TopK of all codes, only its values used; and a past that must find its softmax."""
    nodes = [
        helper.make_node("TopK", ["logits", "count"], ["sorted", "places"], name="sort"),
        helper.make_node("Concat", ["past_k_0", "new"], ["keys"], axis=0),
        helper.make_node("Transpose", ["keys"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["query", "turned"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["weights"], name="softmax"),
    ]
    ports = [("logits", [2, vocab]), ("past_k_0", ["P", 3]), ("new", [2, 3]), ("query", [2, 3])]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in ports]
    outputs = [helper.make_tensor_value_info("sorted", TensorProto.FLOAT, [2, vocab])]
    outputs.append(helper.make_tensor_value_info("weights", TensorProto.FLOAT, [2, "N"]))
    count = helper.make_tensor("count", TensorProto.INT64, [1], [vocab])
    graph = helper.make_graph(nodes, "sort", inputs, outputs, [count])
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


@pytest.mark.parametrize("vocab", [3840, 3841, 4096, 7679, 7680])
def test_two_halves_are_the_sorted_row_exactly_with_equal_values_too(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    logits = rng.normal(0, 1, (2, vocab)).astype(np.float32)
    logits[1] = np.round(logits[1], 1)  # many equal values, also at the border
    rest = {"past_k_0": np.zeros((1, 3), np.float32), "new": rng.normal(0, 1, (2, 3)).astype(np.float32)}
    rest |= {
        "query": np.ones((2, 3), np.float32),
        rewrites.KEY_BIAS: np.array([rewrites.DUMMY_BIAS, 0, 0], np.float32),
    }
    data = rewrites.to_bytes(rewrites.engine_step(sort_graph(vocab), vocab))
    lengths = [
        int(np.frombuffer(t.raw_data, np.int64)[0]) if t.raw_data else t.int64_data[0]
        for t in onnx.load_model_from_string(data).graph.initializer
        if t.name.endswith("_k") or t.name == "count"
    ]
    assert max(lengths) <= rewrites.TOPK_LIMIT
    ordered, weights = session(data, Path()).run(["sorted", "weights"], {"logits": logits, **rest})
    np.testing.assert_array_equal(ordered, -np.sort(-logits, axis=1))
    assert (weights[:, 0] == 0).all()
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)


def test_a_vocabulary_too_long_for_two_halves_is_refused() -> None:
    with pytest.raises(errors.TopKError, match=r"7681 codes.*; run this plan with"):
        rewrites.engine_step(sort_graph(7681), 7681)


def test_a_graph_without_the_known_attention_is_refused_by_name() -> None:
    model = sort_graph(100)
    softmax = next(n for n in model.graph if n.op_type == "Softmax")
    softmax.op_type = "Hardmax"
    with pytest.raises(errors.GraphError, match=r"past_k_0.*MatMul.*; export the plan again"):
        rewrites.engine_step(model, 100)


def test_profiles_list_every_scale_and_batch_with_the_first_scales_dummy(plan: Path) -> None:
    manifest = schema.read_manifest(plan)
    step = next(recipe for recipe in engines.recipes(plan, manifest) if recipe.graph == "step")
    sizes = (1, 2) if plan.stem == "fp16" else (1,)
    assert [p.name for p in step.profiles] == [f"step.{k:02d}.b{b}" for b in sizes for k in range(3)]
    mixed = {"m": 1} if manifest.model.branches else {}
    assert dict(step.profiles[0].sizes) == {"R": 2, "B": 1, "S": 1, "T": 2, "P": 1, "N": 2, **mixed}
    assert dict(step.profiles[2].sizes) == {"R": 2, "B": 1, "S": 4, "T": 1, "P": 5, "N": 21, **mixed}
    bare = dataclasses.replace(
        manifest, graphs={n: g for n, g in manifest.graphs.items() if STATIC.fullmatch(n) is None}
    )
    with pytest.raises(engines.EngineError, match="no static steps"):
        engines.recipes(plan, bare)

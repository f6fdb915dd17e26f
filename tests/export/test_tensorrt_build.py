"""Engines of a plan: really compiled for an RTX 4090 (SM89) on this machine's CPU, described, kept, replaced."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import car_runtime
from car_export import errors
from car_export.cli import main as build_engines
from car_export.tensorrt import build as engines
from car_export.tensorrt import compiler, rewrites
from car_export.tensorrt.compiler import Compiler, Profile
from car_runtime.errors import BackendError
from car_runtime.format import manifest as schema
from car_train import checkpoint
from fixtures.small import small_model
from fixtures.small_plans import small_plan

if importlib.util.find_spec("tensorrt_rtx") is None:
    pytest.skip("tensorrt_rtx is not installed: pip install 'car-deploy[rtx]'", allow_module_level=True)

SM89 = [engines.Target(flavour="rtx", name="sm89")]
GRAPHS = ("control.sketch", "condition", "condition.sketch", "decoder", "encoder", "branch.sketch", "step")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float16 plan with its engines. Read only: `changeable` is a copy."""
    plan = shutil.copytree(small_plan("fp16"), tmp_path_factory.mktemp("compiled") / "small.plan")
    assert build_engines([str(plan), "--target", "rtx", "--sm", "89"]) == 0
    return plan


@pytest.fixture
def changeable(compiled: Path, tmp_path: Path) -> Path:
    return shutil.copytree(compiled, tmp_path / "small.plan")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint.save(small_model(depth=2, sides=(1, 2, 4)), tmp_path_factory.mktemp("run") / "checkpoint")


def entry(plan: Path, graph: str) -> schema.Engine:
    (found,) = [e for e in schema.read_manifest(plan).engines if e.details["graph"] == graph]
    return found


def sidecar(plan: Path, graph: str) -> dict[str, Any]:
    return json.loads((plan / entry(plan, graph).details["sidecar"]).read_text())


def written(plan: Path) -> dict[str, int]:
    """When each engine was written, by graph."""
    return {e.details["graph"]: (plan / e.file).stat().st_mtime_ns for e in schema.read_manifest(plan).engines}


def change_weights(plan: Path, graph: str) -> None:
    """Move one weight that only `graph` reads, and put the manifest right."""
    manifest = schema.read_manifest(plan)
    places: dict[str, set[tuple[int, int]]] = {}
    for name in GRAPHS:
        proto = onnx.load(plan / manifest.graphs[name].file, load_external_data=False)
        tensors = [t for t in proto.graph.initializer if t.data_location == TensorProto.EXTERNAL]
        facts = [{e.key: int(e.value) for e in t.external_data if e.key != "location"} for t in tensors]
        places[name] = {(f["offset"], f["length"]) for f in facts}
    others = set().union(*(p for name, p in places.items() if name != graph))
    offset, _ = max(places[graph] - others, key=lambda place: place[1])
    weights = np.memmap(plan / schema.WEIGHTS, np.uint8, "r+")
    weights[offset] ^= 1
    weights.flush()
    files = manifest.files | schema.describe_files(plan, [schema.WEIGHTS])
    schema.write_manifest(plan, dataclasses.replace(manifest, files=files))


# -- what is built -----------------------------------------------------------------------------------------------


def test_the_manifest_lists_engines_and_sidecars_with_their_hashes(compiled: Path) -> None:
    manifest = schema.read_manifest(compiled)
    schema.verify_files(compiled, manifest)
    assert [e.details["graph"] for e in manifest.engines] == list(GRAPHS)
    present = {f"engines/{p.name}" for p in (compiled / "engines").iterdir()}
    assert present == {name for e in manifest.engines for name in (e.file, e.details["sidecar"])}
    for e in manifest.engines:
        assert (e.flavour, e.target, e.details["precision"]) == ("rtx", "sm89", "fp16")
        assert e.file == f"engines/{e.details['graph']}.rtx.sm89.{e.key[:16]}.engine"
        assert (compiled / e.file).read_bytes()[:4] != b"\0\0\0\0"


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_sidecar_describes_its_engine(compiled: Path, graph: str) -> None:
    manifest, facts = schema.read_manifest(compiled), sidecar(compiled, graph)
    assert (facts["graph"], facts["flavour"], facts["target"]) == (graph, "rtx", "sm89")
    assert facts["version"] == Compiler("rtx").version
    assert facts["key"] == entry(compiled, graph).key
    assert facts["bytes"] == (compiled / facts["file"]).stat().st_size
    declared = manifest.graphs[graph]
    extra = [{"name": "key_bias", "dtype": "float32", "shape": ["N"]}] if graph in ("step", "branch.sketch") else []
    assert facts["inputs"] == [port_facts(p) for p in declared.inputs] + extra
    assert facts["outputs"] == [port_facts(p) for p in declared.outputs]
    for profile in facts["profiles"]:
        assert profile["activation_bytes"] > 0
        for side in ("inputs", "outputs"):
            assert list(profile[side]) == [p["name"] for p in facts[side]]
            assert all(isinstance(d, int) and d > 0 for shape in profile[side].values() for d in shape)


def port_facts(port: schema.Port) -> dict[str, Any]:
    return {"name": port.name, "dtype": port.dtype, "shape": list(port.shape)}


def test_the_profiles_of_the_step_have_the_shapes_of_the_static_steps(compiled: Path) -> None:
    manifest, facts = schema.read_manifest(compiled), sidecar(compiled, "step")
    assert [p["name"] for p in facts["profiles"]] == [f"step.{k:02d}.b{b}" for b in (1, 2) for k in range(3)]
    for profile in facts["profiles"]:
        static = manifest.graphs[profile["name"]]
        for port in (*static.inputs, *static.outputs):
            side = "inputs" if port in static.inputs else "outputs"
            assert tuple(profile[side][port.name]) == port.shape, f"{profile['name']} {port.name}"
    first = facts["profiles"][0]["inputs"]
    assert (first["past_k_0"][0], first["key_bias"]) == (1, [2])  # a dummy token, never an empty input


def test_all_profiles_of_the_step_share_one_copy_of_the_weights(compiled: Path) -> None:
    manifest = schema.read_manifest(compiled)
    recipe = next(r for r in engines.recipes(compiled, manifest) if r.graph == "step")
    tensors = onnx.load_model_from_string(recipe.onnx).graph.initializer
    lengths = {t.name: int(e.value) for t in tensors for e in t.external_data if e.key == "length"}
    # Each matrix of queries, keys and values counts: a second copy of one, 13.8 kB, is too much.
    attention = min(length for name, length in lengths.items() if "qkv_weight" in name)
    total = sum(lengths.values())
    assert total <= sidecar(compiled, "step")["weight_bytes"] < total + attention


def test_the_runtime_reads_the_sidecars(compiled: Path) -> None:
    from car_runtime.backends.tensorrt import engine_metadata as runtime_sidecar

    manifest, version = schema.read_manifest(compiled), Compiler("rtx").version
    found = runtime_sidecar.engines_for(compiled, manifest, "rtx", "sm89", version)
    assert set(found) == set(GRAPHS)
    assert [p.name for p in found["step"].profiles][:2] == ["step.00.b1", "step.01.b1"]
    assert found["step"].inputs["past_k_0"] == "float16"


@pytest.mark.parametrize(("kind", "dtype"), [("fp32", "float32"), ("bf16", "bfloat16")])
def test_other_precisions_compile_too(kind: str, dtype: str, tmp_path: Path) -> None:
    """The fp32 plan has 4096 codes: its sort comes in two halves."""
    plan = shutil.copytree(small_plan(kind), tmp_path / "other.plan")
    assert build_engines([str(plan), "--target", "rtx", "--sm", "89"]) == 0
    facts = sidecar(plan, "step")
    assert facts["precision"] == kind
    assert {p["dtype"] for p in facts["inputs"] if p["name"].startswith("past_")} == {dtype}
    assert {p["dtype"] for p in facts["outputs"] if p["name"] in ("f_hat_out", "next_x", "logits")} == {"float32"}
    assert [e.details["graph"] for e in schema.read_manifest(plan).engines] == [
        "condition",
        "decoder",
        "encoder",
        "step",
    ]


def test_a_bf16_plan_stores_bfloat16_and_onnxruntime_refuses_it() -> None:
    plan = small_plan("bf16")
    manifest = schema.read_manifest(plan)
    assert manifest.precision == schema.Precision(compute="bf16", weights="bf16")
    assert manifest.graphs["step"].output("new_k_0").dtype == "bfloat16"
    stored = {t.data_type for t in onnx.load(plan / "step.onnx", load_external_data=False).graph.initializer}
    assert TensorProto.BFLOAT16 in stored
    assert TensorProto.FLOAT16 not in stored
    control = sum(p.numel() for p in small_model(depth=2, sides=(1, 2, 4), control=False).parameters())
    assert manifest.files[schema.WEIGHTS].bytes <= 2 * control + 65536
    with pytest.raises(BackendError, match=r"bfloat16.*; run it with --backend rtx"):
        car_runtime.open_plan(plan, backend="ort-cpu")


# -- what is kept ------------------------------------------------------------------------------------------------


def test_a_second_build_leaves_every_engine_as_it_is(changeable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = written(changeable)
    manifest = (changeable / "manifest.json").read_bytes()
    assert build_engines([str(changeable), "--target", "rtx", "--sm", "89", "-o", str(changeable)]) == 0
    streams = capsys.readouterr()
    assert streams.out.strip() == str(changeable)
    assert streams.err.count("up to date") == len(GRAPHS)
    assert written(changeable) == before
    assert (changeable / "manifest.json").read_bytes() == manifest


def test_changed_weights_rebuild_the_engines_that_read_them_and_no_other(changeable: Path) -> None:
    before, stale = written(changeable), entry(changeable, "condition")
    change_weights(changeable, "condition")
    engines.build_engines(changeable, SM89)
    after = written(changeable)
    assert {graph for graph in GRAPHS if after[graph] != before[graph]} == {"condition"}
    assert not (changeable / stale.file).exists()
    assert not (changeable / stale.details["sidecar"]).exists()
    schema.verify_files(changeable, schema.read_manifest(changeable))


def test_a_damaged_engine_is_built_again(changeable: Path) -> None:
    before, engine = written(changeable), changeable / entry(changeable, "condition").file
    data = bytearray(engine.read_bytes())
    data[len(data) // 2] ^= 1
    engine.write_bytes(data)
    engines.build_engines(changeable, SM89)
    assert {graph for graph, time in written(changeable).items() if time != before[graph]} == {"condition"}
    schema.verify_files(changeable, schema.read_manifest(changeable))


def test_a_key_is_the_same_wherever_the_plan_lies_and_differs_by_all_that_matters(changeable: Path) -> None:
    manifest = schema.read_manifest(changeable)
    for recipe in engines.recipes(changeable, manifest):
        key = recipe.key("rtx", Compiler("rtx").version, "sm89")
        assert key == entry(changeable, recipe.graph).key
        others = {recipe.key("trt", "1", "sm89"), recipe.key("rtx", "1", "sm89"), recipe.key("rtx", "1", "sm120")}
        fewer = dataclasses.replace(recipe, profiles=recipe.profiles[1:])
        others |= {fewer.key("rtx", "1", "sm89"), dataclasses.replace(recipe, weights="").key("rtx", "1", "sm89")}
        assert len(others | {key}) == 6


def test_an_export_over_a_plan_keeps_the_engines_that_are_still_right(changeable: Path) -> None:
    """Another export of the same weights keeps them all; one of other weights those that don't read what changed."""
    before = written(changeable)
    bare = changeable.with_name("bare.plan")

    def export_again() -> None:
        shutil.rmtree(changeable)
        shutil.copytree(bare, changeable)

    shutil.copytree(small_plan("fp16"), bare)
    with engines.keeping_engines(changeable):
        export_again()
    assert written(changeable) == before
    schema.verify_files(changeable, schema.read_manifest(changeable))
    change_weights(bare, "decoder")
    with engines.keeping_engines(changeable):
        export_again()
    assert written(changeable) == {graph: time for graph, time in before.items() if graph != "decoder"}
    assert sorted(p.name for p in changeable.parent.iterdir()) == ["bare.plan", "small.plan"]


def test_a_failed_export_loses_no_engine(changeable: Path) -> None:
    before = written(changeable)
    with pytest.raises(ZeroDivisionError), engines.keeping_engines(changeable):
        _ = 1 / 0
    assert written(changeable) == before
    assert [p.name for p in changeable.parent.iterdir()] == ["small.plan"]


def test_an_interrupt_stops_the_compiler_and_leaves_nothing(tmp_path: Path) -> None:
    plan, before = small_plan("fp16"), signal.getsignal(signal.SIGINT)
    step = next(r for r in engines.recipes(plan, schema.read_manifest(plan)) if r.graph == "step")

    def interrupt_when_compiling() -> None:
        while signal.getsignal(signal.SIGINT) is before:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt_when_compiling)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        Compiler("rtx").build(step.onnx, plan / "step.onnx", step.profiles, "sm89", tmp_path / "e.engine")
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before
    assert list(tmp_path.iterdir()) == []


# -- what goes wrong ---------------------------------------------------------------------------------------------


@pytest.fixture
def free_to_write() -> Iterator[None]:
    yield
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of file size on Windows")
@pytest.mark.usefixtures("free_to_write")
def test_a_full_disk_is_named_and_leaves_the_plan_whole(changeable: Path) -> None:
    import resource

    change_weights(changeable, "condition")
    before = sorted(p.name for p in (changeable / "engines").iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with pytest.raises(errors.OutputError, match=r"condition.*could not be written.*; free 1 MB there"):
        engines.build_engines(changeable, SM89)
    assert sorted(p.name for p in (changeable / "engines").iterdir()) == before
    schema.verify_files(changeable, schema.read_manifest(changeable))


def tensor(name: str, dtype: int, shape: list[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def graph_of(nodes: list[onnx.NodeProto], inputs: list[Any], outputs: list[Any], *constants: Any) -> bytes:
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(constants))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return rewrites.onnx_bytes(model)


ADD = helper.make_node("Add", ["a", "b"], ["c"], name="the_add")
F32, F16, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
BROKEN: dict[str, tuple[bytes, dict[str, int], str, type[errors.EngineError], str | None, str]] = {
    "mixed types": (
        graph_of([ADD], [tensor("a", F32, [4]), tensor("b", F16, [4])], [tensor("c", F32, [4])]),
        {},
        "sm89",
        errors.MixedTypesError,
        "the_add",
        r"'the_add' \(Add\).*same input types.*; cast",
    ),
    "a long sort": (
        graph_of(
            [helper.make_node("TopK", ["a", "k"], ["c", "i"], name="the_sort")],
            [tensor("a", F32, [2, 4096])],
            [tensor("c", F32, [2, 4096])],
            helper.make_tensor("k", TensorProto.INT64, [1], [4096]),
        ),
        {},
        "sm89",
        errors.TopKError,
        "the_sort",
        r"the_sort.*3840.*; split this TopK",
    ),
    "an unknown operator": (
        graph_of(
            [helper.make_node("Multinomial", ["a"], ["c"], name="the_draw", sample_size=1)],
            [tensor("a", F32, [2, 16])],
            [tensor("c", TensorProto.INT32, [2, 1])],
        ),
        {},
        "sm89",
        errors.GraphError,
        "the_draw",
        r"'the_draw' \(Multinomial\).*UNSUPPORTED_NODE.*; use operators",
    ),
    "sizes that contradict each other": (
        graph_of(
            [
                helper.make_node("Concat", ["p", "a"], ["k"], axis=0),
                helper.make_node("Add", ["k", "b"], ["c"], name="sum"),
            ],
            [tensor("p", F32, ["P"]), tensor("a", F32, ["S"]), tensor("b", F32, ["N"])],
            [tensor("c", F32, ["N"])],
        ),
        {"P": 3, "S": 2, "N": 4},
        "sm89",
        errors.ProfileError,
        "sum",
        r"sum: broadcast.*; the profile's sizes",
    ),
    "a size that is missing": (
        graph_of([ADD], [tensor("a", F32, ["N"]), tensor("b", F32, ["N"])], [tensor("c", F32, ["N"])]),
        {"S": 2},
        "sm89",
        errors.ProfileError,
        None,
        r"odd has no size for the dimension 'N'.*; export",
    ),
    "a type that the target lacks": (
        graph_of([ADD], [tensor("a", BF16, [4]), tensor("b", BF16, [4])], [tensor("c", BF16, [4])]),
        {},
        "sm75",
        errors.TargetError,
        None,
        r"rtx sm75.*; this target has no such type; export with --precision fp16",
    ),
    "no ONNX at all": (b"no graph", {}, "sm89", errors.GraphError, None, r"can't be read: .*; export the plan again"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_the_compiler_refuses_is_a_typed_error_with_node_and_remedy(case: str, tmp_path: Path) -> None:
    data, sizes, target, kind, node, words = BROKEN[case]
    with pytest.raises(kind, match=words) as caught:
        Compiler("rtx").build(data, tmp_path / "g.onnx", [Profile(name="odd", sizes=sizes)], target, tmp_path / "e")
    assert caught.value.node == node
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_capability_that_is_no_target_is_refused_before_anything_is_built() -> None:
    assert set(Compiler("rtx").targets()) >= {"sm75", "sm80", "sm86", "sm89", "sm120"}
    with pytest.raises(errors.TargetError, match=r"--sm 90 is no target .*; choose 75, 80, 86, 89.* or"):
        engines.build_engines(small_plan("fp16"), [engines.Target(flavour="rtx", name="sm90")])


def test_targets_of_a_command_line() -> None:
    assert engines.choose_targets("rtx", (89, 120, 89)) == [*SM89, engines.Target(flavour="rtx", name="sm120")]
    with pytest.raises(errors.TargetError, match="choose one of rtx, trt"):
        engines.choose_targets("dla", (89,))


@pytest.mark.skipif(compiler.gpu_here() is not None, reason="this machine has a GPU")
def test_without_a_gpu_only_rtx_engines_for_a_named_capability_can_be_built() -> None:
    with pytest.raises(errors.NoGpuError, match=r"--target trt .*; use --target rtx --sm 89"):
        engines.choose_targets("trt", None)
    with pytest.raises(errors.NoGpuError, match=r"without --sm .*; name one"):
        engines.choose_targets("rtx", None)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="classic TensorRT is installed")
def test_a_missing_compiler_is_named_with_its_package() -> None:
    with pytest.raises(errors.CompilerMissingError, match=r"--target trt needs tensorrt .*; pip install"):
        Compiler("trt")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["PLAN"], "say what to build for"),
        (["PLAN", "--target", "rtx", "--sm", "89", "-o", "other.plan"], "leave out -o"),
        (["PLAN", "--target", "rtx", "--sm", "89", "--precision", "bf16", "--batch", "4"], "--precision, --batch"),
        (["PLAN", "--target", "rtx", "--sm", "90"], "--sm 90 is no target"),
        (["PLAN", "--sm", "89"], "add --target rtx"),
        (["CHECKPOINT", "-o", "new.plan", "--target", "rtx", "--sm", "90"], "--sm 90 is no target"),
        (["CHECKPOINT", "-o", "new.plan", "--verify", "--target", "rtx", "--sm", "89"], "leave out --target"),
    ],
)
def test_bad_requests_for_engines_are_one_line_with_a_remedy(
    saved: Path,
    compiled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    named = {"PLAN": str(compiled), "CHECKPOINT": str(saved)}
    assert build_engines([named.get(f, f) for f in flags]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert "; " in error
    assert "\n" not in error
    assert os.listdir(tmp_path) == []


def test_turing_gets_half_precision_plans_without_float32_products(tmp_path: Path) -> None:
    plan = shutil.copytree(small_plan("fp16"), tmp_path / "turing.plan")
    engines.build_engines(plan, [engines.Target(flavour="rtx", name="sm75")])
    assert {e.details["graph"] for e in schema.read_manifest(plan).engines} == set(GRAPHS)
    with pytest.raises(errors.TargetError, match=r"rtx sm75.*FP32 GEMM.*; .*export with --precision fp16"):
        engines.build_engines(small_plan("fp32"), [engines.Target(flavour="rtx", name="sm75")])

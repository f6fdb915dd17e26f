"""Int8 plans: what is rounded and how, that nothing else changes, and what comes of it on the plan that ships."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from benchmarks.analysis.counting import stored_weights
from car_export import cli
from car_export.config import Int8Options
from car_export.errors import ExportError, TargetError
from car_export.quantize import calibrate as calibration
from car_export.quantize import int8, rewrite, sites
from car_export.quantize.calibrate import activation_params, calibrate, quantize_weights
from car_export.quantize.int8 import to_int8
from car_export.quantize.statistics import ActivationStats
from car_export.tensorrt.build import build_engines, choose_targets
from car_export.verify import VerificationError
from car_export.weights import WeightCopier
from car_runtime import BackendError, Plan, open_plan
from car_runtime import verify as acceptance
from car_runtime.backends.onnxruntime import cpu as ort_cpu
from car_runtime.backends.onnxruntime.cuda import OrtCuda
from car_runtime.backends.onnxruntime.session import needless_optimizers
from car_runtime.format.manifest import WEIGHTS, Precision, read_manifest, verify_files
from car_runtime.plan import default_plan
from car_train import checkpoint
from fixtures.shipped import shipped_canny
from fixtures.small import small_model
from fixtures.small_plans import small_plan

Floats = NDArray[np.float32]
EXAMPLE = Path(__file__).parents[2] / "examples" / "guitar.png"
WIDTH = 96
"""More than a latent's channels."""
RNG = np.random.default_rng(3)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The int8 form of the plan that ships, a trained one, with one branch, and what was said while it was made."""
    said: list[str] = []
    plan = to_int8(
        Int8Options(source=shipped_canny(), output=tmp_path_factory.mktemp("int8") / "emoji.plan"), said.append
    )
    return plan, said


# ---- Numbers ----


def test_int8_weights_are_within_half_a_step_of_every_output() -> None:
    for shape in ((6, 40), (6, 4, 3, 3)):
        matrix = RNG.normal(size=shape).astype(np.float32)
        matrix[2] *= 1000
        matrix[4] = 0
        numbers, steps = quantize_weights(matrix)
        each = steps.reshape(-1, *[1] * (len(shape) - 1))
        assert numbers.dtype == np.int8
        assert numbers.min() >= -127
        assert (np.abs(numbers * each - matrix) <= 0.5001 * each).all()
        assert (np.abs(numbers[[0, 1, 2, 3, 5]]).reshape(5, -1).max(1) == 127).all()
        assert not numbers[4].any()


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.0, 5.0), (-2.0, 0.0), (-0.17, 9.0), (0.0, 0.0)])
def test_zero_is_one_of_the_steps_and_both_ends_are_reached(low: float, high: float) -> None:
    scale, zero = activation_params(low, high)
    ends = (np.clip(np.round(np.array([low, 0, high]) / scale) + zero, 0, 255) - zero) * scale
    assert ends[1] == 0
    np.testing.assert_allclose(ends[[0, 2]], [low, high], atol=1.001 * scale)


def test_a_large_channel_goes_over_into_the_matrix_where_that_can_be() -> None:
    rows = RNG.normal(size=(256, 32)).astype(np.float32)
    rows[:, 5] *= 60
    matrix = RNG.normal(size=(64, 32)).astype(np.float32)
    stats = ActivationStats(rows.min(0), rows.max(0), [rows])
    plain, smooth = calibrate(matrix, stats, foldable=False), calibrate(matrix, stats, foldable=True)
    assert plain.smoothing is None
    assert smooth.smoothing is not None
    assert smooth.smoothing.argmax() == 5
    assert smooth.error < 0.5 * plain.error
    # What it says of itself is so.
    numbers, steps = quantize_weights(matrix * smooth.smoothing)
    zero = np.float32(smooth.zero_point)
    rounded = (np.clip(np.round(rows / smooth.smoothing / smooth.scale) + zero, 0, 255) - zero) * smooth.scale
    exact = rows @ matrix.T
    error = np.linalg.norm(rounded @ (numbers * steps[:, None]).T - exact) / np.linalg.norm(exact)
    assert error == pytest.approx(smooth.error, rel=1e-3)


def test_a_few_values_far_out_are_clipped() -> None:
    rows = RNG.normal(size=(4096, 16)).astype(np.float32)
    matrix = RNG.normal(size=(8, 16)).astype(np.float32)
    inside = calibrate(matrix, ActivationStats(rows.min(0), rows.max(0), [rows]), foldable=False)
    far = calibrate(matrix, ActivationStats(rows.min(0) * 4, rows.max(0) * 4, [rows]), foldable=False)
    reach = [float(params.scale) * 255 / (rows.max() - rows.min()) for params in (inside, far)]
    assert 0.75 < reach[0] < 1.05
    assert reach[1] == pytest.approx(4 * min(calibration.CLIPS), rel=0.01)


# ---- Graphs ----


def graph_of(kind: str) -> onnx.ModelProto:
    """y = x' · W, x' being a norm with weights, or one that modulation scales and shifts as AdaLN does."""
    C, N = WIDTH, 40
    nodes = [
        helper.make_node("LayerNormalization", ["h", "gain", *(["offset"] if kind == "norm" else [])], ["n"], axis=-1)
    ]
    x = "n"
    if kind == "modulation":
        nodes += [
            helper.make_node("Split", ["modulation"], ["scale", "shift"], axis=1, num_outputs=2),
            helper.make_node("Add", ["scale", "one"], ["factor"]),
            helper.make_node("Mul", ["n", "factor"], ["scaled"]),
            helper.make_node("Add", ["scaled", "shift"], ["x"]),
        ]
        x = "x"
    nodes.append(helper.make_node("MatMul", [x, "W"], ["y"], name="product"))
    arrays = {
        "gain": np.ones(C, np.float32) if kind == "modulation" else RNG.normal(size=C).astype(np.float32),
        "offset": RNG.normal(size=C).astype(np.float32),
        "one": np.float32(1),
        "W": RNG.normal(size=(C, N)).astype(np.float32),
    }
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("h", TensorProto.FLOAT, ["R", "S", C]),
            helper.make_tensor_value_info("modulation", TensorProto.FLOAT, ["R", 2, C]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["R", "S", N])],
        [numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items() if name in used],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model: onnx.ModelProto, feed: dict[str, Floats], folder: Path) -> Floats:
    options = ort.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    options.add_session_config_entry("session.x64quantprecision", "1")  # as the runtime's: for CPUs without VNNI
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {i.name: feed[i.name] for i in session.get_inputs()})
    result: Floats = y
    return result


@pytest.mark.parametrize("kind", ["norm", "modulation"])
def test_what_is_divided_out_of_a_channel_is_put_into_the_matrix(kind: str, tmp_path: Path) -> None:
    model = graph_of(kind)
    feed = {
        "h": RNG.normal(size=(3, 7, WIDTH)).astype(np.float32),
        "modulation": RNG.normal(size=(3, 2, WIDTH)).astype(np.float32),
    }
    feed["modulation"][:, :, 4] *= 50
    if kind == "norm":
        gain = numpy_helper.to_array(model.graph.initializer[0]).copy()
        gain[4] *= 50
        model.graph.initializer[0].CopyFrom(numpy_helper.from_array(gain, "gain"))
    exact = run(model, feed, tmp_path)
    x = "n" if kind == "norm" else "x"
    inner = onnx.ModelProto.FromString(model.SerializeToString())
    inner.graph.output[0].CopyFrom(helper.make_tensor_value_info(x, TensorProto.FLOAT, ["R", "S", WIDTH]))
    rows = run(inner, feed, tmp_path).reshape(-1, WIDTH)

    (tmp_path / "old.bin").write_bytes(bytes(64))
    weights = WeightCopier(tmp_path / "old.bin", tmp_path / WEIGHTS)
    rewriter = rewrite.GraphQuantizer(model, weights, {x: ActivationStats(rows.min(0), rows.max(0), [rows])})
    (product,) = sites.matmul_sites(model, read_manifest(default_plan()))
    error = rewriter.quantize_matmul(product)
    rewriter.finish()
    weights.close()
    got = run(model, feed, tmp_path)
    assert error < 0.01
    assert np.linalg.norm(got - exact) / np.linalg.norm(exact) < 1.5 * error + 1e-3
    assert f"{x}.smoothing" in {t.name for t in model.graph.initializer} or kind == "norm"
    assert rewriter.params[x].smoothing is not None


def kernels(plan: Path, graph: str, tmp_path: Path) -> Counter[str]:
    """Operators that ONNX Runtime makes of a graph."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / f"{graph}.onnx")
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{graph}.bin")
    ort.InferenceSession(
        str(plan / f"{graph}.onnx"),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=needless_optimizers(read_manifest(plan).precision, graph),
    )
    return Counter(
        node.op_type for node in onnx.load(tmp_path / f"{graph}.onnx", load_external_data=False).graph.node
    )


def test_products_and_convolutions_become_int8_kernels(shipped: tuple[Path, list[str]], tmp_path: Path) -> None:
    plan, said = shipped
    graphs, blocks = ("step", "branch.canny"), 9
    step, exact = (sum((kernels(p, g, tmp_path) for g in graphs), Counter[str]()) for p in (plan, shipped_canny()))
    assert step["MatMulIntegerToFloat"] + step["DynamicQuantizeMatMul"] == 4 * blocks + 1  # and the head
    assert exact["MatMul"] + exact["FusedMatMul"] - step["MatMul"] - step["FusedMatMul"] == 4 * blocks + 1
    condition = kernels(plan, "condition", tmp_path) + kernels(plan, "condition.canny", tmp_path)
    assert condition["MatMulIntegerToFloat"] == 3  # the AdaLN that blocks share is in both, the head's in one
    assert not condition["Gemm"] + condition["MatMul"]  # nor is a matrix widened in every run
    assert kernels(plan, "control.canny", tmp_path)["QLinearConv"] == 5 * len(read_manifest(plan).scales)
    assert kernels(plan, "decoder", tmp_path)["QLinearConv"] == 36
    assert not [line for line in said if "still in float32" in line]


# ---- Plans ----


def test_the_plan_that_ships_draws_nearly_the_same_in_int8(shipped: tuple[Path, list[str]]) -> None:
    plan, said = shipped
    manifest = read_manifest(plan)
    verify_files(plan, manifest)
    assert manifest.precision.weights == "int8"
    assert manifest.files[WEIGHTS].bytes < 0.8 * stored_weights(shipped_canny())[0]  # fp16 there
    assert not [name for name in manifest.graphs if name.startswith("step.")]
    assert manifest.provenance["int8 calibration"] == f"{int8.IMAGES} images, synthetic"
    # What errs most is what comes in where the branch joins: the step takes it in as it is. The rest is in INT8.
    assert "int8 leaves" not in manifest.provenance
    report = acceptance.verify(plan, "ort-cpu", warmup=0, runs=1)
    assert report["passed"]
    assert report["settings"]["limits"] == "int8"
    whole = report["agreement"]["teacher_forced"]["all"]
    assert whole["divergence"] < 0.01
    assert whole["top1"] > 0.9
    assert report["agreement"]["picture"]["largest"] <= acceptance.LIMITS["int8"].levels / 2
    assert "vs. PyTorch" in said[-1]


def test_an_image_depends_on_its_seed_and_not_on_its_batch(shipped: tuple[Path, list[str]]) -> None:
    with open_plan(shipped[0], "ort-cpu", threads=1) as plan:
        together = plan.generate(EXAMPLE, 2, seed=4, n=4)
        for i in range(4):
            alone = plan.generate(EXAMPLE, 2, seed=4 + i)
            np.testing.assert_array_equal(together.tokens[i], alone.tokens[0])
            np.testing.assert_array_equal(together.images[i], alone.images[0])
        kept = plan.generate(
            EXAMPLE, 2, seed=9, known_tokens=together.tokens[0], known_mask=np.ones(plan.manifest.tokens, bool)
        )
        np.testing.assert_array_equal(kept.images[0], together.images[0])
        assert plan.encode(together.images[0]).shape == (1, plan.manifest.tokens)


def test_on_a_cpu_without_vnni_sums_are_not_cut_off(
    shipped: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime then multiplies uint8 by uint8, which this CPU can do as well: the same numbers come out."""
    given: list[Any] = []

    class Options(ort.SessionOptions):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            given.append(self)

    monkeypatch.setattr(ort, "SessionOptions", Options)
    with open_plan(shipped[0], "ort-cpu", threads=1) as plan:
        usual = plan.generate(EXAMPLE, 2, seed=1)
    monkeypatch.setattr(ort_cpu, "_has_amx", lambda: False)
    known = len(given)
    with open_plan(shipped[0], "ort-cpu", threads=1) as plan:
        careful = plan.generate(EXAMPLE, 2, seed=1)
    assert {o.get_session_config_entry("session.x64quantprecision") for o in given[known:]} == {"1"}
    np.testing.assert_array_equal(careful.tokens, usual.tokens)
    assert np.abs(careful.images.astype(int) - usual.images).max() <= 1
    with open_plan(backend="ort-cpu", threads=1) as plan:  # a float32 plan has no such entry
        with pytest.raises(RuntimeError):
            given[-1].get_session_config_entry("session.x64quantprecision")
        assert plan.backend_name == "ort-cpu"


def test_what_is_made_is_the_same_each_time(shipped: tuple[Path, list[str]], tmp_path: Path) -> None:
    again = to_int8(Int8Options(source=shipped_canny(), output=tmp_path / "again.plan", name="again"))
    one, other = read_manifest(shipped[0]), read_manifest(again)
    assert other.name == "again"
    assert dataclasses.replace(other, name=one.name) == one


def test_openvino_multiplies_int8_too(shipped: tuple[Path, list[str]]) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed (extra openvino)")
    report = acceptance.verify(shipped[0], "openvino", warmup=0, runs=1)
    assert report["passed"]
    multiplies = {"avx512_vnni", "amx_int8", "avx_vnni"} & set(acceptance.machine()["flags"] or cpu_flags())
    # 0.028 on a CPU without VNNI (AMD Zen 3): OpenVINO computes otherwise there.
    assert report["agreement"]["teacher_forced"]["all"]["divergence"] < (0.02 if multiplies else 0.03)
    with open_plan(shipped[0], "openvino") as plan:
        if not multiplies:
            pytest.skip("this CPU multiplies no INT8")
        backend: Any = plan._backend
        blocks = plan.manifest.model.depth
        made = [node.get_rt_info() for node in backend._models["step"].parts[0]().model.get_runtime_model().get_ops()]
        kinds = Counter(
            str(info["primitiveType"].astype(str)).rsplit("_", 1)[-1]
            for info in made
            if info["layerType"].astype(str) == "FullyConnected"
        )
    # Queries, keys and values are products of their own, as they are in float32.
    assert kinds["I8"] >= blocks * (3 + 3) + 1


def cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    return set(info.read_text(encoding="utf-8").split()) if info.is_file() else set()


def test_a_steered_plan_of_an_export_and_its_few_channels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites, "MIN_CHANNELS", 4)
    monkeypatch.setattr(rewrite, "MAX_ERROR", 1.0)
    # A decoder of random weights whose every convolution is rounded is farther off than one that is left alone.
    loose = dataclasses.replace(acceptance.LIMITS["int8"], levels=128)
    monkeypatch.setitem(acceptance.LIMITS, "int8", loose)
    said: list[str] = []
    source = small_plan("steered")
    plan = to_int8(Int8Options(source=source, output=tmp_path / "s.plan"), said.append)
    model = onnx.load(plan / "step.onnx", load_external_data=False)
    stored = {t.name: t.data_type for t in model.graph.initializer}
    assert TensorProto.INT8 in stored.values()
    # f̂'s channels go into a product of their own, which stays as it is.
    assert stored["car.base.word_embedding.weight"] == TensorProto.FLOAT
    assert "car.base.head.weight" not in stored
    assert not [n for n in model.graph.node if n.op_type == "Conv" and ".int8" in n.input[1]]
    with open_plan(plan, "ort-cpu") as opened, open_plan(source, "ort-cpu") as exact:
        control = np.zeros((20, 20, 3), np.uint8)
        got, wanted = (p.generate(control, 1, seed=1, n=2) for p in (opened, exact))
        assert (got.tokens == wanted.tokens).mean() > 0.5
    for line in ("control", "condition", "step", "decoder"):
        assert any(said_line.startswith(line) for said_line in said), line


def test_control_images_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    controls = tmp_path / "controls"
    controls.mkdir()
    for i in range(2):
        noise = RNG.integers(0, 256, (30, 40, 3), np.uint8)
        Image.fromarray(noise).save(controls / f"{i}.png")
    (controls / "notes.txt").write_text("no image")
    output = tmp_path / "out" / "s.plan"
    flags = ["--weights", "int8", "-o", str(output), "--calibrate", str(controls), str(EXAMPLE)]
    assert cli.main([str(shipped_canny()), *flags]) == 0
    assert capsys.readouterr().out.strip() == str(output)
    assert read_manifest(output).provenance["int8 calibration"] == "3 images, given"
    assert [p.name for p in output.parent.iterdir()] == ["s.plan"]


def test_a_checkpoint_becomes_an_int8_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without control, exported and rounded in one go; nothing of the float32 plan is left."""
    monkeypatch.setattr(rewrite, "MAX_ERROR", 1.0)
    checkpoint.save(small_model(control=False, depth=2, sides=(1, 2, 4)), tmp_path / "var")
    output = tmp_path / "var.plan"
    assert cli.main([str(tmp_path / "var"), "--weights", "int8", "-o", str(output), "--cfg", "2"]) == 0
    manifest = read_manifest(output)
    assert manifest.precision == Precision(compute="fp32", weights="int8")
    assert manifest.sampling.cfg == 2
    assert [name for name in manifest.provenance if name.startswith("sha256 ")]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["var", "var.plan"]
    with open_plan(output, "ort-cpu") as plan:
        assert plan.generate(label=1, seed=1).tokens.shape == (1, 21)


# ---- What can't be ----


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], r"say what to build for, e.g. --target rtx --sm 89, or --weights int8"),
        (["--weights", "int8"], r"an int8 plan is another plan; name it, e.g. -o .*-int8.plan"),
        (["--weights", "int8", "-o", "SAME"], r"is the plan to read; choose another name"),
        (["--weights", "int8", "-o", "x.onnx"], r"ends in .plan"),
        (["--weights", "int8", "-o", "OUT", "--cfg", "2"], r"is a plan already, and --cfg settle"),
        (["--weights", "int8", "--target", "rtx"], r"for --target rtx use --precision fp16"),
        (["--weights", "int8", "--precision", "fp16"], r"leave out --precision fp16"),
        (["--weights", "int8", "--verify", "-o", "OUT"], r"checked by car-run verify"),
        (["--calibrate", "a.png", "-o", "SAME"], r"--calibrate a.png serves --weights int8"),
        (["--weights", "int8", "-o", "OUT", "--calibrate", "EMPTY"], r"no image is there"),
        (["--weights", "int8", "-o", "OUT", "--calibrate", "none.png"], r"none.png"),
    ],
)
def test_flags_that_do_not_go_together_name_the_remedy(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    places = {
        "SAME": str(default_plan()),
        "OUT": str(tmp_path / "o.plan"),
        "EMPTY": str(tmp_path / "empty"),
    }
    before = sorted(p.name for p in tmp_path.iterdir())
    assert cli.main([str(default_plan()), *(places.get(a, a) for a in arguments)]) == 2
    assert re.search(words, capsys.readouterr().err)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_half_precision_plans_are_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"an int8 plan is made from a float32 one \(--precision fp32\)"):
        to_int8(Int8Options(source=small_plan(kind), output=tmp_path / "o.plan"))
    assert not list(tmp_path.iterdir())


def test_controls_for_a_plan_that_takes_none(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="takes no control image; leave out --calibrate"):
        to_int8(Int8Options(source=small_plan("fp32"), output=tmp_path / "o.plan", controls=(EXAMPLE,)))


def test_a_model_that_int8_is_too_coarse_for_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strict = dataclasses.replace(acceptance.LIMITS["int8"], divergence=1e-9)
    monkeypatch.setitem(acceptance.LIMITS, "int8", strict)
    monkeypatch.setattr(int8, "IMAGES", 1)
    with pytest.raises(VerificationError, match=r"(?s)INT8 is too coarse for this model.*divergence.*--calibrate"):
        to_int8(Int8Options(source=default_plan(), output=tmp_path / "o.plan"))
    assert not list(tmp_path.iterdir())


def test_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "o.plan").mkdir()
    (tmp_path / "o.plan" / "mine").write_text("keep")
    with pytest.raises(ExportError, match="exists and is not a plan"):
        to_int8(Int8Options(source=default_plan(), output=tmp_path / "o.plan"))
    assert (tmp_path / "o.plan" / "mine").read_text() == "keep"


def test_gpus_and_their_compilers_refuse_it(shipped: tuple[Path, list[str]]) -> None:
    plan = shipped[0]
    with pytest.raises(BackendError, match="use --backend ort-cpu or openvino"):
        OrtCuda(plan, read_manifest(plan))
    with pytest.raises(TargetError, match="int8 plan, which is for CPUs"):
        build_engines(plan, choose_targets("rtx", [89]))
    with pytest.raises(ExportError, match="computes in fp32 and stores int8"):
        to_int8(Int8Options(source=plan, output=plan.with_name("again.plan")))
    with open_plan(plan, "auto") as opened:
        assert isinstance(opened, Plan)
        assert opened.backend_name in ("ort-cpu", "openvino")

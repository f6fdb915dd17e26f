"""What half precision does to logits and tokens, and that nothing comes near its largest number."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from car_export.config import NumericsOptions
from car_export.plan import compute_model, reference_model
from car_export.precision import numerics, probe
from car_export.precision.case import Case, compare, make_case
from car_export.precision.numerics import is_safe, largest_values, measure
from car_export.precision.probe import ProbedOrtCpu
from car_export.precision.rounding import Rounding, torch_logits
from car_train import checkpoint
from car_train.model import Model
from fixtures.golden import OFFICIAL_D16, OFFICIAL_VAE, Golden, _filled, save_official
from fixtures.small import small_model
from fixtures.small_plans import small_plan

SCRIPT = Path(__file__).parents[2] / "export" / "numerics.py"
# Largest error of a guided logit ÷ their range. fp16 rounds to 2⁻¹¹, bf16 to 2⁻⁸; guidance of 4 multiplies that by up
# to 9, and 5 leaves room for depth.
ROUNDED = {"fp16": 5 * 9 * 2.0**-11, "bf16": 5 * 9 * 2.0**-8}


def small() -> Model:
    """The model of `small_plan("fp16", 1)`, its weights rounded as that plan has them."""
    return reference_model(small_model(depth=2, sides=(1, 2, 4)), "fp16", "fp16")


# -- the graphs ------------------------------------------------------------------------------------------------------


def test_the_chain_of_graphs_agrees_with_pytorch() -> None:
    model = small()
    case = make_case(model, 4.0, 12, 0.9)
    found = compare(case, ProbedOrtCpu(small_plan("fp16", 1)).logits(case), model.config.vqvae.sides)
    assert [scale["side"] for scale in found["scales"]] == [1, 2, 4]
    assert 0 < found["all"]["relative_max"] <= ROUNDED["fp16"]
    assert found["all"]["max"] == max(scale["max"] for scale in found["scales"])
    assert found["all"]["largest_flipped_gap"] <= 2 * ROUNDED["fp16"]
    assert found["all"]["top1"] >= 0.9
    assert found["all"]["sampled"] >= 0.8


def test_probes_change_nothing_and_find_the_largest_values() -> None:
    model, plan = small(), small_plan("fp16", 1)
    case = make_case(model, 4.0, 12, 0.9)
    probed = ProbedOrtCpu(plan, probe=True)
    with_probes, without = probed.logits(case), ProbedOrtCpu(plan).logits(case)
    # A probe keeps ONNX Runtime from leaving a rounding out: equal to within that.
    assert (with_probes - without).abs().max() <= ROUNDED["fp16"] * case.logits.abs().max()
    graphs = {graph for graph, _ in probed.largest}
    assert graphs == {"control", "condition", "step", "decoder", "encoder"}
    assert all(0 <= value < numerics.FP16_MAX for value in probed.largest.values())
    # The stream starts as what goes in, and every block adds to it.
    assert probed.stream > 1


def test_every_half_precision_result_of_the_step_is_probed() -> None:
    model = onnx.load(small_plan("fp16", 1) / "step.onnx", load_external_data=False)
    products = {name for node in model.graph.node if node.op_type in ("MatMul", "Gelu") for name in node.output}
    probes = probe.add_probes(model)
    halves = {name for name, is_stream in probes if not is_stream}
    # Resizing, codes and logits' mixing are float32; all other products are half.
    blocks = 2 + 1
    assert len(products & halves) >= blocks * 7
    assert (
        sum(is_stream for _, is_stream in probes) == 2 * blocks + 1 + 1
    )  # two norms a block, the head's, the fusion's


def test_all_that_writes_into_the_stream_is_scaled() -> None:
    model, plan = small(), small_plan("fp16", 1)
    case = make_case(model, 4.0, 12, 0.9)
    plain, loud = ProbedOrtCpu(plan, probe=True), ProbedOrtCpu(plan, probe=True, factor=10.0)
    plain.logits(case)
    loud.logits(case)
    scaled = {name.removesuffix(".T") for name in loud.scaled}
    for block in ("car.base.blocks.0", "car.base.blocks.1", "car.branch.blocks.0"):
        for name in ("attn.proj.weight", "attn.proj.bias", "mlp.fc2.weight", "mlp.fc2.bias"):
            assert f"{block}.{name}" in scaled
    assert "car.branch.fusions.0.linear.weight" in scaled
    assert not [name for name in scaled if "qkv" in name or "fc1" in name or "head" in name]
    assert loud.stream > 3 * plain.stream
    assert plain.scaled == []


def test_a_value_beyond_half_precision_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are too loud by far must be seen, whether ONNX Runtime rounds the value to inf or not."""
    model, plan = small(), small_plan("fp16", 1)
    case = make_case(model, 4.0, 12, 0.9)
    found = largest_values(ProbedOrtCpu(plan, probe=True, factor=60_000.0), case)
    assert found["overflows"] or not found["finite"]
    quiet = largest_values(ProbedOrtCpu(plan, probe=True), case)
    assert not quiet["overflows"]
    assert quiet["finite"]
    assert quiet["headroom"] > 100
    run: dict[str, Any] = {"all": {"finite": True}}
    report: dict[str, Any] = {"pytorch": run, "onnxruntime": run, "tensors": quiet}
    assert is_safe(report | {"scaled": quiet})
    assert not is_safe(report | {"scaled": found})
    assert not is_safe(report | {"scaled": quiet, "pytorch": {"all": {"finite": False}}})
    json.dumps(found, allow_nan=False)


def test_a_largest_value_is_that_of_the_tensor(tmp_path: Path) -> None:
    half = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["y"])],
        "g",
        [half("x", TensorProto.FLOAT16, [2, 2])],
        [half("y", TensorProto.FLOAT16, [2, 2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    assert probe.add_probes(model) == [("y", False)]
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for values, expected in (([1, -3, 2, 0], 3.0), ([1, -np.inf, 2, 0], np.inf)):
        got = session.run(["largest.y"], {"x": np.array(values, np.float16).reshape(2, 2)})
        assert got == [expected]


# -- rounding in PyTorch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_sums_in_float32_and_rounds_once(dtype: torch.dtype) -> None:
    a, b = torch.randn(7, 300).to(dtype), torch.randn(300, 5).to(dtype)
    with Rounding():
        got = a @ b
        linear = torch.nn.functional.linear(a, b.T.contiguous(), torch.ones(5).to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got, (a.double() @ b.double()).to(dtype), rtol=torch.finfo(dtype).eps, atol=0)
    assert linear.dtype == dtype
    x, weight = torch.randn(1, 4, 6, 6).to(dtype), torch.randn(3, 4, 3, 3).to(dtype)
    with Rounding():
        convolved = torch.nn.functional.conv2d(x, weight)
    expected = torch.nn.functional.conv2d(x.float(), weight.float()).to(dtype)
    torch.testing.assert_close(convolved, expected, rtol=0, atol=0)


def test_in_float32_one_pass_gives_the_logits_of_the_loop() -> None:
    model = small()
    case = make_case(model, 4.0, 12, 0.9)
    assert (torch_logits(model, case) - case.logits).abs().max() <= 1e-5 * case.logits.abs().max()


@pytest.fixture(scope="module")
def case_of_ten(models: Callable[..., Model]) -> Case:
    """What `ten` draws, the published ten scales at depth 4."""
    return make_case(models(Golden("ten")), 4.0, 900, 0.95)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_ten_scales_with_every_result_rounded(
    precision: str, models: Callable[..., Model], case_of_ten: Case
) -> None:
    reference, case = models(Golden("ten")), case_of_ten
    found = compare(case, torch_logits(compute_model(reference, precision), case), reference.config.vqvae.sides)
    assert len(found["scales"]) == 10
    assert found["all"]["finite"]
    assert 0 < found["all"]["relative_max"] <= ROUNDED[precision]
    assert found["all"]["largest_flipped_gap"] <= 2 * found["all"]["relative_max"]
    assert found["all"]["top1"] >= {"fp16": 0.99, "bf16": 0.95}[precision]
    assert found["all"]["sampled"] >= {"fp16": 0.95, "bf16": 0.75}[precision]


# -- the whole -------------------------------------------------------------------------------------------------------


def test_the_script_writes_a_report(tmp_path: Path) -> None:
    """In bf16, which has no graphs to run and so takes seconds; the graphs are tested above, and whole below."""
    run = checkpoint.save(small_model(depth=2, sides=(1, 2, 4)), tmp_path / "run" / "checkpoint")
    output = tmp_path / "report.json"
    command = [sys.executable, SCRIPT, run, "--precision", "bf16", "-o", output]
    done = subprocess.run([str(c) for c in command], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{output}\n"), done.stderr
    report = json.loads(output.read_text())
    assert report["precision"] == "bf16"
    assert report["model"] == {"depth": 2, "width": 48, "heads": 3, "control": True}
    assert (report["onnxruntime"], report["tensors"]) == (None, None)
    assert 0 < report["pytorch"]["all"]["relative_max"] <= ROUNDED["bf16"]
    missing = subprocess.run([sys.executable, str(SCRIPT), "none"], cwd=tmp_path, capture_output=True, text=True)
    assert missing.returncode == 2
    assert missing.stderr.startswith("numerics: error: ")


@pytest.mark.slow
def test_ten_in_the_graphs(models: Callable[..., Model]) -> None:
    report = measure(copy.deepcopy(models(Golden("ten"))), NumericsOptions())  # its weights are rounded in place
    assert is_safe(report)
    for engine in ("pytorch", "onnxruntime"):
        assert report[engine]["all"]["relative_max"] <= ROUNDED["fp16"], engine
        assert report[engine]["all"]["top1"] >= 0.99, engine
    assert report["tensors"]["headroom"] >= 1000
    assert report["scaled"]["headroom"] >= 100


@pytest.mark.slow
def test_d16_in_the_graphs(tmp_path: Path) -> None:
    """The published size, random weights; in a process of its own, which gives its memory back."""
    parts = {"var": {}, "car": {}}  # type: dict[str, dict[str, list[int]]]
    for key, shape in OFFICIAL_D16.items():
        parts["car" if key.startswith("car_") else "var"][key] = shape
    files = save_official({"vae": _filled(OFFICIAL_VAE)} | {k: _filled(v) for k, v in parts.items()}, tmp_path)
    argv = [arg for part, path in files.items() for arg in (f"--{part}", path)]
    command = [sys.executable, SCRIPT, *argv, "--control-type", "depth", "-o", tmp_path / "report.json"]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stderr)
    report = json.loads((tmp_path / "report.json").read_text())
    for engine in ("pytorch", "onnxruntime"):
        assert report[engine]["all"]["relative_max"] <= ROUNDED["fp16"], engine
        assert report[engine]["all"]["top1"] >= 0.99, engine
        assert report[engine]["all"]["sampled"] >= 0.9, engine
    assert report["scaled"]["headroom"] >= 100

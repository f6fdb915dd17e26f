"""NVIDIA's polygraphy reads a plan's graphs, and agrees that engines can be built of their rewrites."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from car_export.tensorrt import build as engines
from car_runtime.format import manifest as schema
from fixtures.small_plans import small_plan

if importlib.util.find_spec("polygraphy") is None:
    pytest.skip("polygraphy is not installed: pip install polygraphy", allow_module_level=True)


def needs(module: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float16 plan with the forms of its graphs next to them, `GRAPH.form.onnx`."""
    copy = shutil.copytree(small_plan("fp16"), tmp_path_factory.mktemp("polygraphy") / "small.plan")
    for recipe in engines.recipes(copy, schema.read_manifest(copy)):
        (copy / f"{recipe.graph}.form.onnx").write_bytes(recipe.onnx)
    return copy


def polygraphy(folder: Path, *argv: str, **environment: str) -> str:
    """Run polygraphy in a folder, and return all it says; its exit code must be 0."""
    done = subprocess.run(
        [sys.executable, "-c", "from polygraphy.tools import main; main()", *argv],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_inspect_model_sees_the_ports_that_the_manifest_names(plan: Path) -> None:
    said = polygraphy(plan, "inspect", "model", "step.onnx")
    for port in schema.read_manifest(plan).graphs["step"].inputs:
        assert f"{port.name} [dtype={port.dtype}, shape={port.shape}" in said


def compare(plan: Path, graph: str) -> None:
    """Compare a graph with the plan's decoder in ONNX Runtime, on inputs that polygraphy makes up once."""
    if not (plan / "outputs.json").exists():
        saved = ["--save-inputs", "inputs.json", "--save-outputs", "outputs.json"]
        polygraphy(plan, "run", "decoder.onnx", "--onnxrt", "--input-shapes", "f_hat:[2,8,4,4]", *saved)
    given = ["--onnxrt", "--load-inputs", "inputs.json", "--load-outputs", "outputs.json"]
    # Levels of 255: a value may fall on the other side of a rounding border.
    said = polygraphy(plan, "run", graph, *given, "--atol", "1", "--rtol", "0")
    assert "Passed: 1/1 iterations" in said


def test_the_form_of_the_decoder_agrees_with_the_plans_decoder(plan: Path) -> None:
    compare(plan, "decoder.form.onnx")


@needs("onnx_graphsurgeon")
def test_a_sanitised_decoder_agrees_with_the_plans_decoder(plan: Path) -> None:
    polygraphy(plan, "surgeon", "sanitize", "decoder.onnx", "--fold-constants", "-o", "sanitised.onnx")
    compare(plan, "sanitised.onnx")


@needs("tensorrt_rtx")
@pytest.mark.parametrize("graph", ["control.sketch", "condition", "decoder", "encoder", "step"])
def test_inspect_capability_finds_every_form_supported(plan: Path, graph: str) -> None:
    said = polygraphy(plan, "inspect", "capability", f"{graph}.form.onnx", POLYGRAPHY_USE_TENSORRT_RTX="1")
    assert "Graph is fully supported by TensorRT" in said

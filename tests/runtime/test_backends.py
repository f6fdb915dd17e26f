"""Choosing an engine: a name opens or says why not; `auto` says what it took."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from car_runtime import BackendError, PlanError, RunError, open_plan
from car_runtime.backends import registry
from car_runtime.backends.registry import BACKENDS, markdown_table, open_backend
from car_runtime.backends.spec import BackendSpec
from car_runtime.format.manifest import WEIGHTS, read_manifest
from car_runtime.system.gpu import has_driver
from fixtures.runtime_plan import build_plan, relist

PYPROJECT = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_plan(tmp_path_factory.mktemp("backends") / "tiny.plan")


@pytest.mark.skipif(has_driver(), reason="this machine has an NVIDIA driver")
@pytest.mark.parametrize("name", ["rtx", "trt", "ort-cuda"])
def test_a_gpu_backend_without_a_driver_is_an_error_with_the_remedy(root: Path, name: str) -> None:
    with pytest.raises(BackendError, match=r"no NVIDIA driver.*; .*install"):
        open_plan(root, name)


def test_an_unknown_backend_is_named(root: Path) -> None:
    with pytest.raises(BackendError, match="there is no backend 'ort_cpu'; use ort-cpu"):
        open_plan(root, "ort_cpu")
    with pytest.raises(
        BackendError, match="there is no backend ''; use one of auto, cuda, rtx, trt, ort-cuda, ort-cpu"
    ):
        open_plan(root, "")


def test_without_onnxruntime_the_message_says_how_to_get_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "openvino", None)
    for name in ("ort-cpu", "auto"):
        with pytest.raises(BackendError, match=r"pip install 'car-deploy\[cpu\]'"):
            open_plan(root, name)


def test_two_onnxruntimes_that_overwrite_each_other_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"onnxruntime", "onnxruntime-gpu"}

    def distribution(name: str) -> object:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return object()

    monkeypatch.setattr(metadata, "distribution", distribution)
    monkeypatch.setitem(sys.modules, "openvino", None)
    for name in ("ort-cpu", "auto"):
        with pytest.raises(
            BackendError, match=r"both installed .*; pip uninstall both, then install 'car-deploy\[cpu\]'"
        ):
            open_plan(root, name)
    for alone in ("onnxruntime", "onnxruntime-gpu"):
        installed = {alone}
        open_plan(root, "ort-cpu", threads=1).close()


def test_auto_goes_on_to_the_next_and_a_name_does_not(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(root: Path, manifest: Any, threads: Any) -> Any:
        raise BackendError("no GPU here; use a machine with one")

    monkeypatch.setattr("car_runtime.backends.tensorrt.backend.open_rtx", absent)
    with open_plan(root, threads=1) as plan:
        assert plan.backend_name == "ort-cpu"
        assert "rtx: no GPU here" in plan.why
    with pytest.raises(BackendError, match="no GPU here"):
        open_plan(root, "rtx")


def test_a_backend_that_cannot_be_imported_is_one_that_does_not_open(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "car_runtime.backends.openvino.backend", None)
    with pytest.raises(BackendError, match=r"the backend 'openvino' can't be loaded here .*; use another backend"):
        open_plan(root, "openvino")


@pytest.mark.parametrize("name", ["ort-cpu", "auto"])
def test_a_graph_that_does_not_load_is_a_fault_of_the_plan(tmp_path: Path, name: str) -> None:
    root = build_plan(tmp_path / "x.plan")
    graph = onnx.load(root / "step.onnx", load_external_data=False)
    graph.graph.node[0].input[0] = "nothing"
    (root / "step.onnx").write_bytes(graph.SerializeToString())
    relist(root, read_manifest(root), "step.onnx")
    with pytest.raises(PlanError) as caught:
        open_plan(root, name)
    assert "cannot open step.onnx" in str(caught.value)
    assert str(caught.value).endswith("export the plan again, or upgrade onnxruntime")
    assert "\n" not in str(caught.value)


def test_a_failing_run_is_an_error_of_the_engine(root: Path) -> None:
    manifest = read_manifest(root)
    backend, _ = open_backend("ort-cpu", root, manifest, 1)
    image = backend.allocate((1, 5, 5, 3), "uint8")
    with pytest.raises(RunError, match="failed in the graph 'decoder'"):
        backend.run("decoder", {"f_hat": backend.allocate((1, 4, 4, 4), "float32")}, {"image": image})
    with pytest.raises(RunError, match="failed in the graph 'condition'"):
        backend.run("condition", {}, {"start": backend.allocate((1, 1, 1, 8), "float32")})
    backend.close()


def test_buffers_are_written_in_place(root: Path) -> None:
    backend, _ = open_backend("ort-cpu", root, read_manifest(root), 1)
    whole = backend.allocate((2, 32, 32, 3), "uint8")
    backend.write(whole, np.zeros((2, 32, 32, 3), np.uint8))
    f_hat = backend.allocate((1, 4, 4, 4), "float32")
    backend.write(f_hat, np.zeros((1, 4, 4, 4), np.float32))
    backend.run("decoder", {"f_hat": f_hat}, {"image": whole[1:2]})
    assert np.unique(backend.read(whole[0:1])).tolist() == [0]
    assert np.unique(backend.read(whole[1:2])).tolist() == [128]
    backend.close()


def test_auto_prefers_bfloat16_on_openvino_for_large_plans_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(root)
    size = manifest.files[WEIGHTS].bytes

    def order(large: int, bfloat16: bool, compute: str = "fp32") -> list[str]:
        monkeypatch.setattr(registry, "LARGE", large)
        monkeypatch.setattr(registry, "has_bfloat16", lambda: bfloat16)
        return registry.best_first(replace(manifest, precision=replace(manifest.precision, compute=compute)))

    usual = registry.by_rank()
    assert order(size, True) == ["cuda", "rtx", "trt", "ort-cuda", "amx", "openvino", "amx-fp32", "ort-cpu"]
    assert order(size + 1, True) == order(size, False) == order(size, True, "fp16") == usual
    assert usual.index("ort-cpu") < usual.index("openvino")


# -- what is known of a backend without opening it -------------------------------------------------------------------


@pytest.mark.parametrize("spec", BACKENDS.values(), ids=lambda spec: str(spec.name))
def test_a_spec_names_code_that_exists_and_an_extra_that_is_declared(spec: BackendSpec) -> None:
    for reference in (spec.opener, spec.probe):
        module, _, name = reference.partition(":")
        assert callable(getattr(import_module(module), name))
    declared = re.search(r"^\[project\.optional-dependencies\]\n(.*?)^\[", PYPROJECT, re.MULTILINE | re.DOTALL)
    assert declared is not None
    assert re.search(rf"^{spec.extra} = \[", declared[1], re.MULTILINE)
    assert f"car-deploy[{spec.extra}]" in spec.install[-1]


def test_every_backend_has_a_rank_of_its_own() -> None:
    ranks = [spec.rank for spec in BACKENDS.values()]
    ranks_bf16 = [spec.rank_bf16 or spec.rank for spec in BACKENDS.values()]
    assert len(set(ranks)) == len(set(ranks_bf16)) == len(BACKENDS)


def test_the_cpus_backends_are_known_from_the_gpus() -> None:
    assert [name for name in BACKENDS if registry.on_cpu(name)] == ["ort-cpu", "openvino", "amx", "amx-fp32"]
    assert not registry.on_cpu("none")


def test_the_table_for_readme_has_a_row_per_backend() -> None:
    head, rule, *rows = markdown_table().splitlines()
    assert [row.split("`")[1] for row in rows] == list(BACKENDS)
    assert {row.count("|") for row in (head, rule, *rows)} == {6}
    assert "pip install '.[cpu]'" in rows[0]

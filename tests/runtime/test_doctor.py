"""`car-run doctor`: it finds what is there, says what is missing and how to get it, and never fails over either."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from car_runtime import BackendError, doctor
from car_runtime.backends.onnxruntime import spec as onnxruntime_spec
from car_runtime.backends.registry import BACKENDS
from car_runtime.backends.tensorrt.spec import old_driver
from car_runtime.cli.main import main
from car_runtime.format.manifest import Engine, Precision, describe_files, read_manifest, write_manifest
from car_runtime.system import cpu, packages
from car_runtime.system import gpu as nvidia
from car_runtime.system.machine import machine
from fixtures.runtime_plan import build_plan

Gpu = Callable[..., None]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_plan(tmp_path_factory.mktemp("doctor") / "tiny.plan")


@pytest.fixture(autouse=True)
def no_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder that is all of PATH: what a test puts there is found, and nothing else."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """Answer for CUDA: a GPU of some capability, or an error."""

    def answer(major: int = 8, minor: int = 9, error: Exception | None = None) -> None:
        def probe() -> nvidia.Gpu:
            if error is not None:
                raise error
            facts = {"memory_bytes": 24 * 10**9, "count": 1, "driver": "13.0", "runtime": "13.0"}
            return nvidia.Gpu(name="NVIDIA GeForce RTX 4090", capability=(major, minor), **facts)  # type: ignore[arg-type]

        monkeypatch.setattr(nvidia, "probe", probe)

    return answer


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Say which distributions are installed."""

    def only(*names: str) -> None:
        monkeypatch.setattr(packages, "version", lambda name: "1.0" if name in names else None)

    return only


def entry(report: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = (backend for backend in report["backends"] if backend["name"] == name)
    return dict(found)


# -- backends --------------------------------------------------------------------------------------------------------


def test_this_machine_runs_the_cpu_backend_and_says_by_what() -> None:
    report = doctor.examine()
    assert report["works"]
    assert [backend["name"] for backend in report["backends"]] == list(BACKENDS)
    found = entry(report, "ort-cpu")
    assert (found["usable"], found["install"]) == (True, [])
    assert found["why"] == f"onnxruntime {metadata.version('onnxruntime')}"


def test_without_any_package_nothing_works_and_each_has_its_command(
    installed: Callable[..., None], gpu: Gpu, capsys: pytest.CaptureFixture[str]
) -> None:
    installed()
    gpu(error=BackendError("the GPU backends need cuda-python; run: pip install 'car-deploy[rtx]'"))
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    for backend in report["backends"]:
        assert not backend["usable"]
        extra = {"ort-cpu": "cpu", "ort-cuda": "gpu", "amx": "openvino", "amx-fp32": "openvino"}.get(
            backend["name"], backend["name"]
        )
        assert len(backend["install"]) == 1, "there is nothing to uninstall"
        assert f"car-deploy[{extra}]" in backend["install"][0]
    assert main(["doctor"]) == 1
    out, err = capsys.readouterr()
    assert "pip install 'car-deploy[cpu]'" in out
    assert err == ""


def test_two_onnxruntimes_are_a_conflict_with_the_way_out(installed: Callable[..., None], gpu: Gpu) -> None:
    installed("onnxruntime", "onnxruntime-gpu")
    gpu()
    for name, extra in (("ort-cpu", "cpu"), ("ort-cuda", "gpu")):
        found = entry(doctor.examine(), name)
        assert not found["usable"]
        assert "overwrite each other" in found["why"]
        assert found["install"] == [
            "pip uninstall onnxruntime onnxruntime-gpu",
            f"pip install 'car-deploy[{extra}]'",
        ]


def test_ort_cuda_replaces_the_cpu_package(installed: Callable[..., None], gpu: Gpu) -> None:
    installed("onnxruntime")
    gpu()
    commands = entry(doctor.examine(), "ort-cuda")["install"]
    assert commands == ["pip uninstall onnxruntime", "pip install 'car-deploy[gpu]'"]


def test_a_provider_that_cannot_load_is_not_taken_for_one_that_runs(installed: Callable[..., None], gpu: Gpu) -> None:
    """The real onnxruntime of this environment is one for CPUs: asked for CUDA, it silently gives the CPU."""
    if metadata.packages_distributions().get("onnxruntime") != ["onnxruntime"]:
        pytest.skip("another onnxruntime than that for CPUs is installed")
    installed("onnxruntime-gpu")
    gpu()
    found = entry(doctor.examine(), "ort-cuda")
    assert not found["usable"]
    assert "CUDAExecutionProvider" in found["why"]


def test_the_probe_model_is_one_that_onnxruntime_opens() -> None:
    assert onnxruntime_spec._try_provider(onnxruntime_spec.ORT_CPU, "CPUExecutionProvider") is None


@pytest.mark.parametrize("name", ["rtx", "trt", "ort-cuda", "cuda"])
def test_without_a_driver_the_reason_is_the_drivers(name: str, gpu: Gpu, installed: Callable[..., None]) -> None:
    installed("tensorrt-rtx", "tensorrt", "onnxruntime-gpu", "cuda-python")
    gpu(error=BackendError("there is no NVIDIA driver on this machine; install one"))
    found = entry(doctor.examine(), name)
    assert (found["usable"], found["why"]) == (False, "there is no NVIDIA driver on this machine; install one")


def test_a_gpu_that_tensorrt_for_rtx_has_no_target_for(gpu: Gpu, installed: Callable[..., None]) -> None:
    installed("tensorrt-rtx")
    gpu(9, 0)
    report = doctor.examine()
    assert report["gpu"]["target"] == "sm90"
    found = entry(report, "rtx")
    assert not found["usable"]
    assert "does not run on compute capability 9.0" in found["why"]
    assert "use trt or ort-cuda" in found["why"]
    assert "TensorRT for RTX has no sm90" in doctor.table(report)


def test_a_broken_library_is_a_finding(
    gpu: Gpu, installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed("tensorrt-rtx", "openvino", "onnxruntime")
    gpu()
    for module in ("tensorrt_rtx", "openvino", "onnxruntime"):
        monkeypatch.setitem(sys.modules, module, None)
    report = doctor.examine()
    for name in ("rtx", "openvino", "ort-cpu"):
        found = entry(report, name)
        assert not found["usable"]
        assert "does not start" in found["why"]
        assert found["install"]
    assert not report["works"]


def test_a_driver_older_than_the_libraries_is_named(
    gpu: Gpu, installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed("tensorrt-rtx", "tensorrt-rtx-cu13")
    gpu()
    old = nvidia.probe()
    monkeypatch.setattr(nvidia, "probe", lambda: replace(old, driver="12.8"))
    found = entry(doctor.examine(), "rtx")
    assert not found["usable"]
    assert "runs CUDA 12.8 at most, but tensorrt-rtx was made for CUDA 13; upgrade the driver to 580" in found["why"]
    gpu()
    assert old_driver("tensorrt-rtx", str(nvidia.gpu_facts().driver)) is None


def test_a_plan_in_a_type_that_the_cpu_cannot_compute_in_runs_on_nothing(tmp_path: Path) -> None:
    root = build_plan(tmp_path / "bf16.plan", precision=Precision(compute="bf16", weights="bf16"))
    found = doctor.examine(root)["plan"]
    assert (found["precision"], set(found["runs_on"]) & {"ort-cpu", "openvino"}) == ("bf16", set())


def test_a_driver_that_fails_in_an_unknown_way_is_a_finding(gpu: Gpu) -> None:
    gpu(error=OSError("libcuda.so: wrong\nELF class"))
    report = doctor.examine()
    assert report["gpu"]["why"] == "OSError: libcuda.so: wrong ELF class; check that nvidia-smi works"
    assert report["works"]


# -- the machine -----------------------------------------------------------------------------------------------------


def test_the_machine_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    here = machine()
    assert here["cores"] == os.cpu_count()
    assert 1 <= here["cores_usable"] <= here["cores"]
    assert here["packages"]["numpy"] == metadata.version("numpy")
    if sys.platform == "linux":
        assert 0 < here["memory_available"] < here["memory"]
        assert set(here["flags"]) <= set(cpu.CPU_FLAGS)
    monkeypatch.setattr(cpu, "cpu_info", lambda: {"flags": "fpu avx2 amx_bf16x amx_tile", "model name": "A"})
    assert (machine()["flags"], machine()["cpu"]) == (["avx2", "amx_tile"], "A")
    monkeypatch.setattr(cpu, "cpu_info", dict)
    assert machine()["flags"] is None


def _nvidia_smi(folder: Path, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for nvidia-smi is a shell script")
def test_nvidia_smi_reports_the_gpu_where_cuda_python_is_missing(no_nvidia_smi: Path, gpu: Gpu) -> None:
    gpu(error=BackendError("the GPU backends need cuda-python; run: pip install"))
    _nvidia_smi(no_nvidia_smi, "echo 'NVIDIA GeForce RTX 4090, 8.9, 24564 MiB, 580.65.06'")
    report = doctor.examine()
    assert report["gpu"]["nvidia_smi"] == ["NVIDIA GeForce RTX 4090, 8.9, 24564 MiB, 580.65.06"]
    assert (report["gpu"]["usable"], report["gpu"]["target"], report["gpu"]["driver"]) == (False, "sm89", "580.65.06")
    assert "--target rtx --sm 89" in doctor.table(report)


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for nvidia-smi is a shell script")
def test_an_nvidia_smi_that_fails_is_shown(no_nvidia_smi: Path, gpu: Gpu) -> None:
    gpu(error=BackendError("there is no NVIDIA driver; install one"))
    _nvidia_smi(no_nvidia_smi, "echo 'NVIDIA-SMI has failed, because it could not talk, to, the driver'; exit 9")
    report = doctor.examine()
    assert (report["gpu"]["name"], report["gpu"]["target"]) == (None, None)
    assert "nvidia-smi: NVIDIA-SMI has failed" in doctor.table(report)


# -- a plan ----------------------------------------------------------------------------------------------------------


def with_engines(plan: Path, target: Path, *targets: str) -> Path:
    """A copy of a plan that lists engines for some targets; nothing opens them."""
    build_plan(target)
    (target / "engines").mkdir()
    engines, names = [], []
    for sm in targets:
        stem = f"engines/step.rtx.{sm}.0123456789abcdef"
        for name, content in ((f"{stem}.engine", b"engine"), (f"{stem}.json", b"{}")):
            (target / name).write_bytes(content)
            names.append(name)
        details = {"graph": "step", "sidecar": f"{stem}.json", "precision": "fp32"}
        engines.append(Engine(file=f"{stem}.engine", flavour="rtx", target=sm, key="0" * 64, details=details))
    manifest = read_manifest(target)
    files = {**manifest.files, **describe_files(target, names)}
    write_manifest(target, replace(manifest, engines=tuple(engines), files=files))
    return target


def test_a_plan_without_engines_runs_on_the_cpu(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(plan), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["plan"]
    assert (found["name"], found["problem"], found["engines"], found["precision"]) == ("tiny", None, [], "fp32")
    assert "ort-cpu" in found["runs_on"]
    assert main(["doctor", str(plan)]) == 0
    assert "plan tiny (fp32): runs on ort-cpu" in capsys.readouterr().out


def test_a_gpu_without_its_engine_gets_the_command_that_builds_it(
    plan: Path, gpu: Gpu, tmp_path: Path, installed: Callable[..., None]
) -> None:
    installed("onnxruntime")
    gpu()
    root = with_engines(plan, tmp_path / "with space.plan", "sm86")
    report = doctor.examine(root)
    assert [(e["target"], e["usable"]) for e in report["plan"]["engines"]] == [("sm86", False)]
    assert report["plan"]["engines"][0]["why"] == "for sm86; this machine has sm89"
    (build,) = report["plan"]["build"]
    assert build["command"] == f"python export/build_engines.py '{root}' --target rtx --sm 89"
    assert build["command"] in doctor.table(report)


def test_engines_for_this_gpu_wait_for_the_backend(
    plan: Path, gpu: Gpu, tmp_path: Path, installed: Callable[..., None]
) -> None:
    installed("onnxruntime")
    gpu()
    report = doctor.examine(with_engines(plan, tmp_path / "two.plan", "sm86", "sm89"))
    assert [e["usable"] for e in report["plan"]["engines"]] == [False, False]
    assert "the backend rtx is not usable" in report["plan"]["engines"][1]["why"]
    assert report["plan"]["build"] == []
    assert "rtx" not in report["plan"]["runs_on"]


def test_an_engine_is_usable_where_its_backend_and_target_are(plan: Path, tmp_path: Path) -> None:
    root = with_engines(plan, tmp_path / "two.plan", "sm86", "sm89")
    found = doctor._plan(root, nvidia.GpuFacts(usable=True, target="sm89"), ["ort-cpu", "rtx"])
    assert [(e["target"], e["usable"]) for e in found["engines"]] == [("sm86", False), ("sm89", True)]
    # Whether they are whole, and of the installed version, is asked of what opens them: these sidecars are empty.
    assert found["runs_on"] == ["ort-cpu"]
    assert "format" in found["build"][0]["why"]


@pytest.mark.parametrize("path", ["no.plan", "."])
def test_a_plan_that_is_none_is_named_and_the_rest_is_still_reported(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", path]) == 0
    out, err = capsys.readouterr()
    assert "ort-cpu" in out
    assert f"plan {path}: " in out
    assert err == ""


def test_bad_arguments_are_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--frobnicate"]) == 2
    assert capsys.readouterr().err == (
        "car-run: error: unrecognized arguments: --frobnicate; see car-run doctor --help\n"
    )

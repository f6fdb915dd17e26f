"""The backend `cuda` on the fake GPU: its kernels in Triton's interpreter, and ONNX Runtime for what has none.

Wanted are the images of `ort-cpu` from the same fp16 plan. What a step computes is test_cuda_steps.py's.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from car_runtime import GenerationConfig, Plan, open_plan
from car_runtime.backends.cuda.driver import CudaError
from car_runtime.backends.onnxruntime.kernels import Cuda
from car_runtime.backends.registry import BACKENDS, open_backend
from car_runtime.backends.spec import MachineFacts
from car_runtime.errors import BackendError, RunError
from car_runtime.format.manifest import read_manifest
from car_runtime.system.gpu import GpuFacts, has_driver
from fixtures.fake_device import GPU, FakeOnnxRuntime
from fixtures.kernel_device import KernelDevice
from fixtures.kernel_models import narrow_plan
from fixtures.runtime_plan import build_plan

SIDES = (1, 2, 3)
GREYS = 2
"""Of 255: fp16's rounding through the decoder, where ONNX Runtime rounds after each operation."""


@pytest.fixture(scope="module")
def root() -> Path:
    return narrow_plan()


@pytest.fixture(scope="module")
def cpu(root: Path) -> Iterator[Plan]:
    with open_plan(root, "ort-cpu", threads=1) as plan:
        yield plan


class Fake:
    """A plan opened on the fake GPU."""

    def __init__(self, root: Path, **options: Any) -> None:
        self.device = KernelDevice(**options)
        self.ort = FakeOnnxRuntime(self.device)
        manifest = read_manifest(root)
        self.backend = Cuda(root, manifest, self.device, self.ort)
        self.plan = Plan(root, manifest, self.backend, "a test")


def drawing(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (12, 12, 3), np.uint8)


def configs() -> list[GenerationConfig]:
    """Requests unlike one another."""
    a, b = drawing(1), drawing(2)
    return [
        GenerationConfig(control={"one": a}, label=1, seed=3, cfg=2.0, top_k=5),
        GenerationConfig(control={"one": b}, label=4, seed=8, cfg=0, top_p=0.5),
        GenerationConfig(control={"one": a, "two": (b, 0.4)}, label=0, seed=1, control_cfg=1.0),
        GenerationConfig(label=2, seed=6, n=2, cfg=3.0, cfg_scales="-1", more_smooth=True),
    ]


@pytest.mark.slow
def test_images_are_those_of_the_plan_on_the_cpu(root: Path, cpu: Plan) -> None:
    """In shared steps, with one branch, with two, with none; all by kernels."""
    fake = Fake(root)
    wanted = [cpu.generate(config) for config in configs()]
    for found, want in zip(fake.plan.generate_many(configs()), wanted, strict=True):
        assert (found.tokens == want.tokens).all()
        assert np.abs(found.images.astype(int) - want.images).max() <= GREYS
    assert fake.device.loaded
    assert fake.ort.sessions == []
    fake.plan.close()
    fake.plan.close()
    assert fake.device.allocated() == 0
    with pytest.raises(RunError, match="closed while it was in use"):
        fake.backend.run("step", {}, {})


@pytest.mark.slow
def test_later_images_launch_what_the_second_recorded(root: Path, cpu: Plan) -> None:
    """All scales and the decoder as one, whatever control, class and settings are in the buffers."""
    fake = Fake(root)
    for seed in range(4):
        config = GenerationConfig(control={"one": drawing(seed)}, label=seed, seed=seed, cfg=1.0 + seed, top_k=9)
        found, want = fake.plan.generate(config), cpu.generate(config)
        assert (found.tokens == want.tokens).all()
        assert np.abs(found.images.astype(int) - want.images).max() <= GREYS
        assert list(found.timings) == list(want.timings)
        assert min(found.timings[f"scale_{k}"] for k in range(len(SIDES))) > 0
    (graph,) = [graph for graph in fake.device.graphs if len(graph.works) > 100]
    assert graph.launches == 3
    assert sum(work.kind == "kernel" for work in graph.works) > len(SIDES) * fake.backend.report()["launches"] / 2
    assert fake.backend.report()["not_captured"] == {}
    plain = GenerationConfig(control={"one": drawing(0)}, label=2, seed=5)
    for _ in range(2):  # guidance at the last scale alone: rows go, step by step
        found = fake.plan.generate(replace(plain, cfg=2.0, cfg_scales="0"))
        assert (found.tokens == cpu.generate(replace(plain, cfg=2.0, cfg_scales="0")).tokens).all()
    assert graph.launches == 3
    fake.plan.close()
    assert all(graph.freed for graph in fake.device.graphs)


@pytest.mark.slow
def test_a_recording_goes_with_its_buffers(root: Path, cpu: Plan) -> None:
    """Another batch takes other buffers; the first ones' memory and recording are given back."""
    fake = Fake(root)
    one, two = (GenerationConfig(label=1, seed=3, n=n, cfg=2.0) for n in (1, 2))
    for config in (one, one, two, one, one, two, two, two):
        assert (fake.plan.generate(config).tokens == cpu.generate(config).tokens).all()
    images = [graph for graph in fake.device.graphs if len(graph.works) > 100]
    assert [graph.launches for graph in images] == [1, 1, 2]
    assert [graph.freed for graph in images] == [True, True, False]
    fake.plan.close()
    assert fake.device.allocated() == 0


@pytest.mark.slow
def test_a_stream_records_each_step(root: Path, cpu: Plan) -> None:
    fake = Fake(root)
    for seed in range(4):
        scales = list(fake.plan.stream({"one": drawing(1)}, 1, seed=seed))
        want = cpu.generate({"one": drawing(1)}, 1, seed=seed)
        assert (np.concatenate([s.tokens.reshape(-1) for s in scales]) == want.tokens[0]).all()
    graphs = fake.device.graphs
    assert [graph.launches for graph in graphs] == [3] * (2 * len(SIDES))  # branch and base
    report = fake.backend.report()
    assert report["graphs_captured"] == len(graphs)
    assert report["not_captured"] == {}
    assert report["launches"] == max(len(graph.works) for graph in graphs)
    fake.plan.close()


@pytest.mark.slow
def test_what_cannot_be_recorded_is_put_on_the_stream_kernel_by_kernel(root: Path, cpu: Plan) -> None:
    fake = Fake(root)
    fake.device.refuse_capture = True
    for seed in range(3):
        found = fake.plan.generate(None, 1, seed=seed, cfg=0)
        assert (found.tokens == cpu.generate(None, 1, seed=seed, cfg=0).tokens).all()
    assert "operation not permitted" in fake.backend.report()["not_captured"]["images"]
    for _ in range(3):
        assert len(list(fake.plan.stream(None, 1, seed=1, cfg=0))) == len(SIDES)
    assert "operation not permitted" in fake.backend.report()["not_captured"]["step"]
    fake.plan.close()


@pytest.mark.slow
def test_an_edit_keeps_its_tokens(root: Path, cpu: Plan) -> None:
    fake = Fake(root)
    tokens = cpu.generate(None, 2, seed=4).tokens[0]
    edit = {"known_tokens": tokens, "known_mask": np.arange(len(tokens)) % 2 == 0, "seed": 3}
    for seed in range(5, 8):
        assert (fake.plan.encode(drawing(seed)) == cpu.encode(drawing(seed))).all()
    assert fake.backend.report()["engine"] == "own kernels"
    found = fake.plan.generate({"two": drawing(1)}, 0, **edit)
    assert (found.tokens == cpu.generate({"two": drawing(1)}, 0, **edit).tokens).all()
    fake.plan.close()


def test_what_has_no_kernels_runs_in_onnx_runtime(root: Path, cpu: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same memory and on the same stream; its session opens when it is first needed."""
    monkeypatch.setattr("car_runtime.backends.cuda.steps.scale_constants", lambda *_: [])
    fake = Fake(root)
    assert fake.ort.sessions == []
    assert (fake.plan.encode(drawing(5)) == cpu.encode(drawing(5))).all()
    assert [session.name for session in fake.ort.sessions] == ["encoder"]
    assert fake.backend.report()["engine"] == "own kernels, onnxruntime 1.99"
    fake.plan.close()
    assert fake.device.allocated() == 0


# -- what it refuses, each in one line, with the remedy -------------------------------------------------------------


def refusal(root: Path, **options: Any) -> str:
    manifest = read_manifest(root)
    device = KernelDevice(**options)
    with pytest.raises(BackendError) as caught:
        Cuda(root, manifest, device, FakeOnnxRuntime(device))
    assert "\n" not in str(caught.value)
    assert device.allocated() == 0
    return str(caught.value)


def test_a_gpu_without_kernels_is_refused_before_anything_is_opened(root: Path) -> None:
    says = refusal(root, gpu=replace(GPU, capability=(7, 5)))
    assert says == "there are no kernels for sm75 (only for sm80, sm86, sm89, sm90, sm120); use --backend ort-cuda"


@pytest.mark.skipif(has_driver(), reason="this machine has an NVIDIA driver")
def test_a_machine_without_a_driver_is_refused_with_the_remedy(root: Path) -> None:
    with pytest.raises(BackendError, match=r"no NVIDIA driver on this machine; install one"):
        open_backend("cuda", root, read_manifest(root))


def test_a_driver_that_refuses_the_kernels_is_too_old(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class OldDriver(KernelDevice):
        def load_kernels(self, code: Any) -> None:
            raise CudaError("CUDA failed in cuModuleLoadData: no binary for GPU; upgrade the driver, or …", 209)

    device = OldDriver()
    monkeypatch.setattr("car_runtime.backends.onnxruntime.kernels.probe", lambda: GPU)
    opened = partial(Cuda, device=device, module=FakeOnnxRuntime(device))
    monkeypatch.setattr("car_runtime.backends.onnxruntime.kernels.Cuda", opened)
    with pytest.raises(BackendError, match=r"cuModuleLoadData: .*; upgrade the driver"):
        open_backend("cuda", root, read_manifest(root))
    assert device.allocated() == 0


def test_plans_of_other_kinds_are_refused(tmp_path: Path, root: Path) -> None:
    whole = shutil.copytree(root, tmp_path / "x.plan")
    manifest = read_manifest(whole)
    for change, says in (
        ({"compute": "fp32", "weights": "fp32"}, "the plan is fp32 with fp32 weights"),
        ({"compute": "fp16", "weights": "int8"}, "the plan is fp16 with int8 weights"),
    ):
        other = replace(manifest, precision=replace(manifest.precision, **change))
        with pytest.raises(BackendError, match=rf"{says}, .*use --backend ort-cuda, or export it with .*fp16"):
            Cuda(whole, other, KernelDevice())
    old = build_plan(tmp_path / "old.plan")
    assert not BACKENDS["cuda"].runs(read_manifest(old))
    with pytest.raises(BackendError, match=r"plans from format 2 on, .* of format 1; .*--upgrade -o NEW, or"):
        open_plan(old, "cuda")


def test_too_little_memory_is_a_reason_to_take_another_backend(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = KernelDevice(memory=100_000)

    def small(root: Path, manifest: Any, *_: Any) -> Cuda:
        return Cuda(root, manifest, device, FakeOnnxRuntime(device))

    monkeypatch.setattr("car_runtime.backends.onnxruntime.kernels.Cuda", small)
    monkeypatch.setattr("car_runtime.backends.onnxruntime.kernels.probe", lambda: GPU)
    with pytest.raises(BackendError, match=r"out of memory .*; close other programs"):
        open_backend("cuda", root, read_manifest(root))
    assert device.allocated() == 0
    backend, why = open_backend("auto", root, read_manifest(root), 1)
    assert backend.name == "ort-cpu"
    assert "cuda: CUDA failed in cudaMalloc: out of memory" in why
    backend.close()


def test_auto_takes_it_first_for_what_it_runs(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    device = KernelDevice()

    def fake(root: Path, manifest: Any) -> Cuda:
        return Cuda(root, manifest, device, FakeOnnxRuntime(device))

    monkeypatch.setattr("car_runtime.backends.onnxruntime.kernels.open_cuda", lambda r, m, t: fake(r, m))
    backend, why = open_backend("auto", root, read_manifest(root))
    assert (backend.name, why) == ("cuda", "auto: cuda, best that opens here")
    backend.close()
    old = build_plan(tmp_path / "old.plan")
    backend, why = open_backend("auto", old, read_manifest(old), 1)
    assert backend.name == "ort-cpu"
    assert "cuda: the backend runs plans from format 2 on" in why
    backend.close()


def test_a_table_of_other_shapes_is_refused_and_leaves_nothing_open(root: Path) -> None:
    manifest = read_manifest(root)
    name = "base.blocks.0.attn.proj.weight"
    bent = replace(manifest.parameters[name], shape=(32, 128))
    device = KernelDevice()
    with pytest.raises(BackendError, match=rf"{name}.*; export the plan again, or use --backend ort-cuda"):
        Cuda(root, replace(manifest, parameters={**manifest.parameters, name: bent}), device, FakeOnnxRuntime(device))
    assert device.allocated() == 0
    assert device.closed


def test_the_doctor_knows_which_gpus_have_kernels() -> None:
    packages = {"cuda-python": "13.0"}
    gpu = GpuFacts(usable=True, name="x", capability="7.5", target="sm75")
    found = BACKENDS["cuda"].examine(MachineFacts(packages=packages, gpu=gpu))
    assert (found.usable, found.install) == (False, ())
    assert found.why == "there are no kernels for sm75, only for sm80, sm86, sm89, sm90, sm120"

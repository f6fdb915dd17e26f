"""What a machine with an NVIDIA GPU must show: `make test-gpu`. Elsewhere each test says why it is skipped.

The same backends run on a fake GPU in test_device.py. Here engines are built for the GPU that is present and compared
with ONNX Runtime on the CPU: not by images, which one token at a near tie changes, but by logits on the same
tokens, and by tokens where the best two logits are further apart than the two engines.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from car_export.errors import EngineError
from car_export.tensorrt.build import build_engines, choose_targets
from car_runtime import BackendError, RunError, open_plan
from car_runtime.backends.cuda.buffers import Memory
from car_runtime.backends.cuda.driver import CudaDevice, CudaError
from car_runtime.backends.onnxruntime.cuda import open_ort_cuda
from car_runtime.backends.onnxruntime.kernels import open_cuda
from car_runtime.backends.tensorrt.backend import open_rtx, open_trt
from car_runtime.backends.tensorrt.spec import FLAVOURS
from car_runtime.format.manifest import read_manifest
from car_runtime.plan import Plan
from car_runtime.system.gpu import Gpu, probe
from fixtures.kernel_models import narrow_plan
from fixtures.small_plans import small_plan
from fixtures.threads import run_in_threads

pytestmark = pytest.mark.gpu

OPENERS = {"rtx": open_rtx, "trt": open_trt, "ort-cuda": open_ort_cuda, "cuda": open_cuda}
PLANS = [("cuda", "fp16"), *((name, kind) for name in OPENERS if name != "cuda" for kind in ("fp32", "fp16"))]
CONTROL = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
# Largest difference of logits, as a share of their range. float32 without TF32: sums in another order; float16: its
# rounding (2⁻¹¹) through all blocks.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}


@pytest.fixture(scope="session")
def gpu() -> Gpu:
    try:
        return probe()
    except BackendError as error:
        pytest.skip(f"there is no GPU to test on: {error}")


@pytest.fixture(scope="module", params=PLANS, ids="-".join)
def root(request: pytest.FixtureRequest, gpu: Gpu, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A backend's name, and a plan with what it needs for the GPU that is present."""
    name, kind = request.param
    made = narrow_plan() if name == "cuda" else small_plan(kind)
    root = shutil.copytree(made, tmp_path_factory.mktemp("gpu") / "small.plan")
    if name in FLAVOURS:
        try:
            import_module(FLAVOURS[name].module)
        except Exception as error:
            pytest.skip(f"{FLAVOURS[name].module} cannot be imported: {error}")
        try:
            build_engines(root, choose_targets(name, None))
        except EngineError as error:
            pytest.skip(f"no engines for this GPU: {error}")
    return name, root


@pytest.fixture
def plan(root: tuple[str, Path]) -> Iterator[Plan]:
    with _open(*root) as opened:
        yield opened


@pytest.fixture
def cpu(root: tuple[str, Path]) -> Iterator[Plan]:
    with open_plan(root[1], "ort-cpu") as opened:
        yield opened


def _open(name: str, path: Path) -> Plan:
    manifest = read_manifest(path)
    try:
        return Plan(path, manifest, OPENERS[name](path, manifest, None), "a test")
    except BackendError as error:
        if name == "ort-cuda" and "has no CUDA" in str(error):
            pytest.skip(str(error))
        raise


def _control(plan: Plan, image: np.ndarray = CONTROL) -> np.ndarray | None:
    return image if plan.manifest.model.control_type is not None else None


def _forced(plan: Plan, tokens: np.ndarray, seed: int = 0) -> np.ndarray:
    """The guided logits [L, V] of a run that keeps these tokens."""
    kept = {"known_tokens": tokens, "known_mask": np.ones(tokens.shape, bool)}
    scales = list(plan.stream(_control(plan), 1, seed, cfg=3.0, logits=True, **kept))
    assert (np.concatenate([scale.tokens.reshape(-1) for scale in scales]) == tokens).all()
    return np.concatenate([np.asarray(scale.logits).reshape(-1, plan.manifest.model.vocab) for scale in scales])


def test_logits_and_most_probable_tokens_are_the_cpus(plan: Plan, cpu: Plan) -> None:
    tolerance = TOLERANCE[plan.manifest.precision.compute]
    tokens = cpu.generate(_control(cpu), 1, top_k=1, cfg=3.0).tokens[0]
    expected, found = _forced(cpu, tokens), _forced(plan, tokens)
    error = np.abs(expected - found).max()
    assert np.isfinite(found).all()
    assert error <= tolerance * np.abs(expected).max()
    second, first = np.sort(expected, axis=1)[:, -2:].T
    clear = first - second > 2 * error
    assert clear.mean() > 0.5
    assert (found.argmax(1) == expected.argmax(1))[clear].all()


def test_images_of_the_same_tokens_are_the_cpus(plan: Plan, cpu: Plan) -> None:
    tokens = cpu.generate(_control(cpu), 1, n=3).tokens
    given = {"known_tokens": tokens, "known_mask": np.ones(tokens.shape, bool), "n": 3}
    found, expected = plan.generate(_control(plan), 1, **given), cpu.generate(_control(cpu), 1, **given)
    assert (found.tokens == tokens).all()
    difference = np.abs(found.images.astype(int) - expected.images)
    assert difference.max() <= (2 if plan.manifest.precision.compute == "fp32" else 16)
    agreement = (plan.encode(expected.images[0]) == cpu.encode(expected.images[0])).mean()
    assert agreement > 0.98


def test_a_seed_gives_the_same_image_again(plan: Plan) -> None:
    """Run, recorded, launched among others: to the bit, since the same kernels compute it."""
    first = plan.generate(_control(plan), 1, seed=5)
    for _ in range(2):
        plan.generate(_control(plan, 255 - CONTROL), 2, seed=6, cfg=0)
        again = plan.generate(_control(plan), 1, seed=5)
        assert (first.tokens == again.tokens).all()
        assert (first.images == again.images).all()
    other = plan.generate(_control(plan), 1, seed=7)
    assert (other.tokens != first.tokens).any()


def test_an_edit_keeps_its_tokens(plan: Plan) -> None:
    tokens = plan.encode(CONTROL)[0]
    keep = np.arange(len(tokens)) % 3 > 0
    result = plan.generate(_control(plan), 1, seed=2, n=2, known_tokens=tokens, known_mask=keep)
    assert (result.tokens[:, keep] == tokens[keep]).all()


def test_the_third_image_launches_what_the_second_recorded(plan: Plan) -> None:
    for seed in (0, 1):
        plan.generate(_control(plan), 1, seed=seed)
    before = plan._backend.report()
    if plan.backend_name == "ort-cuda" and before["not_captured"]:
        pytest.skip(f"this ONNX Runtime cannot record the graphs: {before['not_captured']}")
    assert before["not_captured"] == {}
    began = plan._backend.mark()
    plan.generate(_control(plan), 1, seed=2)
    seconds = plan._backend.seconds(began, plan._backend.mark())
    after = plan._backend.report()
    least = 1 if plan.backend_name == "cuda" else len(plan.manifest.scales) + 1  # an image, or its graphs
    assert after["graphs_captured"] == before["graphs_captured"] >= least
    if plan.backend_name in FLAVOURS:
        assert after["graphs_launched"] - before["graphs_launched"] == len(plan.manifest.scales) + 1
        assert after["contexts"] == before["contexts"]
    assert 0 < seconds < 5
    assert after["memory_bytes"] > 0


def test_several_threads_get_their_own_images(plan: Plan) -> None:
    expected = [plan.generate(_control(plan), label, seed=label).images for label in range(3)]
    found: dict[int, np.ndarray] = {}

    def work(label: int) -> None:
        for _ in range(5):
            found[label] = plan.generate(_control(plan), label, seed=label).images

    run_in_threads(work, 3)
    assert sorted(found) == [0, 1, 2]
    for label, images in found.items():
        assert (images == expected[label]).all()


def test_closing_gives_the_memory_back(root: tuple[str, Path]) -> None:
    with _open(*root) as warm:  # the CUDA context, and what libraries load once, stay
        warm.generate(_control(warm), 1)
    device = CudaDevice()
    before = device.free_memory()
    with _open(*root) as plan:
        plan.generate(_control(plan), 1, n=3)
        held = plan._backend.allocate((1000,), "float32")
    assert before - device.free_memory() < 64 * 1024 * 1024
    with pytest.raises(RunError, match="closed while it was in use"):
        plan._backend.read(held)
    device.close()


def test_what_was_compiled_is_loaded_the_next_time(root: tuple[str, Path]) -> None:
    if root[0] != "rtx":
        pytest.skip("TensorRT for RTX alone compiles when it runs")
    with _open(*root) as plan:
        plan.generate(_control(plan), 1)
    with _open(*root) as plan:
        plan.generate(_control(plan), 1)
        loaded = plan._backend.report()["runtime_cache"]["loaded"]
    assert loaded is not None
    assert Path(loaded).stat().st_size > 0


# The device layer by itself.


@pytest.fixture
def memory(gpu: Gpu) -> Iterator[Memory]:
    device = CudaDevice()
    memory = Memory(device)
    yield memory
    memory.close()
    device.close()


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "bool", "uint8"])
def test_bytes_go_there_and_back(memory: Memory, dtype: str) -> None:
    values = np.random.default_rng(0).integers(0, 2, (100, 33, 3)).astype(dtype)
    array, other = memory.allocate(values.shape, dtype), memory.allocate(values.shape, dtype)
    assert array.address % 256 == 0
    memory.write(array, values)
    memory.copy(array, other)
    assert (memory.read(other) == values).all()
    assert (memory.read(other[7:9]) == values[7:9]).all()


def test_recorded_copies_are_done_at_each_launch(memory: Memory) -> None:
    source, target = memory.allocate((1000,), "int64"), memory.allocate((1000,), "int64")
    memory.device.begin_capture()
    memory.copy(source, target)
    graph = memory.device.end_capture()
    for number in (1, 2):
        memory.write(source, np.full(1000, number, np.int64))
        begin = memory.mark()
        memory.device.launch(graph)
        assert memory.seconds(begin, memory.mark()) > 0
        assert (memory.read(target) == number).all()
    memory.device.free_graph(graph)


def test_too_much_memory_is_refused_and_less_still_works(memory: Memory, gpu: Gpu) -> None:
    with pytest.raises(CudaError, match="close other programs") as caught:
        memory.allocate((4 * gpu.memory_bytes,), "uint8")
    assert caught.value.out_of_memory
    assert memory.read(memory.zeros((10,), "float32")).tolist() == 10 * [0]


def test_the_gpu_is_described(gpu: Gpu) -> None:
    assert gpu.name
    assert gpu.target == f"sm{gpu.capability[0]}{gpu.capability[1]}"
    assert gpu.memory_bytes > 1 << 30
    assert gpu.count >= 1

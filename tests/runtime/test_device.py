"""The GPU backends on a fake GPU: what they put on it, in which order, where, and that images are right.

Nothing here runs on a GPU (test_gpu.py does). The fakes compute with ONNX Runtime what an engine would, as late as
they may, and answer every misuse with a DeviceFault; see fake_device.py.
"""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from car_export.goldens import write_goldens
from car_export.tensorrt.build import Target, build_engines, recipes
from car_runtime import BackendError, GenerationConfig, PlanError, RequestError, RunError, open_plan
from car_runtime import verify as acceptance
from car_runtime.backends.cuda import driver as cuda
from car_runtime.backends.cuda.buffers import DeviceArray, Memory
from car_runtime.backends.cuda.driver import CudaError
from car_runtime.backends.onnxruntime import cuda as ort_cuda
from car_runtime.backends.onnxruntime.cuda import OrtCuda, open_ort_cuda
from car_runtime.backends.tensorrt import backend as tensorrt_engines
from car_runtime.backends.tensorrt import runtime_cache, trust
from car_runtime.backends.tensorrt.backend import TensorRT, open_rtx, open_trt
from car_runtime.format.goldens import GOLDENS, golden_file
from car_runtime.format.manifest import Manifest, describe_files, read_manifest, write_manifest
from car_runtime.plan import Plan
from car_runtime.system import gpu as nvidia
from car_runtime.system.gpu import Gpu
from fixtures.fake_device import GPU, DeviceFault, Enqueued, FakeDevice, FakeOnnxRuntime, FakeTensorRT, write_engines
from fixtures.runtime_plan import LAYERS, SIDES, SIZE, C, D, E, H, L, V, Z, build_plan
from fixtures.small import small_model
from fixtures.small_plans import small_plan
from fixtures.threads import run_in_threads
from fixtures.two_branches import two_branches

CONTROL = np.random.default_rng(1).integers(0, 256, (40, 50, 3), np.uint8)
OTHER_CONTROL = 255 - CONTROL
STARTS = np.cumsum([0, *(side * side for side in SIDES)]).tolist()
STEPS = len(SIDES)
CACHE = [f"{kind}_{i}" for i in range(LAYERS) for kind in "kv"]


class Fake:
    """A plan opened on a fake GPU."""

    def __init__(self, root: Path, flavour: str = "rtx", device: FakeDevice | None = None, **options: Any) -> None:
        manifest, trust = read_manifest(root), options.pop("trust", True)
        files = {name: root / graph.file for name, graph in manifest.graphs.items() if "." not in name}
        self.device = device or FakeDevice()
        self.trt = FakeTensorRT(self.device, root, options.pop("computed_by", files), rtx=flavour == "rtx", **options)
        self.backend = TensorRT(root, manifest, flavour, self.device, self.trt, trust_engines=trust)
        self.plan = Plan(root, manifest, self.backend, "a test")

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *_: object) -> None:
        self.plan.close()

    def events(self, *kinds: str) -> list[tuple[str, list[str]]]:
        """What was run, captured and launched, in order: kind, profiles."""
        named = []
        for kind, detail in self.device.log:
            if kind in (kinds or ("run", "captured", "launched")):
                runs = [detail] if isinstance(detail, Enqueued) else detail
                named.append((kind, [run.profile for run in runs]))
        return named

    def run_of(self, profile: str) -> Enqueued:
        """The only run of a profile that was no launch."""
        (run,) = [run for run in self.device.runs if run.profile == profile]
        return run


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


def make_root(folder: Path, *, control: bool = True, **options: Any) -> Path:
    root = build_plan(folder / "tiny.plan", control=control)
    write_engines(root, **options)
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan with engines of both flavours for one and four images."""
    root = make_root(tmp_path_factory.mktemp("device"), batches=(1, 4))
    write_engines(root, flavour="trt", batches=(1, 4))
    return root


@pytest.fixture
def fake(root: Path) -> Any:
    with Fake(root) as opened:
        yield opened


@pytest.fixture(scope="module")
def cpu(root: Path) -> Any:
    with open_plan(root, "ort-cpu", threads=1) as opened:
        yield opened


# Whole images.


@pytest.mark.parametrize("flavour", ["rtx", "trt"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"n": 4}, {"n": 6, "cfg": 0}, {"n": 5, "cfg": 4, "top_k": 3}, {"label": 2, "seed": 7, "top_p": 0.3}],
    ids=str,
)
def test_images_are_those_of_the_cpu(root: Path, cpu: Plan, flavour: str, settings: dict[str, Any]) -> None:
    expected = cpu.generate(CONTROL, **settings)
    with Fake(root, flavour) as fake:
        for _ in range(3):  # run, recorded and launched, launched
            found = fake.plan.generate(CONTROL, **settings)
            assert (found.tokens == expected.tokens).all()
            assert (found.images == expected.images).all()
        assert fake.backend.report()["graphs_launched"] > STEPS


def test_an_edit_keeps_its_tokens(fake: Fake, cpu: Plan) -> None:
    photo = np.random.default_rng(4).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    tokens = fake.plan.encode(photo)
    assert (tokens == cpu.encode(photo)).all()
    repaint = np.zeros((SIZE, SIZE), bool)
    repaint[:, SIZE // 2 :] = True
    keep = fake.plan.known_mask(repaint)
    for seed in (1, 2):
        edit = {"known_tokens": tokens[0], "known_mask": keep, "seed": seed, "n": 5}
        found, expected = fake.plan.generate(CONTROL, 0, **edit), cpu.generate(CONTROL, 0, **edit)
        assert (found.tokens[:, keep] == tokens[0][keep]).all()
        assert (found.tokens == expected.tokens).all()
        assert (found.images == expected.images).all()
    # Nothing of the edit is left behind.
    assert (fake.plan.generate(CONTROL, 0, seed=1).tokens == cpu.generate(CONTROL, 0, seed=1).tokens).all()


def test_a_plan_without_control_runs(tmp_path: Path) -> None:
    root = make_root(tmp_path, control=False)
    with Fake(root) as fake, open_plan(root, "ort-cpu", threads=1) as cpu:
        found, expected = fake.plan.generate(label=1, seed=3, n=3), cpu.generate(label=1, seed=3, n=3)
        assert (found.tokens == expected.tokens).all()
        assert fake.trt.loads == ["step", "condition", "decoder"]


def test_a_stream_is_read_scale_by_scale(fake: Fake, cpu: Plan) -> None:
    pairs = list(zip(fake.plan.stream(CONTROL, 1, n=5), cpu.stream(CONTROL, 1, n=5), strict=False))
    found = [(step.index, step.tokens, step.preview()) for step in fake.plan.stream(CONTROL, 1, n=4)]
    expected = [(step.index, step.tokens, step.preview()) for step in cpu.stream(CONTROL, 1, n=4)]
    for (i, tokens, image), (j, wanted_tokens, wanted_image) in zip(found, expected, strict=True):
        assert i == j
        assert (tokens == wanted_tokens).all()
        assert (image == wanted_image).all()
    assert len(pairs) == 2 * STEPS


# The transformer, in the form that engines are built from.


@pytest.mark.parametrize(
    ("kind", "built"),
    [
        ("fp32", "by hand"),
        ("fp16", "by hand"),
        pytest.param("fp16", "by TensorRT for RTX", marks=pytest.mark.slow),
    ],
)
def test_the_engine_form_makes_the_cpus_images(tmp_path: Path, kind: str, built: str) -> None:
    """Sidecars, profiles, `key_bias`, the dummy past and the form itself, from the exporter; only the GPU is fake."""
    root = shutil.copytree(small_plan(kind), tmp_path / "small.plan")
    forms = write_forms(root)
    if built == "by hand":
        batches, version = (1, 3), "1.2.3"
        write_engines(root, batches=batches)
    else:
        version = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed").__version__
        batches = (1, 2)
        build_engines(root, [Target(flavour="rtx", name="sm89")])
    manifest = read_manifest(root)
    control = CONTROL if manifest.model.control_type is not None else None
    with (
        Fake(root, computed_by=forms, version=version) as fake,
        open_plan(root, "ort-cpu", threads=1) as cpu,
    ):
        assert fake.backend.batches == batches
        for seed in (1, 2):
            for settings in ({}, {"cfg": 0}, {"n": 3, "label": 1, "top_k": 5}):
                found = fake.plan.generate(control, seed=seed, **settings)
                expected = cpu.generate(control, seed=seed, **settings)
                assert (found.tokens == expected.tokens).all()
                # Sums in another order (the dummy token, rows of guidance where none is needed) round differently.
                assert np.abs(found.images.astype(int) - expected.images).max() <= 1
        assert fake.backend.report()["graphs_launched"] > len(manifest.scales)


@pytest.mark.parametrize("built", ["by hand", pytest.param("by TensorRT for RTX", marks=pytest.mark.slow)])
def test_the_engine_form_of_branches_makes_the_cpus_images(tmp_path: Path, built: str) -> None:
    """A plan of format 2: a branch is an engine of its own, loaded when it is named, and a step takes one of them."""
    root = shutil.copytree(two_branches(), tmp_path / "two.plan")
    forms, version, batches = write_forms(root), "1.2.3", (1, 2)
    if built == "by hand":
        write_engines(root, batches=batches)
    else:
        version, batches = (
            pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed").__version__,
            (1,),
        )
        build_engines(root, [Target(flavour="rtx", name="sm89")])
    with Fake(root, computed_by=forms, version=version) as fake, open_plan(root, "ort-cpu", threads=1) as cpu:
        own = ["control.sketch", "condition.sketch", "branch.sketch"]
        assert sorted(fake.trt.loads) == sorted(["step", "condition", "decoder", *own])
        for seed, control in enumerate([CONTROL, {"other": CONTROL}, None, CONTROL, {"other": (CONTROL, 0.4)}]):
            settings = {"cfg": 0.0} if seed == 1 else {"n": 3, "top_k": 5} if seed == 3 else {"cfg": 3.0}
            for again in (1, 2):
                found = fake.plan.generate(control, 1, 10 * seed + again, **settings)
                expected = cpu.generate(control, 1, 10 * seed + again, **settings)
                assert (found.tokens == expected.tokens).all(), (seed, again)
                # Sums in another order round differently.
                assert np.abs(found.images.astype(int) - expected.images).max() <= 1
        assert {"branch.other", "control.other", "condition.other"} <= set(fake.trt.loads)
        assert fake.backend.report()["graphs_launched"] > 0
        many = [GenerationConfig(control=CONTROL, label=i, cfg=float(i), seed=i) for i in range(3)]
        for found, expected in zip(fake.plan.generate_many(many), cpu.generate_many(many), strict=True):
            assert (found.tokens == expected.tokens).all()
        stopped = list(fake.plan.stream_many(many[:2], cancelled=lambda owner: owner == 1))
        assert stopped[-1].requests in ((0,), (0, 1))
        with pytest.raises(RequestError, match="'rtx' mixes 1 control branch into a step, not 2; give one control"):
            fake.plan.generate({"sketch": CONTROL, "other": CONTROL})
        with pytest.raises(RequestError, match="no rows without control, which control_cfg 2 needs; leave it at 0"):
            fake.plan.generate(CONTROL, control_cfg=2.0)


def write_forms(root: Path) -> dict[str, Path]:
    """The graphs of a plan as a compiler gets them, in files next to the plan's own: graph → file."""
    forms = {recipe.graph: recipe.onnx for recipe in recipes(root, read_manifest(root))}
    files = {graph: root / f"{graph}.form.onnx" for graph in forms}
    for graph, content in forms.items():
        files[graph].write_bytes(content)
    return files


def test_the_acceptance_test_passes_on_the_fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`car-run verify PLAN --backend rtx`: goldens of PyTorch, by teacher forcing and drawn, logits bound and not."""
    root = shutil.copytree(small_plan("fp16"), tmp_path / "small.plan")
    forms = write_forms(root)
    model, names = small_model(depth=2, sides=(1, 2, 4)), {GOLDENS: False, golden_file("sketch"): True}
    for name, steered in names.items():
        write_goldens(root, model, cfg=2.0, top_k=0, top_p=0.0, file=name, steered=steered)
    manifest = read_manifest(root)
    files = manifest.files | describe_files(root, list(names))
    write_manifest(root, replace(manifest, files=files))
    write_engines(root)
    device = FakeDevice()

    def open_fake(root: Path, manifest: Manifest, threads: int | None) -> TensorRT:
        return TensorRT(root, manifest, "rtx", device, FakeTensorRT(device, root, forms), trust_engines=True)

    monkeypatch.setattr(tensorrt_engines, "open_rtx", open_fake)
    report = acceptance.verify(root, "rtx", warmup=1, runs=3)
    assert report["passed"], report["checks"]
    assert report["backend"]["name"] == "rtx"
    assert report["backend"]["not_captured"] == {}
    assert report["backend"]["graphs_captured"] > len(read_manifest(root).scales)
    assert json.dumps(report)
    assert device.allocated() == 0


# What is put on the stream.


def test_the_first_image_runs_the_second_records_and_all_later_ones_replay(fake: Fake) -> None:
    order = ["control", "condition.b1", *(f"step.{k:02}.b1" for k in range(STEPS)), "decoder.b1"]
    fake.plan.generate(CONTROL, 0, seed=1)
    assert fake.events() == [("run", [profile]) for profile in order]
    loop = order[2:]  # the control image and the class are known
    fake.device.log.clear()
    fake.plan.generate(CONTROL, 0, seed=2)
    assert fake.events() == [(kind, [profile]) for profile in loop for kind in ("captured", "launched")]
    for seed in (3, 4):
        fake.device.log.clear()
        fake.plan.generate(CONTROL, 0, seed=seed)
        assert fake.events() == [("launched", [profile]) for profile in loop]


def test_another_control_class_and_edit_replay_the_same_recordings(fake: Fake) -> None:
    for seed in (1, 2):
        fake.plan.generate(CONTROL, 0, seed=seed)
    graphs = len(fake.device.graphs)
    fake.device.log.clear()
    everything = {"known_tokens": np.ones(L, int), "known_mask": np.ones(L, bool)}
    fake.plan.generate(OTHER_CONTROL, 0, seed=1)
    fake.plan.generate(OTHER_CONTROL, 2, seed=1, cfg=0, top_k=3, top_p=0.5)
    fake.plan.generate(CONTROL, 1, seed=1, **everything)
    replayed = [profiles for _, profiles in fake.events("launched")]
    loop = [[f"step.{k:02}.b1"] for k in range(STEPS)] + [["decoder.b1"]]
    assert [profiles for profiles in replayed if profiles[0].startswith(("step", "decoder"))] == 3 * loop
    # Only what makes features and conditions may run anew: its results are kept, each in a place of its own.
    assert {profile for _, (profile,) in fake.events("run")} <= {"control", "condition.b1"}
    assert {g.works[-1].detail.profile for g in fake.device.graphs[graphs:]} <= {"control", "condition.b1"}


def test_a_new_seed_moves_little_to_the_device_and_the_image_back(fake: Fake) -> None:
    fake.plan.generate(CONTROL, 0, seed=1)
    fake.device.moved.clear()
    fake.plan.generate(CONTROL, 0, seed=2)
    known = 8 + 1  # a token to keep, and whether to
    settings, empty_f_hat = 4 + 8 + 4, 4 * Z * E * E
    assert 4 * L <= fake.device.moved["to_device"] <= (4 + known) * _padded(L) + settings + empty_f_hat
    assert fake.device.moved["to_host"] <= 8 * _padded(L) + 3 * SIZE * SIZE


def _padded(tokens: int) -> int:
    """Each scale may begin at a multiple of 256."""
    return tokens + 256 * STEPS


def test_the_profile_is_that_of_scale_and_batch(fake: Fake) -> None:
    fake.plan.generate(CONTROL, 0, n=6)  # 4 + 1 + 1
    steps = [run.profile for run in fake.device.runs if run.profile.startswith("step")]
    assert steps == [f"step.{k:02}.b{b}" for b in (4, 1) for k in range(STEPS)]
    for run in fake.device.runs:
        if run.profile.startswith("step"):
            k, B = int(run.profile[5:7]), int(run.profile[-1])
            S, T = SIDES[k], [*SIDES[1:], 1][k]
            assert run.shapes["x"] == (2 * B, S, S, C)
            assert run.shapes["next_x"] == (2 * B, T, T, C)
            assert run.shapes["f_hat_out"] == (B, Z, E, E)
            assert run.shapes["past_k_0"] == (max(STARTS[k], 1), 2 * B, H, D)
            assert run.shapes["key_bias"] == (max(STARTS[k], 1) + S * S,)


def test_every_step_reads_the_past_in_place_and_writes_the_slot_behind_it(fake: Fake) -> None:
    """Four images: a token's K/V is 256 bytes, so that every slot is aligned and bound as it is."""
    fake.plan.generate(CONTROL, 0, n=4)
    row = 4 * 8 * H * D
    assert row == 256
    runs = [fake.run_of(f"step.{k:02}.b4") for k in range(STEPS)]
    bases = {name: runs[0].addresses[f"new_{name}"] for name in CACHE}
    assert len(set(bases.values())) == 2 * LAYERS
    for k, run in enumerate(runs):
        for name, base in bases.items():
            assert run.addresses[f"new_{name}"] == base + STARTS[k] * row
            if k:
                assert run.addresses[f"past_{name}"] == base
            else:
                assert run.addresses[f"past_{name}"] not in bases.values()
    # What a step hands on is where the next one looks for it.
    for before, after in pairwise(runs):
        assert after.addresses["x"] == before.addresses["next_x"]
        assert after.addresses["f_hat"] == before.addresses["f_hat_out"]
        assert after.addresses["modulation"] == before.addresses["modulation"]


def test_what_the_engines_have_beyond_the_graph(fake: Fake) -> None:
    for n in (1, 4):
        fake.plan.generate(CONTROL, 0, n=n)
        for k in range(STEPS):
            values = fake.run_of(f"step.{k:02}.b{n}").values
            expected = np.zeros(max(STARTS[k], 1) + SIDES[k] ** 2, np.float32)
            if k == 0:
                expected[0] = -1e9
                assert not values["past_k_0"].any()
                assert not values["past_v_1"].any()
            assert values["key_bias"].tolist() == expected.tolist()
    assert np.exp(np.float32(-1e9)) == 0


def test_unaligned_buffers_go_through_aligned_ones(root: Path, cpu: Plan) -> None:
    """One image: a token's K/V is 64 bytes, and TensorRT wants multiples of 256. Recordings have the copies too."""
    with Fake(root) as fake:
        for seed in (1, 2, 3):
            found = fake.plan.generate(CONTROL, 0, seed=seed)
            assert (found.images == cpu.generate(CONTROL, 0, seed=seed).images).all()
        kinds = {g.works[-1].kind: [w.kind for w in g.works] for g in fake.device.graphs}
        assert "on_device" in kinds  # the last work of a step: its K/V to their slots
        assert fake.device.moved["on_device"] > 0


def test_a_recording_belongs_to_its_addresses(fake: Fake, cpu: Plan) -> None:
    """Two streams at once have buffers of their own, so each records for itself; neither gets the other's result."""
    expected = [[s.tokens for s in cpu.stream(CONTROL, 0, seed=seed)] for seed in (5, 6)]
    for _ in range(3):
        streams = [fake.plan.stream(CONTROL, 0, seed=seed) for seed in (5, 6)]
        for k in range(STEPS):
            for i, stream in enumerate(streams):
                assert (next(stream).tokens == expected[i][k]).all()
        for stream in streams:
            assert not list(stream)


def test_old_recordings_make_room(root: Path, cpu: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    room = STEPS + 4  # four images in a batch fill it: their steps, and the decoder for each
    monkeypatch.setattr(tensorrt_engines, "GRAPHS", room)
    counts = []
    with Fake(root) as fake:
        for n in (1, 1, 4, 4, 1, 1):
            found = fake.plan.generate(CONTROL, 0, seed=n, n=n)
            assert (found.images == cpu.generate(CONTROL, 0, seed=n, n=n).images).all()
            counts.append(sum(not graph.freed for graph in fake.device.graphs))
            assert counts[-1] == fake.backend.report()["graphs_captured"]
    one = STEPS + 1
    assert counts == [0, one, 0, room, room - one, room]


@pytest.mark.parametrize("how", ["device", "engine"])
def test_what_cannot_be_recorded_is_run_each_time(root: Path, cpu: Plan, how: str) -> None:
    with Fake(root) as fake:
        fake.device.refuse_capture = how == "device"
        fake.trt.capturable = how != "engine"
        for seed in (1, 2, 3):
            found = fake.plan.generate(CONTROL, 0, seed=seed)
            assert (found.images == cpu.generate(CONTROL, 0, seed=seed).images).all()
        report = fake.backend.report()
        assert report["graphs_captured"] == 0
        assert "step.02.b1" in report["not_captured"]
        assert ("not permitted" if how == "device" else "cannot be recorded") in report["not_captured"]["step.02.b1"]


def test_contexts_share_memory_and_the_weights_are_loaded_once(fake: Fake) -> None:
    fake.plan.generate(CONTROL, 0, n=5)
    fake.plan.encode(np.zeros((SIZE, SIZE, 3), np.uint8))
    fake.plan.generate(CONTROL, 0, n=5)
    assert fake.trt.loads == ["step", "condition", "control", "decoder", "encoder"]
    report = fake.backend.report()
    assert report["contexts"] == len(fake.trt.contexts) == 2 * STEPS + 5
    assert report["weight_bytes"] == 5 * 1000
    pieces = {context._memory[0] for context in fake.trt.contexts if context._memory is not None}
    assert 1 <= len(pieces) <= 3  # one for each batch size, at most one more for the encoder
    needed = max(context._memory[1] for context in fake.trt.contexts if context._memory is not None)
    assert needed <= report["activation_bytes"]


def test_times_are_the_devices(fake: Fake) -> None:
    timings = fake.plan.generate(CONTROL, 0, seed=1).timings
    assert list(timings) == ["control", "condition", *(f"scale_{k}" for k in range(STEPS)), "decoder", "total"]
    # The fake's clock goes a millisecond a work: a run and what surrounds it.
    assert all(0.001 <= timings[f"scale_{k}"] < 0.1 for k in range(STEPS))
    begin = fake.backend.mark()
    assert fake.backend.seconds(begin, fake.backend.mark()) == pytest.approx(0.001)


def test_logits_can_be_read(tmp_path: Path) -> None:
    """They go to the caller's buffer where one is given, and to scratch memory else."""
    with Fake(make_root(tmp_path)) as fake:
        profile = next(p for p in fake.backend._metadata["step"].profiles if p.name == "step.01.b1")
        inputs, outputs = {}, {}
        dtypes = fake.backend._metadata["step"].inputs | fake.backend._metadata["step"].outputs
        for port, shape in profile.inputs.items():
            if port != "key_bias":
                inputs[port] = fake.backend.allocate(shape, dtypes[port])
                fake.backend.write(inputs[port], np.ones(shape, dtypes[port]))
        for port, shape in profile.outputs.items():
            outputs[port] = fake.backend.allocate(shape, dtypes[port])
        fake.backend.run("step.01.b1", inputs, outputs)
        given = fake.run_of("step.01.b1").addresses["logits"]
        assert given == outputs["logits"].address  # type: ignore[attr-defined]
        assert fake.backend.read(outputs["logits"]).shape == (1, 2, 2, V)
        without = {port: buffer for port, buffer in outputs.items() if port != "logits"}
        fake.backend.run("step.01.b1", inputs, without)
        assert fake.device.runs[-1].addresses["logits"] != given
        fake.backend.read(outputs["tokens"])


# Memory.


def test_closing_frees_everything_and_says_so_to_who_goes_on(root: Path) -> None:
    fake = Fake(root)
    fake.plan.generate(CONTROL, 0, n=5)
    held = fake.backend.allocate((3,), "float32")
    stream = fake.plan.stream(CONTROL, 0)
    next(stream)
    assert fake.device.allocated() > 0
    fake.plan.close()
    fake.plan.close()
    fake.backend.close()
    assert fake.device.allocated() == 0
    assert fake.device.hosts == []
    assert all(graph.freed for graph in fake.device.graphs)
    assert fake.device.closed
    assert "memory_bytes" not in fake.backend.report()
    with pytest.raises(RunError, match="closed while it was in use"):
        next(stream)
    for use in (
        lambda: fake.backend.read(held),
        lambda: fake.backend.write(held, np.zeros(3, np.float32)),
        lambda: fake.backend.allocate((1,), "uint8"),
        lambda: fake.backend.mark(),
    ):
        with pytest.raises(RunError, match="closed while it was in use"):
            use()


def test_memory_does_not_grow_from_image_to_image(fake: Fake) -> None:
    def work(seed: int) -> None:
        fake.plan.generate(CONTROL, seed % 3, seed=seed, n=5)
        [step.preview() for step in fake.plan.stream(CONTROL, 0, seed=seed)]

    for seed in range(3):
        work(seed)
    gc.collect()
    used, events, hosts = fake.device.allocated(), len(fake.device.events), len(fake.device.hosts)
    for seed in range(4):
        work(seed)
    assert fake.device.allocated() == used
    assert len(fake.device.events) <= events + 2
    assert len(fake.device.hosts) <= hosts + 2


def test_a_set_of_buffers_made_again_replays_what_was_recorded(fake: Fake) -> None:
    """One image and four in turn give up one set of buffers for the other each time."""
    for n in (1, 4, 1, 4, 1, 4):
        fake.plan.generate(CONTROL, 0, n=n)
    gc.collect()
    fake.device.log.clear()
    for n in (1, 4):
        fake.plan.generate(CONTROL, 0, n=n)
    assert fake.events("run", "captured") == []


def test_arrays_are_views() -> None:
    memory = Memory(FakeDevice())
    array = memory.allocate((6, 2, 4), "float16")
    assert (array.address % 256, array.nbytes) == (0, 96)
    part = array[2:5]
    assert (part.shape, part.address, part.dtype) == ((3, 2, 4), array.address + 32, "float16")
    assert array[4:2].shape == (0, 2, 4)
    assert array[1:].reshape((40,)).address == array.address + 16
    with pytest.raises(AssertionError):
        array.reshape((7,))
    values = np.arange(48, dtype=np.float16).reshape(6, 2, 4)
    memory.write(array, values)
    assert (memory.read(part) == values[2:5]).all()
    assert memory.read(array[0:0]).shape == (0, 2, 4)
    other = memory.allocate((3, 2, 4), "float16")
    memory.copy(part, other)
    assert (memory.read(other) == values[2:5]).all()


def test_bfloat16_travels_as_it_is() -> None:
    memory = Memory(FakeDevice())
    array = memory.allocate((2, 3), "bfloat16")
    memory.write(array, np.arange(6, dtype=np.uint16).reshape(2, 3))
    assert memory.read(array).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert memory.read(memory.zeros((2,), "bfloat16")).dtype == np.uint16


@pytest.mark.parametrize(
    "values", [np.zeros(4, np.float32), np.zeros((2, 3), np.float64), np.zeros((3, 2), np.float32)], ids=str
)
def test_only_the_same_shape_and_dtype_is_copied(values: np.ndarray) -> None:
    memory = Memory(FakeDevice())
    with pytest.raises(RunError, match=r"to a buffer of float32 \[2, 3\]; give the same"):
        memory.write(memory.allocate((2, 3), "float32"), values)
    with pytest.raises(RunError, match="cannot copy int64"):
        memory.copy(memory.allocate((2, 3), "int64"), memory.allocate((2, 3), "float32"))


def test_the_callers_array_may_change_at_once() -> None:
    """Copies are done later; each has its own page-locked block until then."""
    memory = Memory(FakeDevice())
    arrays = [memory.allocate((5,), "int64") for _ in range(20)]
    values = np.zeros(5, np.int64)
    for i, array in enumerate(arrays):
        values[:] = i
        memory.write(array, values)
    for i, array in enumerate(arrays):
        assert memory.read(array).tolist() == 5 * [i]


def test_page_locked_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("car_runtime.backends.cuda.buffers._HOST_LIMIT", 64 * 1024)
    device = FakeDevice()
    memory = Memory(device)
    arrays = [memory.allocate((size,), "uint8") for size in (4000, 9000, 30000, 70000) for _ in range(20)]
    for i, array in enumerate(arrays):
        memory.write(array, np.full(array.shape, i, np.uint8))
        assert sum(len(block) for block in device.hosts) <= 64 * 1024 + 128 * 1024
    for i, array in enumerate(arrays):
        assert (memory.read(array) == i).all()
    memory.close()
    assert device.hosts == []


def test_memory_given_back_is_used_before_new_memory_and_before_giving_up() -> None:
    device = FakeDevice(memory=8192)
    memory = Memory(device)
    first = memory.allocate((4096,), "uint8")
    address = first.address
    memory.write(first, np.zeros(4096, np.uint8))
    view = first[1:2]
    del first
    gc.collect()
    with pytest.raises(RunError, match="out of memory"):
        memory.allocate((8192,), "uint8")  # the view still needs it
    assert memory.read(view).tolist() == [0]
    del view
    gc.collect()
    again = memory.allocate((4000,), "uint8")
    assert again.address == address
    memory.write(again, np.zeros(4000, np.uint8))  # still pending when its memory is given up
    del again
    gc.collect()
    assert memory.allocate((8192,), "uint8").nbytes == 8192
    assert memory.used == 8192


def test_a_read_in_another_thread_ends_before_everything_is_freed() -> None:
    device = FakeDevice()
    memory = Memory(device)
    array = memory.zeros((100,), "int64")
    waiting, go = threading.Event(), threading.Event()
    wait = device.wait

    def slow(event: Any) -> None:
        waiting.set()
        assert go.wait(10)
        wait(event)

    device.wait = slow  # type: ignore[method-assign]
    results: list[np.ndarray] = []
    reader = threading.Thread(target=lambda: results.append(memory.read(array)))
    closer = threading.Thread(target=memory.close)
    reader.start()
    assert waiting.wait(10)
    closer.start()
    assert device.allocated() > 0
    go.set()
    reader.join()
    closer.join()
    assert results[0].tolist() == 100 * [0]
    assert device.allocated() == 0


def test_several_threads_get_their_own_images(fake: Fake, cpu: Plan) -> None:
    jobs = [(control, label) for control in (CONTROL, OTHER_CONTROL) for label in (0, 1)]
    expected = [cpu.generate(*job, n=5).images for job in jobs]
    found: list[list[np.ndarray]] = [[] for _ in jobs]
    errors: list[BaseException] = []

    def work(i: int) -> None:
        try:
            for _ in range(3):
                found[i].append(fake.plan.generate(*jobs[i], n=5).images)
        except BaseException as error:
            errors.append(error)

    run_in_threads(work, len(jobs))
    assert errors == []
    for wanted, images in zip(expected, found, strict=True):
        assert len(images) == 3
        assert all((image == wanted).all() for image in images)


# The fake notices what it should.


def test_the_fake_notices_misuse() -> None:
    device = FakeDevice()
    address = device.malloc(512)
    host = device.malloc_host(512)
    with pytest.raises(DeviceFault, match="outside of all"):
        device.on_device(address + 1, address, 512)
    device.to_host(host, address, 4)
    with pytest.raises(DeviceFault, match="while to_host on it is pending"):
        device.free(address)
    with pytest.raises(DeviceFault, match="before all of them were written"):
        device.synchronize()
    device.pending.clear()
    device.begin_capture()
    device.to_device(address, host, 512)
    for forbidden in (lambda: device.malloc(1), device.synchronize, lambda: device.free(address)):
        with pytest.raises(DeviceFault, match="while a graph is recorded"):
            forbidden()
    graph = device.end_capture()
    device.launch(graph)
    device.synchronize()
    device.free(address)
    with pytest.raises(DeviceFault, match="after they were freed"):
        device.launch(graph)
    with pytest.raises(DeviceFault, match="not allocated"):
        device.free(address)
    with pytest.raises(DeviceFault, match="never recorded"):
        device.wait(device.event())
    block = device.malloc(1024)
    run = Enqueued("p", {}, {})
    with pytest.raises(DeviceFault, match="overlap"):
        device.put_run(run, {"a": (block, 300)}, {"b": (block + 256, 256)}, None)
    with pytest.raises(DeviceFault, match="overlap"):
        device.put_run(run, {}, {"a": (block, 300), "b": (block + 256, 256)}, None)
    device.put_run(run, {"a": (block, 300), "b": (block, 300)}, {"c": (block + 512, 256)}, None)


# Errors.


def _opened(root: Path, gpu: Gpu = GPU, **options: Any) -> None:
    Fake(root, device=FakeDevice(gpu), **options).plan.close()


def test_a_plan_without_engines_names_the_command(tmp_path: Path) -> None:
    root = build_plan(tmp_path / "x.plan")
    command = f"python export/build_engines.py {root} --target rtx --sm 89"
    with pytest.raises(
        BackendError, match=r"no TensorRT for RTX engines for this GPU \(sm89\), none at all"
    ) as caught:
        _opened(root)
    assert str(caught.value).endswith(f"build them: {command}")
    write_engines(root, target="sm120")
    with pytest.raises(BackendError, match=r"\(sm89\), only for sm120; build them: .* --sm 89"):
        _opened(root)
    with pytest.raises(BackendError, match=r"no TensorRT engines .*none at all; build them: .* --target trt$"):
        Fake(root, "trt")


def test_engines_of_another_version_are_refused(root: Path) -> None:
    with pytest.raises(
        BackendError, match=r"built with version 1\.2\.3 .*but 9\.9 is installed; install that .*--sm 89"
    ):
        _opened(root, version="9.9")


def test_the_newest_fitting_engines_are_taken(tmp_path: Path) -> None:
    root = make_root(tmp_path, version="9.9")
    write_engines(root)
    write_engines(root, target="sm120")
    with Fake(root) as fake:
        assert {s.version for s in fake.backend._metadata.values()} == {"1.2.3"}
        assert {s.target for s in fake.backend._metadata.values()} == {"sm89"}


def test_a_missing_engine_is_named(tmp_path: Path) -> None:
    root = make_root(tmp_path, graphs=("step", "condition"))
    with pytest.raises(
        BackendError, match="lacks the TensorRT for RTX engine of decoder, control for sm89; build it"
    ):
        _opened(root)
    write_engines(root, graphs=("decoder", "control"))
    with Fake(root) as fake:
        fake.plan.generate(CONTROL)
        with pytest.raises(RunError, match="no TensorRT for RTX engine of 'encoder' for sm89; build it: "):
            fake.plan.encode(CONTROL)


def test_an_engine_that_does_not_load_says_why(tmp_path: Path) -> None:
    root = make_root(tmp_path)
    device = FakeDevice()
    module = FakeTensorRT(device, root, {})
    module.sidecars.clear()
    with pytest.raises(
        BackendError,
        match=r"cannot load step\..*\.engine: Error Code 2: the magic tag does not match; build .*--sm 89",
    ):
        TensorRT(root, read_manifest(root), "rtx", device, module, trust_engines=True)
    assert device.allocated() == 0
    assert device.closed


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda s: s["inputs"].pop(), "of the inputs, .* is .*, not None"),
        (lambda s: s["outputs"][0].update(dtype="float16"), "of the outputs, .*, not float16"),
        (lambda s: s["profiles"].append(s["profiles"][0]), r"it has \d+ profiles, not \d+"),
    ],
    ids=["input", "dtype", "profiles"],
)
def test_an_engine_must_be_what_its_sidecar_says(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], what: str
) -> None:
    root = make_root(tmp_path)
    device = FakeDevice()
    files = {name: root / graph.file for name, graph in read_manifest(root).graphs.items()}
    module = FakeTensorRT(device, root, files)

    def spoil(sidecar: dict[str, Any]) -> None:
        change(sidecar)
        for profile in sidecar["profiles"]:
            for side in ("inputs", "outputs"):
                profile[side] = {p["name"]: profile[side][p["name"]] for p in sidecar[side]}

    spoiled = tmp_path / "spoiled"
    build_plan(spoiled)
    write_engines(spoiled, change=spoil)
    with pytest.raises(PlanError, match=f"is not what its sidecar says: .*{what}.*; build the engines again"):
        TensorRT(spoiled, read_manifest(spoiled), "rtx", device, module, trust_engines=True)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda s: s.update(format=2), "format is 2, but this car_runtime reads 1"),
        (lambda s: s.pop("version"), "version is missing"),
        (lambda s: s.update(target="sm90"), "target is 'sm90', but the manifest has 'sm89'"),
        (lambda s: s.update(key="0"), "key is '0', but the manifest has"),
        (lambda s: s.update(profiles=[]), "there are no profiles"),
        (lambda s: s.update(weight_bytes=1.5), "weight_bytes is 1.5, but must be an integer"),
        (lambda s: s["profiles"][0]["inputs"].popitem(), "disagree about the inputs"),
        (lambda s: s["profiles"][0]["outputs"].update(more=[1]), "disagree about the outputs more"),
        (lambda s: s["inputs"][0].update(dtype="complex64"), "has dtype 'complex64', not one of"),
        (lambda s: s["profiles"][0].update(inputs={"x": ["R"]}), r"x'\]\[0\] is 'R', but must be an integer"),
        (lambda s: s["profiles"][0].update(inputs={"x": [-1]}), "has the dimension -1"),
    ],
)
def test_a_broken_sidecar_is_a_fault_of_the_plan(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], what: str
) -> None:
    root = make_root(tmp_path, change=change)
    with pytest.raises(PlanError, match=what) as caught:
        _opened(root)
    assert str(caught.value).endswith(("build the engines again", "upgrade car_runtime"))


def test_a_sidecar_that_is_no_json_is_a_fault_of_the_plan(tmp_path: Path) -> None:
    root = make_root(tmp_path)
    for path in (root / "engines").glob("*.json"):
        path.write_text("{")
    device = FakeDevice()
    module = FakeTensorRT.__new__(FakeTensorRT)
    module.__version__ = "1.2.3"
    with pytest.raises(PlanError, match=r"cannot read the sidecar engines/.*; build the engines again"):
        TensorRT(root, read_manifest(root), "rtx", device, module, trust_engines=True)


def test_a_failing_run_carries_the_engines_own_words(fake: Fake) -> None:
    fake.trt.fail = "step.01.b1"
    with pytest.raises(RunError) as caught:
        fake.plan.generate(CONTROL, 0)
    assert str(caught.value).startswith(
        "TensorRT for RTX failed in step.01.b1: Error Code 1: Cuda Runtime (an illegal memory access); "
    )
    fake.trt.fail = None
    for _ in range(2):
        fake.plan.generate(CONTROL, 0)
    fake.trt.fail = "step.01.b1"  # recorded by now: nothing of TensorRT is called any more
    fake.plan.generate(CONTROL, 0)


def test_wrong_buffers_are_named(fake: Fake) -> None:
    backend = fake.backend
    f_hat, image = backend.allocate((1, Z, E, E), "float32"), backend.allocate((1, SIZE, SIZE, 3), "uint8")
    with pytest.raises(RunError, match=r"'decoder' has no profile 'decoder' for f_hat \[3, 4\]; it has decoder.b1"):
        backend.run("decoder", {"f_hat": backend.allocate((3, 4), "float32")}, {"image": image})
    wrong = backend.allocate((1, SIZE, SIZE, 3), "float32")
    with pytest.raises(RunError, match=r"decoder.b1 was given image float32 .*; give uint8 \[1, 32, 32, 3\]"):
        backend.run("decoder", {"f_hat": f_hat}, {"image": wrong})
    with pytest.raises(RunError, match=r"decoder.b1 was given f_hat int64"):
        backend.run("decoder", {"f_hat": backend.allocate((1, Z, E, E), "int64")}, {"image": image})
    with pytest.raises(RunError, match=r"step.00.b1 was not given x; give it \[2, 1, 1, 8\]"):
        backend.run("step.00.b1", {}, {})


def test_a_gpu_that_is_full_says_so(root: Path) -> None:
    with Fake(root, device=FakeDevice(memory=100_000)) as fake:
        with pytest.raises(RunError, match=r"out of memory .*; close other programs"):
            fake.plan.generate(CONTROL, 0, n=4)
        fake.plan.encode(CONTROL)
    assert fake.device.allocated() == 0


# What TensorRT for RTX compiled is kept.


def test_the_runtime_cache_is_kept_next_to_the_engines(tmp_path: Path) -> None:
    root = make_root(tmp_path)
    path = root / "engines" / "runtime.rtx.sm89.fake-rtx-4090.cache"
    with Fake(root) as fake:
        assert fake.backend.report()["runtime_cache"] == {"loaded": None, "saved": None}
        fake.plan.generate(CONTROL, 0)
        assert not path.exists()
        fake.plan.generate(CONTROL, 0)  # the first launch: everything is compiled
        assert path.read_bytes() == b"compiled:condition,control,decoder,step"
        assert fake.backend.report()["runtime_cache"]["saved"] == str(path)
        fake.plan.encode(CONTROL)
    assert path.read_bytes() == b"compiled:condition,control,decoder,encoder,step"
    written = path.stat().st_mtime_ns
    with Fake(root) as fake:
        fake.plan.generate(CONTROL, 0)
        assert fake.backend.report()["runtime_cache"] == {"loaded": str(path), "saved": None}
    assert path.stat().st_mtime_ns == written  # nothing new in it
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []
    open_plan(root, "ort-cpu", threads=1).close()  # the plan is as good as before


def test_where_the_plan_is_read_only_the_cache_goes_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_root(tmp_path)
    write = runtime_cache.write_atomically

    def refuse(contents: Mapping[Path, bytes]) -> None:
        for path in contents:
            if path.is_relative_to(root):
                raise PermissionError(13, "Permission denied", str(path))
        write(contents)

    monkeypatch.setattr(runtime_cache, "write_atomically", refuse)
    for expected in (None, str(Path("~/.cache/car/runtime").expanduser())):
        with Fake(root) as fake:
            fake.plan.generate(CONTROL, 0)
            loaded = fake.backend.report()["runtime_cache"]["loaded"]
            assert (loaded is None) if expected is None else loaded.startswith(expected)


def test_a_cache_that_cannot_be_kept_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_root(tmp_path)

    monkeypatch.setattr(runtime_cache, "write_atomically", _full)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(Path, "expanduser", _homeless)
    with Fake(root) as fake:
        fake.plan.generate(CONTROL, 0)
        fake.plan.generate(CONTROL, 0)
        assert fake.backend.report()["runtime_cache"] == {"loaded": None, "saved": None}


def _homeless(path: Path) -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_a_cache_of_another_machine_is_made_anew(tmp_path: Path) -> None:
    root = make_root(tmp_path)
    path = root / "engines" / "runtime.rtx.sm89.fake-rtx-4090.cache"
    path.write_bytes(b"of another driver")
    with Fake(root) as fake:
        fake.plan.generate(CONTROL, 0)
        assert fake.backend.report()["runtime_cache"]["loaded"] is None
    assert path.read_bytes() == b"compiled:condition,control,decoder,step"
    assert stat.S_ISREG(path.stat().st_mode)


def _full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_classic_tensorrt_has_no_such_cache(root: Path) -> None:
    with Fake(root, "trt") as fake:
        fake.plan.generate(CONTROL, 0)
        assert "runtime_cache" not in fake.backend.report()
        assert fake.backend.report()["engine"] == "tensorrt 1.2.3"


# The real modules, on a machine without a driver.


def _no_driver() -> None:
    try:
        nvidia.probe()
    except BackendError as error:
        if "no NVIDIA driver" in str(error):
            return
    pytest.skip("this machine has an NVIDIA driver")


@pytest.mark.parametrize("opener", [open_rtx, open_trt, lambda *a: open_ort_cuda(*a)], ids=["rtx", "trt", "ort-cuda"])
def test_without_a_driver_every_backend_says_so_first(root: Path, opener: Any) -> None:
    _no_driver()
    with pytest.raises(BackendError, match=r"no NVIDIA driver on this machine; install one .*--backend ort-cpu"):
        opener(root, read_manifest(root), None)


def test_without_a_driver_nothing_is_imported_to_find_that_out(root: Path) -> None:
    _no_driver()
    program = (
        "import sys; from pathlib import Path; import car_runtime\n"
        "from car_runtime.format.manifest import read_manifest\n"
        "from car_runtime.backends.tensorrt import engine_metadata as sidecar\n"
        f"root = Path({str(root)!r}); manifest = read_manifest(root)\n"
        "assert len(sidecar.engines_of(root, manifest, 'rtx')) == 5\n"
        "assert not {'cuda', 'tensorrt', 'tensorrt_rtx', 'onnxruntime', 'torch', 'onnx'} & set(sys.modules)\n"
        "from car_runtime.backends.tensorrt.backend import open_rtx\n"
        "try: open_rtx(root, manifest, None)\n"
        "except car_runtime.BackendError: pass\n"
        "assert not {'cuda', 'tensorrt', 'tensorrt_rtx', 'onnxruntime', 'torch', 'onnx'} & set(sys.modules)\n"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ | {"PYTHONPATH": paths})


def test_the_real_probe_says_that_there_is_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its library is there, but no driver behind it."""
    _no_driver()
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
    monkeypatch.setattr(nvidia, "has_driver", lambda: True)
    with pytest.raises(BackendError, match="no NVIDIA driver on this machine"):
        nvidia.probe()


def test_without_cuda_python_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "has_driver", lambda: True)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(BackendError, match=r"need cuda-python .*; run: pip install 'car-deploy\[cuda\]'; "):
        nvidia.probe()


class _Status(int):
    name = "cudaErrorSomething"


@pytest.mark.parametrize(
    ("driver", "status", "count", "what"),
    [
        (0, 35, None, "no NVIDIA driver"),
        (13000, 100, None, r"\(CUDA 13\.0\) sees no GPU; check nvidia-smi and the variable CUDA_VISIBLE_DEVICES"),
        (13000, 0, 0, "sees no GPU"),
        (12040, 35, None, r"CUDA up to 12\.4, but cuda-python was made for 13\.2; upgrade .*cuda-python 12\.\*"),
        (13000, 803, None, r"CUDA does not start: cudaErrorSomething \(in words\); check that nvidia-smi works"),
    ],
)
def test_each_reason_for_no_gpu_has_its_remedy(
    monkeypatch: pytest.MonkeyPatch, driver: int, status: int, count: int | None, what: str
) -> None:
    class Runtime:
        cudaRuntimeGetVersion = staticmethod(lambda: (_Status(0), 13020))  # noqa: N815
        cudaDriverGetVersion = staticmethod(lambda: (_Status(0), driver))  # noqa: N815
        cudaGetDeviceCount = staticmethod(lambda: (_Status(status), count))  # noqa: N815
        cudaGetErrorString = staticmethod(lambda status: (_Status(0), b"in words"))  # noqa: N815

    monkeypatch.setattr(nvidia, "has_driver", lambda: True)
    monkeypatch.setattr(nvidia, "import_runtime", lambda: Runtime)
    with pytest.raises(BackendError, match=what):
        nvidia.probe()


def test_the_real_cuda_runtime_has_every_function_that_is_called() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
    source = Path(cuda.__file__).read_text() + Path(nvidia.__file__).read_text()
    called = set(re.findall(r'"(cuda[A-Z]\w+)"', source))
    assert len(called) >= 20
    assert [name for name in sorted(called) if not hasattr(runtime, name)] == []
    assert hasattr(runtime, "cudaStreamNonBlocking")
    assert hasattr(runtime.cudaStreamCaptureMode, "cudaStreamCaptureModeThreadLocal")
    properties = runtime.cudaDeviceProp()
    assert all(hasattr(properties, name) for name in ("name", "major", "minor", "totalGlobalMem"))


def test_a_failing_call_is_named_with_its_remedy() -> None:
    """Real calls of the CUDA runtime, which fail for want of a driver."""
    _no_driver()
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
    device = cuda.CudaDevice.__new__(cuda.CudaDevice)
    device._runtime = nvidia.import_runtime()
    with pytest.raises(
        CudaError, match=r"CUDA failed in cudaMalloc: cudaErrorInsufficientDriver \(CUDA driver"
    ) as caught:
        device.malloc(16)
    assert not caught.value.out_of_memory
    error = device._error("cudaMalloc", device._runtime.cudaError_t.cudaErrorMemoryAllocation)
    assert error.out_of_memory
    assert "close other programs" in str(error)


def test_the_real_tensorrt_for_rtx_refuses_what_is_no_engine(root: Path) -> None:
    """Also that its API has what the backend asks of it before an engine is loaded."""
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    copy = root.parent / "real.plan"
    shutil.rmtree(copy, ignore_errors=True)
    build_plan(copy)
    write_engines(copy, version=trt.__version__)
    device = FakeDevice()
    with pytest.raises(BackendError) as caught:
        TensorRT(copy, read_manifest(copy), "rtx", device, trt, trust_engines=True)
    message = str(caught.value)
    assert message.startswith("TensorRT for RTX cannot load step.rtx.sm89.")
    assert "Error Code" in message
    assert "\n" not in message
    assert device.closed


def test_the_real_tensorrt_for_rtx_has_what_the_fake_has() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    from fixtures.fake_device import FakeContext, FakeEngine, FakeRuntime, FakeRuntimeCache, FakeRuntimeConfig

    inner = {"activation_bytes"}
    for real, fake_class in (
        (trt.Runtime, FakeRuntime),
        (trt.ICudaEngine, FakeEngine),
        (trt.IExecutionContext, FakeContext),
        (trt.IRuntimeConfig, FakeRuntimeConfig),
        (trt.IRuntimeCache, FakeRuntimeCache),
    ):
        names = {name for name in vars(fake_class) if not name.startswith("_")} - inner
        assert [name for name in sorted(names) if not hasattr(real, name)] == []
    for name in ("num_io_tensors", "num_optimization_profiles"):
        assert hasattr(trt.ICudaEngine, name)
    for name in ("cuda_graph_strategy", "dynamic_shapes_kernel_specialization_strategy"):
        assert hasattr(trt.IRuntimeConfig, name)
    assert hasattr(trt.IExecutionContext, "active_optimization_profile")
    assert trt.DynamicShapesKernelSpecializationStrategy.EAGER is not None
    assert trt.CudaGraphStrategy.DISABLED is not None
    assert trt.ExecutionContextAllocationStrategy.USER_MANAGED is not None
    assert {"FLOAT", "HALF", "BF16", "INT64", "INT32", "BOOL", "UINT8"} <= set(trt.DataType.__members__)
    assert [int(getattr(trt.TensorIOMode, name)) for name in ("INPUT", "OUTPUT")] == [1, 2]


# ONNX Runtime with CUDA.


class FakeOrt:
    """A plan opened on ONNX Runtime with a fake CUDA."""

    def __init__(self, root: Path, **options: Any) -> None:
        self.device = FakeDevice()
        self.ort = FakeOnnxRuntime(self.device, **options)
        manifest = read_manifest(root)
        self.backend = OrtCuda(root, manifest, self.device, self.ort)
        self.plan = Plan(root, manifest, self.backend, "a test")


@pytest.mark.parametrize("settings", [{}, {"n": 3, "cfg": 0}, {"n": 6, "label": 1, "top_k": 4}], ids=str)
@pytest.mark.parametrize("records", [True, False])
def test_ort_cuda_makes_the_cpus_images(root: Path, cpu: Plan, settings: dict[str, Any], records: bool) -> None:
    fake = FakeOrt(root, records=records)
    expected = cpu.generate(CONTROL, **settings)
    for _ in range(3):
        found = fake.plan.generate(CONTROL, **settings)
        assert (found.tokens == expected.tokens).all()
        assert (found.images == expected.images).all()
    step = fake.ort.sessions[0]
    assert step.name == "step"
    assert [session.name for session in fake.ort.sessions].count("step") == 1  # weights once
    report = fake.backend.report()
    if records:
        batches = {1: 1, 3: 1, 6: 2}[settings.get("n", 1)]
        assert len(step.recorded) == STEPS * batches
        assert step.launches >= STEPS * batches
        assert report["not_captured"] == {}
        assert report["graphs_captured"] == sum(len(s.recorded) for s in fake.ort.sessions)
    else:
        assert report["graphs_captured"] == 0
        assert "cannot use the graph capture feature as requested by the user" in report["not_captured"]["step"]
    fake.plan.close()
    fake.plan.close()
    assert fake.device.allocated() == 0
    with pytest.raises(RunError, match="closed while it was in use"):
        fake.backend.run("decoder", {}, {})


def test_ort_cuda_edits_and_encodes(root: Path, cpu: Plan) -> None:
    fake = FakeOrt(root)
    photo = np.random.default_rng(4).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    tokens = fake.plan.encode(photo)
    assert (tokens == cpu.encode(photo)).all()
    edit = {"known_tokens": tokens[0], "known_mask": np.arange(L) % 2 == 0, "seed": 3}
    assert (fake.plan.generate(CONTROL, 0, **edit).images == cpu.generate(CONTROL, 0, **edit).images).all()
    fake.plan.close()


def test_ort_cuda_runs_what_it_cannot_record(root: Path, cpu: Plan) -> None:
    fake = FakeOrt(root)
    fake.ort.fail_recording = True
    for seed in (1, 2):
        found = fake.plan.generate(CONTROL, 0, seed=seed)
        assert (found.images == cpu.generate(CONTROL, 0, seed=seed).images).all()
    assert "when stream is capturing" in fake.backend.report()["not_captured"]["step"]
    fake.plan.close()


def test_ort_cuda_records_no_more_than_it_may(root: Path, cpu: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_cuda, "GRAPHS", 2)
    fake = FakeOrt(root)
    for _ in range(3):
        assert (fake.plan.generate(CONTROL, 0).images == cpu.generate(CONTROL, 0).images).all()
    assert max(len(session.recorded) for session in fake.ort.sessions) == 2
    fake.plan.close()


def test_ort_cuda_does_not_fall_back_to_the_cpu(root: Path) -> None:
    with pytest.raises(BackendError, match=r"cannot load its CUDA libraries and would run on CPU.*; install CUDA"):
        FakeOrt(root, provider="CPUExecutionProvider")


def test_ort_cuda_wants_the_onnxruntime_with_cuda(root: Path) -> None:
    """The real module; the test environment has the one for CPUs."""
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("the onnxruntime that is installed has CUDA")
    with pytest.raises(BackendError, match=r"has no CUDA; run: pip uninstall onnxruntime, .*'car-deploy\[gpu\]'"):
        OrtCuda(root, read_manifest(root), FakeDevice(), onnxruntime)


def test_ort_cuda_failing_run_is_named(root: Path) -> None:
    fake = FakeOrt(root)
    fake.ort.fail = True
    with pytest.raises(RunError) as caught:
        fake.plan.generate(CONTROL)
    assert str(caught.value) == (
        "onnxruntime failed in the graph 'control' on the GPU: CUDA failure 700: an illegal memory access was "
        "encountered; close the plan and open it again, or use --backend ort-cpu"
    )
    fake.plan.close()


HALF = {
    "control": {"use_tf32": "1", "cudnn_conv_algo_search": "HEURISTIC", "prefer_nhwc": "1"},
    "decoder": {"use_tf32": "1", "cudnn_conv_algo_search": "HEURISTIC"},
}


@pytest.mark.parametrize("kind", ["fp16", "steered"])
def test_ort_cuda_lets_halves_on_the_tensor_cores(kind: str) -> None:
    """No product in float32 may get there: TF32 keeps ten bits of a number."""
    fake = FakeOrt(small_plan(kind))
    fake.plan.encode(CONTROL)
    fake.plan.generate(CONTROL, 0)  # loads the branch
    own = {"control.sketch", "condition.sketch", "branch.sketch"}
    assert {session.name for session in fake.ort.sessions} == {"step", "condition", "decoder", "encoder", *own}
    for session in fake.ort.sessions:
        special = HALF.get(session.name.removesuffix(".sketch"), {}) if kind == "fp16" else {}
        names = ("use_tf32", "cudnn_conv_algo_search", "prefer_nhwc")
        assert {n: session.settings[n] for n in names if n in session.settings} == {"use_tf32": "0", **special}
    assert fake.backend.report()["options_refused"] == {}
    fake.plan.close()


@pytest.mark.parametrize("graph", sorted(HALF))
def test_what_goes_on_the_tensor_cores_has_no_product_in_float32(graph: str) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.shape_inference.infer_shapes(
        onnx.load(
            small_plan("fp16") / {"control": "control.sketch.onnx"}.get(graph, f"{graph}.onnx"),
            load_external_data=False,
        )
    )
    types = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    products = [
        node for node in model.graph.node if node.op_type in ("Conv", "ConvTranspose", "MatMul", "Gemm", "Einsum")
    ]
    assert len(products) > 10
    assert {types[node.output[0]] for node in products} == {onnx.TensorProto.FLOAT16}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"unknown": "prefer_nhwc"}, "Unknown provider option: 'prefer_nhwc'"),
        ({"unrecordable": "prefer_nhwc"}, "cannot use the graph capture feature as requested by the user"),
        ({"failing": "prefer_nhwc"}, "CUDA failure 700: an illegal memory access was encountered"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_ort_cuda_does_without_options_that_are_refused(
    options: dict[str, str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = small_plan("fp16")
    with open_plan(root, "ort-cpu", threads=1) as cpu:
        expected = cpu.generate(CONTROL, 0, seed=1)
    fake = FakeOrt(root, **options)
    for _ in range(3):
        found = fake.plan.generate(CONTROL, 0, seed=1)
        assert (found.tokens == expected.tokens).all()
        assert (found.images == expected.images).all()
    report = fake.backend.report()
    assert list(report["options_refused"]) == ["control.sketch"]
    assert reason in report["options_refused"]["control.sketch"]
    assert report["not_captured"] == {}
    used = {session.name: session for session in fake.ort.sessions}  # the last of each
    assert used["control.sketch"].settings["use_tf32"] == "0"
    assert used["decoder"].settings["use_tf32"] == "1"
    assert used["decoder"].launches
    assert capsys.readouterr().out == ""
    fake.ort.fail = True  # what has run does not fail because of its options
    with pytest.raises(RunError, match=r"failed in the graph 'condition\.sketch' on the GPU"):
        fake.plan.generate(CONTROL, 1, seed=1)
    assert list(fake.backend.report()["options_refused"]) == ["control.sketch"]
    fake.plan.close()


def test_buffers_of_the_backends_are_device_arrays(fake: Fake) -> None:
    assert isinstance(fake.backend.allocate((1,), "bfloat16"), DeviceArray)
    assert json.dumps(fake.backend.report())


# Engines are code: what was not built here is loaded for a plan that the person trusts.


def test_engines_that_were_not_built_here_are_not_loaded(root: Path) -> None:
    with pytest.raises(BackendError, match=r"was not built on this machine, .*--trust-engines"):
        Fake(root, trust=False)


def remember_engines(root: Path) -> None:
    for engine in (root / "engines").glob("*.engine"):
        trust.remember(trust.digest(engine.read_bytes()))


def test_engines_that_were_built_here_are_loaded(root: Path) -> None:
    remember_engines(root)
    Fake(root, trust=False).plan.close()


@pytest.mark.skipif(sys.platform == "win32", reason="modes")
@pytest.mark.parametrize("spoil", ["mode", "folder", "link"])
def test_a_record_that_others_can_write_counts_for_nothing(root: Path, tmp_path: Path, spoil: str) -> None:
    remember_engines(root)
    record = trust.RECORD.expanduser()
    if spoil == "folder":
        record.chmod(0o777)
    for entry in list(record.iterdir()):
        if spoil == "mode":
            entry.chmod(0o666)
        elif spoil == "link":
            (tmp_path / entry.name).write_bytes(b"")
            entry.unlink()
            entry.symlink_to(tmp_path / entry.name)
    with pytest.raises(BackendError, match="was not built on this machine"):
        Fake(root, trust=False)


@pytest.mark.skipif(os.name == "nt", reason="there are no FIFOs")
def test_a_fifo_as_runtime_cache_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "engines" / "runtime.rtx.sm89.a-gpu.cache"
    path.parent.mkdir()
    os.mkfifo(path)
    cache = runtime_cache.RuntimeCache(tmp_path, "rtx", SimpleNamespace(name="A GPU", target="sm89"))  # type: ignore[arg-type]
    config = SimpleNamespace(
        create_runtime_cache=lambda: SimpleNamespace(deserialize=pytest.fail), set_runtime_cache=lambda cache: None
    )
    reading = threading.Thread(target=cache.attach, args=(config,), daemon=True)
    reading.start()
    reading.join(20)
    assert not reading.is_alive()
    assert cache.facts() == {"loaded": None, "saved": None}


def test_a_runtime_cache_that_came_with_a_plan_is_not_loaded(tmp_path: Path) -> None:
    root = make_root(tmp_path)
    with Fake(root) as fake:
        for _ in range(2):
            fake.plan.generate(CONTROL, 0)
    remember_engines(root)
    with Fake(root, trust=False) as fake:
        fake.plan.generate(CONTROL, 0)
        assert fake.backend.report()["runtime_cache"]["loaded"] is not None, "it was saved here"
    for entry in trust.RECORD.expanduser().iterdir():
        entry.unlink()
    remember_engines(root)
    with Fake(root, trust=False) as fake:
        fake.plan.generate(CONTROL, 0)
        assert fake.backend.report()["runtime_cache"]["loaded"] is None

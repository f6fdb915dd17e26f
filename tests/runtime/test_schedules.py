"""Schedules of the scale loop: exact when none is asked for, and each one held to a run that does without it.

What a schedule draws is compared with runs of the exact loop in which all coarser tokens are given: at each scale it
must draw what they draw, at the guidance and on the features that the schedule says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from car_runtime import RequestError, RunError, open_plan
from car_runtime.backends.base import Buffer
from car_runtime.backends.cuda import driver as cuda
from car_runtime.backends.cuda.buffers import Memory
from car_runtime.backends.cuda.driver import CudaDevice
from car_runtime.backends.numpy_buffers import NumpyBuffers
from car_runtime.backends.onnxruntime.cpu import OrtCpu
from car_runtime.backends.onnxruntime.cuda import OrtCuda
from car_runtime.backends.tensorrt.backend import TensorRT
from car_runtime.cli.main import main
from car_runtime.conditioning import CACHED
from car_runtime.config import GenerationConfig
from car_runtime.format.manifest import Manifest, read_manifest
from car_runtime.images import fitted, load_image
from car_runtime.plan import Plan, default_plan
from car_runtime.request import resolve
from car_runtime.schedule import parse_scales
from fixtures.counting_backend import Counting
from fixtures.fake_device import DeviceFault, FakeDevice, FakeOnnxRuntime, FakeTensorRT, write_engines
from fixtures.runtime_plan import LAYERS, SIDES, D, H, L, build_plan
from fixtures.threads import run_in_threads
from fixtures.toy_plan import toy

K = len(SIDES)
STARTS = np.cumsum([0, *(side * side for side in SIDES)]).tolist()
CONTROL = np.random.default_rng(1).integers(0, 256, (40, 50, 3), np.uint8)
SCHEDULES: list[dict[str, Any]] = [
    {"cfg_scales": "-1"},
    {"cfg_scales": 0},
    {"cfg_scales": "1"},
    {"cfg_scales": "1-"},
    {"control_scales": "-0"},
    {"control_scales": "1-2", "control_strength": 0.5},
    {"control_strength": 2},
    {"control_strength": 0},
    {"stop_after": 1},
    {"cfg_scales": range(1, 2), "control_scales": 1, "control_strength": 1.5},
    {"cfg_scales": "-0", "stop_after": 1},
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan with engines for one and two images."""
    root = build_plan(tmp_path_factory.mktemp("schedules") / "tiny.plan")
    write_engines(root)
    return root


@pytest.fixture(scope="module")
def plan(root: Path) -> Iterator[Plan]:
    with open_plan(root, "ort-cpu", threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def manifest(root: Path) -> Manifest:
    return read_manifest(root)


@pytest.fixture(scope="module")
def transformer() -> Iterator[Plan]:
    """A real transformer with random weights, three scales."""
    with open_plan(toy().plan, "ort-cpu", threads=1) as opened:
        yield opened


@pytest.fixture
def rows(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Transformer rows of every step from here on."""
    return watch_rows(plan, monkeypatch)


def watch_rows(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    found: list[int] = []
    run, layers = plan._backend.run, plan.manifest.model.cache_layers

    def watching(graph: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        if graph == "step":
            R = inputs["x"].shape[0]
            assert {inputs[f"past_k_{i}"].shape[1] for i in range(layers)} == {R}
            assert {inputs["modulation"].shape[0], outputs["next_x"].shape[0], outputs["new_v_0"].shape[1]} == {R}
            found.append(R)
        run(graph, inputs, outputs)

    monkeypatch.setattr(plan._backend, "run", watching)
    return found


# Nothing asked for.


def test_a_request_that_names_no_schedule_is_exact(manifest: Manifest) -> None:
    request = resolve(manifest, GenerationConfig(control=CONTROL))
    assert request.schedule.settings() == {}
    everything = GenerationConfig(control=CONTROL, cfg_scales="0-2", control_strength=1, stop_after=2)
    assert request.schedule == resolve(manifest, everything).schedule
    assert request.schedule.plain_control
    assert request.schedule.unguided_from is None


def test_a_schedule_of_all_scales_changes_nothing(plan: Plan, rows: list[int]) -> None:
    expected = plan.generate(CONTROL, 1, seed=3, n=2)
    everything = {"cfg_scales": "0-", "control_scales": f"-{K - 1}", "control_strength": 1.0, "stop_after": K - 1}
    found = plan.generate(CONTROL, 1, seed=3, n=2, **everything)
    assert (found.tokens == expected.tokens).all()
    assert found.images.tobytes() == expected.images.tobytes()
    assert rows == 2 * K * [4]
    assert len(plan._conditioning.scheduled) == 0


def test_every_scale_is_given_the_guidance_asked_for(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    run, given = plan._backend.run, []

    def watching(graph: str, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        if graph == "step":
            given.append(float(inputs["cfg"][0]))
        run(graph, inputs, outputs)

    monkeypatch.setattr(plan._backend, "run", watching)
    plan.generate(CONTROL, 0, cfg=3)
    plan.generate(CONTROL, 0, cfg=3, cfg_scales=1)
    plan.generate(CONTROL, 0, cfg=2, cfg_scales="1-")
    plan.generate(CONTROL, 0, cfg=2)
    assert given == [3, 3, 3, 0, 3, 0, 0, 2, 2, 2, 2, 2]


# Guidance on some scales.


@pytest.mark.parametrize("scales", ["-1", "-0", "1", "1-", "2"])
@pytest.mark.parametrize("which", ["plan", "transformer"])
def test_each_scale_is_drawn_as_with_its_own_guidance_throughout(
    which: str, scales: str, request: pytest.FixtureRequest
) -> None:
    plan: Plan = request.getfixturevalue(which)
    asked = {"label": 1, "seed": 5, "n": 3, "top_p": 0.9}
    found = plan.generate(CONTROL, cfg=4, cfg_scales=scales, **asked)
    guided = parse_scales("cfg_scales", scales, K)
    for k, scale in enumerate(plan.manifest.scales):
        coarser = np.arange(plan.manifest.tokens) < scale.start
        wanted = plan.generate(
            CONTROL, cfg=4 if k in guided else 0, known_tokens=found.tokens, known_mask=coarser, **asked
        )
        part = slice(scale.start, scale.stop)
        assert (found.tokens[:, part] == wanted.tokens[:, part]).all()
    # The last of these runs was given all tokens but those of the last scale, and drew the same ones.
    assert (found.images == wanted.images).all()


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, [4, 4, 4]),
        ({"cfg_scales": "-1"}, [4, 4, 2]),
        ({"cfg_scales": 0}, [4, 2, 2]),
        ({"cfg_scales": 1}, [4, 4, 2]),
        ({"cfg_scales": "1-"}, [4, 4, 4]),
        ({"cfg_scales": "-1", "stop_after": 1}, [4, 4]),
        ({"cfg_scales": "-0", "stop_after": 1}, [4, 2]),
        ({"cfg_scales": "1-", "stop_after": 0}, [2]),
        ({"cfg_scales": "-1", "cfg": 0}, [2, 2, 2]),
    ],
    ids=str,
)
def test_guidance_rows_go_after_the_last_guided_scale(
    plan: Plan, rows: list[int], settings: dict[str, Any], wanted: list[int]
) -> None:
    plan.generate(CONTROL, 0, n=2, **settings)
    assert rows == wanted


@pytest.mark.parametrize("which", ["plan", "transformer"])
@pytest.mark.parametrize("n", [1, 3])
def test_going_on_with_half_the_rows_gives_what_all_rows_give(
    which: str, n: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows: as a backend of fixed rows runs it, guidance 0 from the same scale on. Equal to the bit in f̂."""
    plan: Plan = request.getfixturevalue(which)
    rows = watch_rows(plan, monkeypatch)
    for scales, seed in product(("-0", "-1", "1"), (1, 2)):
        asked = {"label": 0, "seed": seed, "n": n, "cfg": 3, "cfg_scales": scales}
        found = list(plan.stream(CONTROL, **asked))
        with monkeypatch.context() as patch:
            patch.setattr(plan._backend, "guided_only", True)
            wanted = list(plan.stream(CONTROL, **asked))
        assert rows[K:] == K * [2 * n]
        assert rows[K - 1] == n
        rows.clear()
        for a, b in zip(found, wanted, strict=True):
            assert (a.tokens == b.tokens).all()
            # A product of other sizes may add in another order.
            np.testing.assert_allclose(a.f_hat, b.f_hat, rtol=0, atol=0 if which == "plan" else 1e-5)
        assert (found[-1].preview() == wanted[-1].preview()).all()


def test_the_past_of_the_first_rows_is_copied_once(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    copy = plan._backend.copy_rows

    def counting(source: Buffer, target: Buffer, rows: Sequence[int] | None = None) -> None:
        copied.append((source.shape, target.shape))
        copy(source, target, rows)

    monkeypatch.setattr(plan._backend, "copy_rows", counting)
    plan.generate(CONTROL, 0, n=2, cfg_scales="-0")
    assert copied == 2 * LAYERS * [((STARTS[1], 4, H, D), (STARTS[1], 2, H, D))]
    plan.generate(CONTROL, 0, n=2)
    assert len(copied) == 2 * LAYERS


def test_a_second_image_on_a_schedule_allocates_nothing(root: Path, manifest: Manifest) -> None:
    backend = Counting(OrtCpu(root, manifest, 1))
    with Plan(root, manifest, backend, "a test") as plan:
        plan.generate(CONTROL, 0, seed=0)
        exact, backend.allocated = backend.allocated, 0
        settings: dict[str, Any] = {"cfg_scales": "-1", "control_strength": 0.5}
        plan.generate(CONTROL, 0, seed=0, **settings)
        assert backend.allocated == 2 * LAYERS + 1 < exact  # K and V of the first rows, and the weakened features
        backend.allocated = 0
        for seed in range(3):
            plan.generate(CONTROL, 0, seed=seed, **settings)
            plan.generate(CONTROL, 0, seed=seed)
            plan.generate(CONTROL, 0, seed=seed, cfg_scales=0, stop_after=1)
        assert backend.allocated == 0


def test_a_schedule_leaves_nothing_behind(plan: Plan) -> None:
    expected = plan.generate(CONTROL, 0, seed=4, n=2)
    for settings in SCHEDULES:
        plan.generate(CONTROL, 0, seed=9, n=2, **settings)
        found = plan.generate(CONTROL, 0, seed=4, n=2)
        assert (found.tokens == expected.tokens).all()
        assert (found.images == expected.images).all()


def test_an_image_on_a_schedule_does_not_depend_on_its_batch(plan: Plan) -> None:
    for settings in SCHEDULES:
        together = plan.generate(CONTROL, 1, seed=20, n=6, **settings)
        for i in (0, 3, 5):
            alone = plan.generate(CONTROL, 1, seed=20 + i, **settings)
            assert (alone.tokens[0] == together.tokens[i]).all()
            assert (alone.images[0] == together.images[i]).all()


def test_threads_with_schedules_of_their_own_get_what_they_would_get_alone(plan: Plan) -> None:
    alone = [plan.generate(CONTROL, 0, n=3, **settings).images for settings in SCHEDULES]
    together: list[Any] = [None] * len(SCHEDULES)

    def work(i: int) -> None:
        for _ in range(3):
            together[i] = plan.generate(CONTROL, 0, n=3, **SCHEDULES[i]).images

    run_in_threads(work, len(SCHEDULES))
    for expected, found in zip(alone, together, strict=True):
        assert (expected == found).all()


def test_known_tokens_are_kept_on_a_schedule(plan: Plan) -> None:
    rng = np.random.default_rng(3)
    mask, known = rng.random(L) < 0.5, rng.integers(0, 16, L)
    found = plan.generate(CONTROL, 0, known_tokens=known, known_mask=mask, cfg_scales="-0", stop_after=1)
    drawn = np.arange(L) < STARTS[2]
    assert (found.tokens[0][mask & drawn] == known[mask & drawn]).all()
    assert (found.tokens[0][~drawn] == -1).all()


# Control on some scales, and its strength.


@pytest.mark.parametrize(
    ("settings", "factors"),
    [
        ({"control_scales": "-1"}, [1, 1, 0]),
        ({"control_scales": 1}, [0, 1, 0]),
        ({"control_scales": "1-", "control_strength": 0.5}, [0, 0.5, 0.5]),
        ({"control_strength": 1.5}, [1.5, 1.5, 1.5]),
        ({"control_strength": 0}, [0, 0, 0]),
    ],
    ids=str,
)
@pytest.mark.parametrize("which", ["plan", "transformer"])
def test_the_control_comes_in_as_features_made_by_hand(
    which: str,
    settings: dict[str, Any],
    factors: list[float],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan: Plan = request.getfixturevalue(which)
    found = plan.generate(CONTROL, 0, seed=3, n=2, **settings)
    square = fitted(load_image(CONTROL), plan.manifest.model.image_size, "crop", (0, 0, 0))
    by_hand = np.array(plan._conditioning.compute_features(square, plan.manifest.model.default_branch or ""))
    for scale, factor in zip(plan.manifest.scales, factors, strict=True):
        by_hand[scale.start : scale.stop] *= np.float32(factor)
    plan.forget()
    monkeypatch.setattr(plan._conditioning, "compute_features", lambda *_: by_hand)
    wanted = plan.generate(CONTROL, 0, seed=3, n=2)
    plan.forget()
    assert (found.tokens == wanted.tokens).all()
    assert (found.images == wanted.images).all()


def test_the_control_is_computed_once_for_all_schedules(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[str] = []
    kept = plan._conditioning
    control, scheduled = kept.compute_features, kept.compute_scheduled
    monkeypatch.setattr(kept, "compute_features", lambda *a: computed.append("control") or control(*a))
    monkeypatch.setattr(kept, "compute_scheduled", lambda *a: computed.append("scheduled") or scheduled(*a))
    plan.forget()
    for settings in ({}, {"control_strength": 0.5}, {"control_strength": 0.5, "cfg_scales": 1}, {}):
        plan.generate(CONTROL, **settings)
    assert computed == ["control", "scheduled"]
    plan.generate(CONTROL, control_strength=0.5, control_scales="1-")
    plan.generate(255 - CONTROL, control_strength=0.5)
    assert computed == ["control", "scheduled", "scheduled", "control", "scheduled"]
    for i in range(CACHED + 2):
        plan.generate(CONTROL, control_strength=1 + i / 100)
    assert len(plan._conditioning.scheduled) == CACHED
    assert computed.count("control") == 2


# Stopping early.


@pytest.mark.parametrize("last", range(K))
def test_stopping_gives_the_preview_of_that_scale(plan: Plan, last: int) -> None:
    steps = [step for step in plan.stream(CONTROL, 2, seed=7, n=5) if step.index == last]
    heard: list[tuple[int, bool]] = []
    found = plan.generate(
        CONTROL, 2, seed=7, n=5, stop_after=last, on_scale=lambda step: heard.append((step.index, step.last))
    )
    assert (found.images == np.concatenate([step.preview() for step in steps])).all()
    drawn = np.concatenate([step.tokens.reshape(len(step.images), -1) for step in steps])
    assert (found.tokens[:, STARTS[last] : STARTS[last + 1]] == drawn).all()
    assert (found.tokens[:, STARTS[last + 1] :] == -1).all()
    assert (found.tokens[:, : STARTS[last + 1]] >= 0).all()
    assert heard == 2 * [(k, k == last) for k in range(last + 1)]
    assert [name for name in found.timings if name.startswith("scale")] == [f"scale_{k}" for k in range(last + 1)]


def test_a_stream_ends_where_the_schedule_says(plan: Plan) -> None:
    steps = list(plan.stream(CONTROL, 0, n=5, stop_after=0))
    assert [(step.index, step.last, step.images) for step in steps] == [
        (0, True, range(4)),
        (0, True, range(4, 5)),
    ]


# Requests.


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (None, range(6)),
        ("0-5", range(6)),
        ("2-4", range(2, 5)),
        (" 2 - 4 ", range(2, 5)),
        ("2-", range(2, 6)),
        ("-3", range(4)),
        ("3", range(3, 4)),
        (3, range(3, 4)),
        (np.int64(3), range(3, 4)),
        (range(1, 3), range(1, 3)),
    ],
    ids=str,
)
def test_scales_are_named_by_their_ends(given: Any, wanted: range) -> None:
    assert parse_scales("cfg_scales", given, 6) == wanted


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"cfg_scales": "3"}, r"cfg_scales is '3', but the plan's scales are 0…2; give two ends as 0-2"),
        ({"cfg_scales": "1-7"}, "cfg_scales is '1-7', but the plan's scales are 0…2"),
        ({"cfg_scales": -1}, "cfg_scales is -1, but the plan's scales are 0…2"),
        ({"cfg_scales": range(-1, 2)}, r"cfg_scales is range\(-1, 2\), but the plan's scales"),
        ({"cfg_scales": "2-1"}, "cfg_scales is '2-1', which ends before it begins; give the coarser scale first"),
        ({"cfg_scales": ""}, "cfg_scales is '', which names no scales; give two ends as 0-2, one of them as 1- or"),
        ({"cfg_scales": "-"}, "names no scales"),
        ({"cfg_scales": "a-b"}, "names no scales"),
        ({"cfg_scales": "1.5"}, "names no scales"),
        ({"cfg_scales": 1.5}, "names no scales"),
        ({"cfg_scales": True}, "names no scales"),
        ({"cfg_scales": range(2, 2)}, "names no scales"),
        ({"cfg_scales": range(0, 3, 2)}, "names no scales"),
        ({"cfg_scales": (0, 1)}, "names no scales"),
        ({"control_scales": "0-3"}, "control_scales is '0-3', but the plan's scales are 0…2"),
        ({"control_strength": float("nan")}, "control_strength is nan, but must be a number in 0…2; 1 is what"),
        ({"control_strength": float("inf")}, "control_strength is inf"),
        ({"control_strength": -0.1}, "control_strength is -0.1"),
        ({"control_strength": 2.1}, "control_strength is 2.1"),
        ({"control_strength": "1"}, "control_strength is '1'"),
        ({"stop_after": 3}, "stop_after is 3, but must be a whole number in 0…2; 2 draws them all"),
        ({"stop_after": -1}, "stop_after is -1"),
        ({"stop_after": 1.0}, "stop_after is 1.0"),
    ],
    ids=str,
)
def test_what_is_no_schedule_is_named_with_the_remedy(plan: Plan, settings: dict[str, Any], says: str) -> None:
    for call in (plan.generate, plan.stream):
        with pytest.raises(RequestError, match=says):
            call(CONTROL, **settings)


def test_a_plan_without_control_takes_no_schedule_of_it(tmp_path: Path) -> None:
    with open_plan(build_plan(tmp_path / "var.plan", control=False), threads=1) as var:
        for settings in ({"control_scales": "0-1"}, {"control_strength": 1.0}):
            with pytest.raises(RequestError, match=r"control_s.*has no control branch \(plain VAR\); leave it out"):
                var.generate(**settings)
        found = var.generate(label=1, n=2, cfg_scales="-0", stop_after=1)
        assert found.request.schedule.settings() == {"cfg_scales": "0-0", "stop_after": 1}
        assert (found.tokens[:, STARTS[2] :] == -1).all()


@pytest.mark.parametrize("settings", SCHEDULES, ids=str)
def test_the_request_says_how_to_make_the_image_again(plan: Plan, settings: dict[str, Any]) -> None:
    first = plan.generate(CONTROL, 0, seed=1, **settings)
    said = first.request.schedule.settings()
    assert set(said) == set(settings)
    assert json.loads(json.dumps(said)) == said
    assert (plan.generate(CONTROL, 0, seed=1, **said).images == first.images).all()


# GPUs, faked.


def on_ort_cuda(root: Path, **options: Any) -> tuple[Plan, FakeDevice, FakeOnnxRuntime]:
    device, manifest = FakeDevice(), read_manifest(root)
    ort = FakeOnnxRuntime(device, **options)
    return Plan(root, manifest, OrtCuda(root, manifest, device, ort), "a test"), device, ort


def on_tensorrt(root: Path, flavour: str) -> tuple[Plan, FakeDevice]:
    device, manifest = FakeDevice(), read_manifest(root)
    files = {name: root / graph.file for name, graph in manifest.graphs.items() if "." not in name}
    trt = FakeTensorRT(device, root, files, rtx=flavour == "rtx")
    return Plan(root, manifest, TensorRT(root, manifest, flavour, device, trt, trust_engines=True), "a test"), device


@pytest.mark.parametrize("records", [True, False])
def test_ort_cuda_makes_the_cpus_images_on_every_schedule(root: Path, plan: Plan, records: bool) -> None:
    gpu, device, _ = on_ort_cuda(root, records=records)
    for settings, n in product(SCHEDULES, (1, 3)):
        expected = plan.generate(CONTROL, 0, n=n, **settings)
        for _ in range(3):  # run, recorded, launched
            found = gpu.generate(CONTROL, 0, n=n, **settings)
            assert (found.tokens == expected.tokens).all()
            assert (found.images == expected.images).all()
    gpu.close()
    assert device.allocated() == 0


def test_ort_cuda_copies_the_past_on_the_stream_and_replays_what_follows(root: Path) -> None:
    gpu, device, ort = on_ort_cuda(root)
    for _ in range(3):
        gpu.generate(CONTROL, 0, cfg_scales="-1")
    step = ort.sessions[0]
    allocated, recorded, launches = device.allocated(), len(step.recorded), step.launches
    assert recorded == K
    device.log.clear()
    device.moved.clear()
    gpu.generate(CONTROL, 0, seed=8, cfg_scales="-1")
    row = 4 * H * D
    assert [detail for kind, detail in device.log if kind == "spaced copy"] == 2 * LAYERS * [
        (row, 2 * row, STARTS[2])
    ]
    assert device.allocated() == allocated
    assert (len(step.recorded), step.launches) == (recorded, launches + K)
    # What ends earlier shares the recordings of the scales that it has in common, guided and not.
    for _ in range(3):
        gpu.generate(CONTROL, 0, cfg_scales="-0")
    assert len(step.recorded) == K + 1
    gpu.close()


@pytest.mark.parametrize("flavour", ["rtx", "trt"])
def test_engines_of_fixed_rows_make_the_cpus_images_and_replay_them(root: Path, plan: Plan, flavour: str) -> None:
    if flavour == "trt":
        write_engines(root, flavour="trt")
    gpu, device = on_tensorrt(root, flavour)
    for seed in (1, 2):
        gpu.generate(CONTROL, 0, seed=seed)
    captured = len(device.graphs)
    for settings in SCHEDULES:
        expected = plan.generate(CONTROL, 0, seed=3, **settings)
        found = gpu.generate(CONTROL, 0, seed=3, **settings)
        assert (found.tokens == expected.tokens).all()
        assert (found.images == expected.images).all()
    steps = [run for run in device.runs if run.profile.startswith("step")]
    assert {run.shapes["x"][0] for run in steps} == {2}
    assert len(device.graphs) <= captured + 1  # no scale is recorded anew; the decoder may find f̂ in the other buffer
    assert not [detail for kind, detail in device.log if kind == "spaced copy"]
    gpu.close()


# Another engine, on the plan that ships.


def test_openvino_goes_on_with_half_the_rows() -> None:
    openvino = pytest.importorskip("car_runtime.backends.openvino.backend")
    pytest.importorskip("openvino", reason="OpenVINO is not installed (extra openvino)")
    root, control = default_plan(), Path(__file__).parents[2] / "examples" / "guitar.png"
    manifest = read_manifest(root)
    asked: dict[str, Any] = {"label": 2, "seed": 1, "n": 2, "cfg_scales": "-2", "control_strength": 0.8}
    with (
        open_plan(root, "ort-cpu", threads=1) as expected,
        Plan(root, manifest, openvino.OpenVino(root, manifest, 1, "f32"), "a test") as plan,
    ):
        wanted, found = expected.generate(control, **asked), plan.generate(control, **asked)
        whole = expected.generate(control, **asked | {"cfg_scales": None, "control_strength": None})
    # Sums in another order: a draw may fall on the other side of a border, and what comes after it differs too.
    assert (found.tokens == wanted.tokens).mean() > 0.9
    assert (whole.tokens == wanted.tokens).mean() < 0.9


# Copies of rows.


@pytest.mark.parametrize("memory", ["host", "device"])
def test_the_first_rows_of_each_entry_are_copied(memory: str) -> None:
    place: Any = NumpyBuffers() if memory == "host" else Memory(FakeDevice())
    values = np.arange(5 * 4 * 2 * 3, dtype=np.float16).reshape(5, 4, 2, 3)
    source, target = place.allocate(values.shape, "float16"), place.allocate((5, 2, 2, 3), "float16")
    place.write(source, values)
    place.copy_rows(source, target)
    assert (place.read(target) == values[:, :2]).all()
    place.copy_rows(source[1:3], target[:2])
    assert (place.read(target)[:2] == values[1:3, :2]).all()
    assert (place.read(target)[2:] == values[2:, :2]).all()
    whole = place.allocate(values.shape, "float16")
    place.copy_rows(source, whole)
    assert (place.read(whole) == values).all()


@pytest.mark.parametrize("shape", [(4, 2, 3), (5, 3, 3), (5, 2, 4), (5, 5, 3)], ids=str)
def test_only_rows_of_the_same_entries_are_copied_on_a_device(shape: tuple[int, ...]) -> None:
    memory = Memory(FakeDevice())
    source = memory.zeros((5, 4, 3), "float32")
    if shape == (5, 3, 3):
        source = memory.zeros((5, 4, 3), "float16")
    with pytest.raises(RunError, match=r"cannot copy float.*; give the same shape and dtype"):
        memory.copy_rows(source, memory.allocate(shape, "float32"))


def test_the_fake_notices_a_copy_with_gaps_onto_itself() -> None:
    device = FakeDevice()
    address = device.malloc(512)
    with pytest.raises(DeviceFault, match="overlap"):
        device.on_device_spaced(address, address, 32, 64, 8, 32)
    with pytest.raises(DeviceFault, match="refuses"):
        device.on_device_spaced(address, address + 256, 64, 32, 4, 64)


@pytest.mark.gpu
def test_a_gpu_copies_the_first_rows_of_each_entry() -> None:
    """cudaMemcpy2DAsync on the card that is present."""
    try:
        cuda.probe()
    except cuda.BackendError as error:
        pytest.skip(f"there is no GPU to test on: {error}")
    memory = Memory(CudaDevice())
    values = np.random.default_rng(0).random((424, 4, 16, 64), np.float32)
    source, target = memory.allocate(values.shape, "float32"), memory.allocate((424, 2, 16, 64), "float32")
    memory.write(source, values)
    memory.copy_rows(source, target)
    assert (memory.read(target) == values[:, :2]).all()
    memory.close()


# The command.


@pytest.fixture
def here(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    edges = Image.new("L", (40, 40))
    ImageDraw.Draw(edges).rectangle((8, 12, 30, 28), outline=255, width=3)
    edges.save(tmp_path / "edges.png")
    (tmp_path / "car.plan").symlink_to(root)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "cwd"


GIVEN = ["-e", "../car.plan", "--backend", "ort-cpu", "--threads", "1", "--control", "../edges.png"]


def test_the_flags_make_the_image_and_are_reported(
    here: Path, plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--cfg-scales", "-1", "--control-scales", "1-", "--control-strength", "0.5", "--stop-after", "1"]
    assert main([*GIVEN, *flags, "--tokens", "t.npz", "--preview", "steps", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    settings = {"cfg_scales": "0-1", "control_scales": "1-2", "control_strength": 0.5, "stop_after": 1}
    assert report["schedule"] == settings
    assert report["previews"] == ["steps/scale-00.png", "steps/scale-01.png"]
    assert [stage for stage in report["timings"] if stage.startswith("scale")] == ["scale_0", "scale_1"]
    expected = plan.generate(here.parent / "edges.png", **settings)
    with Image.open("out.png") as image, np.load("t.npz") as stored:
        image.load()
        assert (np.asarray(image) == expected.images[0]).all()
        assert (stored["tokens"] == expected.tokens).all()
        assert (stored["tokens"][:, STARTS[2] :] == -1).all()
        text = dict(image.text)  # type: ignore[attr-defined]
    assert {name: text[name] for name in settings} == {name: str(value) for name, value in settings.items()}
    again = [f"--{name.replace('_', '-')}={text[name]}" for name in settings]
    assert main([*GIVEN, *again, "-o", "again.png"]) == 0
    assert Path("again.png").read_bytes() == Path("out.png").read_bytes()


def test_a_person_sees_how_many_scales_there_will_be(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert main([*GIVEN, "--stop-after", "1"]) == 0
    lines = capsys.readouterr().err.splitlines()[1:]
    assert [line.partition(", ")[0] for line in lines] == [f"car-run: image 0: scale {k}/2" for k in (1, 2)]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--cfg-scales", "3"], "cfg_scales is '3', but the plan's scales are 0…2; give two ends"),
        (["--cfg-scales", "2-1"], "cfg_scales is '2-1', which ends before it begins; give the coarser scale first"),
        (["--control-scales", "x"], "control_scales is 'x', which names no scales; give two ends"),
        (["--control-strength", "nan"], "control_strength is nan, but must be a number in 0…2"),
        (["--control-strength", "much"], "argument --control-strength: invalid float value: 'much'; see"),
        (["--stop-after", "3"], "stop_after is 3, but must be a whole number in 0…2"),
        (["--stop-after", "-1"], "stop_after is -1"),
    ],
    ids=str,
)
def test_what_is_no_schedule_is_said_in_one_line(
    here: Path, flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*GIVEN, *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("car-run: error: ")
    assert says in err
    assert err.count("\n") == 1
    assert list(here.iterdir()) == []

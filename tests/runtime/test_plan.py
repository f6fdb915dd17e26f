"""The programming interface on a small real plan, held to the same model written in numpy."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import car_runtime.plan as plan_module
from car_runtime import ImageError, PlanError, RequestError, RunError, open_plan
from car_runtime.backends.base import Buffer
from car_runtime.backends.registry import open_backend
from car_runtime.conditioning import CACHED
from car_runtime.config import GenerationConfig
from car_runtime.format.manifest import Manifest, read_manifest
from car_runtime.images import control_pyramid, fitted, load_image
from car_runtime.plan import Plan
from car_runtime.request import resolve
from fixtures.runtime_plan import CLASSES, NAMES, SIDES, SIZE, L, V, Z, build_plan, generate, image
from fixtures.threads import run_in_threads

CONTROL = np.random.default_rng(1).integers(0, 256, (40, 50, 3), np.uint8)
OTHER_CONTROL = 255 - CONTROL


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_plan(tmp_path_factory.mktemp("plan") / "tiny.plan")


@pytest.fixture(scope="module")
def plan(root: Path) -> Iterator[Plan]:
    with open_plan(root, "ort-cpu", threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def var(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plan]:
    with open_plan(build_plan(tmp_path_factory.mktemp("plan") / "var.plan", control=False), threads=1) as opened:
        yield opened


@pytest.fixture
def runs(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each graph runs from here on, with nothing cached yet."""
    counter: Counter[str] = Counter()
    run = plan._backend.run

    def counting(graph: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        counter[graph] += 1
        run(graph, inputs, outputs)

    monkeypatch.setattr(plan._backend, "run", counting)
    plan.forget()
    return counter


def _pyramid(plan: Plan, control: np.ndarray) -> list[np.ndarray]:
    square = fitted(load_image(control), plan.manifest.model.image_size, "crop", (0, 0, 0))
    return control_pyramid(square, plan.manifest.scales)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cfg": 0},
        {"cfg": 4, "top_k": 1},
        {"cfg": 0.5, "top_k": 3, "top_p": 0},
        {"top_k": 0, "top_p": 0.3},
        {"top_p": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("label", [None, 0, 2])
def test_tokens_and_images_are_the_models(plan: Plan, settings: dict[str, Any], label: int | None) -> None:
    result = plan.generate(CONTROL, label, seed=100, n=6, **settings)
    oracle = {**settings, "top_k": settings.get("top_k") or V, "top_p": settings.get("top_p", 0.95) or 2.0}
    assert result.images.shape == (6, SIZE, SIZE, 3)
    assert result.images.dtype == np.uint8
    assert result.tokens.dtype == np.int64
    for i in range(6):
        tokens, image = generate(_pyramid(plan, CONTROL), CLASSES if label is None else label, 100 + i, **oracle)
        assert result.tokens[i].tolist() == tokens.tolist()
        # Both round a float32 sigmoid; a value half-way between two levels may go either way.
        assert np.abs(result.images[i].astype(int) - image).max() <= 1


def test_a_var_plan_needs_no_control(var: Plan) -> None:
    result = var.generate(label="cat", seed=4, n=2)
    for i in range(2):
        assert result.tokens[i].tolist() == generate(None, 0, 4 + i)[0].tolist()


def test_control_class_seed_and_settings_all_matter(plan: Plan) -> None:
    base = plan.generate(CONTROL, 0, 0, n=4).tokens
    for other in (
        plan.generate(OTHER_CONTROL, 0, 0, n=4),
        plan.generate(CONTROL, 1, 0, n=4),
        plan.generate(CONTROL, 0, 50, n=4),
        plan.generate(CONTROL, 0, 0, n=4, cfg=6),
        plan.generate(CONTROL, 0, 0, n=4, top_k=1),
    ):
        assert (other.tokens != base).any()


def test_without_a_class_no_guidance_rows_run(plan: Plan, var: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kinds would be "no class": half of the work, for the tokens that cfg 0 draws."""
    for opened, control in ((plan, CONTROL), (var, None)):
        rows: list[int] = []
        run = opened._backend.run

        def counting(graph: str, inputs: Any, outputs: Any, run: Any = run, rows: list[int] = rows) -> None:
            rows.extend([inputs["x"].shape[0]] if graph == "step" else [])
            run(graph, inputs, outputs)

        monkeypatch.setattr(opened._backend, "run", counting)
        classless = opened.generate(control, seed=3, n=2, cfg=4)
        assert rows == [2] * len(SIDES)
        assert (classless.tokens == opened.generate(control, seed=3, n=2, cfg=0).tokens).all()
        assert rows == [2] * 2 * len(SIDES)
        opened.generate(control, 0, seed=3, n=2, cfg=4)
        assert rows[-len(SIDES) :] == [4] * len(SIDES)


def test_an_image_depends_on_its_seed_and_not_on_its_batch(plan: Plan) -> None:
    together = plan.generate(CONTROL, 1, seed=20, n=7)
    assert together.request.seeds == tuple(range(20, 27))
    for i in range(7):
        alone = plan.generate(CONTROL, 1, seed=20 + i)
        assert (alone.tokens[0] == together.tokens[i]).all()
        assert (alone.images[0] == together.images[i]).all()


def test_known_tokens_stay_and_the_rest_follows_them(plan: Plan) -> None:
    first = plan.generate(CONTROL, 0, seed=1)
    rng = np.random.default_rng(3)
    mask, known = rng.random((5, L)) < 0.5, rng.integers(0, V, (5, L))
    result = plan.generate(CONTROL, 0, seed=1, n=5, known_tokens=known, known_mask=mask)
    assert (result.tokens[mask] == known[mask]).all()
    for i in range(5):
        tokens, _ = generate(_pyramid(plan, CONTROL), 0, 1 + i, known=known[i], known_mask=mask[i])
        assert result.tokens[i].tolist() == tokens.tolist()
    again = plan.generate(CONTROL, 0, seed=9, known_tokens=first.tokens[0], known_mask=np.ones(L, bool))
    assert (again.images == first.images).all()


def test_known_tokens_do_not_linger_in_the_next_call(plan: Plan) -> None:
    before = plan.generate(CONTROL, 0, seed=1).tokens
    plan.generate(CONTROL, 0, seed=1, known_tokens=np.zeros(L, int), known_mask=np.ones(L, bool))
    assert (plan.generate(CONTROL, 0, seed=1).tokens == before).all()


def test_an_edit_goes_by_way_of_encode_and_a_pixel_mask(plan: Plan) -> None:
    photo = np.random.default_rng(4).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    tokens = plan.encode(photo)
    repaint = np.zeros((SIZE, SIZE), bool)
    repaint[:, SIZE // 2 :] = True
    keep = plan.known_mask(repaint)
    result = plan.generate(CONTROL, 0, known_tokens=tokens[0], known_mask=keep)
    assert 0 < keep.sum() < L
    assert (result.tokens[0][keep] == tokens[0][keep]).all()


def test_encode_takes_arrays_files_and_lists(plan: Plan, tmp_path: Path) -> None:
    photos = np.random.default_rng(4).integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)
    Image.fromarray(photos[1]).save(tmp_path / "x.png")
    expected = [
        np.floor(p.reshape(s, SIZE // s, s, SIZE // s, 3).mean((1, 3, 4)) / 16).reshape(-1)
        for p in photos
        for s in SIDES
    ]
    tokens = plan.encode(photos)
    assert tokens.dtype == np.int64
    assert tokens.tolist() == np.concatenate(expected).reshape(3, L).tolist()
    mixed = plan.encode([photos[0], tmp_path / "x.png", Image.fromarray(photos[2])])
    assert (mixed == tokens).all()
    assert plan.encode(Image.new("RGB", (99, 12))).shape == (1, L)
    with pytest.raises(RequestError, match="at least one"):
        plan.encode([])


def test_a_plan_without_encoder_says_so(tmp_path: Path) -> None:
    root = build_plan(tmp_path / "x.plan")
    graphs = {k: v for k, v in read_manifest(root).graphs.items() if k != "encoder"}
    with (
        open_plan(build_plan(tmp_path / "x.plan", graphs=graphs), threads=1) as plan,
        pytest.raises(RequestError, match="has no encoder; export it again"),
    ):
        plan.encode(CONTROL)


def test_stream_yields_every_scale_and_ends_with_the_image(plan: Plan) -> None:
    result = plan.generate(CONTROL, "lion", seed=2, n=5)
    steps = list(plan.stream(CONTROL, "lion", seed=2, n=5))
    assert [(s.index, s.last, s.images) for s in steps] == [
        (k, k == 2, images) for images in (range(4), range(4, 5)) for k in range(3)
    ]
    for step in steps:
        scale = plan.manifest.scales[step.index]
        expected = result.tokens[step.images.start : step.images.stop, scale.start : scale.stop]
        assert (step.tokens.reshape(len(step.images), -1) == expected).all()
        # The stream is over: results must not be views of buffers that later scales wrote.
        assert step.f_hat.shape == (len(step.images), Z, 4, 4)
        images = np.stack([image(f_hat) for f_hat in step.f_hat])
        assert (step.preview() == images).all()
        assert (step.preview([len(images) - 1, 0]) == images[[-1, 0]]).all()
    assert (np.concatenate([s.preview() for s in steps if s.last]) == result.images).all()


def test_a_stream_may_be_left_early(plan: Plan) -> None:
    expected = plan.generate(CONTROL, 0, seed=2)
    stream = plan.stream(CONTROL, 0, seed=2)
    next(stream)
    between = plan.generate(CONTROL, 0, seed=2)
    del stream
    assert (between.tokens == expected.tokens).all()
    assert (plan.generate(CONTROL, 0, seed=2).tokens == expected.tokens).all()


def test_a_bad_stream_raises_before_its_first_scale(plan: Plan) -> None:
    with pytest.raises(RequestError, match="cfg is -1"):
        plan.stream(CONTROL, cfg=-1)


def test_a_scale_stays_what_it_was_when_its_stream_is_left(plan: Plan) -> None:
    expected = next(plan.stream(CONTROL, 0, seed=2))
    wanted = (expected.tokens, expected.f_hat)
    stream = plan.stream(CONTROL, 0, seed=2)
    step = next(stream)
    del stream
    plan.generate(OTHER_CONTROL, 1, seed=8)
    assert (step.tokens == wanted[0]).all()
    assert (step.f_hat == wanted[1]).all()


def test_a_loop_that_nobody_watches_reads_nothing_between_scales(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read waits for a GPU: the tokens and the images at the end of each batch must be all."""
    log: list[str] = []
    run, read = plan._backend.run, plan._backend.read
    monkeypatch.setattr(plan._backend, "run", lambda graph, *io: log.append(graph) or run(graph, *io))
    monkeypatch.setattr(plan._backend, "read", lambda buffer: log.append("read") or read(buffer))
    plan.forget()
    plan.generate(CONTROL, n=2)
    assert log == ["control", "condition", "step", "step", "step", "decoder", "decoder", "read", "read"]


def test_a_config_is_asked_for_like_its_settings(plan: Plan) -> None:
    config = GenerationConfig(control=CONTROL, label="cat", seed=4, n=2, cfg=2.0, top_k=8)
    wanted = plan.generate(CONTROL, "cat", 4, 2, cfg=2.0, top_k=8)
    for found in (
        plan.generate(config),
        plan.generate(config=config),
        plan.generate(replace(config, seed=9), seed=4),
        plan.generate(resolve(plan.manifest, config)),
    ):
        assert (found.tokens == wanted.tokens).all()
        assert (found.images == wanted.images).all()
    assert (list(plan.stream(config))[-1].preview() == wanted.images).all()


MANY = (
    GenerationConfig(control=CONTROL, label="lion", seed=2, n=5),
    GenerationConfig(control=OTHER_CONTROL, seed=9, cfg=0),
    GenerationConfig(control=CONTROL, label=1, seed=4, n=2, cfg=4, top_k=3, top_p=0.5, stop_after=1),
)
"""Requests that differ in control, class, seeds, number, guidance, sampling and schedule."""


def test_many_requests_each_give_what_they_give_alone(plan: Plan) -> None:
    alone = [plan.generate(config) for config in MANY]
    for wanted, found in zip(alone, plan.generate_many(MANY), strict=True):
        assert (found.tokens == wanted.tokens).all()
        assert (found.images == wanted.images).all()
        assert found.request.seeds == wanted.request.seeds
    assert plan.generate_many([]) == []
    images = np.concatenate([wanted.images for wanted in alone])
    owners = [i for i, config in enumerate(MANY) for _ in range(config.n)]
    last = [scale for scale in plan.stream_many(MANY) if scale.last]
    assert [i for scale in last for i in scale.images] == list(range(8))
    for scale in last:
        assert scale.requests == tuple(owners[i] for i in scale.images)
        assert (scale.preview() == images[list(scale.images)]).all()


def test_a_cancelled_request_ends_between_scales_and_leaves_the_others_as_they_are(
    plan: Plan, runs: Counter[str]
) -> None:
    seen: list[tuple[int, int]] = []
    finished = {}
    for scale in plan.stream_many(MANY, cancelled=lambda i: i == 0 and (0, 1) in seen):
        seen.append((scale.requests[0], scale.index))
        if scale.last:
            finished[scale.requests[0]] = scale.preview()
    assert seen == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]
    assert runs["step"] == len(seen)
    for i in (1, 2):
        assert (finished[i] == plan.generate(MANY[i]).images).all()
    assert list(plan.stream_many(MANY, cancelled=lambda _: True)) == []


def test_a_bad_one_of_many_requests_is_named_before_anything_runs(plan: Plan, runs: Counter[str]) -> None:
    other = resolve(plan.manifest, GenerationConfig(control=CONTROL))
    other = replace(other, manifest=replace(other.manifest, name="another"))
    bad: list[tuple[Any, type[Exception], str]] = [
        (GenerationConfig(control=CONTROL, cfg=-1), RequestError, "config 1: cfg is -1"),
        (GenerationConfig(control="absent.png"), ImageError, "config 1: .*absent.png"),
        (other, RequestError, "config 1: the request is not for the plan 'tiny'; resolve it against this plan"),
        (CONTROL[0, 0, 0], RequestError, "config 1 is .*; give a GenerationConfig or a Request"),
    ]
    for config, kind, message in bad:
        for call in (plan.generate_many, plan.stream_many):
            with pytest.raises(kind, match=message):
                call([MANY[0], config])
    assert not runs


def test_a_request_for_another_plan_is_refused(plan: Plan) -> None:
    request = resolve(plan.manifest, GenerationConfig(control=CONTROL))
    elsewhere = replace(request, manifest=replace(plan.manifest, name="another"))
    with pytest.raises(RequestError, match="is not for the plan 'tiny'; resolve it against this plan"):
        plan.generate(elsewhere)
    again = replace(request, manifest=read_manifest(plan.path))  # of the same plan, opened elsewhere
    assert (plan.generate(again).tokens == plan.generate(request).tokens).all()
    with pytest.raises(RequestError, match="a request stands alone"):
        plan.generate(request, seed=1)


def test_a_misspelt_setting_is_refused(plan: Plan) -> None:
    for call in (plan.generate, plan.stream):
        with pytest.raises(RequestError, match="there is no setting 'topk'; did you mean 'top_k'"):
            call(CONTROL, topk=3)


def test_what_is_kept_can_be_forgotten(plan: Plan, runs: Counter[str]) -> None:
    for _ in range(2):
        plan.generate(CONTROL, 0, control_strength=0.5)
        plan.forget()
    assert (runs["control"], runs["condition"]) == (2, 2)


def test_a_plan_that_gives_no_logits_says_so(plan: Plan) -> None:
    with pytest.raises(RequestError, match="gives no logits; export it again"):
        plan.stream(CONTROL, logits=True)
    with pytest.raises(RequestError, match="gives no logits; export it again"):
        plan.stream_many([GenerationConfig(control=CONTROL)], logits=True)
    assert next(plan.stream(CONTROL)).logits is None


def test_a_second_seed_costs_no_control_and_no_condition(plan: Plan, runs: Counter[str]) -> None:
    plan.generate(CONTROL, 0, seed=0)
    assert runs == {"control": 1, "condition": 1, "step": 3, "decoder": 1}
    plan.generate(CONTROL.copy(), "cat", seed=1)
    assert runs == {"control": 1, "condition": 1, "step": 6, "decoder": 2}
    plan.generate(OTHER_CONTROL, 0)
    assert (runs["control"], runs["condition"]) == (2, 1)
    plan.generate(CONTROL, 1)
    assert (runs["control"], runs["condition"]) == (2, 2)


def test_the_cache_distinguishes_controls_of_the_same_bytes(plan: Plan, runs: Counter[str]) -> None:
    flat = np.arange(32 * 32 * 3, dtype=np.uint32).astype(np.uint8)
    plan.generate(flat.reshape(32, 32, 3))
    plan.generate(flat.reshape(16, 64, 3))
    assert runs["control"] == 2


def test_the_cache_is_bounded(plan: Plan, runs: Counter[str]) -> None:
    for i in range(CACHED + 3):
        plan.generate(np.full((16, 16), i, np.uint8))
    assert len(plan._conditioning.features) == CACHED
    plan.generate(np.full((16, 16), 0, np.uint8))
    assert runs["control"] == CACHED + 4


def test_threads_on_one_plan_get_what_they_would_get_alone(plan: Plan) -> None:
    jobs = [(control, label, seed) for control in (CONTROL, OTHER_CONTROL) for label in (0, 1) for seed in (0, 7)]
    alone = [plan.generate(*job, n=3).tokens for job in jobs]
    plan.forget()
    together: list[Any] = [None] * len(jobs)

    def work(i: int) -> None:
        for _ in range(5):
            together[i] = plan.generate(*jobs[i], n=3).tokens

    run_in_threads(work, len(jobs))
    for expected, found in zip(alone, together, strict=True):
        assert (expected == found).all()


def test_timings_cover_every_stage(plan: Plan) -> None:
    timings = plan.generate(CONTROL, n=5).timings
    assert list(timings) == ["control", "condition", "scale_0", "scale_1", "scale_2", "decoder", "total"]
    assert all(seconds >= 0 for seconds in timings.values())
    assert timings["total"] >= sum(seconds for stage, seconds in timings.items() if stage != "total")


def test_on_scale_hears_of_every_scale(plan: Plan) -> None:
    heard: list[tuple[int, range]] = []
    plan.generate(CONTROL, n=2, on_scale=lambda step: heard.append((step.index, step.images)))
    assert heard == [(k, range(2)) for k in range(3)]


def test_facts_of_the_plan(plan: Plan, root: Path) -> None:
    assert plan.class_names == NAMES
    assert plan.backend_name == "ort-cpu"
    assert plan.why == "asked for"
    assert plan.path == root
    with open_plan(root) as automatic:
        assert automatic.why.startswith("auto: ort-cpu")


def test_control_and_plan_must_fit(plan: Plan, var: Plan, tmp_path: Path) -> None:
    with pytest.raises(
        RequestError, match="follows a control image of type 'canny' and none was given; give control"
    ):
        plan.generate()
    with pytest.raises(RequestError, match="no control branch"):
        var.generate(CONTROL)
    with pytest.raises(ImageError, match="there is no image"):
        plan.generate(tmp_path / "missing.png")
    with pytest.raises(ImageError, match="under 8"):
        plan.generate(np.zeros((1, 1, 3), np.uint8))


def test_a_closed_plan_says_so(root: Path) -> None:
    plan = open_plan(root, threads=1)
    stream = plan.stream(CONTROL)
    step = next(stream)
    plan.close()
    plan.close()
    for use in (lambda: plan.generate(CONTROL), lambda: plan.encode(CONTROL), step.preview):
        with pytest.raises(RequestError, match="is closed; open it again"):
            use()
    with pytest.raises(RunError, match="closed while it was in use"):
        next(stream)


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", 10**6, True])
def test_a_bad_number_of_threads_is_refused(root: Path, threads: Any) -> None:
    with pytest.raises(RequestError, match="threads is"):
        open_plan(root, threads=threads)


def test_a_missing_default_plan_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plan_module, "DEFAULT_PLAN", tmp_path / "absent.plan")
    with pytest.raises(PlanError, match=r"none ships with this installation .*; name one"):
        open_plan()


def test_an_edited_plan_does_not_open_unless_asked_to(tmp_path: Path) -> None:
    root = build_plan(tmp_path / "x.plan")
    content = bytearray((root / "weights.bin").read_bytes())
    content[1] ^= 1  # the lowest bits of a weight: nothing but the hash shows it
    (root / "weights.bin").write_bytes(content)
    with pytest.raises(PlanError, match="changed after the export"):
        open_plan(root)
    open_plan(root, verify=False, threads=1).close()


class _Device:
    """A buffer that can do no more than the protocol says, standing for one on a GPU."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    @property
    def shape(self) -> tuple[int, ...]:
        return self._array.shape

    def __getitem__(self, rows: slice, /) -> _Device:
        return _Device(self._array[rows])

    def reshape(self, shape: tuple[int, ...], /) -> _Device:
        assert all(size >= 0 for size in shape)
        return _Device(self._array.reshape(shape))


class _DeviceBackend:
    """ort-cpu behind buffers that are no arrays."""

    name = "device"
    guided_only = True
    max_mixed = 1
    cache_dtype = None

    def __init__(self, root: Path, manifest: Manifest, batches: tuple[int, ...]) -> None:
        self._host, _ = open_backend("ort-cpu", root, manifest, 1)
        self.batches = batches

    def allocate(self, shape: tuple[int, ...], dtype: str) -> _Device:
        # Rubbish, so that reading what was never written shows.
        return _Device(np.full(shape, 77, np.dtype(dtype)))

    def constant(self, values: np.ndarray, dtype: str) -> _Device:
        return _Device(np.array(values))

    def write(self, buffer: Any, values: np.ndarray) -> None:
        self._host.write(buffer._array, values)

    def read(self, buffer: Any) -> np.ndarray:
        return self._host.read(buffer._array)

    def copy(self, source: Any, target: Any) -> None:
        self._host.copy(source._array, target._array)

    def mark(self) -> float:
        return self._host.mark()

    def seconds(self, begin: float, end: float) -> float:
        return self._host.seconds(begin, end)

    def repeated(self, owner: object, key: Any, work: Any) -> Any:
        return work()

    def report(self) -> dict[str, Any]:
        return {}

    def step_graph(self, scale: int, batch: int) -> str:
        assert batch in self.batches
        return self._host.step_graph(scale, batch)

    def run(self, graph: str, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        arrays = [{name: buffer._array for name, buffer in side.items()} for side in (inputs, outputs)]
        self._host.run(graph, *arrays)

    def close(self) -> None:
        self._host.close()


@pytest.mark.parametrize(("cfg", "label"), [(0.0, 1), (3.0, 1), (3.0, None)])
@pytest.mark.parametrize("batches", [(1,), (1, 2), (1, 4)], ids=str)
def test_the_loop_needs_no_more_of_a_backend_than_the_protocol(
    plan: Plan, root: Path, batches: tuple[int, ...], cfg: float, label: int | None
) -> None:
    """Nor does an image depend on the sizes of batches, or on guidance rows that guide nothing."""
    expected = plan.generate(CONTROL, label, seed=3, n=5, cfg=cfg)
    device = Plan(root, plan.manifest, _DeviceBackend(root, plan.manifest, batches), "a test")
    result = device.generate(CONTROL, label, seed=3, n=5, cfg=cfg)
    assert (result.tokens == expected.tokens).all()
    assert (result.images == expected.images).all()
    assert (list(device.stream(CONTROL, label, seed=3, cfg=cfg))[-1].preview() == expected.images[:1]).all()
    device.close()


def test_reasons_name_the_plan_and_not_the_directory_that_is_held(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def passing_over(name: str, path: Path, *rest: Any) -> tuple[Any, str]:
        return open_backend(name, path, *rest)[0], f"not rtx: build it: build_engines.py {path} --target rtx"

    monkeypatch.setattr(plan_module, "open_backend", passing_over)
    with open_plan(root, "ort-cpu", threads=1) as opened:
        assert opened.why == f"not rtx: build it: build_engines.py {root} --target rtx"


def test_a_plan_that_is_replaced_while_it_is_opened_is_its_successor(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an export does it: the new folder takes the place, the files of the old one go."""
    plan, new, gone = tmp_path / "a.plan", tmp_path / "new.plan", tmp_path / "old.plan"
    shutil.copytree(root, plan)
    shutil.copytree(root, new)
    real, replaced = plan_module.manifest_in, []

    def replacing(folder: Any, key: Any) -> Manifest:
        manifest = real(folder, key)
        if not replaced:
            replaced.append(plan.rename(gone))
            new.rename(plan)
            shutil.rmtree(gone)
        return manifest

    monkeypatch.setattr(plan_module, "manifest_in", replacing)
    with open_plan(plan, "ort-cpu", threads=1) as opened:
        assert opened.generate(CONTROL, 0).tokens.shape == (1, L)
    assert replaced


def test_a_plan_that_lacks_a_file_is_not_opened_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(root, tmp_path / "a.plan")
    (tmp_path / "a.plan" / "weights.bin").unlink()
    asked: list[Path] = []
    real = plan_module.open_plan_folder
    monkeypatch.setattr(plan_module, "open_plan_folder", lambda path: asked.append(path) or real(path))
    with pytest.raises(PlanError, match=r"weights\.bin is missing"):
        open_plan(tmp_path / "a.plan", "ort-cpu")
    assert len(asked) == 1

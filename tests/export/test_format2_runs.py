"""Plans of format 2 in the runtime: one base, branches alone and mixed, requests that share steps."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from car_export.config import ExportOptions
from car_export.plan2 import build_plan_of_2
from car_runtime import GenerationConfig, Plan, open_plan
from car_runtime.backends.openvino.backend import OpenVino
from car_runtime.errors import PlanError, RequestError
from car_runtime.format.manifest import read_manifest
from car_runtime.request import uniforms
from car_train.model import Model
from car_train.model.sample import control_pyramid, sample
from fixtures.shared import build_once
from fixtures.small import sibling, small_model

SIDES = (1, 2, 3)
BACKENDS = ("ort-cpu", "openvino")


def drawing(number: int) -> Image.Image:
    image = Image.new("RGB", (12, 12))
    ImageDraw.Draw(image).ellipse((number, 2, 9, 5 + number), outline="white", width=1)
    return image


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    model = small_model(depth=2, sides=SIDES)
    return {"sketch": model, "other": sibling(model)}


@pytest.fixture(scope="module")
def root(models: dict[str, Model]) -> Path:
    def export(folder: Path) -> None:
        options = ExportOptions(output=folder / "two.plan", name="two", more_smooth=True)
        build_plan_of_2(models, options)

    return build_once("format2-runs", export) / "two.plan"


@pytest.fixture(scope="module", params=BACKENDS)
def plan(root: Path, request: pytest.FixtureRequest) -> Iterator[Plan]:
    if request.param == "ort-cpu":
        with open_plan(root, request.param, threads=1) as opened:
            yield opened
    else:
        pytest.importorskip("openvino")
        manifest = read_manifest(root)
        with Plan(root, manifest, OpenVino(root, manifest, 1, "f32"), "a test") as opened:  # as PyTorch computes
            yield opened


def by_pytorch(model: Model, control: Image.Image | None, label: int, seed: int, **settings: Any) -> np.ndarray:
    """Tokens [L]; without a control those of the base alone."""
    car = model.car
    assert car is not None
    sizes = [s * model.config.vqvae.patch for s in SIDES]
    maps = None if control is None else control_pyramid(control, sizes)
    if control is None:
        car = copy.copy(car)
        car._modules = {"base": car.base, "branch": None}
    noise = torch.from_numpy(uniforms([seed], sum(s * s for s in SIDES)))
    tokens, _ = sample(model.vqvae, car.eval(), torch.tensor([label]), noise, maps, **settings)
    return np.asarray(tokens)[0]


def test_each_branch_and_none_draw_what_pytorch_does(plan: Plan, models: dict[str, Model]) -> None:
    size = plan.manifest.model.image_size
    for seed, (branch, label) in enumerate([("sketch", 1), ("other", 2), ("sketch", 4), (None, 3)]):
        control = drawing(seed).resize((size, size))
        given = {} if branch is None else {branch: control}
        found = plan.generate(given, label, seed, cfg=2.5, top_k=7, top_p=0.8)
        model = models[branch or "sketch"]
        wanted = by_pytorch(model, control if branch else None, label, seed, cfg=2.5, top_k=7, top_p=0.8)
        assert (found.tokens[0] == wanted).all(), (branch, label)
    default = plan.generate(drawing(1), 1, 5)
    named = plan.generate({"sketch": drawing(1)}, 1, 5)
    assert (default.tokens == named.tokens).all()
    assert (default.tokens != plan.generate({"other": drawing(1)}, 1, 5).tokens).any()


def test_weights_mix_branches(plan: Plan) -> None:
    a, b = drawing(1), drawing(3)
    one = plan.generate({"sketch": a}, 1, 3)
    assert (plan.generate({"sketch": (a, 1.0), "other": (b, 0.0)}, 1, 3).tokens == one.tokens).all()
    none = plan.generate(None, 1, 3)
    assert (plan.generate({"sketch": (a, 0.0)}, 1, 3).tokens == none.tokens).all()
    half = plan.generate({"sketch": (a, 0.5), "other": (b, 0.5)}, 1, 3)
    assert (half.tokens != one.tokens).any()
    again = plan.generate({"other": (b, 0.5), "sketch": (a, 0.5)}, 1, 3)
    assert (half.tokens == again.tokens).all()


def forced(plan: Plan, tokens: np.ndarray, control: Any, **settings: Any) -> list[np.ndarray]:
    """Each scale's logits with all tokens known."""
    mask = np.ones(tokens.shape, bool)
    steps = plan.stream(control, 2, known_tokens=tokens, known_mask=mask, logits=True, **settings)
    return [np.asarray(step.logits) for step in steps]


def test_guidance_by_the_control_leads_away_from_no_control(plan: Plan) -> None:
    control = {"sketch": drawing(2)}
    tokens = plan.generate(control, 2, 9).tokens
    g, t = 1.5, 2.0
    found = forced(plan, tokens, control, cfg=t, control_cfg=g)
    guided = forced(plan, tokens, control, cfg=t)
    own = forced(plan, tokens, control, cfg=0)
    plain = forced(plan, tokens, None, cfg=0)
    for scale, *values in zip(plan.manifest.scales, found, guided, own, plain, strict=True):
        wanted = values[1] + g * scale.cfg_ratio * (values[2] - values[3])
        np.testing.assert_allclose(values[0], wanted, rtol=0, atol=2e-4)


def requests() -> list[GenerationConfig]:
    """Requests unlike one another in everything that an image can have of its own."""
    a, b = {"sketch": drawing(1)}, {"other": drawing(3)}
    return [
        GenerationConfig(control=a, label=1, seed=3, n=2, cfg=2.0, top_k=5),
        GenerationConfig(control=drawing(4), label=4, seed=8, cfg=0, top_p=0.5),
        GenerationConfig(control=b, label="bee", seed=5),
        GenerationConfig(label=2, seed=6, n=2, cfg=3.0, cfg_scales="-1"),
        GenerationConfig(control={**a, "other": (drawing(2), 0.4)}, label=0, seed=1, control_cfg=1.0),
        GenerationConfig(control=drawing(2), seed=2, control_strength=0.5, stop_after=1),
        GenerationConfig(control=drawing(3), label=3, seed=4, cfg_scales="-0", cfg=4.0, more_smooth=True),
        GenerationConfig(control=a, label=2, seed=3, control_cfg=2.0, cfg=1.0),
        GenerationConfig(label=3, seed=9),
    ]


def test_requests_that_share_steps_make_what_they_make_alone(plan: Plan) -> None:
    together = plan.generate_many(requests())
    for config, result in zip(requests(), together, strict=True):
        alone = plan.generate(config)
        assert (alone.tokens == result.tokens).all(), config
        if plan.backend_name == "ort-cpu":
            assert (alone.images == result.images).all(), config
    assert plan.generate_many([]) == []


def test_images_of_several_requests_are_in_one_step(plan: Plan) -> None:
    configs = [GenerationConfig(control=drawing(i), label=i, seed=i, cfg=float(i)) for i in range(4)]
    scales = list(plan.stream_many(configs))
    assert [(s.index, s.requests) for s in scales] == [(k, (0, 1, 2, 3)) for k in range(len(SIDES))]


def test_a_request_that_is_cancelled_leaves_the_others_as_they_are(plan: Plan) -> None:
    configs = requests()[:2] + requests()[6:8]
    wanted = plan.generate_many(configs)
    seen: list[tuple[int, tuple[int, ...]]] = []
    tokens: dict[int, list[np.ndarray]] = {}

    def cancelled(position: int) -> bool:
        return position == 1 and bool(seen)

    for scale in plan.stream_many(configs, cancelled=cancelled):
        seen.append((scale.index, scale.requests))
        for place, image in enumerate(scale.images):
            tokens.setdefault(image, []).append(scale.tokens[place].reshape(-1))
    assert seen[0] == (0, (0, 0, 1, 2))
    assert all(1 not in owners for _, owners in seen[1:])
    flat = [row for result in wanted for row in result.tokens]
    for image in (0, 1, 3, 4):
        assert (np.concatenate(tokens[image]) == flat[image]).all()
    assert len(tokens[2]) == 1


def test_the_server_draws_requests_of_several_people_in_shared_steps(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fastapi")
    from car_runtime.request import resolve
    from car_serve.batcher import Batcher
    from car_serve.jobs import Job
    from car_serve.limits import Limits
    from car_serve.metrics import Metrics

    configs = [
        GenerationConfig(control=drawing(i), label=i, seed=i, cfg=(0.0, 2.0)[i % 2], top_k=3 + i) for i in range(3)
    ]
    configs += [GenerationConfig(label=1, seed=9), GenerationConfig(control=drawing(1), label=1, seed=4)]
    alone = [plan.generate(config) for config in configs]
    jobs = [Job(request=resolve(plan.manifest, config), plan=plan) for config in configs]
    steps: list[tuple[int, ...]] = []
    stream = plan.stream_many

    def watched(*given: Any, **settings: Any) -> Iterator[Any]:
        for scale in stream(*given, **settings):
            steps.append(scale.requests)
            if scale.index == 0 and len(set(scale.requests)) == 3:
                jobs[1].cancel()
            yield scale

    monkeypatch.setattr(plan, "stream_many", watched)
    batcher = Batcher("two", plan, Limits(batch_wait_ms=2000, max_batch=5), Metrics())
    batcher._crowded = True  # as after a batch of several: the first request waits for others
    try:
        for job in jobs:
            batcher.submit(job)
        until = time.monotonic() + 60
        while not all(job.finished for job in jobs) and time.monotonic() < until:
            time.sleep(0.01)
    finally:
        batcher.close()
    # Three share the steps of the one branch; one cancels and frees its rows; one without a control comes after them.
    assert steps == [(0, 1, 2), *[(0, 2)] * (len(SIDES) - 1), *[(0,)] * len(SIDES), *[(0,)] * len(SIDES)]
    assert [job.state for job in jobs] == ["done", "cancelled", "done", "done", "done"]
    for i in (0, 2, 3, 4):
        assert (jobs[i].tokens == alone[i].tokens).all()
        if plan.backend_name == "ort-cpu":
            assert np.array_equal(jobs[i].images[0], alone[i].images[0])


def test_what_a_plan_cannot_follow_is_refused_in_one_line(plan: Plan) -> None:
    for control, says in (
        ({"depth": drawing(1)}, "there is no branch 'depth' in the plan 'two'; it has sketch, other"),
        ({"sketch": (drawing(1), 2.5)}, "the weight of sketch is 2.5, but must be a number in 0"),
        ({"sketch": (drawing(1), float("nan"))}, "the weight of sketch is nan"),
    ):
        with pytest.raises(RequestError, match=says):
            plan.generate(control, 1)
    with pytest.raises(RequestError, match="there is no control; give one, or leave it out"):
        plan.generate(None, 1, control_cfg=1.0)
    with pytest.raises(RequestError, match="config 1: there is no branch"):
        plan.generate_many([GenerationConfig(), GenerationConfig(control={"x": drawing(1)})])


def test_parameters_of_another_type_than_the_step_takes_are_refused_by_the_reader(root: Path) -> None:
    manifest = read_manifest(root)
    key = "branches.sketch.fusions.0.norm.weight"
    one = manifest.parameters[key]
    short = replace(one, dtype="bfloat16", bytes=one.bytes // 2)
    with pytest.raises(PlanError, match=r"fusions\.0\.norm\.weight is bfloat16 \[\d+\], unlike the step's"):
        replace(manifest, parameters={**manifest.parameters, key: short})


def test_what_one_branch_fuses_with_is_read_where_the_file_is_mapped(root: Path) -> None:
    """At d16 a copy would be 67 MB a branch; several are stacked, which takes one."""
    with open_plan(root, "ort-cpu", threads=1) as plan:
        for branches, mapped in (((), True), (("other",), True), (("sketch", "other"), False)):
            for name, buffer in plan._fusions.of(branches).items():
                assert isinstance(buffer, np.ndarray), name
                assert buffer.flags.owndata is False or not mapped
                assert buffer.flags.writeable is not mapped, (branches, name)

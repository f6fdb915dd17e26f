"""`CARPipeline`: its arguments come to the same images as the runtime's own settings."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from car_runtime import CarError, CARPipeline, GenerationConfig, RequestError, open_plan
from car_runtime.config import Blend
from car_runtime.editing.edit import Edit
from car_runtime.pipeline import OF_CALLS, OF_OPENING
from fixtures.runtime_plan import NAMES, SIDES, SIZE, build_plan

ROOT = Path(__file__).parents[2]
EDGES = np.random.default_rng(1).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
OTHER = 255 - EDGES


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CARPipeline]:
    root = build_plan(tmp_path_factory.mktemp("plan") / "tiny.plan")
    with CARPipeline.from_pretrained(root, backend="ort-cpu", threads=1) as opened:
        yield opened


def pixels(images: Any) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ({}, {}),
        ({"class_labels": NAMES[0]}, {"label": NAMES[0]}),
        ({"class_labels": 2, "guidance_scale": 4}, {"label": 2, "cfg": 3.0}),
        ({"class_labels": 2, "guidance_scale": 1.0}, {"label": 2, "cfg": 0.0}),
        ({"num_images_per_prompt": 3}, {"n": 3}),
        ({"num_inference_steps": 2}, {"stop_after": 1}),
        ({"controlnet_conditioning_scale": 0.5}, {"control_strength": 0.5}),
        ({"control_guidance_end": 0.7}, {"control_scales": "0-1"}),
        ({"control_guidance_start": 0.3}, {"control_scales": "1-2"}),
        ({"top_k": 3, "fit": "pad"}, {"top_k": 3, "fit": "pad"}),
    ],
    ids=lambda value: ",".join(value) or "none",
)
def test_an_argument_is_the_setting_that_the_table_says(
    pipe: CARPipeline, arguments: dict[str, Any], settings: dict[str, Any]
) -> None:
    made = pipe(EDGES, generator=7, **arguments)
    expected = pipe.plan.generate(GenerationConfig(control=EDGES, seed=7, **settings))
    assert np.array_equal(pixels(made.images), expected.images)
    assert made.seeds == list(expected.request.seeds)
    assert all(isinstance(image, Image.Image) for image in made.images)


def test_lists_have_an_entry_for_each_prompt_and_a_single_value_serves_all(pipe: CARPipeline) -> None:
    made = pipe([EDGES, OTHER], [0, 1], num_images_per_prompt=2, generator=5)
    alone = [
        pipe(EDGES, 0, num_images_per_prompt=2, generator=5),
        pipe(OTHER, 1, num_images_per_prompt=2, generator=7),
    ]
    assert made.seeds == [5, 6, 7, 8]
    assert np.array_equal(pixels(made.images), np.concatenate([pixels(one.images) for one in alone]))
    assert len(made.results) == 2
    one_control = pipe(EDGES, ["cat", None], generator=5)
    assert np.array_equal(
        pixels(one_control.images), pixels([*pipe(EDGES, 0, generator=5).images, *pipe(EDGES, generator=6).images])
    )


def test_seeds_of_the_output_make_its_images_again(pipe: CARPipeline) -> None:
    first, second = pipe(EDGES, 0, num_images_per_prompt=2), pipe(EDGES, 0, num_images_per_prompt=2)
    assert first.seeds != second.seeds, "a seed by chance"
    again = pipe(EDGES, 0, num_images_per_prompt=2, generator=first.seeds[::-1])
    assert again.seeds == first.seeds[::-1]
    assert np.array_equal(pixels(again.images[::-1]), pixels(first.images))


def test_a_numpy_generator_gives_a_new_seed_each_time(pipe: CARPipeline) -> None:
    generator = np.random.default_rng(3)
    seeds = [pipe(EDGES, generator=generator).seeds for _ in range(2)]
    generator = np.random.default_rng(3)
    assert seeds[0] != seeds[1]
    assert seeds == [pipe(EDGES, generator=generator).seeds for _ in range(2)]


def test_arrays_are_floats_from_0_to_1(pipe: CARPipeline) -> None:
    made = pipe(EDGES, 0, generator=1, num_images_per_prompt=2, output_type="np")
    assert (made.images.dtype, made.images.shape) == (np.float32, (2, SIZE, SIZE, 3))
    as_bytes = np.round(made.images * 255).astype(np.uint8)
    assert np.array_equal(as_bytes, pixels(pipe(EDGES, 0, generator=1, num_images_per_prompt=2).images))


def test_the_callback_sees_every_scale_and_the_finished_images_last(pipe: CARPipeline) -> None:
    seen = []

    def look(given: CARPipeline, step: int, side: int, more: dict[str, Any]) -> None:
        assert given is pipe
        seen.append((step, side, more["scale"].preview()))

    made = pipe(EDGES, 0, generator=1, callback_on_step_end=look)
    assert [(step, side) for step, side, _ in seen] == list(enumerate(SIDES))
    assert np.array_equal(seen[-1][2], pixels(made.images))


def test_with_a_mask_the_image_is_a_photo_that_is_painted(pipe: CARPipeline) -> None:
    photo = np.random.default_rng(2).integers(0, 256, (40, 48, 3), np.uint8)
    mask = np.zeros((40, 48), np.uint8)
    mask[10:30, 10:30] = 255
    made = pipe(photo, 1, mask_image=mask, control_image=EDGES, generator=4)
    expected = pipe.plan.generate(control=EDGES, label=1, seed=4, edit=Edit(image=photo, mask=mask))
    assert expected.edited is not None
    assert np.array_equal(pixels(made.images), pixels(expected.edited))
    assert np.array_equal(np.asarray(made.images[0])[0], photo[0]), "what the mask leaves out is the photo's"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_type": "pt"}, "output_type is 'pt'; choose"),
        ({"guidance_scale": 0}, "guidance_scale is 0, but must be a number in 1…1001"),
        ({"guidance_scale": "4"}, "guidance_scale is '4'"),
        ({"num_inference_steps": 50}, "num_inference_steps is 50, but must be a whole number in 1…3; leave it out"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"controlnet_conditioning_scale": 3}, "controlnet_conditioning_scale is 3"),
        ({"control_guidance_start": 0.5, "control_guidance_end": 0.6}, "no scale of 3 lies between"),
        ({"control_guidance_end": 1.5}, "control_guidance_end is 1.5"),
        ({"class_labels": [0, 1, 2], "image": [EDGES, OTHER]}, "image 2, class_labels 3; give each an entry"),
        ({"class_labels": []}, "the lists have unlike lengths or none"),
        ({"generator": [1, 2]}, "generator has 2 seeds for 1 images"),
        ({"generator": -1}, "generator is -1"),
        ({"generator": "7"}, "generator is a str; give a seed"),
        ({"control_image": EDGES}, "control_image goes with mask_image"),
        ({"mask_image": EDGES[..., 0], "image": None}, "mask_image is of a photo, and none is given"),
        ({"mask_image": EDGES[..., 0], "output_type": "np"}, "choose 'pil'"),
        (
            {"prompt": "a cat"},
            "prompt is 'a cat', which only diffusers has; give class_labels: the models know classes",
        ),
        ({"height": 512}, "height is 512, which only diffusers has; leave it out: a plan draws images of one size"),
        ({"return_dict": False}, "return_dict is False, which only diffusers has; leave it out"),
        ({"latents": EDGES}, "which only diffusers has; give generator"),
        ({"guidance": 4}, "there is no setting 'guidance'"),
        ({"seed": 4}, "seed is given as generator here; give that alone"),
        ({"edit": None, "mask_image": EDGES[..., 0]}, "edit is given as mask_image here; give that alone"),
        ({"edit": 3}, "edit is 3; give a car_runtime.editing.edit.Edit, or leave it out"),
        ({"callback_on_step_end": 3}, "callback_on_step_end is 3; give a function, or leave it out"),
        ({"guidance_scale": 4, "cfg": 3}, "cfg and guidance_scale are the same; give one"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_drawn(
    pipe: CARPipeline, arguments: dict[str, Any], message: str
) -> None:
    drawn: list[int] = []
    with pytest.raises(RequestError, match=re.escape(message)):
        pipe(**{"image": EDGES, "callback_on_step_end": lambda *_: drawn.append(1), **arguments})
    assert not drawn


ODD = [
    3,
    -1.5,
    "",
    "x",
    b"x",
    True,
    math.nan,
    2**70,
    np.int64(1),
    np.zeros((3, 3)),
    [],
    [None],
    {1: 2},
    object(),
    range(3),
]


def refused(call: Callable[..., object], *given: object, **named: object) -> None:
    """Nothing, where a call does what it is asked or refuses it; what else it raises ends the test."""
    what = f"{call} of {given} {named}"
    try:
        call(*given, **named)
    except CarError as error:
        said = str(error)
    except Exception as error:
        raise AssertionError(f"{what}: {error!r}") from error
    else:
        return
    assert "; " in said, f"{what}: no remedy in {said}"


def opened(**arguments: Any) -> None:
    CARPipeline.from_pretrained(**arguments).close()


@pytest.mark.parametrize("odd", ODD, ids=[type(odd).__name__ + str(i) for i, odd in enumerate(ODD)])
def test_an_argument_that_makes_no_sense_has_an_error_of_ours(pipe: CARPipeline, odd: object) -> None:
    """Every argument, of calls, edits, blends, streams and opening, given things of other kinds."""
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[:8] = 255
    own = set(inspect.signature(CARPipeline.__call__).parameters) - {"self", "settings"}
    for name in own | {one.name for one in fields(GenerationConfig)}:
        refused(pipe, **{"image": EDGES, "generator": 1, name: odd})
        refused(pipe, **{"image": EDGES, "generator": 1, "mask_image": mask, name: odd})
    for one in fields(Edit):
        refused(pipe, EDGES, edit=Edit(**{"image": EDGES, one.name: odd}))
    for one in fields(Blend):
        refused(pipe, EDGES, blend=Blend(**{"share": 0.5, "label": 1, one.name: odd}))
    for name in [*inspect.signature(open_plan).parameters, "revision"]:
        refused(opened, **{"path": pipe.plan.path, "backend": "ort-cpu", "threads": 1, name: odd})
    refused(pipe.plan.generate, EDGES, on_scale=odd)
    refused(pipe.plan.generate_many, odd)
    refused(pipe.plan.stream_many, [], cancelled=odd)
    refused(CARPipeline, odd)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": 3}, "the plan is 3; give its directory or hf:ORG/NAME, or nothing for the one in the package"),
        ({"path": ""}, "the plan is ''; give its directory"),
        (
            {"torch_dtype": "float16"},
            "torch_dtype is 'float16', which only diffusers has; leave it out: a plan has the",
        ),
        ({"backends": "ort-cpu"}, "from_pretrained has no argument 'backends'; it takes revision, path, backend,"),
        ({"backend": None}, "there is no backend None; use one of auto"),
        ({"revision": 3}, "revision is 3; give a branch, tag or commit"),
    ],
)
def test_what_no_plan_can_be_opened_with_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(CarError, match=re.escape(message)):
        CARPipeline.from_pretrained(**arguments)


def test_what_asks_for_nothing_is_taken(pipe: CARPipeline) -> None:
    """As callers of diffusers write it."""
    plain = pipe(EDGES, generator=1)
    nothing = {name: value for one in OF_CALLS for name in one.names for value in one.neutral}
    same = pipe(EDGES, generator=1, **nothing | {"height": SIZE, "width": SIZE})
    assert np.array_equal(pixels(same.images), pixels(plain.images))
    nothing = {name: value for one in OF_OPENING for name in one.names for value in one.neutral}
    CARPipeline.from_pretrained(pipe.plan.path, backend="ort-cpu", threads=1, **nothing).close()


def test_a_revision_needs_a_plan_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"revision is 'main', but .* is not on the hub; leave it out"):
        CARPipeline.from_pretrained(build_plan(tmp_path / "tiny.plan"), revision="main")


def test_labels_are_the_plans_classes(pipe: CARPipeline) -> None:
    assert pipe.labels == {name: index for index, name in enumerate(NAMES)}


def test_the_page_maps_every_argument() -> None:
    page = (ROOT / "docs/from-diffusers.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    named = set(re.findall(r"`(\w+)`", " ".join(rows)))
    arguments = set(inspect.signature(CARPipeline.__call__).parameters) - {"self", "settings"}
    assert arguments <= named


def test_the_page_has_what_only_diffusers_has() -> None:
    page = (ROOT / "docs/from-diffusers.md").read_text(encoding="utf-8")
    for one in (*OF_CALLS, *OF_OPENING):
        names = ", ".join(f"`{name}`" for name in one.names)
        values = ", ".join(f"`{value!r}`".replace("'", '"') for value in one.neutral)
        assert f"| {names} | {values} | {one.remedy} |" in page

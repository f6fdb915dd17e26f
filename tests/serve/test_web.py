"""The studio without a server: the site of the shipped plan on a static host, in a real browser."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import car_runtime
from car_runtime.editing.edit import Edit
from car_runtime.format.goldens import read_goldens
from car_runtime.images import text_chunks
from car_runtime.receipt import control_of, receipt_of
from fixtures.serving import SHIPPED
from fixtures.site import Site, fetched_engine, write_shipped_site
from fixtures.studio import HEART, SCALES, Studio, pixels

ROOT = Path(__file__).parents[2]
UMBRELLA = ROOT / "examples/umbrella.png"
DRAW = """async ([form, settings]) => {
  const made = [];
  for (const own of settings) {
    const tokens = [];
    let png = null;
    for await (const event of window.engine.stream({ ...form, ...own, previews: false })) {
      if (event.type === 'scale') tokens.push(...event.tokens);
      if (event.type === 'picture') png = event.png;
    }
    made.push([tokens, png]);
  }
  return made;
}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site of the shipped plan."""
    made = tmp_path_factory.mktemp("web") / "site"
    write_shipped_site(made, SHIPPED)
    return made


@pytest.fixture(scope="module")
def site(folder: Path) -> Iterator[Site]:
    host = Site(folder)
    yield host
    host.close()


@pytest.fixture(scope="module")
def plan() -> Iterator[car_runtime.Plan]:
    """The same plan in Python."""
    with car_runtime.open_plan(SHIPPED, "ort-cpu", threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(chromium: Any, site: Site) -> Iterator[Any]:
    """The site's page, with an engine of its own at `window.engine`."""
    studio = Studio(chromium, site.url)
    studio.page.evaluate(
        """async () => {
          const { Engine } = await import('/studio/engine.js');
          window.engine = new Engine('site.json');
          await window.engine.capabilities();
        }"""
    )
    yield studio.page
    studio.close()


def base64_of(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def test_the_page_draws_the_goldens_greedy_tokens(page: Any, plan: car_runtime.Plan) -> None:
    """Those of float32 PyTorch, which `ort-cpu` draws, too; with control and without."""
    for branch in ("canny", ""):
        goldens = read_goldens(SHIPPED, plan.manifest, branch)
        form: dict[str, Any] = {"class": goldens.label, "cfg": goldens.cfg, "top_k": 1}
        if goldens.control is not None:
            stream = io.BytesIO()
            Image.fromarray(goldens.control).save(stream, "PNG")
            form["control"] = base64.b64encode(stream.getvalue()).decode()
        ((tokens, _),) = page.evaluate(DRAW, [form, [{"seed": 0}]])
        assert tokens == goldens.tokens.tolist()


SETTINGS: list[dict[str, Any]] = [
    *({"seed": seed} for seed in (0, 1, 2, 2**40)),
    {"seed": 3, "cfg": 3.0, "cfg_scales": "1-3", "top_p": 0.9},
    {"seed": 4, "control_scales": "0-3", "control_strength": 0.7, "top_k": 0},
    {"seed": 5, "class": None, "top_p": 0},
    {"seed": 6, "cfg": 0},
]


def test_a_seed_draws_the_same_image_in_page_and_terminal(page: Any, plan: car_runtime.Plan) -> None:
    """At least 99 % of the tokens; a sum rounded in another order may turn one at a boundary between two codes."""
    form = {"control": base64_of(UMBRELLA), "class": "fluent-travel-places"}
    made = page.evaluate(DRAW, [form, SETTINGS])
    equal = []
    for settings, (tokens, png) in zip(SETTINGS, made, strict=True):
        config = {"label": "fluent-travel-places", **settings}
        if "class" in config:
            config["label"] = config.pop("class")
        result = plan.generate(UMBRELLA, **config)
        equal.append(np.mean(np.array(tokens) == result.tokens[0]))
        if equal[-1] == 1:
            assert np.abs(pixels(png) - result.images[0]).max() <= 1
    assert np.mean(equal) >= 0.99
    assert sum(share == 1 for share in equal) >= len(equal) - 1


def test_a_page_draws_as_far_as_asked(page: Any, plan: car_runtime.Plan) -> None:
    form = {"control": base64_of(UMBRELLA), "class": 4, "seed": 9, "stop_after": 2}
    ((tokens, png),) = page.evaluate(DRAW, [form, [{}]])
    result = plan.generate(UMBRELLA, label=4, seed=9, stop_after=2)
    assert tokens == result.tokens[0, : len(tokens)].tolist()
    assert len(tokens) == plan.manifest.scales[2].stop
    assert np.abs(pixels(png) - result.images[0]).max() <= 1


EDIT = """async ([form, edit, image]) => {
  for await (const event of window.engine.edit({ ...form, previews: false }, edit, image)) {
    if (event.type === 'picture') return [event.png, event.receipt];
  }
}"""


def drawn(page: Any, **form: Any) -> tuple[str, str]:
    """Id and PNG of an umbrella that the page drew."""
    made = page.evaluate(
        "(form) => window.engine.draw(form)",
        {"control": base64_of(UMBRELLA), "class": "fluent-travel-places", "seed": 11, **form},
    )
    return made["id"], made["images"][0]["png"]


def light(box: tuple[int, int, int, int], side: int = 64) -> Image.Image:
    """A mask that is white in a box."""
    mask = np.zeros((side, side), np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 255
    return Image.fromarray(mask)


def in_base64(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def test_a_branch_in_the_page_is_car_runs_vary(page: Any, plan: car_runtime.Plan) -> None:
    id, png = drawn(page)
    form = {"control": base64_of(UMBRELLA), "class": "fluent-objects", "seed": 12}
    tokens = receipt_of(text_chunks(io.BytesIO(base64.b64decode(png))), plan.manifest).tokens
    edit = Edit(image=Image.new("RGB", (64, 64)), from_scale=3, tokens=tokens)
    wanted = plan.generate(UMBRELLA, label="fluent-objects", seed=12, edit=edit)
    for source in ({"id": id}, {"id": "gone"}):  # a result that is no longer kept is sent as an image
        made, receipt = page.evaluate(EDIT, [form, {**source, "scale": 2}, png])
        found = receipt_of(text_chunks(io.BytesIO(base64.b64decode(made))), plan.manifest)
        assert np.array_equal(found.tokens, wanted.tokens[0])
        assert found.settings["edit"] == "whole"
        assert receipt["edit"] == {"scale": 2}


@pytest.mark.parametrize("box", [(30, 8, 60, 34), (0, 40, 20, 64)])
def test_in_painting_in_the_page_is_pythons(page: Any, plan: car_runtime.Plan, box: tuple[int, ...]) -> None:
    id, png = drawn(page)
    mask = light(box)
    form = {"control": base64_of(UMBRELLA), "class": "fluent-travel-places", "seed": 13}
    made, _ = page.evaluate(EDIT, [form, {"id": id, "mask": in_base64(mask)}, png])
    image = Image.fromarray(pixels(png).astype(np.uint8))
    wanted = plan.generate(
        UMBRELLA, label="fluent-travel-places", seed=13, edit=Edit(image=image, mask=mask.convert("L"))
    )
    found = pixels(made)
    assert np.abs(found - wanted.edited[0]).max() <= 1
    assert np.abs(found - pixels(png)).max() > 10
    kept = np.asarray(mask) == 0
    kept[max(0, box[1] - 2) : box[3] + 2, max(0, box[0] - 2) : box[2] + 2] = False
    assert np.array_equal(found[kept], pixels(png)[kept])


def test_extending_in_the_page_is_pythons(page: Any, plan: car_runtime.Plan) -> None:
    id, png = drawn(page)
    form = {"control": base64_of(UMBRELLA), "class": "fluent-travel-places", "seed": 14}
    made, _ = page.evaluate(EDIT, [form, {"id": id, "frame": [0.2, 0.2, 0.8, 0.8]}, png])
    image = Image.fromarray(pixels(png).astype(np.uint8))
    margins = (21, 21, 22, 22)
    wanted = plan.generate(
        UMBRELLA, label="fluent-travel-places", seed=14, edit=Edit(image=image, extend=margins)
    ).edited[0]
    assert pixels(made).shape == wanted.shape
    assert np.abs(pixels(made) - wanted).max() <= 1


def test_a_receipt_of_the_page_opens_in_the_terminal_and_the_other_way_round(
    page: Any, plan: car_runtime.Plan, tmp_path: Path
) -> None:
    from car_runtime.cli import main

    _, png = drawn(page, seed=15, cfg=2.5)
    path = tmp_path / "page.png"
    path.write_bytes(base64.b64decode(png))
    receipt = receipt_of(text_chunks(path), plan.manifest)
    again = plan.generate(control_of(text_chunks(path), receipt, 64), **dict(receipt.settings))
    assert np.array_equal(again.tokens[0], receipt.tokens)
    assert np.abs(again.images[0] - pixels(png)).max() <= 1

    made = tmp_path / "terminal.png"
    arguments = ["--control", str(UMBRELLA), "--class", "fluent-objects", "--seed", "16", "-o", str(made)]
    assert main.main(["-e", str(SHIPPED), "--backend", "ort-cpu", *arguments]) == 0
    last = SCALES - 1
    png, _ = page.evaluate(EDIT, [{"class": "fluent-objects"}, {"image": base64_of(made), "scale": last}, None])
    tokens = receipt_of(text_chunks(io.BytesIO(base64.b64decode(png))), plan.manifest).tokens
    assert np.array_equal(tokens, receipt_of(text_chunks(made), plan.manifest).tokens)
    assert np.abs(pixels(png) - pixels(base64_of(made))).max() <= 1


def test_a_photo_becomes_the_map_that_python_derives(page: Any, plan: car_runtime.Plan) -> None:
    from car_runtime.photo import control_of_photo

    photo = ROOT / "examples/photos/mouse.png"
    made = page.evaluate("(photo) => window.engine.controls({ photo })", base64_of(photo))
    wanted, _ = control_of_photo(photo, plan.manifest)
    assert wanted.any()
    assert np.array_equal(pixels(made["control"]), wanted)


def test_what_cannot_be_used_is_refused_in_words(page: Any) -> None:
    said = page.evaluate(
        """async (forms) => Promise.all(forms.map((form) => window.engine.draw(form).then(() => null, (e) => [e.status, e.message])))""",
        [
            {"class": "no such"},
            {"seed": -1},
            {"top_p": 2},
            {"cfg_scales": "5-2"},
            {"control": "bm8="},
            {"plan": "other"},
            {"edit": {"id": "gone", "scale": 1}},
        ],
    )
    assert [status for status, _ in said] == [400, 400, 400, 400, 400, 404, 404]
    assert all(";" in line or "must be" in line for _, line in said)


def test_cancelling_stops_between_scales(page: Any) -> None:
    found = page.evaluate(
        """async (form) => {
          let [scales, id] = [0, null];
          try {
            for await (const event of window.engine.stream(form)) {
              if (event.type === 'queued') id = event.id;
              if (event.type === 'scale' && ++scales === 2) await window.engine.cancel(id);
            }
          } catch (error) { return [scales, error.code]; }
        }""",
        {"control": base64_of(UMBRELLA), "n": 9},
    )
    assert found[1] == "cancelled"
    assert found[0] <= 4

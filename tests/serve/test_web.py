"""The studio without a server: the site of the shipped plan on a static host, in a real browser."""

from __future__ import annotations

import base64
import io
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import car_runtime
from car_runtime.editing.edit import Edit
from car_runtime.format.goldens import read_goldens
from car_runtime.format.graph_check import stored_weights
from car_runtime.format.manifest import read_manifest
from car_runtime.images import text_chunks
from car_runtime.receipt import control_of, receipt_of
from fixtures.serving import SHIPPED
from fixtures.site import Site, fetched_engine, write_shipped_site
from fixtures.studio import HEART, SCALES, SEAM, SIZE, Studio, pixels

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not (SHIPPED / "manifest.json").is_file() or read_manifest(SHIPPED).format < 2,
    reason="a page runs plans of format 2, and the shipped one is not",
)
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
    """The site of the shipped plan, as `make web` makes it."""
    made = tmp_path_factory.mktemp("web") / "site"
    write_shipped_site(made, SHIPPED, "--branches", "canny,sketch")
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
def studio(chromium: Any, site: Site) -> Iterator[Studio]:
    """The page of the site, one for all tests, as opening a plan takes seconds of a core."""
    opened = Studio(chromium, site.url, has_touch=True)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def page(studio: Studio) -> Any:
    """The same page, with its engine at `window.engine`."""
    studio.page.evaluate("async () => { window.engine = (await import('/studio/main.js')).client; }")
    return studio.page


@pytest.fixture
def empty(studio: Studio) -> Studio:
    """The page with nothing drawn and nothing kept."""
    shown = studio.page.locator("#history [aria-label^=Show]")
    while left := shown.count():
        studio.page.locator("#history .remove").first.dispatch_event("click")
        studio.page.wait_for_function(
            "left => document.querySelectorAll('#history [aria-label^=Show]').length < left", arg=left
        )
    studio.page.click("#clear", force=True)
    studio.page.fill("#class", "")
    return studio


def base64_of(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def test_the_page_draws_the_goldens_greedy_tokens(page: Any, plan: car_runtime.Plan) -> None:
    """Those of float32 PyTorch, which `ort-cpu` draws, too; with controls and without."""
    for branch in ("canny", "sketch", ""):
        goldens = read_goldens(SHIPPED, plan.manifest, branch)
        form: dict[str, Any] = {"class": goldens.label, "cfg": goldens.cfg, "top_k": 1}
        if goldens.control is not None:
            stream = io.BytesIO()
            Image.fromarray(goldens.control).save(stream, "PNG")
            form["control"] = {branch: base64.b64encode(stream.getvalue()).decode()}
        ((tokens, _),) = page.evaluate(DRAW, [form, [{"seed": 0}]])
        assert tokens == goldens.tokens.tolist()


SETTINGS: list[dict[str, Any]] = [
    *({"seed": seed} for seed in (0, 1, 2, 2**53 - 1)),
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


def light(box: tuple[int, int, int, int], side: int = SIZE) -> Image.Image:
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
    edit = Edit(image=Image.new("RGB", (SIZE, SIZE)), from_scale=3, tokens=tokens)
    wanted = plan.generate(UMBRELLA, label="fluent-objects", seed=12, edit=edit)
    for source in ({"id": id}, {"id": "gone"}):  # a result that is no longer kept is sent as an image
        made, receipt = page.evaluate(EDIT, [form, {**source, "scale": 2}, png])
        found = receipt_of(text_chunks(io.BytesIO(base64.b64decode(made))), plan.manifest)
        assert np.array_equal(found.tokens, wanted.tokens[0])
        assert found.settings["edit"] == "whole"
        assert receipt["edit"] == {"scale": 2}


@pytest.mark.parametrize("box", [(60, 16, 120, 68), (0, 80, 40, SIZE)])
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
    kept[max(0, box[1] - SEAM) : box[3] + SEAM, max(0, box[0] - SEAM) : box[2] + SEAM] = False
    assert np.array_equal(found[kept], pixels(png)[kept])


def test_extending_in_the_page_is_pythons(page: Any, plan: car_runtime.Plan) -> None:
    id, png = drawn(page)
    form = {"control": base64_of(UMBRELLA), "class": "fluent-travel-places", "seed": 14}
    made, _ = page.evaluate(EDIT, [form, {"id": id, "frame": [0.2, 0.2, 0.8, 0.8]}, png])
    image = Image.fromarray(pixels(png).astype(np.uint8))
    margins = (43, 43, 42, 42)
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
    again = plan.generate(control_of(text_chunks(path), receipt, SIZE), **dict(receipt.settings))
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
        """(forms) => Promise.all(
          forms.map((form) => window.engine.draw(form).then(() => null, (error) => [error.status, error.message]))
        )""",
        [
            {"class": "no such"},
            {"seed": -1},
            {"seed": 2**53 - 1, "n": 2},
            {"top_p": 2},
            {"cfg_scales": "5-2"},
            {"control": "bm8="},
            {"plan": "other"},
            {"edit": {"id": "gone", "scale": 1}},
            {"edit": {"image": base64_of(UMBRELLA), "mask": in_base64(light((6, 6, 11, 11)))}},
        ],
    )
    assert [status for status, _ in said] == [400, 400, 400, 400, 400, 400, 404, 404, 400]
    assert "covers no token by half, which are 8 pixels wide" in said[-1][1]
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


def test_a_person_draws_branches_and_stops_early(empty: Studio) -> None:
    """`Studio` fails on a request to anywhere else."""
    studio, page = empty, empty.page
    assert page.evaluate("crossOriginIsolated")
    studio.stroke(HEART)
    studio.choose("fluent-smileys-emotion")
    studio.draw()
    first = studio.scales()
    assert len(first) == SCALES
    assert np.array_equal(first[-1], studio.image())

    page.click("#film li:nth-child(3) button")
    page.click("#actions >> text=Branch here")
    studio.done(2)
    assert studio.stored()[0]["images"][0]["receipt"]["edit"] == {"scale": 2}
    assert all(np.array_equal(one, other) for one, other in zip(first[:3], studio.scales()[:3], strict=True))
    assert not np.array_equal(first[-1], studio.image())

    page.locator("#film button:not(.fork)").nth(2).click()
    page.get_by_role("button", name="Stop here").click()
    studio.done(3)
    assert len(studio.scales()) == 3
    assert np.array_equal(studio.image(), studio.scales()[-1])


def test_a_png_that_is_brought_restores_everything(empty: Studio, tmp_path: Path) -> None:
    studio, page = empty, empty.page
    studio.bring(UMBRELLA)
    studio.choose("fluent-objects")
    studio.draw()
    saved = tmp_path / "image.png"
    saved.write_bytes(base64.b64decode(studio.stored()[0]["images"][0]["png"]))
    wanted, control = studio.scales(), studio.stored()[0]["control"]
    page.click("#history .remove", force=True)
    page.click("#clear")
    studio.choose("fluent-flags")
    page.set_input_files("#file", str(saved))
    page.wait_for_selector("#pad-note:has-text('Restored')")
    assert page.input_value("#class") == "fluent-objects"
    until = time.monotonic() + 60
    while len(studio.scales()) < SCALES and time.monotonic() < until:  # drawn again from the tokens in the file
        page.wait_for_timeout(100)
    assert all(np.array_equal(one, two) for one, two in zip(wanted, studio.scales(), strict=True))
    assert np.array_equal(pixels(studio.stored()[0]["control"]), pixels(control))


def test_a_png_of_car_run_that_is_brought_restores_everything(
    empty: Studio, plan: car_runtime.Plan, tmp_path: Path
) -> None:
    """It is drawn again from the tokens in it."""
    from car_runtime.cli import main

    made = tmp_path / "terminal.png"
    arguments = [
        "--control",
        str(UMBRELLA),
        "--class",
        "fluent-objects",
        "--seed",
        "16",
        "--cfg",
        "2.35",
        "-o",
        str(made),
    ]
    assert main.main(["-e", str(SHIPPED), "--backend", "ort-cpu", *arguments]) == 0
    page = empty.page
    page.set_input_files("#file", str(made))
    page.wait_for_selector("#pad-note:has-text('Restored')")
    assert [page.input_value(field) for field in ("#class", "#seed", "#cfg")] == ["fluent-objects", "16", "2.35"]
    assert np.array_equal(empty.image(), pixels(base64_of(made)))
    page.wait_for_function(f"() => document.querySelectorAll('#film img').length === {SCALES}")
    assert np.abs(empty.scales()[-1] - empty.image()).max() <= 1
    control = pixels(empty.stored()[0]["control"])
    assert np.array_equal(control, np.asarray(Image.open(UMBRELLA).convert("RGB")))


def test_a_seed_that_javascript_has_not_is_not_shown_as_another(empty: Studio, tmp_path: Path) -> None:
    from car_runtime.cli import main

    made = tmp_path / "terminal.png"
    assert main.main(["-e", str(SHIPPED), "--backend", "ort-cpu", "--seed", str(2**63 - 1), "-o", str(made)]) == 0
    page = empty.page
    page.fill("#seed", str(2**53 - 1))
    assert page.input_value("#seed") == str(2**53 - 1)
    page.set_input_files("#file", str(made))
    page.wait_for_selector("#pad-note:has-text('Its seed is larger than the studio draws with')")
    assert page.input_value("#seed") == str(2**53 - 1)
    page.wait_for_function(f"() => document.querySelectorAll('#film img').length === {SCALES}")


def test_a_photo_larger_than_an_engine_reads_is_made_smaller(empty: Studio, tmp_path: Path) -> None:
    large = Image.open(ROOT / "examples/photos/mouse.png").convert("RGB").resize((4200, 4200))
    large.save(tmp_path / "large.jpg")
    empty.page.set_input_files("#file", str(tmp_path / "large.jpg"))
    empty.page.wait_for_selector("#pad-note:has-text('edges')")


def test_live_mode_draws_while_the_pen_moves(empty: Studio) -> None:
    page = empty.page
    page.click("label.switch")
    empty.stroke(HEART, release=False)
    page.wait_for_function("() => document.querySelector('#images img')?.src.startsWith('blob:')")
    page.mouse.up()
    empty.done()
    assert empty.stored()[0]["live"]
    page.click("label.switch")


def test_a_phone_shows_one_column_and_a_finger_draws(empty: Studio) -> None:
    page = empty.page
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator("#pad").scroll_into_view_if_needed()
    box = page.locator("#pad").bounding_box()
    assert box["width"] > 300
    for x in (0.3, 0.5, 0.7):
        page.touchscreen.tap(box["x"] + x * box["width"], box["y"] + 0.5 * box["height"])
    page.tap("#draw")
    empty.done()
    page.set_viewport_size({"width": 1280, "height": 800})


def test_the_page_works_offline_and_has_kept_the_images(empty: Studio, site: Site) -> None:
    page = empty.page
    empty.bring(UMBRELLA)
    empty.draw()
    kept = empty.image()
    empty.context.set_offline(True)
    page.reload()
    page.wait_for_selector("html[data-ready]", timeout=240_000)
    assert np.array_equal(empty.image(), kept)
    empty.draw()
    empty.done(2)
    assert not np.array_equal(empty.image(), kept)
    empty.context.set_offline(False)


def refused(chromium: Any, folder: Path) -> tuple[Site, Any, Any]:
    """A host of a site, a context and its page, once that says what is wrong."""
    host, context = Site(folder), chromium.new_context()
    page = context.new_page()
    page.goto(host.url)
    page.wait_for_selector("#message.bad", timeout=240_000)
    return host, context, page


def test_a_file_that_is_not_the_sites_is_refused_and_a_mended_or_new_site_is_used(
    chromium: Any, folder: Path, tmp_path: Path
) -> None:
    """One changed byte of the weights, of which the page says so in one sentence, and goes on with nothing."""
    copy = tmp_path / "site"
    shutil.copytree(folder, copy)
    weights = copy / "plan/weights.bin"
    data = bytearray(weights.read_bytes())
    data[1000] ^= 1
    weights.write_bytes(data)
    host, context, page = refused(chromium, copy)
    assert page.inner_text("#message").startswith("Plan/weights.bin is not the file that the site was made with; ")
    assert page.is_disabled("#draw")

    data[1000] ^= 1
    weights.write_bytes(data)  # the host has the right one again
    page.click("#message button")
    page.wait_for_selector("html[data-ready]", state="attached", timeout=240_000)

    tab = context.new_page()
    tab.goto(host.url)
    context.new_cdp_session(tab).send("Page.reload", {"ignoreCache": True})  # which goes past the service worker
    tab.wait_for_function("() => !crossOriginIsolated && document.querySelector('#draw')")
    tab.wait_for_function("() => crossOriginIsolated && document.querySelector('#message').textContent.includes('%')")
    tab.close()

    # A site that was made anew waits for the next visit, whole, and leaves another one of this origin alone.
    about = json.loads((copy / "site.json").read_text())
    about["version"] = "new"
    (copy / "site.json").write_text(json.dumps(about))
    worker = (copy / "sw.js").read_text()
    (copy / "sw.js").write_text(worker.replace('VERSION = "', 'VERSION = "new-', 1))
    version = "async () => (await (await fetch('site.json')).json()).version"
    page.evaluate("() => caches.open(`car ${location.origin}/other/ 1`)")
    page.evaluate("async () => { await (await navigator.serviceWorker.ready).update(); }")
    page.wait_for_function("async () => Boolean((await navigator.serviceWorker.ready).waiting)")
    assert page.evaluate(version) != "new"
    page.reload()
    page.wait_for_function(f"async () => (await ({version})()) === 'new'")
    page.wait_for_function("async () => (await caches.keys()).length === 2")
    assert f"car {host.url}/other/ 1" in page.evaluate("() => caches.keys()")
    context.close()
    host.close()


def test_nothing_is_lost_while_the_page_loads(chromium: Any, site: Site) -> None:
    """Then nothing can be drawn, set or dropped, and the button does nothing. The browser keeps nothing."""
    context = chromium.new_context(service_workers="block")
    context.add_init_script(
        """for (const name of ['localStorage', 'sessionStorage', 'indexedDB', 'caches']) {
          Object.defineProperty(window, name, { get() { throw new DOMException('denied', 'SecurityError'); } });
        }"""
    )
    page = context.new_page()
    waiting: list[Any] = []
    page.route("**/site.json", lambda route: waiting.append(route))
    page.goto(f"{site.url}/?engine=wasm")
    page.wait_for_selector("[inert] #pad")
    for selector in ("#draw", "#seed", "#pad"):
        box = page.locator(selector).bounding_box()
        page.mouse.click(box["x"] + 20, box["y"] + 20)
        page.keyboard.press("Enter")
    blank = "() => { const data = document.querySelector('#pad').getContext('2d').getImageData(0, 0, 512, 512).data;"
    assert page.evaluate(blank + " return data.every((value, i) => value === (i % 4 === 3 ? 255 : 0)); }")
    taken = """() => ['dragover', 'drop'].map((type) => {
      const event = new DragEvent(type, { bubbles: true, cancelable: true });
      document.body.dispatchEvent(event);
      return event.defaultPrevented;
    })"""
    assert page.evaluate(taken) == [True, True]
    assert page.url == f"{site.url}/?engine=wasm"
    assert len(waiting) == 1
    context.close()


def test_a_site_that_was_copied_in_part_says_so(chromium: Any, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "site"
    shutil.copytree(folder, copy)
    (copy / "ort/ort.wasm.min.mjs").unlink()
    (copy / "studio/guitar.png").unlink()  # without which there is no service worker either
    host, context, page = refused(chromium, copy)
    assert page.inner_text("#message").startswith("Ort/ort.wasm.min.mjs cannot be fetched; see that the whole ")
    context.close()
    host.close()


def test_a_browser_without_what_is_needed_says_so_in_one_sentence(chromium: Any, site: Site) -> None:
    context = chromium.new_context()
    context.add_init_script("WebAssembly.validate = () => false")
    page = context.new_page()
    page.goto(site.url)
    page.wait_for_selector("#message.bad", timeout=240_000)
    assert page.inner_text("#message").startswith("This browser has no WebAssembly with SIMD; open the page in ")
    context.close()


# ---- the command ---------------------------------------------------------------------------------------------------


def run(*arguments: object) -> int:
    from car_runtime.cli import main

    return main.main(["plan", "web", *map(str, arguments)])


def test_the_shipped_plans_site_is_small_and_names_its_terms(folder: Path) -> None:
    about = json.loads((folder / "site.json").read_text())
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert sum(path.stat().st_size for path in files.values()) <= 60_000_000
    assert set(about["files"]) == set(files) - {"site.json", "sw.js"}
    assert "Microsoft" in files["ort/LICENSE"].read_text()
    assert about["plan"]["shipped"]
    assert {control["type"] for control in about["plan"]["controls"]} == {"canny", "sketch"}


def spread(site: Path) -> bytes:
    """weights.bin of a site as the page puts it together."""
    packed, about = (site / "plan/weights.bin").read_bytes(), json.loads((site / "site.json").read_text())["weights"]
    data, at = bytearray(about["bytes"]), 0
    for offset, length in about["pieces"]:
        data[offset : offset + length] = packed[at : at + length]
        at += length
    assert at == len(packed)
    return bytes(data)


def test_a_site_of_some_branches_has_all_that_their_graphs_read_and_nothing_else(folder: Path) -> None:
    whole, page = (SHIPPED / "weights.bin").read_bytes(), spread(folder)
    manifest = read_manifest(SHIPPED)
    graphs = json.loads((folder / "plan/manifest.json").read_text())["graphs"]
    assert {"step", "branch.canny", "branch.sketch", "control.sketch"} <= graphs.keys()
    for name, graph in graphs.items():
        for one in stored_weights((SHIPPED / graph["file"]).read_bytes()):
            place = slice(one.offset, one.offset + one.bytes)
            assert page[place] == whole[place], (name, one.name)
    for name, one in manifest.parameters.items():
        found = page[one.offset : one.offset + one.bytes]
        if name.startswith("branches.depth.") and one.bytes > 1000:
            assert not any(found), name
        elif not name.startswith(("branches.depth.", "branches.normal.", "branches.hed.")):
            assert found == whole[one.offset : one.offset + one.bytes], name
    assert not list((folder / "plan").glob("*depth*"))
    assert len(json.loads((folder / "plan/goldens.json").read_text())) == 3


@pytest.mark.parametrize(
    ("branches", "said"),
    [
        ("canny,lines", "has no branch 'lines'; name some of: {branches}"),
        ("sketch", "would lack 'canny', the plan's default branch; name it, too"),
    ],
)
def test_branches_that_a_page_cannot_have_are_refused(
    branches: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = tmp_path / "site"
    assert run(SHIPPED, "-o", site, "--onnxruntime", fetched_engine(), "--branches", branches) == 2
    assert said.format(branches=", ".join(read_manifest(SHIPPED).model.branches)) in capsys.readouterr().err
    assert not site.exists()


def test_a_site_replaces_a_site_and_nothing_else(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "site"
    shutil.copytree(folder, copy)
    (copy / "plan/weights.bin").unlink()
    assert run(SHIPPED, "-o", copy, "--onnxruntime", fetched_engine()) == 0
    assert (copy / "plan/weights.bin").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["site"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("")
    assert run(SHIPPED, "-o", other, "--onnxruntime", fetched_engine()) == 2
    assert "holds other things than a site" in capsys.readouterr().err
    assert [path.name for path in other.iterdir()] == ["thesis.tex"]


def test_another_package_than_the_pinned_one_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = tmp_path / "onnxruntime-web.tgz"
    archive.write_bytes(b"something else")
    assert run(SHIPPED, "-o", tmp_path / "site", "--onnxruntime", archive) == 2
    assert "SHA-256 differs" in capsys.readouterr().err
    assert run(SHIPPED, "-o", tmp_path / "site", "--onnxruntime", tmp_path / "none.tgz") == 2
    assert "npm pack onnxruntime-web@" in capsys.readouterr().err
    assert run(SHIPPED, "-o", tmp_path / "site", "--onnxruntime", "/dev/zero") == 2
    assert "it is not a regular file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["onnxruntime-web.tgz"]


def test_spoiled_goldens_are_refused_and_an_export_without_any_has_a_site(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = shutil.copytree(SHIPPED, tmp_path / "a.plan")
    goldens = [path for path in plan.iterdir() if path.suffix == ".npz"]
    whole = {path: path.read_bytes() for path in goldens}
    goldens[0].write_bytes(whole[goldens[0]][:-1] + b"x")
    assert run(plan, "-o", tmp_path / "site", "--onnxruntime", fetched_engine()) == 2
    assert goldens[0].name in capsys.readouterr().err
    assert not (tmp_path / "site").exists()
    manifest = json.loads((plan / "manifest.json").read_text())
    for path in goldens:
        path.unlink()
        del manifest["files"][path.name]
    (plan / "manifest.json").write_text(json.dumps(manifest))
    assert run(plan, "-o", tmp_path / "site", "--onnxruntime", fetched_engine()) == 0
    assert json.loads((tmp_path / "site/plan/goldens.json").read_text()) == []

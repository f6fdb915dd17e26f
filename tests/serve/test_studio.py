"""The studio in a real browser, on a real server with the shipped plan: what a person would do, and what they see."""

from __future__ import annotations

import base64
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

uvicorn = pytest.importorskip("uvicorn", reason="the extra serve is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from car_runtime import open_plan  # noqa: E402
from car_serve.app import create_app  # noqa: E402
from car_serve.limits import Limits  # noqa: E402

ROOT = Path(__file__).parents[2]
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
REQUIRED = (
    os.environ.get("STUDIO_BROWSER") == "required"
)  # continuous integration: then a browser that is absent fails
pytestmark = pytest.mark.skipif(
    CHROMIUM is None and not REQUIRED, reason="no chromium on this machine: apt install chromium"
)
SCALES = 6
HEART = [
    (
        0.5 + 0.36 * math.sin(t) ** 3,
        0.47 - 0.026 * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)),
    )
    for t in (i * 2 * math.pi / 40 for i in range(41))
]


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    app = create_app([open_plan(threads=2)], Limits(queue=1))
    running = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    until = time.monotonic() + 60
    while not running.started and time.monotonic() < until:
        time.sleep(0.02)
    running.address = f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    running.service = app.state.service
    yield running
    running.should_exit = True
    thread.join(20)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    assert CHROMIUM is not None, "no chromium on this machine; apt install chromium"
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


class Studio:
    """A page and what goes wrong on it: errors of scripts, of the CSP, and requests to anywhere else."""

    def __init__(self, chromium: Any, address: str, **context: Any) -> None:
        self.context = chromium.new_context(**({"viewport": {"width": 1280, "height": 800}} | context))
        self.context.grant_permissions(["clipboard-read", "clipboard-write"])
        self.page = self.context.new_page()
        self.page.set_default_timeout(30_000)
        self.wrong: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.address = address
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("console", lambda message: self._console(message))
        self.page.on("request", self._request)
        self.open()

    def _console(self, message: Any) -> None:
        # A refusal that a test provokes is logged by the browser as a failed resource.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.wrong.append(message.text)

    def _request(self, request: Any) -> None:
        if not request.url.startswith((self.address, "blob:" + self.address, "data:")):
            self.wrong.append(f"a request to {request.url}")
        if request.url.endswith("/v1/pictures") and request.method == "POST":
            self.bodies.append(request.post_data_json)

    def open(self) -> None:
        self.page.goto(self.address + "/")
        self.page.wait_for_selector("html[data-ready]")

    def stroke(self, points: list[tuple[float, float]], on: str = "#pad", release: bool = True) -> None:
        box = self.page.locator(on).bounding_box()
        at = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
        self.page.mouse.move(*at[0])
        self.page.mouse.down()
        for point in at[1:]:
            self.page.mouse.move(*point)
        if release:
            self.page.mouse.up()

    def choose(self, words: str) -> None:
        self.page.fill("#class", words)
        self.page.keyboard.press("Enter")

    def draw(self) -> None:
        self.page.click("#draw")
        self.done()

    def done(self, images: int = 1) -> None:
        self.page.wait_for_function(
            "n => !document.querySelector('#draw.busy') && document.querySelectorAll('#history [aria-label^=Show]')"
            ".length >= n",
            arg=images,
        )

    def stored(self) -> list[dict[str, Any]]:
        """The history as the page keeps it, newest first: PNGs as base64."""
        return self.page.evaluate(
            """async () => {
              const store = await import('/studio/store.js');
              const { toBase64 } = await import('/studio/page.js');
              await store.open();
              const items = await store.list();
              for (const item of items) for (const image of item.images) {
                image.png = await toBase64(image.png);
                image.scales = image.scales.length;
              }
              return items.map(({ before, ...item }) => item);
            }"""
        )

    def image(self, index: int = 0) -> np.ndarray:
        """uint8 [H, W, 3] of a history entry, 0 the newest."""
        return pixels(self.stored()[index]["images"][0]["png"])

    def close(self) -> None:
        self.context.close()
        assert not self.wrong


def pixels(png: str) -> np.ndarray:
    from io import BytesIO

    return np.asarray(Image.open(BytesIO(base64.b64decode(png))).convert("RGB")).astype(int)


@pytest.fixture
def studio(chromium: Any, server: Any) -> Iterator[Studio]:
    opened = Studio(chromium, server.address)
    yield opened
    opened.close()


def test_a_heart_is_drawn_and_becomes_a_heart(studio: Studio) -> None:
    page = studio.page
    assert page.locator("#empty").is_visible()
    # The scales in the order in which their thumbnails come in.
    page.evaluate(
        """() => { window.seen = []; new MutationObserver(() => {
          [...document.querySelectorAll('#film li')].forEach((li, i) => {
            if (li.querySelector('img') && !window.seen.includes(i)) window.seen.push(i); });
        }).observe(document.querySelector('#film'), { childList: true, subtree: true }); }"""
    )
    studio.stroke(HEART)
    assert not page.locator("#empty").is_visible()
    studio.choose("fluent smileys")
    studio.draw()
    assert page.evaluate("window.seen") == list(range(SCALES))
    made = studio.image()
    assert made.shape == (64, 64, 3)
    # It follows the drawing: coloured inside the heart, light around it.
    assert made[24:36, 24:40].min(axis=-1).mean() < 180
    assert made[:6].mean() > 225
    assert made[-6:].mean() > 225
    # And is what the runtime makes of the same request, to the pixel.
    body = studio.bodies[-1]
    with open_plan() as plan:
        control = pixels(body["control"]).astype(np.uint8)
        again = plan.generate(control, label=body["class"], **{k: body[k] for k in ("seed", "cfg", "top_k", "top_p")})
    assert np.abs(again.images[0].astype(int) - made).max() <= 1


def test_undo_redo_eraser_and_clear_change_the_map(studio: Studio) -> None:
    page = studio.page
    read = "document.querySelector('#pad').toDataURL()"
    blank = page.evaluate(read)
    studio.stroke([(0.2, 0.2), (0.8, 0.8)])
    line = page.evaluate(read)
    assert line != blank
    page.keyboard.press("Control+z")
    assert page.evaluate(read) == blank
    page.keyboard.press("Control+Shift+Z")
    assert page.evaluate(read) == line
    page.keyboard.press("e")
    studio.stroke([(0.5, 0.5), (0.8, 0.8)])
    assert page.evaluate(read) not in (line, blank)
    page.click("#clear")
    assert page.evaluate(read) == blank
    before = page.input_value("#size")
    page.keyboard.press("]")
    assert int(page.input_value("#size")) > int(before)


def test_the_pen_presses_harder_and_the_line_is_wider(studio: Studio) -> None:
    lit = """async pressure => {
      const pad = document.querySelector('#pad'), box = pad.getBoundingClientRect();
      const at = (type, x) => pad.dispatchEvent(new PointerEvent(type, { pointerId: 1, pointerType: 'pen', pressure,
        clientX: box.left + x * box.width, clientY: box.top + box.height / 2, bubbles: true, cancelable: true }));
      pad.setPointerCapture = () => {};
      at('pointerdown', 0.2); at('pointermove', 0.8); at('pointerup', 0.8);
      const { data } = pad.getContext('2d').getImageData(256, 0, 1, 512);
      let n = 0; for (let i = 0; i < data.length; i += 4) n += data[i] > 128; return n; }"""
    light = studio.page.evaluate(lit, 0.1)
    assert studio.page.evaluate(lit, 1.0) > 1.8 * light


def test_a_photo_becomes_a_map_that_can_be_edited(studio: Studio) -> None:
    page = studio.page
    page.set_input_files("#file", str(ROOT / "examples/photos/mouse.png"))
    page.wait_for_function("() => document.querySelector('#pad-note').textContent.includes('edges')")
    edges = page.evaluate("document.querySelector('#pad').toDataURL()")
    page.keyboard.press("e")
    studio.stroke([(0.1, 0.5), (0.9, 0.5)])
    assert page.evaluate("document.querySelector('#pad').toDataURL()") != edges
    page.keyboard.press("Control+z")
    studio.draw()
    # Pixels stay pixels: the map that is sent is the one that was made.
    from car_runtime.controls import derive

    wanted = derive(Image.open(ROOT / "examples/photos/mouse.png"), "canny-grey", 64)
    sent = pixels(studio.bodies[-1]["control"])
    assert np.array_equal(sent[..., 0], np.asarray(wanted).reshape(64, 64, -1)[..., 0])


def test_an_inverted_map_is_noticed_and_mended_with_a_click(studio: Studio, tmp_path: Path) -> None:
    heart = Image.open(ROOT / "examples/heart.png").convert("L")
    heart.point(lambda level: 255 - level).save(tmp_path / "inverted.png")
    page = studio.page
    page.set_input_files("#file", str(tmp_path / "inverted.png"))
    page.click("text=Invert it")
    studio.draw()
    assert np.array_equal(pixels(studio.bodies[-1]["control"])[..., 0], np.asarray(heart))


def test_a_blank_drawing_is_noticed_and_an_example_is_a_click_away(studio: Studio) -> None:
    studio.page.click("#draw")
    assert "blank" in studio.page.inner_text("#pad-note")
    studio.page.click("#pad-note button")
    studio.done()
    assert studio.stored()[0]["images"][0]["receipt"]["class"]["name"] == "fluent-travel-places"


def test_branching_keeps_the_coarse_scales_and_draws_the_fine_ones_anew(studio: Studio) -> None:
    page = studio.page
    page.click("#examples button >> nth=1")
    studio.done()
    page.click("#film li:nth-child(3) button")
    assert "Scale 3 of 6" in page.inner_text("#actions")
    page.click("text=Branch here")
    studio.done(2)
    new, old = studio.stored()
    assert studio.bodies[-1]["edit"] == {"id": old["id"], "index": 0, "scale": 2}
    assert new["images"][0]["seed"] != old["images"][0]["seed"]
    assert not np.array_equal(studio.image(0), studio.image(1))


def test_restyle_is_another_class_on_the_same_coarse_scales(studio: Studio) -> None:
    page = studio.page
    page.click("#examples button >> nth=1")
    studio.done()
    studio.choose("noto smileys")
    page.click("#film li:nth-child(2) button")
    page.click("text=Restyle")
    studio.done(2)
    new, old = studio.stored()
    assert new["images"][0]["receipt"]["class"]["name"] == "noto-smileys-emotion"
    assert new["images"][0]["seed"] == old["images"][0]["seed"]


def test_stop_here_gives_the_coarse_image(studio: Studio) -> None:
    page = studio.page
    page.click("#examples button >> nth=1")
    studio.done()
    page.click("#film li:nth-child(4) button")
    page.click("text=Stop here")
    studio.done(2)
    new = studio.stored()[0]["images"][0]
    assert new["receipt"]["stop_after"] == 3
    assert new["scales"] == 4


def test_in_painting_changes_what_was_painted_over(studio: Studio) -> None:
    page = studio.page
    page.click("#examples button >> nth=1")
    studio.done()
    page.keyboard.press("m")
    studio.stroke([(0.15, 0.15), (0.4, 0.15), (0.4, 0.4), (0.15, 0.4), (0.3, 0.25)], on="#mask")
    page.click("text=In-paint")
    studio.done(2)
    mask = pixels(studio.bodies[-1]["edit"]["mask"])
    assert 0 < (mask.max(axis=-1) > 0).mean() < 0.5
    changed = np.abs(studio.image(0) - studio.image(1)).max(axis=-1)
    # A token has 8 pixels and the decoder looks a little past it; far away nothing moves much.
    assert changed[:24, :24].mean() > 2 * changed[48:, 48:].mean()
    page.keyboard.press("c")
    assert page.locator("#compare").is_visible()


def test_extend_puts_the_image_into_a_smaller_frame(studio: Studio) -> None:
    page = studio.page
    page.click("#examples button >> nth=1")
    studio.done()
    page.keyboard.press("x")
    page.focus("#grip")
    page.keyboard.press("ArrowLeft")
    page.click("#actions >> text=Extend")
    studio.done(2)
    left, top, right, bottom = studio.bodies[-1]["edit"]["frame"]
    assert right - left == pytest.approx(0.56)
    assert (left, right) == (top, bottom)
    assert studio.image(0)[:6].mean() > 200


def test_cancel_stops_and_the_server_has_nothing_left(studio: Studio, server: Any) -> None:
    page = studio.page
    studio.stroke(HEART)
    page.click("#variations span >> text=9")
    page.click("#draw")
    page.wait_for_selector("#film img")
    page.keyboard.press("Escape")
    assert "Cancelled" in page.inner_text("#message")
    until = time.monotonic() + 10
    while server.service.results.unfinished() and time.monotonic() < until:
        time.sleep(0.05)
    assert not server.service.results.unfinished()
    assert not studio.stored()


def test_a_reload_finds_drawing_settings_and_history_again(studio: Studio) -> None:
    page = studio.page
    studio.stroke(HEART)
    studio.choose("fluent smileys")
    studio.draw()
    before = studio.stored()
    drawn = page.evaluate("document.querySelector('#pad').toDataURL()")
    page.wait_for_timeout(500)
    studio.open()
    assert studio.stored() == before
    assert page.evaluate("document.querySelector('#pad').toDataURL()") == drawn
    assert page.input_value("#class") == "fluent-smileys-emotion"
    assert page.locator("#film img").count() == SCALES


def test_a_png_restores_everything_and_draws_the_same_again(
    studio: Studio, chromium: Any, server: Any, tmp_path: Path
) -> None:
    page = studio.page
    studio.stroke(HEART)
    studio.choose("noto smileys")
    page.click("#lock")
    page.fill("#seed", "77")
    studio.draw()
    with page.expect_download() as download:
        page.keyboard.press("d")
    download.value.save_as(tmp_path / "heart.png")
    other = Studio(chromium, server.address)
    other.page.set_input_files("#file", str(tmp_path / "heart.png"))
    other.page.wait_for_function("() => document.querySelector('#pad-note').textContent.includes('Restored')")
    assert other.page.input_value("#seed") == "77"
    assert other.page.input_value("#class") == "noto-smileys-emotion"
    other.page.click("#lock")
    other.page.click("#draw")
    other.done(2)
    assert np.array_equal(other.image(0), studio.image(0))
    other.close()


def test_variations_are_chosen_by_a_click(studio: Studio) -> None:
    page = studio.page
    studio.stroke(HEART)
    page.click("#variations span >> text=4")
    studio.draw()
    assert page.locator("#images button").count() == 4
    page.click("#images button >> nth=2")
    assert page.get_attribute("#images button >> nth=2", "aria-pressed") == "true"


def test_copied_commands_say_the_same_request(studio: Studio) -> None:
    page = studio.page
    page.click("#examples button >> nth=1")
    studio.done()
    page.click("[aria-label='Copy as a command']")
    page.click("#actions >> text=car-run")
    page.wait_for_function("() => document.querySelector('#image-note').textContent.includes('Copied')")
    command = page.evaluate("navigator.clipboard.readText()")
    seed = studio.stored()[0]["images"][0]["seed"]
    assert command.startswith("car-run --control control.png")
    assert f"--seed {seed}" in command
    assert "--class fluent-smileys-emotion" in command


def test_a_full_queue_is_said_with_a_way_out(studio: Studio, server: Any) -> None:
    page = studio.page
    studio.stroke(HEART)
    limits = server.service.limits
    object.__setattr__(limits, "queue", 0)
    try:
        page.click("#draw")
        page.wait_for_function("() => document.querySelector('#message').textContent.includes('queue is full')")
    finally:
        object.__setattr__(limits, "queue", 64)
    page.click("#message >> text=Try again")
    studio.done()


def test_live_mode_draws_while_the_pen_moves(studio: Studio) -> None:
    page = studio.page
    page.click(".switch")
    studio.stroke(HEART[:20], release=False)
    page.wait_for_selector("#images img[src^=blob]")
    assert all(body["n"] == 1 for body in studio.bodies)
    page.mouse.up()
    studio.done()
    assert len(studio.stored()) == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_in_one_column_and_a_finger_draws(chromium: Any, server: Any, scheme: str) -> None:
    phone = Studio(
        chromium, server.address, viewport={"width": 390, "height": 844}, color_scheme=scheme, has_touch=True
    )
    page = phone.page
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    pad, image = page.locator("#pad-frame").bounding_box(), page.locator("#image-frame").bounding_box()
    assert pad["width"] == image["width"] > 340
    assert image["y"] > pad["y"] + pad["height"]
    client = phone.context.new_cdp_session(page)
    touch = lambda kind, at: client.send(  # noqa: E731
        "Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y} for x, y in at]}
    )
    touch("touchStart", [(100, 150)])
    for i in range(10):
        touch("touchMove", [(100 + 15 * i, 150 + 10 * i)])
    touch("touchEnd", [])
    assert not page.locator("#empty").is_visible()
    phone.draw()
    phone.close()


def test_every_control_has_a_name_and_contrast_suffices(studio: Studio) -> None:
    """What axe-core looks at first: names, roles, ids, and AA contrast in both themes."""
    page = studio.page
    page.click("#examples button >> nth=1")
    studio.done()
    page.click("#more summary")
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, canvas, img, [role]')].filter(node =>
          !(node.ariaLabel || node.getAttribute('aria-labelledby') || node.labels?.length || node.textContent.trim()
            || node.hasAttribute('alt') || node.getAttribute('aria-hidden') || node.closest('[aria-hidden]')
            || node.getAttribute('role') === 'status' || node.querySelector('img'))).map(node => node.outerHTML)"""
    )
    assert not nameless
    assert page.evaluate(
        "(ids => ids.length === new Set(ids).size)([...document.querySelectorAll('[id]')].map(n => n.id))"
    )
    for _ in range(2):
        assert all(ratio >= 4.5 for ratio in page.evaluate(CONTRASTS).values()), page.evaluate(CONTRASTS)
        page.click("#theme")


CONTRASTS = """() => {
  const linear = v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = value => {
    const c = new OffscreenCanvas(1, 1).getContext('2d');
    c.fillStyle = value;
    c.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...c.getImageData(0, 0, 1, 1).data].map(linear);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const probe = document.body.appendChild(document.createElement('i'));
  const of = name => { probe.style.color = `var(--${name})`; return light(getComputedStyle(probe).color); };
  const on = { text: ['page', 'panel', 'well', 'accent-soft'], quiet: ['page', 'panel', 'well'],
    warn: ['page', 'panel'],
    'on-accent': ['accent', 'accent-hover'], 'on-soft': ['accent-soft'], bad: ['page', 'panel'], accent: ['page'] };
  const found = {};
  for (const [name, grounds] of Object.entries(on)) for (const ground of grounds) {
    const [a, b] = [of(name), of(ground)].sort((p, q) => q - p);
    found[`${name} on ${ground}`] = (a + .05) / (b + .05);
  }
  probe.remove();
  return found;
}"""


def test_the_page_is_ours_alone() -> None:
    """No address but relative ones, no inline script or style, nothing to build."""
    folder = ROOT / "runtime/car_serve/studio"
    for path in folder.iterdir():
        if path.suffix in (".js", ".css", ".html", ".svg"):
            text = path.read_text(encoding="utf-8").replace("http://www.w3.org/", "")
            assert not re.search(r"https?://|@import|\bstyle=|\bon[a-z]+=\"", text), path.name
            assert path.name == "client.js" or "v1/" not in text.replace("POST /v1/", "").replace(
                "${origin}/v1/", ""
            ), path.name

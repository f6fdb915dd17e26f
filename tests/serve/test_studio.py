"""The studio in a real browser, on a real server with the shipped plan: what a person would do, and what they see."""

from __future__ import annotations

import base64
import re
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from car_runtime import open_plan
from car_runtime.editing.frame import FEATHER
from car_runtime.format.manifest import read_manifest
from fixtures.serving import ROOT, SHIPPED, body, image64
from fixtures.studio import HEART, SCALES, SEAM, SIZE, Studio, pixels


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
    assert made.shape == (SIZE, SIZE, 3)
    # It follows the drawing: coloured inside the heart, light around it.
    assert made[48:72, 48:80].min(axis=-1).mean() < 180
    assert made[:12].mean() > 225
    assert made[-12:].mean() > 225
    # And is what the runtime makes of the same request, to the pixel.
    body = studio.bodies[-1]
    with open_plan() as plan:
        control = pixels(body["control"]).astype(np.uint8)
        again = plan.generate(control, label=body["class"], **{k: body[k] for k in ("seed", "cfg", "top_k", "top_p")})
    assert np.abs(again.images[0].astype(int) - made).max() <= 1


def inside_heart() -> np.ndarray:
    """The pixels of an image well inside the drawn heart, and those well outside, bool [2, SIZE, SIZE]."""
    sheet = Image.new("L", (SIZE, SIZE))
    ImageDraw.Draw(sheet).polygon([(SIZE * x, SIZE * y) for x, y in HEART], fill=255)
    small, large = sheet.filter(ImageFilter.MinFilter(17)), sheet.filter(ImageFilter.MaxFilter(17))
    return np.stack([np.asarray(small) > 0, np.asarray(large) == 0])


def is_a_heart(image: np.ndarray) -> bool:
    """Whether an image is dark or coloured inside the heart and near white outside."""
    inner, outer = inside_heart()
    level = image.min(axis=-1)
    return bool(level[outer].mean() > 215 and level[inner].mean() < level[outer].mean() - 50)


def test_a_new_user_draws_changes_branches_in_paints_and_finds_it_all_again(studio: Studio) -> None:
    page = studio.page
    page.fill("#seed", "77")  # which stays: of other seeds, some draw something else into the heart
    studio.stroke(HEART)
    studio.choose("fluent smileys")
    studio.draw()
    assert is_a_heart(studio.shown())

    studio.choose("twemoji symbols")
    studio.draw()
    studio.done(2)
    assert is_a_heart(studio.shown())
    assert np.abs(studio.image(0) - studio.image(1)).mean() > 2

    page.click("#film li:nth-child(3) button")
    assert np.array_equal(studio.shown(), studio.scales()[2])
    page.locator("#film .fork").nth(2).click()
    studio.done(3)
    new, old = studio.scales(0), studio.scales(1)
    assert [np.array_equal(a, b) for a, b in zip(new, old, strict=True)] == [True] * 3 + [False] * (SCALES - 3)

    page.keyboard.press("m")
    studio.stroke([(0.02, 0.02), (0.2, 0.02), (0.02, 0.1), (0.2, 0.1), (0.02, 0.2), (0.2, 0.2)], on="#mask")
    page.click("#actions >> text=In-paint")
    studio.done(4)
    changed = np.abs(studio.image(0) - studio.image(1)).max(axis=-1)
    assert changed[SIZE // 2 :, SIZE // 2 :].max() == 0
    assert changed[: SIZE // 4, : SIZE // 4].max() > 0

    before, drawn = studio.stored(), page.evaluate("document.querySelector('#pad').toDataURL()")
    page.wait_for_timeout(500)  # the pad is kept 200 ms after the last stroke
    studio.open()
    assert studio.stored() == before
    assert len(before) == 4
    assert page.evaluate("document.querySelector('#pad').toDataURL()") == drawn
    for i, button in enumerate(page.locator("#history [aria-label^=Show]").all()):
        button.click()
        page.wait_for_timeout(50)
        assert np.array_equal(studio.shown(), studio.image(i))
        assert page.locator("#film img").count() == SCALES
    assert is_a_heart(studio.shown())


def test_every_kind_of_control_has_an_example_that_follows_it(studio: Studio, tmp_path: Path) -> None:
    """A reload, the history and a PNG that is brought know the kind, too."""
    page, follows = studio.page, "document.querySelector('#follows').value"
    kinds = page.eval_on_selector_all("#follows option", "all => all.map(({ value }) => value)")
    assert kinds == list(read_manifest(SHIPPED).model.branches)
    assert page.locator("#examples button").count() == len(kinds)
    for i in range(len(kinds)):
        page.evaluate("i => document.querySelectorAll('#examples button')[i].click()", i)
        studio.done(i + 1)
    first, *others = [body["control"] for body in studio.bodies]
    assert isinstance(first, str)
    named = [next(iter(control)) for control in others]
    assert set(named) == set(kinds[1:])
    page.wait_for_timeout(500)  # the pad is kept 200 ms after it changed
    studio.open()
    assert page.evaluate(follows) == named[-1]
    page.locator("#history [aria-label^=Show]").last.click()
    page.wait_for_function(f"() => {follows} === {kinds[0]!r}")
    (tmp_path / "a.png").write_bytes(base64.b64decode(studio.stored()[0]["images"][0]["png"]))
    page.set_input_files("#file", str(tmp_path / "a.png"))
    page.wait_for_function("() => document.querySelector('#pad-note').textContent.includes('Restored')")
    assert page.evaluate(follows) == named[-1]


def test_a_stroke_may_start_on_an_example(studio: Studio) -> None:
    page = studio.page
    box, pad = (page.locator(what).bounding_box() for what in ("#examples button >> nth=1", "#pad"))
    start = ((box["x"] + box["width"] / 2 - pad["x"]) / pad["width"], (box["y"] + 20 - pad["y"]) / pad["height"])
    studio.stroke([start, (start[0], 0.8)])
    assert not studio.bodies
    lit = "([x, y]) => document.querySelector('#pad').getContext('2d').getImageData(512 * x, 512 * y, 1, 1).data[0]"
    assert page.evaluate(lit, start) == page.evaluate(lit, [start[0], 0.79]) == 255
    page.keyboard.press("Control+z")
    page.click("#examples button >> nth=1")
    studio.done()


def test_an_image_that_nobody_keeps_is_given_back(studio: Studio) -> None:
    page = studio.page
    page.evaluate(
        """async () => {
          const { url } = await import('/studio/page.js');
          window.kept = await (await fetch('/studio/heart.png')).blob();
          window.addresses = [url(window.kept), url(await (await fetch('/studio/heart.png')).blob())]; }"""
    )
    browser = studio.context.new_cdp_session(page)
    there = """() => Promise.all(addresses.map((address) => new Promise((done) => {
      const image = new Image();
      image.onload = () => done(true);
      image.onerror = () => done(false);
      image.src = address; })))"""
    until = time.monotonic() + 20
    while page.evaluate(there) != [True, False] and time.monotonic() < until:
        browser.send("HeapProfiler.collectGarbage")
        page.wait_for_timeout(50)
    assert page.evaluate(there) == [True, False]


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

    wanted = derive(Image.open(ROOT / "examples/photos/mouse.png"), "canny", SIZE)
    sent = pixels(studio.bodies[-1]["control"])
    assert np.array_equal(sent[..., 0], np.asarray(wanted).reshape(SIZE, SIZE, -1)[..., 0])


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_an_image_that_is_dropped_or_pasted_becomes_the_drawing(studio: Studio, way: str) -> None:
    page, file = studio.page, ROOT / "examples/heart.png"
    if way == "drop":
        box = page.locator("#pad").bounding_box()
        browser = studio.context.new_cdp_session(page)
        for kind in ("dragEnter", "dragOver", "drop"):
            data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
            place = {"x": box["x"] + 50, "y": box["y"] + 50}
            browser.send("Input.dispatchDragEvent", {"type": kind, "data": data, **place})
            if kind == "dragOver":
                assert page.locator("#pad-frame.dragging").count() == 1
        assert page.locator("#pad-frame.dragging").count() == 0
    else:
        page.evaluate(
            """async data => {
              const blob = new Blob([Uint8Array.from(atob(data), c => c.charCodeAt(0))], { type: 'image/png' });
              await navigator.clipboard.write([new ClipboardItem({ 'image/png': blob })]); }""",
            base64.b64encode(file.read_bytes()).decode(),
        )
        page.keyboard.press("Control+v")
    page.wait_for_selector("#empty", state="hidden")
    studio.draw()
    sent = pixels(studio.bodies[-1]["control"])[..., 0]
    assert np.array_equal(sent, np.asarray(Image.open(file).convert("L")))


def test_what_is_no_image_is_refused_in_words(studio: Studio, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    studio.page.set_input_files("#file", str(tmp_path / "a.png"))
    studio.page.wait_for_selector("#pad-note.bad")
    assert studio.page.locator("#empty").is_visible()


def test_dark_and_light_stay_as_chosen(studio: Studio) -> None:
    page = studio.page
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.click("#theme")
    dark = page.evaluate(ground)
    assert dark != light
    studio.open()
    assert page.evaluate(ground) == dark
    page.click("#theme")
    studio.open()
    assert page.evaluate(ground) == light


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
    assert f"Scale 3 of {SCALES}" in page.inner_text("#actions")
    page.click("text=Branch here")
    studio.done(2)
    new, old = studio.scales(0), studio.scales(1)
    # The same states up to the third scale, to the byte of their previews; others from there on.
    assert all(np.array_equal(a, b) for a, b in zip(new[:3], old[:3], strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(new[3:], old[3:], strict=True))
    assert not np.array_equal(studio.image(0), studio.image(1))
    assert np.abs(studio.image(0) - studio.image(1)).mean() < 40  # a variation, not another image


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
    of_new, of_old = studio.scales(0), studio.scales(1)
    assert all(np.array_equal(a, b) for a, b in zip(of_new[:2], of_old[:2], strict=True))
    assert not np.array_equal(of_new[-1], of_old[-1])


def test_stop_here_gives_the_coarse_image(studio: Studio) -> None:
    page = studio.page
    page.click("#examples button >> nth=1")
    studio.done()
    page.click("#film li:nth-child(4) button")
    page.click("text=Stop here")
    studio.done(2)
    new = studio.stored()[0]["images"][0]
    assert new["receipt"]["stop_after"] == 3
    assert len(new["scales"]) == 4
    assert np.abs(studio.image(0) - studio.scales(1)[3]).max() == 0  # previews of small images are exact


def test_a_branch_leaves_a_locked_seed_and_stops_at_its_scale(studio: Studio) -> None:
    page = studio.page
    page.click("#examples button >> nth=1")
    studio.done()
    page.fill("#seed", "77")
    page.click("#film li:nth-child(3) button")
    page.click("text=Branch here")
    studio.done(2)
    assert page.input_value("#seed") == "77"
    assert studio.bodies[-1]["seed"] != 77
    page.click("#film li:nth-child(5) button")
    shown = studio.shown()
    page.click("text=Stop here")
    studio.done(3)
    assert np.array_equal(studio.image(0), shown)


def test_in_painting_changes_what_was_painted_over(studio: Studio) -> None:
    page = studio.page
    page.click("#examples button >> nth=1")
    studio.done()
    page.keyboard.press("m")
    studio.stroke([(0.4, 0.4), (0.6, 0.4), (0.6, 0.6), (0.4, 0.6), (0.5, 0.5)], on="#mask")
    page.click("text=In-paint")
    studio.done(2)
    mask = pixels(studio.bodies[-1]["edit"]["mask"]).min(axis=-1)
    assert set(np.unique(mask)) == {0, 255}
    assert 0.02 < (mask > 0).mean() < 0.5
    changed = np.abs(studio.image(0) - studio.image(1)).max(axis=-1)
    assert changed[mask > 0].mean() > 1, "nothing of the object was drawn anew"
    # What was not painted over is the image's own, to the byte, but for the seam.
    rows, columns = np.nonzero(mask)
    away = np.ones_like(mask, bool)
    away[rows.min() - SEAM : rows.max() + 1 + SEAM, columns.min() - SEAM : columns.max() + 1 + SEAM] = False
    assert changed[away].max() == 0
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
    # The frame has grown around the image, whose pixels stay.
    grown, image = studio.image(0), studio.image(1)
    assert len(grown) == round(SIZE / 0.56)
    first = round(left * len(grown))
    kept = grown[first : first + SIZE, first : first + SIZE]
    seam = round(FEATHER * len(grown))
    assert np.array_equal(kept[seam:-seam, seam:-seam], image[seam:-seam, seam:-seam])
    assert grown[:12].mean() > 200


def test_cancel_stops_and_the_server_has_nothing_left(studio: Studio, server: Any) -> None:
    page = studio.page
    studio.stroke(HEART)
    page.click("#variations span >> text=9")
    # From within the page: what drives it takes as long for a key as nine images take.
    page.evaluate(
        """() => new Promise((done) => {
          new MutationObserver((_, film) => {
            if (!document.querySelector("#film img")) return;
            film.disconnect();
            document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", bubbles: true }));
            done();
          }).observe(document.body, { childList: true, subtree: true });
          document.querySelector("#draw").click();
        })"""
    )
    page.wait_for_selector("#message >> text=Cancelled")
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
    # The filmstrip is there again, too: the same states, from the tokens in the file.
    other.page.wait_for_function(f"() => document.querySelectorAll('#film img').length === {SCALES}")
    assert all(np.array_equal(a, b) for a, b in zip(other.scales(), studio.scales(), strict=True))
    other.page.click("#lock")
    other.page.click("#draw")
    other.done(2)
    assert np.array_equal(other.image(0), studio.image(0))
    other.close()


def test_a_png_that_the_studio_cannot_draw_again_says_so(studio: Studio, server: Any, tmp_path: Path) -> None:
    request = body(control={"canny": [image64(), 0.4]})
    made = httpx.post(f"{server.address}/v1/pictures", json=request, timeout=60).json()
    (tmp_path / "a.png").write_bytes(base64.b64decode(made["images"][0]["png"]))
    studio.page.set_input_files("#file", str(tmp_path / "a.png"))
    studio.page.wait_for_selector("#pad-note.warn >> text=that the studio does not draw with")
    assert np.array_equal(studio.image(), pixels(made["images"][0]["png"]))


def test_variations_are_chosen_by_a_click(studio: Studio) -> None:
    page = studio.page
    studio.stroke(HEART)
    page.click("#variations span >> text=4")
    studio.draw()
    assert page.locator("#images button").count() == 4
    page.click("#images button >> nth=2")
    assert page.get_attribute("#images button >> nth=2", "aria-pressed") == "true"


def edited(studio: Studio, how: str) -> None:
    """An example image and, as its second version, what an edit makes of it."""
    page = studio.page
    page.click("#examples button >> nth=1")
    studio.done()
    if how == "draw":
        return
    if how == "paint":
        page.keyboard.press("m")
        studio.stroke([(0.15, 0.15), (0.4, 0.15), (0.4, 0.4), (0.15, 0.4), (0.3, 0.25)], on="#mask")
        page.click("text=In-paint")
    elif how == "extend":
        page.keyboard.press("x")
        page.click("#actions >> text=Extend")
    else:
        if how == "restyle":
            studio.choose("noto smileys")
        page.click("#film li:nth-child(3) button")
        page.click("#actions >> text=" + {"branch": "Branch here", "restyle": "Restyle", "stop": "Stop here"}[how])
    studio.done(2)


def run_command(kind: str, words: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """What a copied command writes, where its files were saved."""
    monkeypatch.chdir(folder)
    if kind == "car-run":
        from car_runtime.cli.main import main

        assert main(shlex.split(words)[1:]) == 0
    elif kind == "Python":
        exec(compile(words, "copied", "exec"), {})
    else:
        subprocess.run(["sh", "-c", words], check=True, timeout=60)
    return np.asarray(Image.open(folder / "image.png").convert("RGB")).astype(int)


@pytest.mark.parametrize("how", ["draw", "branch", "restyle", "stop", "paint", "extend"])
def test_copied_commands_draw_the_same_image(
    studio: Studio, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = studio.page
    saved: list[Any] = []
    page.on("download", lambda download: saved.append(download))
    edited(studio, how)
    for kind in ("car-run", "Python", "curl"):
        folder = tmp_path / kind
        folder.mkdir()
        page.click("[aria-label='Copy as a command']")
        page.click(f"#actions >> text={kind}")
        page.wait_for_function("k => document.querySelector('#image-note').textContent.includes('as ' + k)", arg=kind)
        words = page.evaluate("navigator.clipboard.readText()")
        files = re.findall(r"\w+\.png", page.inner_text("#image-note").split("Save")[0])
        saved.clear()
        page.click("#image-note button")
        until = time.monotonic() + 10
        while len(saved) < len(files) and time.monotonic() < until:
            page.wait_for_timeout(20)
        for download in saved:
            download.save_as(folder / download.suggested_filename)
        assert sorted(path.name for path in folder.iterdir()) == sorted(files)
        made = run_command(kind, words, folder, monkeypatch)
        assert made.shape == studio.image().shape, (kind, words)
        assert np.abs(made - studio.image()).max() <= 1, (kind, words)


def test_a_mask_is_painted_on_the_chosen_image_alone(studio: Studio) -> None:
    page = studio.page
    studio.stroke(HEART)
    page.click("#variations span >> text=4")
    studio.draw()
    page.click("#images button >> nth=2")
    page.keyboard.press("m")
    assert page.locator("#images button:visible").count() == 1
    assert page.locator("#images button:visible").bounding_box() == page.locator("#image-frame").bounding_box()
    studio.stroke([(0.1, 0.1), (0.3, 0.1), (0.1, 0.2), (0.3, 0.2)], on="#mask")
    page.click("text=In-paint")
    studio.done(2)
    assert studio.bodies[-1]["edit"]["index"] == 2
    new, old = (pixels(item["images"][index]["png"]) for item, index in zip(studio.stored(), (0, 2), strict=True))
    assert np.array_equal(new[SIZE // 2 :], old[SIZE // 2 :])


def test_a_class_that_does_not_exist_is_said_where_it_is_written(studio: Studio) -> None:
    page = studio.page
    studio.stroke(HEART)
    page.fill("#class", "hart")
    page.keyboard.press("Escape")
    page.click("#draw")
    assert "No class is called “hart”" in page.inner_text("#class-note")
    assert not studio.bodies
    page.click("#class-note button")
    page.fill("#class", "fluent")
    assert page.get_attribute("#class", "aria-invalid") == "false"
    page.click("#classes li >> text=fluent-symbols")
    assert not page.inner_text("#class-note")
    studio.draw()
    assert studio.bodies[-1]["class"] == "fluent-symbols"


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


def violations(studio: Studio) -> list[str]:
    """What axe-core finds on the page as it is, a line for each node."""
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed"
    )
    found = axe.Axe().run(studio.page).response
    return [
        f"{rule['id']} ({rule['impact']}): {node['html'][:120]} {node['failureSummary'][:200]}"
        for rule in found["violations"]
        for node in rule["nodes"]
    ]


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_axe_core_finds_nothing(chromium: Any, server: Any, tmp_path: Path, width: int, scheme: str) -> None:
    """Empty, done with everything open, with a mask, comparing, with errors, and the help sheet."""
    studio = Studio(chromium, server.address, viewport={"width": width, "height": 844}, color_scheme=scheme)
    page = studio.page
    page.emulate_media(reduced_motion="reduce", color_scheme=scheme)  # no colour is caught on its way to another
    assert not violations(studio)
    page.click("#examples button >> nth=1")
    studio.done()
    page.click("#variations span >> text=4")
    studio.draw()
    page.click("#more summary")
    page.click("#class")
    page.click("#film li:nth-child(3) button")
    assert not violations(studio)
    page.keyboard.press("Escape")
    for key in ("m", "x", "c"):
        page.locator("#image-frame").click(position={"x": 5, "y": 5})
        page.keyboard.press("Escape")
        page.keyboard.press(key)
        assert not violations(studio)
    page.keyboard.press("Escape")
    limits = server.service.limits
    object.__setattr__(limits, "queue", 0)
    try:
        page.click("#draw")
        page.wait_for_function("() => document.querySelector('#message').textContent.includes('queue is full')")
        assert not violations(studio)
    finally:
        object.__setattr__(limits, "queue", 64)
    (tmp_path / "a.png").write_bytes(b"no image")
    page.set_input_files("#file", str(tmp_path / "a.png"))
    page.wait_for_selector("#pad-note.bad")
    page.click("#help")
    page.wait_for_selector("#sheet[open]")
    assert not violations(studio)
    page.keyboard.press("Escape")
    assert not violations(studio)
    studio.close()


def test_the_page_is_ours_alone() -> None:
    """No address but relative ones, no inline script or style, nothing to build."""
    folder = ROOT / "runtime/car_serve/studio"
    for path in folder.rglob("*"):
        if path.suffix in (".js", ".css", ".html", ".svg"):
            text = path.read_text(encoding="utf-8").replace("http://www.w3.org/", "")
            assert not re.search(r"https?://|@import|\bstyle=|\bon[a-z]+=\"", text), path.name
            assert path.name == "client.js" or "v1/" not in text.replace("POST /v1/", "").replace(
                "${origin}/v1/", ""
            ), path.name

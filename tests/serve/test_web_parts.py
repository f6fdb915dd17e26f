"""What a page computes without a server, compared with Python: random numbers, images, control maps, receipts."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from car_runtime.control_checks import prepare_control
from car_runtime.controls import derive
from car_runtime.conventions import PRESETS
from car_runtime.format.manifest import read_manifest
from car_runtime.images import control_pyramid, fitted, open_image, text_chunks
from car_runtime.receipt import pack, plan_digest, receipt_of
from car_runtime.request import uniforms
from fixtures.serving import SHIPPED
from fixtures.site import Site

ROOT = Path(__file__).parents[2]
PHOTOS = sorted((ROOT / "examples/photos").iterdir())


@pytest.fixture(scope="module")
def run(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Run a function of JavaScript, which imports modules of the studio, in a page."""
    site = Site(ROOT / "runtime/car_serve")
    page = chromium.new_page()
    page.goto(site.url + "/blank")

    def call(script: str, argument: Any = None) -> Any:
        return page.evaluate(script, argument)

    yield call
    page.close()
    site.close()


def png(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def cut_out(side: int = 96) -> Image.Image:
    """A shaded disc with a soft edge on transparency, RGBA."""
    y, x = np.mgrid[:side, :side] / (side - 1) * 2 - 1
    r = np.hypot(x, y)
    rgb = np.stack([120 + 100 * x, 128 - 90 * y, 200 - 120 * r], -1)
    alpha = np.clip((0.8 - r) * side / 4, 0, 1) * 255
    return Image.fromarray(np.concatenate([np.clip(rgb, 0, 255), alpha[..., None]], -1).astype(np.uint8))


def test_the_page_draws_numpys_random_numbers_to_the_bit(run: Callable[..., Any]) -> None:
    seeds = [0, 1, 7, 2**31, 2**32 - 1, 2**32, 2**53 - 1, *range(100, 110)]
    found = run(
        """async (seeds) => {
          const { uniforms } = await import('/studio/web/random.js');
          return seeds.map((seed) => [...uniforms(seed, 683)]);
        }""",
        seeds,
    )
    assert np.array_equal(np.array(found), uniforms(seeds, 683).astype(float))


def test_the_page_draws_the_same_numbers_of_seeds_beyond_javascripts_numbers(run: Callable[..., Any]) -> None:
    found = run("async () => [...(await import('/studio/web/random.js')).uniforms(9223372036854775807n, 9)]")
    assert np.array_equal(np.array(found), uniforms([2**63 - 1], 9)[0].astype(float))


@pytest.mark.parametrize("kind", ["RGB", "RGBA"])
def test_images_are_resized_as_pillow_does_to_the_bit(run: Callable[..., Any], kind: str) -> None:
    rng = np.random.default_rng(3)
    channels = len(kind)
    source = Image.fromarray(rng.integers(0, 256, (50, 70, channels), np.uint8))
    found = run(
        """async ([data, sizes, channels]) => {
          const { image, resize, fitted } = await import('/studio/web/pixels.js');
          const source = image(70, 50, channels, Uint8Array.from(data));
          return [
            ...sizes.flatMap((s) => ['bicubic', 'lanczos'].map((f) => [...resize(source, s, s, f).data])),
            ...['crop', 'pad', 'stretch'].map((fit) => [...fitted(source, 33, fit, [9, 8, 7]).data]),
          ];
        }""",
        [np.asarray(source).ravel().tolist(), [7, 33, 128], channels],
    )
    filters = (Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
    wanted = [np.asarray(source.resize((s, s), f)).ravel() for s in (7, 33, 128) for f in filters]
    wanted += [np.asarray(fitted(source, 33, fit, (9, 8, 7))).ravel() for fit in ("crop", "pad", "stretch")]
    for one, other in zip(found, wanted, strict=True):
        assert np.array_equal(one, other)


def test_a_png_is_read_and_written_to_the_pixel_with_its_texts(run: Callable[..., Any], tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    image = Image.fromarray(rng.integers(0, 256, (20, 31, 3), np.uint8))
    written = run(
        """async (data) => {
          const { decode, encodePng, toBytes, toBase64 } = await import('/studio/web/codec.js');
          return toBase64(await encodePng(await decode(toBytes(data)), { one: 'café', two: '日本' }));
        }""",
        png(image),
    )
    path = tmp_path / "image.png"
    path.write_bytes(base64.b64decode(written))
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(image))
    assert text_chunks(path) == {"one": "café", "two": "日本"}


@pytest.mark.parametrize("mode", ["RGBA", "L", "LA", "P"])
def test_pngs_of_every_common_kind_are_read_as_python_reads_them(run: Callable[..., Any], mode: str) -> None:
    data = png(cut_out().convert(mode))
    found = run(
        """async (data) => {
          const { decode, toBytes } = await import('/studio/web/codec.js');
          const image = await decode(toBytes(data));
          return [image.channels, [...image.data]];
        }""",
        data,
    )
    wanted = np.asarray(open_image(io.BytesIO(base64.b64decode(data))))
    assert found[0] == wanted.shape[2]
    assert np.array_equal(found[1], wanted.ravel())


DERIVE = """async ([data, convention, size, fit]) => {
  const { decode, toBytes } = await import('/studio/web/codec.js');
  const { derive } = await import('/studio/web/controls.js');
  return [...derive(await decode(toBytes(data)), convention, size, fit).map.data];
}"""


@pytest.mark.parametrize("name", ["canny", "canny-grey"])
@pytest.mark.parametrize("photo", range(2))
def test_canny_of_a_photo_is_pythons_to_the_bit(run: Callable[..., Any], name: str, photo: int) -> None:
    image = Image.open(PHOTOS[photo]).convert("RGB")
    image.thumbnail((300, 300))
    for size, fit in ((64, "crop"), (128, "pad")):
        convention = PRESETS[name]
        found = run(DERIVE, [png(image), json.loads(as_json(convention)), size, fit])
        wanted = derive(image, convention, size, fit=fit)
        assert wanted.any()
        assert np.array_equal(found, wanted.ravel())


@pytest.mark.parametrize(
    "name",
    ["hed-soft", "depth-dome", "depth-inverse", "normal-dome", "normal-directx", "sketch-dodge", "sketch-dark"],
)
def test_other_maps_of_a_photo_are_within_one_grey_level(run: Callable[..., Any], name: str) -> None:
    convention = PRESETS[name]
    image = cut_out()
    found = run(DERIVE, [png(image), json.loads(as_json(convention)), 64, "crop"])
    wanted = derive(image, convention, 64).ravel().astype(int)
    assert np.ptp(wanted) > 50
    assert np.abs(np.array(found) - wanted).max() <= 1


def test_a_control_is_made_smaller_for_each_scale_as_python_does(run: Callable[..., Any]) -> None:
    scales = read_manifest(SHIPPED).scales
    image = open_image(ROOT / "examples/umbrella.png").convert("RGB")
    found = run(
        """async ([data, sides]) => {
          const { decode, toBytes } = await import('/studio/web/codec.js');
          const { resize } = await import('/studio/web/pixels.js');
          const image = await decode(toBytes(data));
          return sides.map((side) => [...resize(image, side, side, 'bicubic').data]);
        }""",
        [png(image), [scale.control_size for scale in scales]],
    )
    for one, other in zip(found, control_pyramid(image, scales), strict=True):
        assert np.array_equal(one, other.ravel())


def maps() -> dict[str, tuple[Image.Image, str]]:
    """Control maps with something to say of each, and the convention they are judged by."""
    lines = np.zeros((64, 64, 3), np.uint8)
    lines[20:24, 10:50] = 255
    thin = np.zeros((640, 640, 3), np.uint8)
    thin[300, 50:600] = 255
    thick = thin.copy()
    thick[300:330, 50:600] = 255
    ink = np.zeros((64, 64, 4), np.uint8)
    ink[20:24, 10:50, 3] = 255
    ramp = np.repeat(np.linspace(100, 130, 64)[None, :, None], 64, 0).repeat(3, 2).astype(np.uint8)
    photo = Image.open(PHOTOS[0]).convert("RGB").resize((80, 64))
    return {
        "good": (Image.fromarray(lines), "canny"),
        "inverted": (Image.fromarray(255 - lines), "canny"),
        "blank": (Image.fromarray(lines * 0), "canny"),
        "photo": (photo, "canny"),
        "grey photo": (photo.convert("L").convert("RGB").resize((64, 64)), "canny"),
        "thin": (Image.fromarray(thin), "canny"),
        "thick": (Image.fromarray(thick), "canny"),
        "black ink on nothing": (Image.fromarray(ink), "canny"),
        "flat depth": (Image.fromarray(ramp), "depth"),
        "no normals": (Image.fromarray(ramp), "normal"),
    }


@pytest.mark.parametrize("case", list(maps()))
def test_a_map_is_judged_as_python_judges_it(run: Callable[..., Any], case: str) -> None:
    image, name = maps()[case]
    found = run(
        """async ([data, convention]) => {
          const { decode, toBytes } = await import('/studio/web/codec.js');
          const { prepareControl } = await import('/studio/web/checks.js');
          const { square, warnings } = prepareControl(await decode(toBytes(data)), convention, 64);
          return [[...square.data], warnings];
        }""",
        [png(image), json.loads(as_json(PRESETS[name]))],
    )
    square, warnings = prepare_control(open_image(image), PRESETS[name], 64, None)
    assert np.array_equal(found[0], np.asarray(square).ravel())
    # The same findings in the same words, but for the remedy, which names flags in a terminal.
    assert [line.split(";")[0] for line in found[1]] == [line.split(";")[0] for line in warnings]


def test_receipts_are_read_and_written_as_pythons(run: Callable[..., Any]) -> None:
    manifest = read_manifest(SHIPPED)
    rng = np.random.default_rng(5)
    tokens = rng.integers(-1, manifest.model.vocab, manifest.tokens)
    lines = maps()["good"][0]
    plan = {
        "digest": plan_digest(manifest),
        "name": manifest.name,
        "tokens": manifest.tokens,
        "vocab": manifest.model.vocab,
        "defaultBranch": "canny",
    }
    settings = {"label": 3, "cfg": 1.25, "top_k": 100, "top_p": 0.00002, "seed": 2**53 - 1, "edit": "whole"}
    texts = run(
        """async ([plan, settings, tokens, control]) => {
          const { writeReceipt } = await import('/studio/web/receipt.js');
          const { decode, toBytes } = await import('/studio/web/codec.js');
          const image = await decode(toBytes(control));
          return writeReceipt(plan, settings, tokens, [{ branch: 'canny', weight: 1, image, png: control }], image);
        }""",
        [plan, settings, tokens.tolist(), png(lines)],
    )
    receipt = receipt_of(texts, manifest)
    assert receipt is not None
    assert np.array_equal(receipt.tokens, tokens)
    assert dict(receipt.settings) == settings
    assert receipt.is_of(lines)

    from car_runtime.receipt import Receipt, text_of

    own = text_of(
        Receipt(plan=plan["digest"], name="é\u2028", settings=settings | {"cfg": 4.0}, tokens=tokens, control=None),
        manifest.model.vocab,
    )
    read = """async ([plan, text]) => {
      const { readReceipt } = await import('/studio/web/receipt.js');
      try {
        const { settings, tokens } = await readReceipt({ 'car-receipt': text }, plan);
        return [settings, [...tokens]];
      } catch (error) { return error.message; }
    }"""
    found = run(read, [plan, own])
    assert found[0] == settings | {"cfg": 4}
    assert found[1] == tokens.tolist()
    assert "altered" in run(read, [plan, own.replace('"cfg":4.0', '"cfg":5.0')])
    packed = run("async ([t, v]) => (await import('/studio/web/receipt.js')).pack(t, v)", [tokens.tolist(), 1024])
    assert packed == pack(tokens, 1024)


def as_json(convention: Any) -> str:
    from dataclasses import asdict

    return json.dumps(asdict(convention))

"""One file means one image: training and runtime read every kind alike, fit it alike, refuse it alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from car_runtime import images as runtime
from car_runtime.control_checks import prepare_control
from car_runtime.conventions import PRESETS
from car_runtime.errors import CarError
from car_train.data import images as train
from car_train.data.dataset import ControlledImages
from car_train.errors import UserError
from fixtures.awkward import KINDS, photo, strokes

GROUNDS = {"black": (0, 0, 0), "white": (255, 255, 255), "flat": (128, 128, 255)}
GREY = np.asarray(photo((60, 45)).convert("L"))


def _rgba() -> Image.Image:
    image = photo((60, 45)).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((60, 45)))
    return image


def _palette(transparency: object) -> Callable[[Path], None]:
    return lambda path: photo((60, 45)).quantize(16).save(path, "PNG", transparency=transparency)


def _with_exif(turn: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = turn
        photo((60, 45)).save(path, "JPEG", exif=exif)

    return write


FILES: dict[str, Callable[[Path], None]] = {
    "rgb": lambda p: photo((60, 45)).save(p, "PNG"),
    "grey": lambda p: Image.fromarray(GREY).save(p, "PNG"),
    "grey 16": lambda p: Image.fromarray(GREY.astype(np.uint16) * 257).save(p, "PNG"),
    "grey 16 with a transparent level": lambda p: Image.fromarray(GREY.astype(np.uint16)).save(
        p, "PNG", transparency=int(GREY[0, 0])
    ),
    "grey 16 tiff, big-endian": lambda p: Image.frombytes("I;16B", (60, 45), GREY.astype(">u2").tobytes()).save(
        p, "TIFF"
    ),
    "grey 32": lambda p: Image.fromarray(GREY.astype(np.int32) * 200).save(p, "TIFF"),
    "float": lambda p: Image.fromarray(GREY.astype(np.float32) / 255).save(p, "TIFF"),
    "1 bit": lambda p: photo((60, 45)).convert("1").save(p, "PNG"),
    "grey alpha": lambda p: _rgba().convert("LA").save(p, "PNG"),
    "rgba": lambda p: _rgba().save(p, "PNG"),
    "rgba webp": lambda p: _rgba().save(p, "WEBP", lossless=True),
    "rgb with a transparent colour": lambda p: photo((60, 45)).save(
        p, "PNG", transparency=photo((60, 45)).getpixel((0, 0))
    ),
    "grey with a transparent level": lambda p: Image.fromarray(GREY).save(p, "PNG", transparency=int(GREY[0, 0])),
    "palette": lambda p: photo((60, 45)).quantize(16).save(p, "PNG"),
    "palette, one transparent": _palette(3),
    "palette, all of some alpha": _palette(bytes(range(0, 256, 16))),
    "gif": lambda p: photo((60, 45)).quantize(16).save(p, "GIF", transparency=2),
    "cmyk jpeg": lambda p: photo((60, 45)).convert("CMYK").save(p, "JPEG"),
    "cmyk tiff": lambda p: photo((60, 45)).convert("CMYK").save(p, "TIFF"),
    "ycbcr tiff": lambda p: photo((60, 45)).convert("YCbCr").save(p, "TIFF"),
    "bmp": lambda p: photo((60, 45)).save(p, "BMP"),
    "premultiplied": lambda p: _rgba().convert("RGBa").convert("RGBA").save(p, "PNG"),
    **{f"exif {turn}": _with_exif(turn) for turn in range(1, 9)},
    "float in metres": lambda p: Image.fromarray(GREY.astype(np.float32)).save(p, "TIFF"),
    "float nan": lambda p: Image.fromarray(np.full((9, 9), np.nan, np.float32)).save(p, "TIFF"),
    "negative": lambda p: Image.fromarray(GREY.astype(np.int32) - 300).save(p, "TIFF"),
    "truncated": lambda p: (photo().save(p, "PNG"), p.write_bytes(p.read_bytes()[:2000]))[0],
    "ppm": lambda p: photo().save(p, "PPM"),
    "ico": lambda p: photo().save(p, "ICO"),
    "eps": lambda p: photo().save(p, "EPS"),
    "text": lambda p: (p.write_text("no image"), None)[1],
}
if features.check("avif"):
    FILES["avif"] = lambda p: photo((60, 45)).save(p, "AVIF")
REFUSED = {"float in metres", "float nan", "negative", "truncated", "ppm", "ico", "eps", "text"}


@pytest.mark.parametrize("kind", FILES)
def test_training_and_runtime_read_one_image(kind: str, tmp_path: Path) -> None:
    FILES[kind](tmp_path / "x.png")  # whatever it is: the name doesn't count
    if kind in REFUSED:
        with pytest.raises(CarError, match="; "):
            runtime.open_image(tmp_path / "x.png")
        with pytest.raises(UserError, match="; "):
            train.open_image(tmp_path / "x.png")
        return
    here, there = runtime.open_image(tmp_path / "x.png"), train.open_image(tmp_path / "x.png")
    assert here.mode == there.mode
    np.testing.assert_array_equal(np.asarray(here), np.asarray(there))
    for ground in GROUNDS.values():
        for fit in ("crop", "pad", "stretch"):
            of_map = runtime.fitted(runtime.drawn_on_ground(here, ground)[0], 32, fit, ground)
            trained = train.fitted(train.open_map(tmp_path / "x.png", ground), 32, fit, ground)
            np.testing.assert_array_equal(np.asarray(of_map), np.asarray(trained))
            np.testing.assert_array_equal(
                np.asarray(runtime.fitted(here, 32, fit, (255, 255, 255))), np.asarray(train.fitted(there, 32, fit))
            )


def test_deep_grey_and_float_mean_what_8_bits_mean(tmp_path: Path) -> None:
    for kind in ("grey", "grey 16", "float"):
        FILES[kind](tmp_path / "x")
        np.testing.assert_array_equal(np.asarray(train.open_image(tmp_path / "x"))[..., 0], GREY)


@pytest.mark.parametrize("kind", ["grey 16 with a transparent level", "grey with a transparent level", "gif"])
def test_a_level_that_is_declared_transparent_shows_the_ground(kind: str, tmp_path: Path) -> None:
    FILES[kind](tmp_path / "x")
    image = np.asarray(train.open_image(tmp_path / "x"))
    shown = np.asarray(train.on_ground(train.open_image(tmp_path / "x"), (1, 2, 3)))
    assert (image[..., 3] == 0).any()
    assert (shown[image[..., 3] == 0] == (1, 2, 3)).all()


@pytest.mark.parametrize("name", ["eps", "ppm", "ico"])
def test_formats_beyond_the_list_are_not_even_tried(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FILES[name](tmp_path / "x.png")
    for plugin in ("EPS", "PPM", "ICO"):
        monkeypatch.setitem(Image.OPEN, plugin, (lambda *_: pytest.fail("tried"), None))
    with pytest.raises(CarError, match="not an image that can be read; give a PNG"):
        runtime.open_image(tmp_path / "x.png")
    with pytest.raises(UserError, match="not a readable image"):
        train.open_image(tmp_path / "x.png")


@pytest.mark.parametrize("ground", [(255, 255, 255, 0), (0, 0, 0, 0), (255, 255, 255, 128)])
def test_a_control_file_with_alpha_is_one_image_in_training_and_runtime(
    ground: tuple[int, ...], tmp_path: Path
) -> None:
    for name in ("pictures", "controls"):
        (tmp_path / name / "cat").mkdir(parents=True)
    Image.new("RGB", (32, 32), "red").save(tmp_path / "pictures" / "cat" / "a.png")
    strokes(ground, (255, 255, 255, 255), "RGBA", size=32).save(tmp_path / "controls" / "cat" / "a.png")
    data = ControlledImages(
        tmp_path / "pictures", 32, split="all", control_type="canny", control_root=tmp_path / "controls"
    )
    image = runtime.open_image(tmp_path / "controls" / "cat" / "a.png")
    run = prepare_control(image, PRESETS["canny"], 32, None)[0]
    np.testing.assert_array_equal(data[0]["control"].numpy(), np.asarray(run))


@pytest.mark.parametrize(("fit", "width", "height"), [("crop", 85, 85), ("pad", 64, 64), ("stretch", 64, 85)])
def test_training_keeps_the_aspect_by_default(fit: str, width: int, height: int, tmp_path: Path) -> None:
    """A disc of 100 pixels in 400×300."""
    (tmp_path / "cat").mkdir()
    pixels = np.full((300, 400), 255, np.uint8)
    y, x = np.mgrid[:300, :400]
    pixels[(x - 200) ** 2 + (y - 150) ** 2 < 50**2] = 0
    Image.fromarray(pixels).save(tmp_path / "cat" / "disc.png")
    dark = (ControlledImages(tmp_path, 256, split="all", preload=False, fit=fit)[0]["image"].numpy() < 0).all(0)
    assert dark.any(0).sum() == pytest.approx(width, abs=1)
    assert dark.any(1).sum() == pytest.approx(height, abs=1)


@pytest.mark.parametrize("kind", KINDS)
def test_awkward_files_are_read_alike(kind: str, tmp_path: Path) -> None:
    path = KINDS[kind](tmp_path)
    try:
        here = runtime.open_image(path)
    except CarError:
        with pytest.raises(UserError):
            train.open_image(path)
        return
    np.testing.assert_array_equal(np.asarray(here), np.asarray(train.open_image(path)))

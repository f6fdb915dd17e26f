"""Images in and out: every kind of file becomes the right RGB or one clear error; nothing half-written stays."""

from __future__ import annotations

import io
import os
import struct
import zlib
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from car_runtime import images
from car_runtime.cli.options import image_source
from car_runtime.errors import ImageError, OutputError, RequestError
from car_runtime.format.manifest import Scale
from car_runtime.images import (
    check_writable,
    contact_sheet,
    control_pyramid,
    fitted,
    load_image,
    png_bytes,
    write_files,
)
from fixtures.golden import REFERENCE

RAMP = np.linspace(0, 255, 256).astype(np.uint8).reshape(16, 16)


def _scales(sizes: list[int]) -> list[Scale]:
    blank = {"tokens": 1, "start": 0, "stop": 1, "next_side": 1, "cfg_ratio": 0.0, "constants": {}}
    return [Scale(side=size // 16, control_size=size, **blank) for size in sizes]  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", ["tiny.npz", "ten.npz"])
def test_control_pyramid_is_what_the_published_model_saw(
    name: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "usable_cores", lambda: threads)
    monkeypatch.setattr(images, "RESIZED_APART", 1)
    golden = np.load(REFERENCE / name)
    stream = io.BytesIO(png_bytes(golden["control_png"]))
    expected = [golden[f"control_{k}"] for k in range(sum(key.startswith("control_") for key in golden) - 1)]
    pyramid = control_pyramid(load_image(stream), _scales([len(image) for image in expected]))
    assert len(pyramid) in (4, 10)
    for ours, theirs in zip(pyramid, expected, strict=True):
        assert ours.dtype == np.uint8
        assert (ours == theirs).all()


def test_fit_takes_the_middle_adds_margins_or_distorts() -> None:
    image = Image.new("RGB", (90, 50), "white")
    image.paste((255, 0, 0), (20, 0, 70, 50))  # the middle square
    for turned in (image, image.transpose(Image.Transpose.ROTATE_90)):
        assert np.unique(np.asarray(fitted(turned, 32, "crop", (0, 0, 0))).reshape(-1, 3), axis=0).tolist() == [
            [255, 0, 0]
        ]
        padded = np.asarray(fitted(turned, 90, "pad", (1, 2, 3)))
        assert padded[0, 0].tolist() == padded[-1, -1].tolist() == [1, 2, 3]
        assert (padded == (1, 2, 3)).all(axis=2).sum() == 90 * 40
    stretched = fitted(image, 32, "stretch", (0, 0, 0))
    assert (np.asarray(stretched) == np.asarray(image.resize((32, 32), Image.Resampling.LANCZOS))).all()


def test_padding_is_transparent_where_the_image_has_alpha() -> None:
    padded = np.asarray(fitted(Image.new("RGBA", (40, 20), (9, 9, 9, 255)), 16, "pad", (255, 255, 255)))
    assert padded[0, 0, 3] == 0
    assert padded[8, 8].tolist() == [9, 9, 9, 255]


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(RAMP),
        Image.fromarray(RAMP).convert("RGB"),
        Image.fromarray(RAMP).convert("LA"),
        Image.fromarray(RAMP).convert("RGBA"),
        Image.fromarray(RAMP).convert("P"),
        Image.fromarray(RAMP.astype(np.uint16) * 257),
        Image.fromarray(RAMP.astype(np.int32) * 257),
        Image.fromarray(RAMP.astype(np.float32) / 255),
    ],
    ids=lambda image: image.mode,
)
@pytest.mark.parametrize("as_file", [False, True])
def test_grey_means_the_same_in_every_mode(tmp_path: Path, image: Image.Image, as_file: bool) -> None:
    if as_file:
        path = tmp_path / ("x.tif" if image.mode in ("F", "I") else "x.png")
        image.save(path)
    loaded = load_image(path if as_file else image)
    assert loaded.mode == "RGB"
    assert (np.asarray(loaded) == RAMP[:, :, None]).all()


def test_one_bit_images_are_black_and_white() -> None:
    bits = Image.fromarray(RAMP > 100)
    assert bits.mode == "1"
    assert (np.asarray(load_image(bits))[..., 0] == np.where(RAMP > 100, 255, 0)).all()


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV"])
def test_colour_spaces_become_rgb(mode: str) -> None:
    red = Image.new("RGB", (16, 16), (250, 10, 10))
    assert np.abs(np.asarray(load_image(red.convert(mode)), int) - (250, 10, 10)).max() <= 3


@pytest.mark.parametrize("background", [(0, 0, 0), (255, 255, 255)])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_show_the_background(mode: str, background: tuple[int, int, int]) -> None:
    if mode == "P":
        image = Image.new("P", (16, 16), 1)
        image.putpalette([0, 0, 0, 90, 90, 90])
        image.info["transparency"] = 1
    else:
        image = Image.new(mode, (16, 16), (90, 90, 90, 0) if mode == "RGBA" else (90, 0))
    assert (np.asarray(load_image(image, background=background)) == background).all()


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 10))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.jpg", exif=exif)
    assert load_image(tmp_path / "x.jpg").size == (10, 20)


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert np.asarray(load_image(tmp_path / "x.gif"))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("shape", [(16, 16), (16, 16, 1), (16, 16, 3)])
def test_arrays_are_images_too(shape: tuple[int, ...]) -> None:
    assert np.asarray(load_image(np.full(shape, 7, np.uint8))).tolist() == np.full((16, 16, 3), 7).tolist()


def _png_header(width: int, height: int) -> bytes:
    """A PNG that only claims its size: decoding it would fail, so a size error shows that it was not tried."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 1000) + b"IDAT"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is not an image that can be read"),
        (b"hello", "is not an image that can be read"),
        (_png_header(8200, 8200), "8200×8200, over 67108864 pixels; make it smaller"),
        (_png_header(10_000, 10_000), "over 67108864 pixels; make it smaller"),
        (_png_header(100_000, 100_000), "over 67108864 pixels; make it smaller"),
        (_png_header(64, 64), "truncated, damaged"),
        (png_bytes(np.zeros((64, 64, 3), np.uint8))[:-40], "truncated, damaged"),
        (png_bytes(np.zeros((1, 1, 3), np.uint8)), "1×1 pixels, under 8 on an edge; give a larger image"),
        (png_bytes(np.zeros((7, 500, 3), np.uint8)), "500×7 pixels, under 8"),
    ],
    ids=["empty", "text", "72 MP", "100 MP", "10 GP", "no data", "truncated", "1×1", "thin"],
)
def test_an_unusable_file_is_refused_in_one_line(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ImageError) as caught:
        load_image(tmp_path / "x.png")
    assert says in str(caught.value)
    assert "x.png" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("nowhere.png", "there is no image 'nowhere.png'; check the path"),
        (".", "'.' is a directory; give an image file"),
        ("a\0b", "; save it"),
        ("x" * 5000, "; "),
        (5, "int is not an image; give a path"),
        (np.zeros((16, 16, 3)), "is float64 [16, 16, 3]; give uint8"),
        (np.zeros((16, 16, 2), np.uint8), "[16, 16, 2]; give uint8"),
        (np.zeros((16,), np.uint8), "uint8 [16]"),
        (np.zeros((0, 16), np.uint8), "the image array is empty"),
        (Image.fromarray(np.full((16, 16), 70_000, np.int32)), "grey values 70000…70000, outside 0…65535"),
        (Image.fromarray(np.full((16, 16), np.nan, np.float32)), "grey values nan"),
        (Image.fromarray(np.full((16, 16), -0.5, np.float32)), "outside 0…1"),
    ],
)
def test_an_unusable_source_is_refused(source: Any, says: str) -> None:
    with pytest.raises(ImageError) as caught:
        load_image(source)
    assert says in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_any_damage_to_a_file_gives_an_image_or_an_image_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8))
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"):
        stream = io.BytesIO()
        image.save(stream, kind)
        for _ in range(40):
            content = bytearray(stream.getvalue())
            for at in rng.integers(0, len(content), 3):
                content[at] = rng.integers(256)
            with suppress(ImageError):
                assert load_image(io.BytesIO(bytes(content))).mode == "RGB"


def test_what_says_no_size_is_read_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    content = png_bytes(np.zeros((16, 16, 3), np.uint8))
    for limit, good in ((len(content), True), (len(content) - 1, False)):
        monkeypatch.setattr("car_runtime.images.MAX_BYTES", limit)
        reader, writer = os.pipe()
        os.write(writer, content)
        os.close(writer)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        with nullcontext() if good else pytest.raises(ImageError, match=f"over {limit} bytes; make"):
            assert load_image(f"/dev/fd/{reader}").size == (16, 16)
        os.close(reader)
        with nullcontext() if good else pytest.raises(RequestError, match=f"over {limit} bytes; make"):
            assert load_image(image_source("-")).size == (16, 16)


def test_png_text_can_be_read_again() -> None:
    png = png_bytes(np.full((9, 9, 3), 5, np.uint8), {"seed": 3, "class": "chaton 🐱"})
    with Image.open(io.BytesIO(png)) as image:
        image.load()
        assert image.text == {"seed": "3", "class": "chaton 🐱"}  # type: ignore[attr-defined]
        assert (np.asarray(image) == 5).all()


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_fit_leaves_the_right_size_untouched(fit: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    assert (np.asarray(fitted(Image.fromarray(image), 32, fit, (0, 0, 0))) == image).all()
    assert fitted(Image.fromarray(image), 16, fit, (0, 0, 0)).size == (16, 16)


@pytest.mark.parametrize(("count", "shape"), [(1, (128, 128)), (5, (128, 656)), (6, (260, 392)), (10, (392, 524))])
def test_contact_sheet_holds_every_image(count: int, shape: tuple[int, int]) -> None:
    # Images of 8 pixels are enlarged to 128, with gaps of 4.
    sheet = contact_sheet([np.full((8, 8, 3), i, np.uint8) for i in range(count)])
    assert sheet.shape == (*shape, 3)
    assert set(np.unique(sheet).tolist()) - {255} == set(range(count))


def test_contact_sheet_leaves_large_images_as_they_are() -> None:
    image = np.random.default_rng(0).integers(0, 255, (130, 140, 3), np.uint8)
    sheet = contact_sheet([image, image])
    assert sheet.shape == (130, 284, 3)
    assert (sheet[:, :140] == image).all()
    assert (sheet[:, 144:] == image).all()


def test_files_are_written_together_with_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    write_files({tmp_path / "a": b"1", tmp_path / "b": b"2"})
    (tmp_path / "plain").touch()
    assert (tmp_path / "a").read_bytes() == b"1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "plain"]
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_when_one_file_cannot_be_written_none_is(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(OutputError, match="choose another place"):
        write_files({tmp_path / "a": b"1", tmp_path / "missing" / "b": b"2"})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_an_output_that_cannot_be_written_is_found_before_the_work(tmp_path: Path) -> None:
    check_writable(tmp_path / "out.png")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for path, says in [
        (tmp_path, "is a directory"),
        (tmp_path / "no" / "out.png", "does not exist; create it"),
        (tmp_path / "file" / "out.png", "does not exist"),
    ]:
        with pytest.raises(OutputError, match=says):
            check_writable(path)
    if os.path.isdir("/proc/self"):  # refuses new files even to the superuser
        with pytest.raises(OutputError, match="choose another place"):
            check_writable("/proc/self/out.png")

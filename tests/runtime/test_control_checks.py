"""What is said about a control: one line where it can't be followed as it is, nothing about a good one."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from car_runtime import open_plan
from car_runtime.cli.main import main
from car_runtime.control_checks import prepare_control
from car_runtime.conventions import PRESETS
from car_runtime.errors import CarError, RequestError
from car_runtime.images import open_image
from car_runtime.photo import converted_map, map_of_photo
from car_runtime.plan import Plan
from fixtures.awkward import KINDS, ball, colours_of, photo, strokes

EXAMPLES = Path(__file__).parents[2] / "examples"
GEOMETRY = ("depth", "normal")


def said(image: Image.Image | Path, name: str, size: int = 64, fit: str | None = None) -> tuple[str, ...]:
    return prepare_control(open_image(image), PRESETS[name], size, fit)[1]


# --- no false alarms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.png")), ids=lambda path: path.stem)
def test_nothing_is_said_about_the_examples(path: Path) -> None:
    for name in ("canny", "canny-grey"):
        assert said(path, name) == ()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("size", [64, 256])
def test_nothing_is_said_about_derived_maps(name: str, size: int) -> None:
    photos = [Image.open(EXAMPLES / "photos" / "mouse.png"), Image.fromarray(255 - np.asarray(photo((256, 256))))]
    photos.append(photo((256, 256)))
    for image in photos[:1] if PRESETS[name].control_type in GEOMETRY else photos:
        made, _ = map_of_photo(image, PRESETS[name], size)
        assert said(Image.fromarray(made), name, size) == ()


# --- what is found --------------------------------------------------------------------------------------------------

WANTED: dict[str, tuple[str, str | None]] = {
    "scanner_1_bit": ("sketch", "inverted"),
    "scanner_paper": ("sketch", "inverted"),
    "tablet_black_ink": ("sketch", "strokes have the colour"),
    "tablet_white_ink": ("sketch", None),
    "tablet_grey_alpha": ("canny", "strokes have the colour"),
    "web_gif": ("canny", "strokes have the colour"),
    "blender_depth": ("depth", None),
    "blender_depth_far_white": ("depth", "inverted"),
    "kinect_millimetres": ("depth", "grey levels 12…16 of 0…255"),
    "depth_coloured": ("depth", "is coloured"),
    "blender_normals": ("normal", "red is turned round"),
    "blender_normals_black_ground": ("normal", "ground is black"),
    "game_normals_directx": ("normal", "red and green are turned round"),
    "normal_bae": ("normal", None),
    "scribble_inverted": ("sketch", "inverted"),
    "canny_1024": ("canny", "lose"),
    "canny_with_jpeg_noise": ("canny", None),
    "empty_canvas": ("canny", "blank"),
    "camera_3_2": ("canny", "not square"),
    "phone_turned": ("canny", "coloured"),
    "photoshop_16_bit": ("canny", "looks like a photo"),
}


@pytest.mark.parametrize("kind", WANTED)
def test_one_line_says_what_is_wrong_with_a_map(kind: str, tmp_path: Path) -> None:
    name, says = WANTED[kind]
    found = [line for line in said(KINDS[kind](tmp_path), name, 128) if kind != "camera_3_2" or "square" in line]
    assert len(found) == (says is not None)
    assert says is None or (says in found[0] and "; " in found[0] and "\n" not in found[0])


@pytest.mark.parametrize("kind", ["blender_depth_metres", "eps"])
def test_what_cannot_be_read_is_refused_with_the_remedy(kind: str, tmp_path: Path) -> None:
    with pytest.raises(CarError, match="; "):
        open_image(KINDS[kind](tmp_path))


@pytest.mark.parametrize(
    ("image", "name", "says"),
    [
        (Image.new("L", (64, 64), 7), "hed", "blank: all of it is RGB 7,7,7"),
        (strokes(0, 255, size=64), "sketch-dark", "inverted"),
        (Image.fromarray(colours_of(ball()[1] * [1, 1, -1])), "normal", "no normal map"),
        (photo(), "normal", "no normal map"),
        (photo(), "depth", "coloured"),
        (Image.fromarray(np.pad([[255]], 31).astype(np.uint8)), "canny", "nearly blank: 1 of"),
    ],
)
def test_maps_of_the_wrong_kind_are_noticed(image: Image.Image, name: str, says: str) -> None:
    found = said(image, name, image.width)
    assert len(found) == 1
    assert says in found[0]


@pytest.mark.parametrize(("width", "says"), [(1, "lose"), (3, "lose"), (12, None), (40, None), (120, None)])
def test_lines_of_a_large_map_are_thin_or_thick_enough(width: int, says: str | None) -> None:
    """Whether they are followed is a matter of their width, not of how many pixels they have."""
    image = Image.new("L", (1200, 1200))
    ImageDraw.Draw(image).ellipse((200, 200, 900, 900), outline=255, width=width)
    found = said(image, "canny", 128)
    assert len(found) == (says is not None)
    assert says is None or says in found[0]


def test_black_strokes_on_nothing_are_drawn_in_white(tmp_path: Path) -> None:
    seen, _ = prepare_control(open_image(KINDS["tablet_black_ink"](tmp_path)), PRESETS["sketch"], 128, None)
    np.testing.assert_array_equal(np.asarray(seen.convert("L")), np.asarray(strokes(0, 255)))


def test_the_ground_is_the_conventions() -> None:
    cutout = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(cutout).rectangle((20, 20, 40, 40), fill=(200, 100, 200, 255))
    for name, preset in PRESETS.items():
        seen, _ = prepare_control(cutout, preset, 64, None)
        assert seen.getpixel((0, 0)) == preset.ground, name


@pytest.mark.parametrize(("fit", "done"), [("crop", "middle"), ("pad", "margins"), ("stretch", "distorted")])
def test_another_aspect_is_said_with_what_was_done(fit: str, done: str) -> None:
    wide = Image.new("L", (192, 64))
    ImageDraw.Draw(wide).ellipse((76, 12, 116, 52), outline=255, width=3)
    found = said(wide, "canny", 64, fit)
    assert "192×64, not square" in found[0]
    assert done in found[0]
    assert said(wide.crop((64, 0, 128, 64)), "canny") == ()


# --- plan and command -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan() -> Any:
    with open_plan(backend="ort-cpu", threads=1) as opened:
        yield opened


def test_a_large_control_draws_what_it_draws_at_the_models_size(plan: Plan) -> None:
    large = strokes(0, 255, width=40, size=1024)
    small = large.resize((128, 128), Image.Resampling.LANCZOS)
    assert (plan.generate(large, 8).tokens == plan.generate(small, 8).tokens).all()


def test_encoding_keeps_the_aspect(plan: Plan) -> None:
    wide = photo((256, 192))
    middle = ImageOps.fit(wide, (192, 192)).resize((128, 128), Image.Resampling.LANCZOS)
    stretched = wide.resize((128, 128), Image.Resampling.LANCZOS)
    assert (plan.encode(wide) == plan.encode(middle)).all()
    assert (plan.encode(wide, fit="stretch") == plan.encode(stretched)).all()
    assert not (plan.encode(wide, fit="pad") == plan.encode(stretched)).all()
    with pytest.raises(RequestError, match="fit is 'tile'; choose crop, pad or stretch"):
        plan.encode(wide, fit="tile")


def test_the_result_has_the_warnings(plan: Plan) -> None:
    assert plan.generate(EXAMPLES / "heart.png", 8).warnings == ()
    (warning,) = plan.generate(ImageOps.invert(Image.open(EXAMPLES / "heart.png")), 8).warnings
    assert "inverted" in warning


def test_the_command_says_it_on_stderr_and_in_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("L", (64, 64)).save("blank.png")
    assert main(["--control", "blank.png", "--threads", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    (warning,) = json.loads(out)["warnings"]
    assert [line for line in err.splitlines() if "warning" in line] == [f"car-run: warning: {warning}"]


def test_control_writes_the_map_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mouse, out = EXAMPLES / "photos" / "mouse.png", tmp_path / "map.png"
    assert main(["control", str(mouse), "-o", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    expected = map_of_photo(mouse, PRESETS["canny"], 128)[0]
    np.testing.assert_array_equal(np.asarray(Image.open(out)), expected)
    assert main(["control", str(mouse), "--type", "normal-opengl", "--size", "32", "-o", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["convention"] == "normal-opengl"
    assert Image.open(out).size == (32, 32)
    for wrong in (["-o", "x.jpg"], ["-o", str(mouse)], ["-o", str(out), "--size=1"], ["-o", str(out), "--fit=x"]):
        assert main(["control", str(mouse), *wrong]) == 2


@pytest.mark.parametrize(
    ("given", "wanted"),
    [(name, name.partition("-")[0]) for name in ("normal-opengl", "normal-directx", "sketch-dark", "depth-inverse")],
)
def test_a_map_becomes_one_of_another_convention(given: str, wanted: str, tmp_path: Path) -> None:
    _, n, _ = ball()
    signs = [-1 if axis in ("left", "up") else 1 for axis in PRESETS[given].axes]
    depth = Image.fromarray(np.rint(255 * (1 - ball()[0])).astype(np.uint8))
    files = {"normal": Image.fromarray(colours_of(n * signs)) if signs else None, "depth": depth}
    (files.get(wanted) or strokes(255, 0)).save(tmp_path / "map.png")  # type: ignore[union-attr]
    assert said(tmp_path / "map.png", wanted, 128) != ()
    pixels, warnings = converted_map(tmp_path / "map.png", PRESETS[given], PRESETS[wanted], 128)
    assert warnings == ()
    assert said(Image.fromarray(pixels), wanted, 128) == ()
    with pytest.raises(RequestError, match="cannot become one of"):
        converted_map(tmp_path / "map.png", PRESETS[given], PRESETS["canny"], 128)


def test_a_map_of_nothing_is_said_by_the_control_command_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (64, 64), "white").save(tmp_path / "empty.png")
    assert main(["control", str(tmp_path / "empty.png"), "-o", str(tmp_path / "map.png"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert "the control is blank" in err
    assert len(json.loads(out)["warnings"]) == 1


def test_the_control_command_reads_stdin_and_refuses_no_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given, out = EXAMPLES / "photos" / "mouse.png", tmp_path / "map.png"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.read_bytes())))
    assert main(["control", "-", "-o", str(out)]) == 0
    expected, _ = map_of_photo(given, PRESETS["canny"], 128)
    np.testing.assert_array_equal(np.asarray(Image.open(out)), expected)
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["control", "-", "-o", str(out)]) == 2
    assert main(["control", str(given), "-o", str(out), "--threads", "0"]) == 2
    assert "threads is 0, but must be a whole number in 1…1024" in capsys.readouterr().err

"""Control images: what they show, and that the runtime derives what training made."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageDraw

from car_runtime import controls as runtime
from car_runtime.errors import ImageError
from car_train.config import CONTROL_TYPES
from car_train.conventions import PRESETS
from car_train.data import controls as train
from car_train.data.images import fitted

SIDES = [32, 64, 100]


def photo(seed: int, width: int, height: int) -> Image.Image:
    """Opaque, with structure at every size, as photos have it: noise at octaves, 1/f."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), np.float32)
    for octave in range(2, 8):
        coarse = rng.standard_normal((2**octave, 2**octave, 3)).astype(np.float32)
        total += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) / 2 ** (octave / 2)
    return Image.fromarray(np.clip(128 + 60 * total, 0, 255).astype(np.uint8))


def drawing(seed: int, side: int = 128) -> Image.Image:
    """Flat shapes with soft edges on a transparent ground, as emoji are."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGBA", (4 * side, 4 * side))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = rng.integers(0, 3 * side, 2)
        w, h = rng.integers(side // 4, 2 * side, 2)
        shape = (draw.ellipse, draw.rectangle)[rng.integers(2)]
        shape((x, y, x + w, y + h), fill=(*(int(c) for c in rng.integers(0, 256, 3)), 255))
    return image.resize((side, side), Image.Resampling.LANCZOS)


def disc(side: int, radius: float, colour: int = 255) -> np.ndarray:
    """A disc of one grey on transparent ground: uint8 [side, side, 4]."""
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    rgba = np.full((side, side, 4), colour, np.uint8)
    rgba[..., 3] = np.where(x * x + y * y <= radius * radius, 255, 0)
    return rgba


def at_size(image: Image.Image, side: int) -> np.ndarray:
    """What training makes of an image before its control: uint8 [side, side, 4]."""
    return np.asarray(fitted(image.convert("RGBA"), side))


# --- one definition, two implementations ----------------------------------------------------------------------------


def test_trainer_runtime_and_config_know_the_same_types() -> None:
    assert tuple(train._MAKERS) == tuple(runtime._MAKERS) == CONTROL_TYPES
    assert train.NEEDS_ALPHA == runtime.NEEDS_ALPHA


@pytest.mark.parametrize(
    "name",
    ["HED_SIGMAS", "HED_HALF", "DEPTH_RELIEF", "BLUR_SHARE", "NORMAL_SIGMA", "SKETCH_GAIN"],
)
def test_constants_are_equal(name: str) -> None:
    assert getattr(train, name) == getattr(runtime, name)


# Few levels make ties and plateaus, where thinning is decided by strict or loose comparison.
greys = hnp.arrays(
    np.uint8,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=20),
    elements=st.sampled_from([0, 1, 40, 80, 120, 200, 255]) | st.integers(0, 255),
)


@settings(deadline=None, max_examples=150)
@given(greys, st.integers(0, 500), st.integers(0, 500))
def test_canny_equals_opencv_to_the_bit(grey: np.ndarray, a: int, b: int) -> None:
    low, high = min(a, b), max(a, b)
    np.testing.assert_array_equal(runtime.canny(grey, low, high), cv2.Canny(grey, low, high))


colours = hnp.arrays(
    np.uint8,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40).map(lambda shape: (*shape, 3)),
    elements=st.sampled_from([0, 1, 40, 80, 120, 200, 255]) | st.integers(0, 255),
)


@settings(deadline=None, max_examples=150)
@given(colours, st.integers(0, 500), st.integers(0, 500))
def test_canny_of_colour_equals_opencv_to_the_bit(rgb: np.ndarray, a: int, b: int) -> None:
    low, high = min(a, b), max(a, b)
    np.testing.assert_array_equal(runtime.canny(rgb, low, high), cv2.Canny(rgb, low, high))


def test_canny_sees_an_edge_between_colours_of_equal_brightness() -> None:
    image = Image.new("RGB", (64, 64), (200, 60, 60))
    ImageDraw.Draw(image).ellipse([16, 16, 48, 48], fill=(60, 131, 60))
    grey, rgb = (runtime.derive(image, name, 64)[..., 0] for name in ("canny-grey", "canny"))
    assert grey.max() == 0
    assert (rgb == cv2.Canny(np.array(image), 100, 200)).all()
    assert 80 < (rgb > 0).sum() < 200  # the outline, π·32 pixels


@pytest.mark.parametrize("side", [1, 2, 3, 17, 64, 256])
@pytest.mark.parametrize("kind", ["noise", "photo", "steps", "drawing"])
def test_canny_equals_opencv_on_images(kind: str, side: int) -> None:
    rng = np.random.default_rng(side)
    grey = {
        "noise": lambda: rng.integers(0, 256, (side, side + 3), dtype=np.uint8),
        "photo": lambda: np.asarray(photo(side, side, side + 5).convert("L")),
        "steps": lambda: np.asarray(photo(side, side + 5, side).convert("L")) // 32 * 32,
        "drawing": lambda: np.asarray(drawing(side).convert("L").resize((side, side))),
    }[kind]()
    if kind in ("noise", "photo"):
        colour = rng.integers(0, 256, (*grey.shape, 3), dtype=np.uint8) if kind == "noise" else None
        rgb = np.asarray(photo(side, grey.shape[1], grey.shape[0])) if colour is None else colour
        np.testing.assert_array_equal(runtime.canny(rgb, 100, 200), cv2.Canny(np.ascontiguousarray(rgb), 100, 200))
    np.testing.assert_array_equal(runtime.canny(grey, 100, 200), cv2.Canny(np.ascontiguousarray(grey), 100, 200))


@pytest.mark.parametrize(("dx", "dy"), [(338, 140), (478, 198), (140, 338), (198, 478)])
def test_canny_rounds_directions_as_opencv(dx: int, dy: int) -> None:
    """Slopes nearest to the limits between directions: one in 2¹⁵ more or less in tan 22.5° changes the outcome."""
    rng = np.random.default_rng(dx)
    for _ in range(200):
        grey = rng.integers(0, 256, (5, 5), dtype=np.uint8)
        grey[1:4, 1:4] = [[0, 0, 0], [0, 0, dx // 2], [0, dy // 2, 0]]  # Sobel gives (dx, dy) in the middle
        np.testing.assert_array_equal(runtime.canny(grey, 0, 1), cv2.Canny(grey, 0, 1))


@pytest.mark.parametrize("name", list(PRESETS))
@pytest.mark.parametrize("side", SIDES)
def test_runtime_derives_what_training_made(name: str, side: int) -> None:
    """Canny to the bit. Elsewhere float32 sums run in another order (1e-7), which tips a rounding now and then:
    1 level at most, in under 1 % of the values (measured: 1 level, 0.7 %)."""
    images = [drawing(seed) for seed in range(6)]
    control_type = PRESETS[name].control_type
    if control_type not in runtime.NEEDS_ALPHA:
        images += [photo(seed, 90 + 40 * seed, 120) for seed in range(4)]
    for image in images:
        made = train.make_control(at_size(image, side), name)
        derived = runtime.derive(image, name, side)
        assert derived.shape == made.shape == (side, side, 3)
        assert derived.dtype == made.dtype == np.uint8
        off = np.abs(derived.astype(int) - made)
        if control_type == "canny":
            assert off.max() == 0
        assert off.max() <= 1
        assert (off > 0).mean() < 0.01


@settings(deadline=None, max_examples=60)
@given(hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=20)))
def test_distance_equals_opencv(mask: np.ndarray) -> None:
    """Both exact before the square root; one float32 rounding (6e-8) apart, so 1e-6 relative."""
    exact = cv2.distanceTransform(np.pad(mask.astype(np.uint8), 1), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    np.testing.assert_allclose(runtime.distance_to_outside(mask), exact, rtol=1e-6)


def test_compositing_on_white_equals_pillow() -> None:
    colour, alpha = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    rgba = np.stack([colour, colour, colour, alpha], axis=2)
    white = Image.new("RGBA", (256, 256), (255, 255, 255, 255))
    expected = np.asarray(Image.alpha_composite(white, Image.fromarray(rgba)).convert("RGB"))
    np.testing.assert_array_equal(train.on_white(rgba), expected)
    np.testing.assert_array_equal(runtime.on_white(rgba), expected)


def test_exif_orientation_is_applied_before_deriving() -> None:
    upright = photo(1, 80, 60)
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # to be turned by 90° clockwise
    np.testing.assert_array_equal(runtime.derive(turned, "canny", 64), runtime.derive(upright, "canny", 64))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "CMYK", "RGB", "RGBA", "I;16"])
def test_any_mode_can_be_derived_from(mode: str) -> None:
    image = photo(2, 70, 50)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    assert runtime.derive(image, "canny", 32).shape == (32, 32, 3)


# --- what the controls show -----------------------------------------------------------------------------------------


def test_dome_over_a_disc_is_a_hemisphere() -> None:
    """Within 1.5 pixels where ρ ≤ 0.8·R: the rim is known to a pixel, and near it the sphere is too steep."""
    side, radius = 101, 40.0
    height, r = train.dome(disc(side, radius)[..., 3] > 0)
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    rho = np.hypot(x, y)
    inside = rho <= 0.8 * radius
    assert r == pytest.approx(radius, abs=1.5)
    np.testing.assert_allclose(height[inside], np.sqrt(radius**2 - rho[inside] ** 2), atol=1.5)
    assert height[rho > radius + 1].max() == 0


def test_depth_is_brightest_in_the_middle_and_0_outside() -> None:
    depth = train.make_control(disc(64, 24), "depth")[..., 0]
    assert depth[31:33, 31:33].min() == depth.max() == 255  # a white disc: dome and relief are both full
    assert depth[0].max() == 0
    row = depth[32, 8:33].astype(int)
    assert (np.diff(row) >= 0).all()


def test_depth_of_dark_things_is_lower_but_has_the_same_dome() -> None:
    white, black = (train.make_control(disc(64, 24, colour), "depth")[32, 32, 0] for colour in (255, 0))
    assert black == pytest.approx(255 / (1 + train.DEPTH_RELIEF), abs=1)
    assert white == 255


def test_normals_of_a_disc_are_those_of_a_sphere() -> None:
    """Red left, green up. Within 0.08 where ρ ≤ 0.7·R: distance is known to a pixel in 40, and the blur flattens."""
    side, radius = 101, 40.0
    n = train.make_control(disc(side, radius), "normal").astype(np.float64) / 127.5 - 1
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    inside = np.hypot(x, y) <= 0.7 * radius
    np.testing.assert_allclose(n[..., 0][inside], -x[inside] / radius, atol=0.08)
    np.testing.assert_allclose(n[..., 1][inside], -y[inside] / radius, atol=0.08)
    assert (n[..., 2][inside] > 0).all()


def test_normals_have_length_1_and_the_ground_faces_the_viewer() -> None:
    control = train.make_control(at_size(drawing(3), 64), "normal")
    length = np.linalg.norm(control / 127.5 - 1, axis=2)
    np.testing.assert_allclose(length, 1, atol=0.01)  # half a level in 127.5, three times
    ground = train.make_control(disc(64, 20), "normal")[0, 0]
    assert ground.tolist() == [128, 128, 255]


@pytest.mark.parametrize("side", [64, 256])
def test_hed_is_black_on_flat_ground_and_bright_on_a_step(side: int) -> None:
    image = np.zeros((side, side, 3), np.uint8)
    image[:, side // 2 :] = 255
    edge = train.make_control(image, "hed")[side // 2, :, 0]
    assert edge[: side // 2 - 12].max() == 0
    # A full step answers with m = 1 on the edge itself, less what the pixel grid takes at the finer scale.
    assert edge.max() > 0.85 * 255
    np.testing.assert_array_equal(edge, edge[::-1])


def test_sketch_draws_white_lines_on_black_and_that_of_0_1_0_dark_on_white() -> None:
    image = np.full((64, 64, 3), 255, np.uint8)
    image[30:33] = 40
    published = train.make_control(image, "sketch")[..., 0]
    assert published[31].min() > 192
    sketch = train.make_control(image, "sketch-dark")[..., 0]
    np.testing.assert_array_equal(sketch, 255 - published)
    assert sketch[31].max() < 64
    assert sketch[:16].min() == sketch[-16:].min() == 255
    flat = train.make_control(np.full((64, 64, 3), 90, np.uint8), "sketch-dark")
    assert flat.min() >= 254


def test_canny_sees_the_image_on_white() -> None:
    white_on_transparent, black_on_transparent = disc(64, 20, 255), disc(64, 20, 0)
    assert train.make_control(white_on_transparent, "canny").max() == 0
    assert train.make_control(black_on_transparent, "canny").max() == 255


@pytest.mark.parametrize("control_type", CONTROL_TYPES)
def test_empty_and_full_images_do_not_fail(control_type: str) -> None:
    for alpha in (0, 255):
        rgba = np.full((32, 32, 4), alpha, np.uint8)
        assert train.make_control(rgba, control_type).shape == (32, 32, 3)
    empty = Image.new("RGBA", (32, 32))
    assert runtime.derive(empty, control_type, 32).shape == (32, 32, 3)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("control_type", ["depth", "normal"])
def test_geometry_without_alpha_is_refused_with_the_remedy(control_type: str) -> None:
    with pytest.raises(ValueError, match=rf"{control_type}.*alpha.*control_root"):
        train.make_control(np.zeros((32, 32, 3), np.uint8), control_type)
    for opaque in (photo(0, 64, 64), photo(0, 64, 64).convert("RGBA")):
        with pytest.raises(ImageError, match=rf"{control_type}.*give the control image with --control"):
            runtime.derive(opaque, control_type, 32)


def test_unknown_types_and_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="'pose'; choose one of: canny"):
        train.make_control(np.zeros((8, 8, 3), np.uint8), "pose")
    with pytest.raises(ValueError, match=r"float64 \[8, 8\]"):
        train.make_control(np.zeros((8, 8)), "canny")  # type: ignore[arg-type]
    with pytest.raises(ImageError, match=r"'pose'.*--control"):
        runtime.derive(photo(0, 64, 64), "pose", 32)

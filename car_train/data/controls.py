"""Control images, made from the images themselves: fast enough to run on the fly, and without weights.

Shape legend: H, W the image's sides, 3 or 4 the channels RGB or RGBA. Images and controls are uint8 HWC. RGBA
is not premultiplied; where colours count, it is composited on white.

`car_runtime.controls` states the same definitions in numpy and Pillow alone; the tests hold the two together: Canny
to the bit, the others to one grey level in 255.

    canny   cv2.Canny(image, 100, 200), of RGB or of grey: white lines of one pixel on black.
    hed     soft edges at two scales, bright on black, after the look of HED (Xie and Tu 2015), without its network.
    depth   a dome over the alpha mask, white = near, plus a little relief from brightness; background 0.
    normal  the normals of that surface, red to the left, green up, blue to the viewer; background (128, 128, 255).
    sketch  pencil lines, white on black: the colour dodge of grey by its blurred inverse, inverted.

That is what the presets named as the types say (`car_train.conventions`); others turn polarity or axes round.
Depth and normal are geometric, so they need the shape of the thing: an alpha channel.
"""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from car_train.conventions import CONTROL_TYPES, ControlConvention, ConventionError, convention

HED_SIGMAS = (1.0, 2.0)  # pixels
HED_HALF = 0.25  # the step height, in units of white − black, that gives a response of one half
DEPTH_RELIEF = 0.15  # share of blurred brightness, relative to a dome of height 1
BLUR_SHARE = 1 / 32  # sigma of the blurs in depth and sketch, as a share of the image's shorter side
NORMAL_SIGMA = 1.0  # pixels
SKETCH_GAIN = 2.5

Image = NDArray[np.uint8]
Floats = NDArray[np.floating[Any]]  # float32, unless said otherwise


def make_control(image: Image, control: str | ControlConvention) -> Image:
    """The control image of an image.

    image: uint8 [H, W, 3 or 4], at the model's size. Depth and normal need 4 channels.
    control: a convention, or the name of a preset (`conventions.PRESETS`).

    Returns uint8 [H, W, 3] in [0, 255]; all three channels are equal but for normals.
    Raises ValueError: unknown name or type, wrong shape or dtype, or no alpha where the type needs it.
    """
    how = convention(control)
    if how.control_type not in _MAKERS:
        raise ConventionError(f"no control type {how.control_type!r}; choose one of: {', '.join(CONTROL_TYPES)}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (3, 4):
        raise ValueError(f"an image is uint8 [H, W, 3 or 4], not {image.dtype} {list(image.shape)}; convert it first")
    if how.control_type in NEEDS_ALPHA and image.shape[2] != 4:
        raise ValueError(
            f"{how.name!r} is made from the alpha channel, and this image has none; use images "
            "with transparency, or make the controls with an annotator and give their folder (control_root)"
        )
    return _MAKERS[how.control_type](np.ascontiguousarray(image), how)


def on_white(image: Image) -> Image:
    """RGB of an image on white, rounded as Pillow's `alpha_composite` does: uint8 [H, W, 3 or 4] → [H, W, 3]."""
    if image.shape[2] == 3:
        return image
    rgb, alpha = image[..., :3].astype(np.uint32), image[..., 3:].astype(np.uint32)
    scaled = rgb * alpha + 255 * (255 - alpha) + 128
    return ((scaled + (scaled >> 8)) >> 8).astype(np.uint8)


def dome(mask: NDArray[np.bool_]) -> tuple[Floats, float]:
    """A surface over a silhouette: √(2·r·d − d²), d the distance to outside, r its maximum; a hemisphere on a disc.

    mask: bool [H, W]; beyond the image's border is outside.
    Returns the height in pixels, float32 [H, W] in [0, r], 0 outside; and r (0 for an empty mask).
    """
    padded = np.pad(mask.astype(np.uint8), 1)
    d = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    d = np.sqrt(np.rint(d * d))  # squared distances are whole; the last bit that OpenCV gives differs by the call
    r = float(d.max())
    return np.sqrt(np.maximum(d * (2 * r - d), 0)), r


def _canny(image: Image, how: ControlConvention) -> Image:
    seen = _grey(image) if how.colour == "grey" else np.ascontiguousarray(on_white(image))
    low, high = how.thresholds
    return _lines(cv2.Canny(seen, low, high), how)


def _lines(x: Image, how: ControlConvention) -> Image:
    """Lines, uint8 [H, W], light on dark as the convention has them: uint8 [H, W, 3]."""
    return _grey_to_rgb(255 - x if how.polarity == "dark-on-light" else x)


def _hed(image: Image, how: ControlConvention) -> Image:
    """m²/(m² + HED_HALF²), with m the mean over scales σ of σ·√(2π)·|∇(G_σ ∗ I)| in the strongest channel.

    The factor makes m the height of a step edge, whatever σ.
    """
    rgb = on_white(image).astype(np.float32) / 255
    m = np.zeros(image.shape[:2], np.float32)
    for sigma in HED_SIGMAS:
        gx, gy = _gradient(_blur(rgb, sigma))
        m += sigma * np.sqrt(2 * np.pi) * np.sqrt(gx * gx + gy * gy).max(axis=2) / len(HED_SIGMAS)
    return _lines(_to_uint8(m * m / (m * m + HED_HALF**2)), how)


def _depth(image: Image, how: ControlConvention) -> Image:
    near = _to_uint8(_relief(image)[0])
    return _grey_to_rgb(255 - near if how.polarity == "far-is-light" else near)


def _normal(image: Image, how: ControlConvention) -> Image:
    height, r, mask = _relief(image)
    gx, gy = _gradient(_blur(height * (r * (1 + DEPTH_RELIEF)), NORMAL_SIGMA))
    n = np.stack([-gx, -gy, np.ones_like(gx)], axis=2)
    n /= np.linalg.norm(n, axis=2, keepdims=True)
    n[~mask] = (0, 0, 1)
    n *= [-1 if axis in ("left", "up") else 1 for axis in how.axes]
    return _to_uint8((n + 1) / 2)


def _relief(image: Image) -> tuple[Floats, float, NDArray[np.bool_]]:
    """Height in [0, 1] (dome of radius r plus brightness, over 1 + DEPTH_RELIEF), r in pixels, mask (alpha ≥ 128)."""
    mask = image[..., 3] >= 128
    height, r = dome(mask)
    luma = _blur(_grey(image).astype(np.float32) / 255, BLUR_SHARE * min(mask.shape))
    return mask * (height / max(r, 1.0) + DEPTH_RELIEF * luma) / np.float32(1 + DEPTH_RELIEF), r, mask


def _sketch(image: Image, how: ControlConvention) -> Image:
    """SKETCH_GAIN·(1 − dodge), dodge = grey / (1 − blur(1 − grey)) = grey / blur(grey); both within [0, 1]."""
    grey = _grey(image).astype(np.float32) / 255
    dodge = np.minimum(grey / np.maximum(_blur(grey, BLUR_SHARE * min(grey.shape)), 1 / 255), 1)
    return _lines(255 - _to_uint8(1 - SKETCH_GAIN * (1 - dodge)), how)


def _grey(image: Image) -> Image:
    grey: Image = cv2.cvtColor(on_white(image), cv2.COLOR_RGB2GRAY)
    return grey


def _blur(x: Floats, sigma: float) -> Floats:
    """Gaussian of radius ⌈3σ⌉, mirrored at the border without repeating it (reflect-101)."""
    side = 2 * int(np.ceil(3 * sigma)) + 1
    blurred: Floats = cv2.GaussianBlur(x, (side, side), sigma, borderType=cv2.BORDER_REFLECT_101)
    return blurred


def _gradient(x: Floats) -> tuple[Floats, Floats]:
    """3×3 Sobel over 8: slope per pixel, to the right and down."""
    return cv2.Sobel(x, cv2.CV_32F, 1, 0, scale=1 / 8), cv2.Sobel(x, cv2.CV_32F, 0, 1, scale=1 / 8)


def _to_uint8(x: Floats) -> Image:
    return np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8)


def _grey_to_rgb(x: Image) -> Image:
    return np.repeat(x[..., None], 3, axis=2)


_MAKERS: dict[str, Callable[[Image, ControlConvention], Image]] = {
    "canny": _canny,
    "hed": _hed,
    "depth": _depth,
    "normal": _normal,
    "sketch": _sketch,
}
NEEDS_ALPHA = frozenset({"depth", "normal"})

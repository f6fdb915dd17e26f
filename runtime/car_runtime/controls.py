"""Control images derived from a photo, as training made them; numpy and Pillow alone.

The definitions, with their constants, are those of `car_train.data.controls`, which has OpenCV to do them. Canny is
equal to `cv2.Canny(image, 100, 200)` to the bit, of RGB and of grey; the others differ from training by at most one
grey level in 255, because sums are rounded in another order. `tests/train/test_controls.py` holds the two together.
Polarity, axes, colour and thresholds are the convention's (`conventions`).

Shape legend: H, W an image's sides; uint8 HWC.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from car_runtime.conventions import CONTROL_TYPES, PRESETS, ControlConvention
from car_runtime.errors import ImageError
from car_runtime.images import WHITE, Source, fitted, open_image

HED_SIGMAS = (1.0, 2.0)  # pixels
HED_HALF = 0.25  # the step height, in units of white − black, that gives a response of one half
DEPTH_RELIEF = 0.15  # share of blurred brightness, relative to a dome of height 1
BLUR_SHARE = 1 / 32  # sigma of the blurs in depth and sketch, as a share of the image's shorter side
NORMAL_SIGMA = 1.0  # pixels
SKETCH_GAIN = 2.5

Pixels: TypeAlias = NDArray[np.uint8]
Floats: TypeAlias = NDArray[np.floating[Any]]  # float32, unless said otherwise
Mask: TypeAlias = NDArray[np.bool_]


def derive(image: Source, control: str | ControlConvention, size: int, *, fit: str | None = None) -> Pixels:
    """The control image of a photo: uint8 [size, size, 3] in [0, 255].

    image:   a path, PIL image or array, as `images.load_image` takes it. Brought to size × size with LANCZOS
             (premultiplied, where there is alpha), then composited on white: what training does to its own.
    control: a convention, or the name of a preset: `canny`, `canny-grey`, `hed`, `depth`, `normal`, `sketch` …
    size:    the model's side in pixels, positive.
    fit:     what becomes of another aspect: "crop", "pad" or "stretch"; None for the convention's own.

    Raises ImageError: no convention of this name or type, a damaged image, no transparency where the type needs it.
    """
    known = PRESETS.get(control) if isinstance(control, str) else control
    if known is None or known.control_type not in _MAKERS:
        name = control if isinstance(control, str) else control.control_type
        raise ImageError(
            f"{name!r} cannot be derived from a photo (only {', '.join(CONTROL_TYPES)}); "
            "give the control image with --control"
        )
    rgba = np.asarray(fitted(open_image(image), size, fit or known.fit, WHITE).convert("RGBA"), np.uint8)
    if known.control_type in NEEDS_ALPHA and rgba[..., 3].min() == 255:
        raise ImageError(
            f"{known.name!r} is derived from an image's transparency, and this one is opaque; give the control image "
            "with --control, a network with --annotator, or a cut-out with an alpha channel"
        )
    return _MAKERS[known.control_type](rgba, known)


# --- the types ------------------------------------------------------------------------------------------------------


def _canny(rgba: Pixels, convention: ControlConvention) -> Pixels:
    seen = _grey(rgba) if convention.colour == "grey" else on_white(rgba)
    low, high = convention.thresholds
    return _lines(canny(seen, low, high), convention)


def _lines(x: Pixels, convention: ControlConvention) -> Pixels:
    """Lines, uint8 [H, W], light on dark as the convention has them: uint8 [H, W, 3]."""
    return _grey_to_rgb(255 - x if convention.polarity == "dark-on-light" else x)


def _hed(rgba: Pixels, convention: ControlConvention) -> Pixels:
    """m²/(m² + HED_HALF²), with m the mean over scales σ of σ·√(2π)·|∇(G_σ ∗ I)| in the strongest channel.

    The factor makes m the height of a step edge, whatever σ.
    """
    rgb = on_white(rgba).astype(np.float32) / 255
    m: Floats = np.zeros(rgba.shape[:2], np.float32)
    for sigma in HED_SIGMAS:
        gx, gy = _gradient(_blur(rgb, sigma))
        m += sigma * np.sqrt(2 * np.pi) * np.sqrt(gx * gx + gy * gy).max(axis=2) / len(HED_SIGMAS)
    return _lines(_to_uint8(m * m / (m * m + HED_HALF**2)), convention)


def _depth(rgba: Pixels, convention: ControlConvention) -> Pixels:
    near = _to_uint8(_relief(rgba)[0])
    return _grey_to_rgb(255 - near if convention.polarity == "far-is-light" else near)


def _normal(rgba: Pixels, convention: ControlConvention) -> Pixels:
    height, r, mask = _relief(rgba)
    gx, gy = _gradient(_blur(height * (r * (1 + DEPTH_RELIEF)), NORMAL_SIGMA))
    n = np.stack([-gx, -gy, np.ones_like(gx)], axis=2)
    n /= np.linalg.norm(n, axis=2, keepdims=True)
    n[~mask] = (0, 0, 1)
    n *= [-1 if axis in ("left", "up") else 1 for axis in convention.axes]
    return _to_uint8((n + 1) / 2)


def _relief(rgba: Pixels) -> tuple[Floats, float, Mask]:
    """Height in [0, 1] (dome of radius r plus brightness, over 1 + DEPTH_RELIEF), r in pixels, mask (alpha ≥ 128).

    The dome over a silhouette is √(2·r·d − d²), d the distance to outside, r its maximum; a hemisphere on a disc.
    """
    mask = rgba[..., 3] >= 128
    d = distance_to_outside(mask)
    r = float(d.max())
    dome = np.sqrt(np.maximum(d * (2 * r - d), 0))
    luma = _blur(_grey(rgba).astype(np.float32) / 255, BLUR_SHARE * min(mask.shape))
    return mask * (dome / max(r, 1.0) + DEPTH_RELIEF * luma) / np.float32(1 + DEPTH_RELIEF), r, mask


def _sketch(rgba: Pixels, convention: ControlConvention) -> Pixels:
    """SKETCH_GAIN·(1 − dodge), dodge = grey / (1 − blur(1 − grey)) = grey / blur(grey); both within [0, 1]."""
    grey = _grey(rgba).astype(np.float32) / 255
    dodge = np.minimum(grey / np.maximum(_blur(grey, BLUR_SHARE * min(grey.shape)), 1 / 255), 1)
    return _lines(255 - _to_uint8(1 - SKETCH_GAIN * (1 - dodge)), convention)


# --- Canny, as OpenCV does it ---------------------------------------------------------------------------------------


def canny(image: Pixels, low: int, high: int) -> Pixels:
    """Edges of an image: uint8 [H, W] or [H, W, 3] → uint8 [H, W], 255 on edges. Equal to `cv2.Canny` of the same.

    In colour the channel with the largest slope counts, pixel by pixel, the first one where several have it.
    Canny 1986: slope (3×3 Sobel, |dx| + |dy|), thinning to ridges, then hysteresis: ridges above `high`, and ridges
    above `low` that hang together with them.
    """
    dx, dy = _sobel_int(image)
    if image.ndim == 3:
        steepest = (np.abs(dx) + np.abs(dy)).argmax(axis=2, keepdims=True)
        dx, dy = (np.take_along_axis(d, steepest, axis=2)[..., 0] for d in (dx, dy))
    slope = np.abs(dx) + np.abs(dy)
    ridge = _on_ridge(dx, dy, slope) & (slope > low)
    edges: Pixels = np.where(_connected(ridge & (slope > high), ridge), 255, 0).astype(np.uint8)
    return edges


def _sobel_int(image: Pixels) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """3×3 Sobel to the right and down, int32 [H, W] or [H, W, C]; the border is repeated outwards."""
    p = np.pad(image.astype(np.int32), [(1, 1), (1, 1), (0, 0)][: image.ndim], mode="edge")
    across, down = p[:, 2:] - p[:, :-2], p[2:] - p[:-2]
    dx = across[:-2] + 2 * across[1:-1] + across[2:]
    dy = down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]
    return dx, dy


def _on_ridge(dx: NDArray[np.int32], dy: NDArray[np.int32], slope: NDArray[np.int32]) -> Mask:
    """Where the slope is a maximum along the gradient, rounded to one of four directions; bool [H, W].

    tan 22.5° is 13573 / 2¹⁵ in OpenCV, and tan 67.5° is that plus 2. Of two equal slopes the left or upper one
    counts; along diagonals neither. Beyond the border the slope is 0.
    """
    height, width = slope.shape
    p = np.pad(slope, 1)

    def neighbour(down: int, right: int) -> NDArray[np.int32]:
        return p[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    y = np.abs(dy).astype(np.int64) << 15
    tan_22 = np.abs(dx).astype(np.int64) * 13573
    tan_67 = tan_22 + (np.abs(dx).astype(np.int64) << 16)
    flat, steep = y < tan_22, y > tan_67
    along_x = (slope > neighbour(0, -1)) & (slope >= neighbour(0, 1))
    along_y = (slope > neighbour(-1, 0)) & (slope >= neighbour(1, 0))
    falling = (slope > neighbour(-1, -1)) & (slope > neighbour(1, 1))
    rising = (slope > neighbour(-1, 1)) & (slope > neighbour(1, -1))
    diagonal = np.where((dx ^ dy) < 0, rising, falling)
    return np.where(flat, along_x, np.where(steep, along_y, diagonal))


def _connected(seeds: Mask, allowed: Mask) -> Mask:
    """The pixels of `allowed` that a path of allowed pixels, with 8 neighbours each, joins to a seed; bool [H, W]."""
    p = np.pad(allowed, 1)
    row = p.shape[1]
    around = np.array([-row - 1, -row, -row + 1, -1, 1, row - 1, row, row + 1])
    left = p.ravel()  # allowed, and not reached yet
    reached = np.zeros_like(left)
    front = np.flatnonzero(np.pad(seeds, 1))
    while front.size:
        reached[front] = True
        left[front] = False
        front = (front[:, None] + around).ravel()
        front = np.unique(front[left[front]])
    return reached.reshape(p.shape)[1:-1, 1:-1]


# --- mathematics ----------------------------------------------------------------------------------------------------


def distance_to_outside(mask: Mask) -> Floats:
    """Distance to the nearest pixel outside the mask, 0 outside; beyond the border is outside. bool → float32 [H, W].

    Euclidean and exact, one axis at a time: first along columns, then, squared, along rows (Felzenszwalb and
    Huttenlocher 2012, without their envelope: the sides are small).
    """
    padded = np.pad(mask, 1)
    height, width = padded.shape
    column = np.zeros(padded.shape, np.int64)
    for y in range(1, height):
        column[y] = np.where(padded[y], column[y - 1] + 1, 0)
    for y in range(height - 2, -1, -1):
        column[y] = np.minimum(column[y], column[y + 1] + 1)
    x = np.arange(width)
    along = (x[:, None] - x) ** 2
    squared = np.stack([(along + column[y] ** 2).min(axis=1) for y in range(height)])
    distance: Floats = np.sqrt(squared[1:-1, 1:-1]).astype(np.float32)
    return distance


def on_white(rgba: Pixels) -> Pixels:
    """RGB of an image on white, rounded as Pillow's `alpha_composite` does: uint8 [H, W, 4] → [H, W, 3]."""
    rgb, alpha = rgba[..., :3].astype(np.uint32), rgba[..., 3:].astype(np.uint32)
    scaled = rgb * alpha + 255 * (255 - alpha) + 128
    return ((scaled + (scaled >> 8)) >> 8).astype(np.uint8)


def _grey(rgba: Pixels) -> Pixels:
    """BT.601 luma on white, in OpenCV's 15-bit fixed point; uint8 [H, W]."""
    rgb = on_white(rgba).astype(np.uint32)
    return ((rgb[..., 0] * 9798 + rgb[..., 1] * 19235 + rgb[..., 2] * 3735 + (1 << 14)) >> 15).astype(np.uint8)


def _blur(x: Floats, sigma: float) -> Floats:
    """Gaussian of radius ⌈3σ⌉ over [H, W] or [H, W, C], mirrored at the border without repeating it (reflect-101)."""
    radius = int(np.ceil(3 * sigma))
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-(offsets**2) / (2 * sigma**2))
    weights = (weights / weights.sum()).astype(np.float32)
    for axis in (0, 1):
        margins = [(radius, radius) if a == axis else (0, 0) for a in range(x.ndim)]
        padded = np.moveaxis(np.pad(x, margins, mode="reflect"), axis, 0)
        length = x.shape[axis]
        rows = sum(w * padded[k : k + length] for k, w in enumerate(weights))
        x = np.moveaxis(np.asarray(rows), 0, axis)
    return x


def _gradient(x: Floats) -> tuple[Floats, Floats]:
    """3×3 Sobel over 8: slope per pixel, to the right and down; reflect-101 at the border."""
    p = np.pad(x, [(1, 1), (1, 1), *[(0, 0)] * (x.ndim - 2)], mode="reflect")
    across, down = p[:, 2:] - p[:, :-2], p[2:] - p[:-2]
    gx: Floats = (across[:-2] + 2 * across[1:-1] + across[2:]) / 8
    gy: Floats = (down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]) / 8
    return gx, gy


def _to_uint8(x: Floats) -> Pixels:
    return np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8)


def _grey_to_rgb(x: Pixels) -> Pixels:
    return np.repeat(x[..., None], 3, axis=2)


_MAKERS: dict[str, Callable[[Pixels, ControlConvention], Pixels]] = {
    "canny": _canny,
    "hed": _hed,
    "depth": _depth,
    "normal": _normal,
    "sketch": _sketch,
}
NEEDS_ALPHA = frozenset({"depth", "normal"})

"""A control map brought to the model's square, and what about it is probably not as meant.

Nothing here refuses a map: an image comes out of any. A warning is one line that names what was found and ends with
the remedy. Thresholds are such that no map of the examples, and none that is derived from an image, gives any
(`tests/runtime/test_control_checks.py`).

Shapes: S side of the model's image in pixels; H, W of the map as it was given.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from car_runtime.conventions import ControlConvention
from car_runtime.images import BLACK, CONTRAST, drawn_on_ground, fitted

Floats: TypeAlias = NDArray[np.floating[Any]]

COLOURED, COLOURED_SHARE = 40, 0.05
"""A pixel is coloured whose channels differ by more; a map of lines or depth has no larger share of such pixels."""
LINE = 96
"""How far from the ground, in grey levels, a line has to be to be followed."""
MIDDLE = (64, 176)
"""Median of a map of lines on dark ground: below it is one, above it is inverted, within it is a photo."""
FEW = 1 / 1024
"""Share of pixels off the ground under which there is nothing to follow: 4 of 64×64."""
UNUSED = 64
"""Grey levels: a depth map that spans fewer holds next to nothing of the relief."""
LOST = 0.4
"""Share of their contrast that lines must keep when a map is made smaller."""
CROPPED = 1.5
"""Aspect from which on it is said that a photo was cropped; of a map it is always said."""


def prepare_control(
    image: Image.Image, convention: ControlConvention | None, size: int, fit: str | None
) -> tuple[Image.Image, tuple[str, ...]]:
    """The map as RGB, size × size, and its warnings.

    image:      as `images.open_image` gives it.
    convention: how maps of this branch are made; None where that is not known.
    fit:        "crop", "pad", "stretch"; None for the convention's own.
    """
    ground, kind = (convention.ground, convention.control_type) if convention else (BLACK, "control")
    flat, redrawn = drawn_on_ground(image, ground)
    fit = fit or (convention.fit if convention else "crop")
    square = fitted(flat, size, fit, ground)
    warnings = []
    if redrawn:
        warnings.append(
            "the control's strokes have the colour that its transparent parts get here "
            f"({_name(ground)}), and were drawn in {_name([255 - level for level in ground])}; "
            "save it with opaque ground to choose"
        )
    if aspect := aspect_warning("control", image.size, size, fit):
        warnings.append(aspect)
    lines = convention is not None and convention.polarity in ("light-on-dark", "dark-on-light")
    found = _content(np.asarray(square), convention, kind)
    if found is None and lines:
        found = _thin_lines(flat, square, kind) or _few_lines(np.asarray(square))
    if found is not None:
        warnings.append(found)
    return square, tuple(warnings)


def aspect_warning(what: str, given: tuple[int, int], size: int, fit: str, least: float = 1.0) -> str | None:
    """What was done to an image of another aspect than 1:1; None where that moves no pixel, or is under `least`."""
    long, short = max(given), min(given)
    if long / short <= least or (long - short) * size / long < 1:
        return None
    done = {"crop": "its middle was taken", "pad": "margins were added", "stretch": "it was distorted"}[fit]
    return (
        f"the {what} is {given[0]}×{given[1]}, not square, and {done}; "
        "choose with --fit crop, pad or stretch, or give a square one"
    )


def _content(rgb: NDArray[np.uint8], convention: ControlConvention | None, kind: str) -> str | None:
    """The first thing that is wrong with the map itself; rgb: uint8 [S, S, 3]."""
    planes = _planes(rgb)
    spread = int((planes.max(axis=(1, 2)) - planes.min(axis=(1, 2))).max())
    if spread < CONTRAST and not (spread and kind == "depth"):
        return f"the control is blank: all of it is {_name(rgb[0, 0])}; there is nothing to follow"
    if convention is None:
        return None
    if convention.polarity == "vectors":
        return _normals(rgb, convention, kind)
    coloured = float((planes.max(axis=0) - planes.min(axis=0) > COLOURED).mean())
    if coloured > COLOURED_SHARE:
        return (
            f"the control is coloured ({coloured:.0%} of it), but {kind} maps are grey; "
            "for a photo use --photo, and save depth without a colour map"
        )
    grey = planes.mean(axis=0)
    if convention.polarity in ("near-is-light", "far-is-light"):
        return _depth(grey if convention.polarity == "near-is-light" else 255 - grey, kind)
    return _lines(grey if convention.polarity == "light-on-dark" else 255 - grey, convention)


def _planes(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The channels, uint8 [3, S, S]: numpy is twenty times as fast along a last axis that isn't of three."""
    return np.ascontiguousarray(np.moveaxis(rgb, 2, 0))


def _lines(grey: Floats, convention: ControlConvention) -> str | None:
    """grey: [S, S], lines light, whatever the map's polarity."""
    kind, here = convention.control_type, convention.polarity.replace("-", " ")
    median = float(np.median(grey))
    if median > MIDDLE[1]:
        return f"the control looks inverted: {kind} maps of this plan are {here}; invert it"
    if median > MIDDLE[0]:
        return f"the control looks like a photo, not like lines that are {here} ({kind}); give it with --photo"
    return None


def _few_lines(rgb: NDArray[np.uint8]) -> str | None:
    """Whether next to nothing is off the ground, the commonest grey level."""
    grey = _planes(rgb).mean(axis=0)
    off = int((np.abs(grey - np.median(grey)) > LINE).sum())
    if off >= FEW * grey.size:
        return None
    return f"the control is nearly blank: {off} of {grey.size} pixels are on lines; draw more, or stronger lines"


def _depth(near: Floats, kind: str) -> str | None:
    """near: [S, S], near is light, whatever the map's polarity."""
    low, high = (float(level) for level in np.percentile(near, (0.5, 99.5)))
    if high - low < UNUSED:
        return (
            f"the control uses grey levels {low:.0f}…{high:.0f} of 0…255 alone, so its {kind} is nearly flat; "
            "stretch it to the whole range before it is saved"
        )
    edge = max(1, len(near) // 16)
    border = np.ones(near.shape, bool)
    border[edge:-edge, edge:-edge] = False
    # Ground that is as near as can be, around something that is farther: a map in which far is light.
    if np.percentile(near[border], 20) >= 240 and np.percentile(near[~border], 5) < 160:
        return f"the control looks inverted: its border is nearer than what it surrounds ({kind}); invert it"
    return None


def _normals(rgb: NDArray[np.uint8], convention: ControlConvention, kind: str) -> str | None:
    n = rgb / 127.5 - 1
    planes = _planes(rgb)
    empty = (planes.max(axis=0) < 16) | (planes.min(axis=0) > 239)
    length = np.linalg.norm(n, axis=2)
    if (~empty).mean() < 0.02 or (np.abs(length[~empty] - 1) < 0.3).mean() < 0.6 or n[..., 2][~empty].mean() < 0:
        return f"the control is no {kind} map: its colours are not unit vectors to the viewer; see docs/inputs.md"
    if empty.mean() > 0.05:
        return (
            f"the control's ground is {_name(rgb[empty][0])}, which is no direction; "
            f"make it {_name(convention.ground)} or transparent"
        )
    turned = [
        colour
        for channel, colour, to in ((0, "red", convention.axes[0]), (1, "green", convention.axes[1]))
        if _grows(n, channel) == (-1 if to in ("right", "down") else 1)
    ]
    if not turned:
        return None
    red, green, _ = convention.axes
    return (
        f"the control's {' and '.join(turned)} {'are' if len(turned) > 1 else 'is'} turned round: normals of this "
        f"plan have red {red}, green {green}; invert what is turned, or see car-run control --from"
    )


def _grows(n: Floats, channel: int) -> int:
    """Whether red grows to the right, or green down, over the tilted parts of a thing on flat ground.

    1 or −1; 0 where that is not plain, or the ground is not flat: of a room nothing follows.
    """
    ground = np.concatenate([n[0], n[-1], n[:, 0], n[:, -1]])
    if np.median(ground[:, 2]) < 0.95 or (ground[:, 2] > 0.9).mean() < 0.7:
        return 0
    tilted = np.abs(n[..., channel]) > 0.2
    if tilted.mean() < 0.02:
        return 0
    at = np.nonzero(tilted)[1 - channel]
    value = n[..., channel][tilted]
    at = at - at.mean()
    together = float((at * (value - value.mean())).mean() / (at.std() * value.std() + 1e-9))
    return 0 if abs(together) < 0.5 else int(np.sign(together))


def _thin_lines(flat: Image.Image, square: Image.Image, kind: str) -> str | None:
    """Lines of a pixel in a large map are grey haze in a small one."""
    if min(flat.size) < 1.5 * square.width:
        return None
    before = _off_ground(flat)
    on = before > LINE
    strokes = before[on]
    if not strokes.size:
        return None
    # A line has as many fewer pixels as the map is smaller, and is one pixel wide; half of them, so that breaks don't
    # count. Its edges, of one pixel each, say how wide it was.
    edges = on[1:-1, 1:-1] & ~(on[:-2, 1:-1] & on[2:, 1:-1] & on[1:-1, :-2] & on[1:-1, 2:])
    wide = max(1.0, 2 * strokes.size / max(int(edges.sum()), 1) - 1)
    count = max(4, round(strokes.size / wide * square.width / min(flat.size) / 2))
    after = float(np.sort(_off_ground(square).ravel())[-count:].mean())
    lost = 1 - after / float(strokes.mean())
    if lost < 1 - LOST:
        return None
    return (
        f"the control's lines lose {lost:.0%} of their contrast from {flat.width}×{flat.height} to "
        f"{square.width}×{square.height} pixels ({kind}); draw them thicker, or at that size"
    )


def _off_ground(image: Image.Image) -> Floats:
    """How far each pixel is from the commonest grey level, [H, W]."""
    grey = np.asarray(image.convert("L"), np.float32)
    return np.abs(grey - np.median(grey))


def _name(rgb: Any) -> str:
    levels = ",".join(str(int(level)) for level in rgb)
    return {"0,0,0": "black", "255,255,255": "white"}.get(levels, f"RGB {levels}")

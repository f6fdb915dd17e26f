"""An ONNX net as an annotator: images in, maps out, controls made of these. It runs in ONNX Runtime, on the CPU.

Shape legend: B images, H, W an image's sides, h, w the sides a net works at, C channels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from car_train.conventions import PRESETS, ControlConvention
from car_train.data.annotator import (
    DEFAULTS,
    Annotator,
    AnnotatorError,
    Floats,
    NetSettings,
    Pixels,
    UnusableImageError,
)
from car_train.data.controls import NEEDS_ALPHA, on_white
from car_train.files import sha256


class AnnotatorNet:
    """An ONNX net in ONNX Runtime, on the CPU: images in, controls out."""

    def __init__(
        self,
        path: Path,
        control_type: str,
        settings: NetSettings,
        threads: int,
        convention: ControlConvention | None = None,
        work_size: Callable[[int], int] = lambda side: side,
    ):
        settings.check(control_type)
        self.path, self.control_type, self.settings = path, control_type, settings
        self.convention = convention or PRESETS[control_type]
        self.work_size = work_size
        self.session = _open(path, threads)
        inputs = self.session.get_inputs()
        if len(inputs) != 1:
            names = ", ".join(i.name for i in inputs) or "none"
            raise AnnotatorError(
                f"{path}: the net has {len(inputs)} inputs ({names}), not one; export it with the image alone"
            )
        self.input, self.dtype = inputs[0].name, self._dtype(inputs[0])
        self.channels, (self.fixed_batch, *self.fixed) = self._layout(inputs[0])
        self.output = self._output()
        self.factor, self.summand = settings.normalisation(control_type)
        # The file's own bytes; weights that a net keeps in further files are not in the hash.
        self.origin = {
            "annotator": control_type,
            "net": sha256(path),
            "convention": self.convention.name,
            "settings": {name: value for name, value in asdict(settings).items() if value != getattr(DEFAULTS, name)},
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
                f"{self.path}: input {tensor.name!r} is {tensor.type}; export the net with a float or uint8 image"
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
            raise AnnotatorError(f"{where}, without the three channels of an image; export the net with an RGB input")
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
        """(h, w) that go into the net, margins included, for an image of this size."""
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
        """Images of one size → maps float32 [B, h', w', C], margins still there."""
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
        # A net of a fixed batch gets its last image more than once.
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
                f"{self.path}: output {self.output!r} is {out.dtype} {list(shape)} for {batch} images, not "
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
            raise UnusableImageError(f"{self.path.name} gives values that are not finite; leave this image out")
        if self.control_type not in NEEDS_ALPHA:
            map_hwC = _edges(map_hwC.mean(axis=2, keepdims=True), self.settings.sigmoid)
        map_HWC = self._to_size(map_hwC, height, width)
        if self.control_type == "normal":
            return normals_to_pixels(map_HWC, self.settings.flip, self.convention.axes)
        x = stretch(map_HWC[..., 0]) if self.control_type == "depth" else map_HWC[..., 0]
        # As the net gives it, or after `invert`, light is an edge, or near.
        inverted = self.settings.invert != (self.convention.polarity in ("dark-on-light", "far-is-light"))
        grey = np.rint(255 * np.clip(1 - x if inverted else x, 0, 1)).astype(np.uint8)
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
            "operators, with its external data alongside it"
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
        # No numbers in the text: one warning is enough, and Python distinguishes them by their text.
        warnings.warn(
            "the net gives values far outside 0…1, which are cut off; if these are logits, add --sigmoid",
            stacklevel=2,
        )
    return np.clip(x, 0, 1)


def stretch(x: Floats) -> Floats:
    """Values brought to 0…1 by this image's least and greatest; 0 where all are equal."""
    low, high = x.min(), x.max()
    return (x - low) / (high - low) if high > low else np.zeros_like(x)


def normals_to_pixels(n_HWC: Floats, flip: str = "", axes: Sequence[str] = ("right", "down", "viewer")) -> Pixels:
    """Vectors [H, W, 3] of any length → (n + 1)/2·255 of the unit vectors; where there is none, one to the viewer.

    x is to the right, y down, z to the viewer, but for those to `flip`; axes: where red, green and blue are large.
    """
    flips = np.array([-1 if axis in flip else 1 for axis in "xyz"], np.float32)
    n_HWC = n_HWC * flips * np.array([-1 if axis in ("left", "up") else 1 for axis in axes], np.float32)
    length = np.linalg.norm(n_HWC, axis=2, keepdims=True)
    unit = np.where(length > 1e-6, n_HWC / np.maximum(length, 1e-6), np.array([0, 0, 1], np.float32))
    return np.rint((unit + 1) * 127.5).astype(np.uint8)

"""A network that makes control maps of photos: one ONNX file, and a JSON file next to it that describes it.

    net = open_annotator("hed.onnx", PRESETS["hed"])     # hed.json lies next to it
    map_SS3 = net(open_image("photo.jpg"), 256, "crop")

`car_train` makes the maps of a data set with the same networks (`car_train.data.annotator_net`), by the same
arithmetic. It runs in ONNX Runtime, on the CPU.

Shapes: S side of the map; h, w the sides the network works at; C channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from car_runtime.backends.onnxruntime.session import import_onnxruntime
from car_runtime.backends.onnxruntime.spec import ORT_CPU
from car_runtime.conventions import ControlConvention
from car_runtime.errors import PlanError, RequestError, RunError, one_line
from car_runtime.format.typed_json import parse_json
from car_runtime.images import WHITE, fitted, on_ground

Floats: TypeAlias = NDArray[np.float32]
Pixels: TypeAlias = NDArray[np.uint8]

RANGES = {"0-1": (1 / 255, 0.0), "0-255": (1.0, 0.0), "-1-1": (1 / 127.5, -1.0)}
"""What the grey levels 0…255 are multiplied by, and what is added, before mean and std."""
GIVES = ("edges", "logits", "depth", "normals", "map")
"""What a network gives: edges in 0…1, their logits, depth in any unit, normals in −1…1, or a finished map in 0…1."""
LARGEST = 4096
"""Pixels on an edge that a network is given at most: RGB in float32 of that is 200 MB."""
_REMEDY = "correct it (docs/inputs.md)"


@dataclass(frozen=True, kw_only=True)
class NetDescription:
    """What a network takes and gives: the object "annotator" of the JSON file. Raises RequestError."""

    gives: str
    """One of `GIVES`."""
    size: int | None = None
    """The longer side that goes in, in pixels; None: the map's, times `enlarge` up to `enlarge_to`."""
    enlarge: int | None = None
    enlarge_to: int | None = None
    multiple: int | None = None
    """Of which each side is one, rounded up; None for 32."""
    margin: int | None = None
    """Pixels of repeated border around the image, cut off again."""
    range: str | None = None
    """Of the values that go in, before mean and std: "0-1" (the default), "0-255" or "-1-1"; none for uint8."""
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    layout: str | None = None
    """ "nchw" or "nhwc", where the file doesn't say it."""
    colours: str | None = None
    """ "rgb" (the default) or "bgr", also the order of mean and std."""
    output: str | None = None
    """Name of the output, where there are several."""
    invert: bool | None = None
    """Edges that are dark, depth that grows with distance."""
    unsigned: bool | None = None
    """Normals that come as (n + 1)/2."""
    flip: str | None = None
    """Of normals: axes to turn round, of "xyz", so that x is to the right, y down, z to the viewer."""

    def __post_init__(self) -> None:
        choices = {"gives": GIVES, "range": tuple(RANGES), "layout": ("nchw", "nhwc"), "colours": ("rgb", "bgr")}
        for name, known in choices.items():
            value = getattr(self, name)
            _require(value is None or value in known, f"{name} is {value!r}, not one of {', '.join(known)}")
        limits = {"size": 8, "enlarge": 1, "enlarge_to": 8, "multiple": 1, "margin": 0}
        for name, least in limits.items():
            value = getattr(self, name)
            _require(value is None or least <= value <= LARGEST, f"{name} is {value}, not in {least}…{LARGEST}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            _require(values is None or len(values) == 3, f"{name} has {len(values or ())} numbers, not 3")
        _require(self.std is None or min(self.std) > 0, f"std is {self.std}, but must be positive")
        _require(set(self.flip or "") <= set("xyz"), f"flip is {self.flip!r}, but names axes of xyz")

    def work_side(self, side: int) -> int:
        """The longer side that goes in, for a map of this side."""
        if self.size is not None:
            return self.size
        return max(side, min((self.enlarge or 1) * side, self.enlarge_to or LARGEST))

    def normalisation(self) -> tuple[Floats, Floats]:
        """(factor, summand) that turn grey levels 0…255 into what a float network takes, one a channel."""
        factor, summand = RANGES[self.range or "0-1"]
        divisor, subtrahend = (np.array(v, np.float64) for v in (self.std or (1, 1, 1), self.mean or (0, 0, 0)))
        return (factor / divisor).astype(np.float32), ((summand - subtrahend) / divisor).astype(np.float32)


def _require(good: bool, problem: str) -> None:
    if not good:
        raise RequestError(f"the network's description: {problem}; {_REMEDY}")


def read_description(onnx: Path) -> NetDescription:
    """The description next to a network, NAME.json for NAME.onnx. Raises RequestError."""
    path = onnx.with_suffix(".json")
    try:
        return parse_json(path.read_bytes(), path.name, _REMEDY).field("annotator").read(NetDescription)
    except FileNotFoundError as error:
        raise RequestError(
            f"{str(onnx)!r} has no description {path.name!r} next to it; write one (docs/inputs.md)"
        ) from error
    except (OSError, ValueError) as error:
        raise RequestError(f"cannot read {str(path)!r} ({one_line(error)}); {_REMEDY}") from error
    except PlanError as error:
        raise RequestError(str(error)) from error


def open_annotator(onnx: str | Path, convention: ControlConvention, *, threads: int | None = None) -> Annotator:
    """Open a network for maps of a convention. Raises RequestError, BackendError (no ONNX Runtime)."""
    path = Path(onnx)
    if not path.is_file():
        raise RequestError(f"there is no network {str(path)!r}; give an .onnx file with its description next to it")
    return Annotator(path, read_description(path), convention, threads)


class Annotator:
    """A network, opened: photos in, maps of one convention out."""

    def __init__(self, path: Path, net: NetDescription, convention: ControlConvention, threads: int | None) -> None:
        self.path, self.net, self.convention = path, net, convention
        wanted = {"normal": ("normals", "map"), "depth": ("depth", "map")}
        allowed = wanted.get(convention.control_type, ("edges", "logits", "map"))
        if net.gives not in allowed:
            raise RequestError(
                f"{path.name} gives {net.gives!r}, but {convention.control_type} maps need {' or '.join(allowed)}; "
                "give another network"
            )
        self._session = _session(path, threads)
        self._input = self._only_input()
        self._channels, (self._fixed_h, self._fixed_w) = self._layout()
        self._output = self._named_output()

    def __call__(self, image: Image.Image, size: int, fit: str) -> Pixels:
        """The map of an image of `images.open_image`: uint8 [size, size, 3]. Raises RequestError, RunError."""
        photo = on_ground(fitted(image, size, fit, WHITE), WHITE)
        map_hwC = self._run(photo)
        if not np.isfinite(map_hwC).all():
            raise RunError(f"{self.path.name} gives values that are not finite; give another image or network")
        if self.net.gives in ("edges", "logits"):
            map_hwC = _edges(map_hwC.mean(axis=2, keepdims=True), self.net.gives == "logits")
        map_SSC = self._to_size(map_hwC, size)
        if self.net.gives == "map":
            finished = np.rint(255 * np.clip(map_SSC, 0, 1)).astype(np.uint8)
            return finished if finished.shape[2] == 3 else np.repeat(finished, 3, axis=2)
        if self.net.gives == "normals":
            return _normals(map_SSC, self.net.flip or "", self.convention)
        x = _stretched(map_SSC[..., 0]) if self.net.gives == "depth" else map_SSC[..., 0]
        inverted = bool(self.net.invert) != (self.convention.polarity in ("dark-on-light", "far-is-light"))
        grey = np.rint(255 * np.clip(1 - x if inverted else x, 0, 1)).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)

    # -- what the network takes and gives ----------------------------------------------------------------------------

    def _only_input(self) -> Any:
        inputs = self._session.get_inputs()
        if len(inputs) != 1:
            raise RequestError(
                f"{self.path.name} has {len(inputs)} inputs, not one; export the network with the image alone"
            )
        types = ("tensor(float)", "tensor(float16)", "tensor(double)", "tensor(uint8)")
        if inputs[0].type not in types:
            raise RequestError(
                f"{self.path.name}: its input is {inputs[0].type}; export it with a float or uint8 image"
            )
        if inputs[0].type == "tensor(uint8)" and (self.net.range, self.net.mean, self.net.std) != (None, None, None):
            raise RequestError(
                f"{self.path.name} takes uint8, 0…255 as it is; leave range, mean and std out of its description"
            )
        return inputs[0]

    def _layout(self) -> tuple[int, tuple[int | None, int | None]]:
        """(axis of the channels, (h, w) where they are fixed)."""
        shape = self._input.shape
        known = {"nchw": [1], "nhwc": [3], None: [a for a in (1, 3) if len(shape) == 4 and shape[a] == 3]}
        axes = known[self.net.layout]
        if len(shape) != 4 or not axes or _size(shape[axes[0]]) not in (None, 3):
            raise RequestError(
                f"{self.path.name}: its input is {shape}, not [1, 3, h, w] or [1, h, w, 3]; "
                'say "layout" in its description, or export it with an RGB image as input'
            )
        h, w = (2, 3) if axes[0] == 1 else (1, 2)
        return axes[0], (_size(shape[h]), _size(shape[w]))

    def _named_output(self) -> str:
        names = [output.name for output in self._session.get_outputs()]
        if self.net.output is None and len(names) == 1:
            return str(names[0])
        if self.net.output in names:
            return str(self.net.output)
        raise RequestError(
            f'{self.path.name} has the outputs {", ".join(names)}; say which one as "output" in its description'
        )

    def _sides(self, side: int) -> tuple[int, int]:
        """(h, w) that go in, margins included, for a map of this side."""
        margin, multiple, work = self.net.margin or 0, self.net.multiple or 32, self.net.work_side(side)
        h, w = (fixed or -(-(work + 2 * margin) // multiple) * multiple for fixed in (self._fixed_h, self._fixed_w))
        if min(h, w) <= 2 * margin or max(h, w) > 2 * LARGEST:
            raise RequestError(f"{self.path.name} would work at {h}×{w} pixels; {_REMEDY}")
        return h, w

    # -- running -----------------------------------------------------------------------------------------------------

    def _run(self, photo: Image.Image) -> Floats:
        """An RGB square → the output, float32 [h', w', C], margins still there."""
        h, w = self._sides(photo.width)
        m = self.net.margin or 0
        inner = photo.resize((w - 2 * m, h - 2 * m), Image.Resampling.BICUBIC)
        x = np.pad(np.asarray(inner), ((m, m), (m, m), (0, 0)), mode="edge")[None]
        if self.net.colours == "bgr":
            x = x[..., ::-1]
        if self._input.type != "tensor(uint8)":
            factor, summand = self.net.normalisation()
            dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}.get(self._input.type, np.float64)
            x = (x * factor + summand).astype(dtype)
        if self._channels == 1:
            x = x.transpose(0, 3, 1, 2)
        try:
            (out,) = self._session.run([self._output], {self._input.name: np.ascontiguousarray(x)})
        except Exception as error:  # ONNX Runtime's errors have no class in common
            raise RunError(
                f'{self.path.name} fails on {list(x.shape)} ({one_line(error)[:300]}); give "size" and "multiple" '
                "that it can take"
            ) from error
        return self._map(np.asarray(out))

    def _map(self, out: NDArray[Any]) -> Floats:
        """The output as float32 [h', w', C]. Integers become 0…1, and normals −1…1."""
        gives, shape = self.net.gives, out.shape
        allowed = {"normals": (3,), "depth": (1,)}.get(gives, (1, 3))
        if out.ndim == 3 and gives != "normals":
            out = out[..., None]
        axes = [a for a in (1, 3) if out.ndim == 4 and out.shape[a] in allowed]
        if not axes or out.shape[0] != 1 or out.size == 0 or out.dtype.kind not in "fu":
            raise RequestError(
                f"{self.path.name}: its output is {out.dtype} {list(shape)}, which are no {gives}; "
                'name another one as "output" in its description'
            )
        # Where either axis could be it, that of the input; [1, h, w] has got its own at the end.
        if (self._channels if self._channels in axes and len(shape) == 4 else axes[-1]) == 1:
            out = out.transpose(0, 2, 3, 1)
        whole = out.dtype.kind == "u"
        maps: Floats = out[0].astype(np.float32) / np.float32(np.iinfo(out.dtype).max if whole else 1)
        return 2 * maps - 1 if gives == "normals" and (whole or self.net.unsigned) else maps

    def _to_size(self, map_hwC: Floats, size: int) -> Floats:
        """[h', w', C] → [S, S, C]. The map may be smaller than what went in; its margins are in proportion."""
        h, w = self._sides(size)
        y, x = ((self.net.margin or 0) * n / side for n, side in zip(map_hwC.shape[:2], (h, w), strict=True))
        box = (x, y, map_hwC.shape[1] - x, map_hwC.shape[0] - y)
        # HAMMING neither rings, as LANCZOS does, nor blurs as much as BILINEAR when shrinking.
        channels = [
            Image.fromarray(np.ascontiguousarray(map_hwC[..., c])).resize(
                (size, size), Image.Resampling.HAMMING, box=box
            )
            for c in range(map_hwC.shape[2])
        ]
        return np.stack([np.asarray(channel, np.float32) for channel in channels], axis=2)


def _session(path: Path, threads: int | None) -> Any:
    ort = import_onnxruntime(ORT_CPU, "onnxruntime", ("cpu", "gpu"))
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3  # warnings about how a network was made are of no use to who runs it
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors have no class in common
        raise RequestError(
            f"{str(path)!r} cannot be opened by ONNX Runtime ({one_line(error)[:300]}); give an ONNX file of "
            "standard operators, with its external data alongside it"
        ) from error


def _size(dimension: Any) -> int | None:
    """A dimension's size, None where it is dynamic."""
    return dimension if isinstance(dimension, int) and dimension > 0 else None


def _edges(x: Floats, logits: bool) -> Floats:
    """Logits or probabilities → probabilities in 0…1."""
    # The sigmoid, in a form whose exponential doesn't overflow.
    return (0.5 * (1 + np.tanh(0.5 * x))).astype(np.float32) if logits else np.clip(x, 0, 1)


def _stretched(x: Floats) -> Floats:
    """Values brought to 0…1 by this image's least and greatest; 0 where all are equal."""
    low, high = float(x.min()), float(x.max())
    return (x - x.min()) / (x.max() - x.min()) if high > low and math.isfinite(high - low) else np.zeros_like(x)


def _normals(n_SS3: Floats, flip: str, convention: ControlConvention) -> Pixels:
    """Vectors of any length → (n + 1)/2·255 of the unit vectors; where there is none, one to the viewer."""
    flips = np.array([-1 if axis in flip else 1 for axis in "xyz"], np.float32)
    n_SS3 = n_SS3 * flips * np.array([-1 if to in ("left", "up") else 1 for to in convention.axes], np.float32)
    length = np.linalg.norm(n_SS3, axis=2, keepdims=True)
    unit = np.where(length > 1e-6, n_SS3 / np.maximum(length, 1e-6), np.array([0, 0, 1], np.float32))
    return np.rint((unit + 1) * 127.5).astype(np.uint8)

"""How the maps of a control branch are made: what a manifest states, what `--photo` follows, what warnings judge by.

Two models of one control type may want opposite maps: the published sketch branch was trained on white lines on
black, ours of version 0.1.0 on dark lines on white. A convention says which, by name and in full. `PRESETS` is the
table; `car_train.data.conventions` has the same one for training, and a test holds the two equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from car_runtime.errors import PlanError

CONTROL_TYPES = ("canny", "hed", "depth", "normal", "sketch")
ANNOTATORS = ("canny", "hed", "soft-hed", "midas", "dome", "normal-bae", "pidinet", "dodge")
"""What makes the maps: OpenCV's Canny; ControlNet's HED network, or its look without one (`soft-hed`); MiDaS; the
geometry of the silhouette (`dome`); NormalBae; PiDiNet, or a colour dodge (`dodge`)."""
COLOURS = ("rgb", "grey")
POLARITIES = ("light-on-dark", "dark-on-light", "near-is-light", "far-is-light", "vectors")
AXES = ("left", "right", "up", "down", "viewer")
FITS = ("crop", "pad", "stretch")
"""How an image of another aspect becomes a square: its middle, all of it with margins, or all of it distorted."""
_REMEDY = "export the plan again"


@dataclass(frozen=True, kw_only=True)
class ControlConvention:
    """How the control maps of a branch are made. Raises PlanError for a value that no convention has."""

    name: str
    """Of a preset, or any other word for a convention of one's own."""
    control_type: str
    """ "canny", "hed", "depth", "normal", "sketch", or another word."""
    annotator: str
    """One of `ANNOTATORS`, or another word for what only a file of maps can give."""
    colour: str
    """What the annotator looks at: "rgb", or "grey" (BT.601)."""
    polarity: str
    """Of lines ("light-on-dark", "dark-on-light"), of depth ("near-is-light", "far-is-light"), or "vectors"."""
    axes: tuple[str, ...]
    """Where the vectors of a normal map point whose red, green and blue are large; empty for other types."""
    ground: tuple[int, ...]
    """RGB, 0…255, that transparent parts of a map show: what this type has where there is nothing."""
    fit: str
    """One of `FITS`: what becomes of a map or photo that isn't square, unless a request says otherwise."""
    value_range: tuple[int, ...]
    """Least and greatest grey level of a map that uses its range, 0…255."""
    thresholds: tuple[int, ...]
    """Of Canny, low and high; empty for other annotators."""

    def __post_init__(self) -> None:
        for field, known in (("colour", COLOURS), ("polarity", POLARITIES), ("fit", FITS)):
            self._require(getattr(self, field) in known, field, f"is not one of {', '.join(known)}")
        for field in ("name", "control_type", "annotator"):
            text = getattr(self, field)
            self._require(0 < len(text) <= 64 and text.isprintable(), field, "must be a word of at most 64 letters")
        self._require(set(self.axes) <= set(AXES), "axes", f"must be of {', '.join(AXES)}")
        self._require(len(self.axes) in (0, 3), "axes", "must be three, or none")
        for field, length, top in (("ground", (3,), 255), ("value_range", (2,), 255), ("thresholds", (0, 2), 2040)):
            numbers = getattr(self, field)
            good = len(numbers) in length and all(0 <= n <= top for n in numbers)
            self._require(good, field, f"must be {' or '.join(map(str, length))} numbers in 0…{top}")
        for field in ("value_range", "thresholds"):
            numbers = getattr(self, field)
            self._require(list(numbers) == sorted(numbers), field, "must be in ascending order")

    def _require(self, good: bool, field: str, rule: str) -> None:
        if not good:
            raise PlanError(f"control_convention.{field} {getattr(self, field)!r} {rule}; {_REMEDY}")


def _table(conventions: Iterable[ControlConvention]) -> Mapping[str, ControlConvention]:
    return {convention.name: convention for convention in conventions}


_LINES = ControlConvention(
    name="canny",
    control_type="canny",
    annotator="canny",
    colour="rgb",
    polarity="light-on-dark",
    axes=(),
    ground=(0, 0, 0),
    fit="crop",
    value_range=(0, 255),
    thresholds=(100, 200),
)
_HED = replace(_LINES, name="hed", control_type="hed", annotator="hed", thresholds=())
_SKETCH = replace(_HED, name="sketch", control_type="sketch", annotator="pidinet")
_DEPTH = replace(_HED, name="depth", control_type="depth", annotator="midas", polarity="near-is-light")
_NORMAL = replace(
    _HED,
    name="normal",
    control_type="normal",
    annotator="normal-bae",
    polarity="vectors",
    axes=("left", "up", "viewer"),
    ground=(128, 128, 255),
)

PRESETS: Mapping[str, ControlConvention] = _table(
    [
        _LINES,
        _HED,
        _DEPTH,
        _NORMAL,
        _SKETCH,
        replace(_LINES, name="canny-grey", colour="grey"),
        replace(_HED, name="hed-soft", annotator="soft-hed"),
        replace(_DEPTH, name="depth-dome", annotator="dome"),
        replace(_DEPTH, name="depth-inverse", polarity="far-is-light", ground=(255, 255, 255)),
        replace(_NORMAL, name="normal-dome", annotator="dome"),
        replace(_NORMAL, name="normal-directx", annotator="dome", axes=("right", "down", "viewer")),
        replace(_NORMAL, name="normal-opengl", annotator="dome", axes=("right", "up", "viewer")),
        replace(_SKETCH, name="sketch-dodge", annotator="dodge", colour="grey"),
        replace(
            _SKETCH,
            name="sketch-dark",
            annotator="dodge",
            colour="grey",
            polarity="dark-on-light",
            ground=(255, 255, 255),
        ),
    ]
)
"""By name. Those named as a control type are the published CAR's."""

DERIVED: Mapping[str, str] = {
    "canny": "canny",
    "hed": "hed-soft",
    "depth": "depth-dome",
    "normal": "normal-dome",
    "sketch": "sketch-dodge",
}
"""Control type → the preset of maps that are derived from the images themselves, without a network."""

FIRST: Mapping[str, str] = {
    "canny": "canny-grey",
    "hed": "hed-soft",
    "depth": "depth-dome",
    "normal": "normal-directx",
    "sketch": "sketch-dark",
}
"""Control type → the preset of version 0.1.0, which plans and checkpoints have that state none."""


def stated_or_first(control_type: str | None, stated: ControlConvention | None) -> ControlConvention | None:
    """The convention of a branch: what it states for its type, or that of version 0.1.0; None for unknown types."""
    if stated is not None and stated.control_type == control_type:
        return stated
    name = FIRST.get(control_type or "")
    return None if name is None else PRESETS[name]

"""What can be asked of a plan, each setting described once: `Plan.generate` takes them, `car-run` has their flags.

    config = GenerationConfig(control="depth.png", label="golden retriever", n=4)
    plan.generate(config)
    plan.generate(config, seed=4)                      # the same but for the seed
    plan.generate("depth.png", "golden retriever", n=4)  # or without a config

A config is not tied to a plan; `car_runtime.request.resolve` checks it against one and fills in that plan's defaults.
numpy is not needed here, so that `car-run --help` answers at once.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from car_runtime.errors import RequestError
from car_runtime.system.files import read_regular

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from car_runtime.editing.edit import Edit
    from car_runtime.images import Source
    from car_runtime.schedule import Scales

PRESETS: dict[str, dict[str, Any]] = {
    "plan": {},
    "car": {"cfg": 4.0, "top_k": 900, "top_p": 0.95},
    "var-fid": {"cfg": 1.5, "top_k": 900, "top_p": 0.96},
}
"""Name → sampling settings where a request gives none itself. plan: the plan's own. car: of the published CAR.
var-fid: with which VAR's FID is measured."""
MAX_KEY = 4096
"""Bytes that a key's file may have."""
POSITIONAL = ("control", "label", "seed", "n")
"""Settings that a call may give without their names, in this order."""


@dataclass(frozen=True, kw_only=True)
class Blend:
    """An image between two: from the config's own class and seed towards those named here."""

    share: float
    """0…1: 0 is the config's own image, 1 that of the class and seed named here."""
    label: int | str | None = None
    """Class index or name; None: the config's own class. Start tokens and AdaLN modulation are mixed linearly."""
    seed: int | None = None
    """Seed of the first image; None: the config's own. Random numbers are mixed as `blended_uniforms` says."""


@dataclass(frozen=True, kw_only=True)
class Flag:
    """How a setting is given on the command line."""

    group: str
    """What it is listed with in `--help`: "input", "sampling" or "schedule"."""
    names: tuple[str, ...]
    metavar: str | None
    type: Callable[[str], object]
    """Turns the text of the command line into the field's value."""
    help: str


def _flag(group: str, spelling: str, type: Callable[[str], object], help: str) -> dict[str, Flag]:
    """Metadata of a field that has a flag, spelled as in `--help`: "-n, --num N"."""
    words = spelling.replace(",", "").split()
    names = tuple(word for word in words if word.startswith("-"))
    metavar = None if names == tuple(words) else words[-1]
    return {"flag": Flag(group=group, names=names, metavar=metavar, type=type, help=help)}


def key_text(given: str) -> str:
    """A watermark's key: as given, or the text of the file that follows an @. Raises RequestError."""
    if not given.startswith("@"):
        return given
    try:
        return read_regular(given[1:], MAX_KEY).decode().strip()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it isn't UTF-8 text"
        raise RequestError(f"the key file {given[1:]!r} can't be read ({why}); name a text file") from error


@dataclass(frozen=True, kw_only=True, eq=False)
class GenerationConfig:
    """Images to make: what they follow, how many, how they are drawn, and on which schedule.

    None means the plan's own value or, of a schedule, that it is off. Values are checked by
    `car_runtime.request.resolve`, since their ranges are the plan's.
    """

    control: Source | Mapping[str, Source | tuple[Source, float]] | None = field(
        default=None,
        metadata=_flag(
            "input",
            "--control IMAGE",
            str,
            "control image (edges, depth, …), or BRANCH=IMAGE[:WEIGHT]; - reads stdin",
        ),
    )
    """Path, open binary file, PIL image or uint8 array [H, W] or [H, W, 3] for the plan's default branch; or a
    mapping from branches to such images, with or without a weight, 0…2: {"canny": "e.png", "depth": ("d.png", 0.6)}.
    None for plain VAR."""
    label: int | str | None = field(
        default=None, metadata=_flag("input", "--class CLASS", str, "class index or name (default: no class)")
    )
    """Class index, class name (any case, or one of its comma-separated synonyms), or None for no class."""
    seed: int = field(default=0, metadata=_flag("sampling", "--seed", int, "seed of the first image (default: 0)"))
    """0…2⁶³−n; image i is drawn with seed + i, and depends on no other."""
    n: int = field(
        default=1,
        metadata=_flag("sampling", "-n, --num N", int, "images, with seeds SEED … SEED+N-1 (default: 1)"),
    )
    """Number of images, 1…1024."""
    cfg: float | None = field(
        default=None,
        metadata=_flag("sampling", "--cfg G", float, "classifier-free guidance; 0 = off, twice as fast"),
    )
    """Strength of classifier-free guidance, 0…1000; 0 turns it off, which halves the work."""
    top_k: int | None = field(
        default=None, metadata=_flag("sampling", "--top-k K", int, "draw among the K most probable codes; 0 = all")
    )
    """0…vocab: draw among that many of the most probable codes; 0 turns it off."""
    top_p: float | None = field(
        default=None,
        metadata=_flag("sampling", "--top-p P", float, "draw within this share of probability; 0 = all"),
    )
    """0…1: draw among the most probable codes that hold this share of the probability; 0 turns it off."""
    preset: str | None = field(
        default=None,
        metadata=_flag("sampling", "--preset NAME", str, "guidance, top-k, top-p of: car, var-fid, plan (default)"),
    )
    """Where `cfg`, `top_k`, `top_p` come from if they are None, by name (`PRESETS`): "car", "var-fid", or "plan"."""
    more_smooth: bool = field(
        default=False,
        metadata=_flag("sampling", "--more-smooth", bool, "smoother images, of a plan exported with --more-smooth"),
    )
    """Whether codes are mixed by Gumbel noise instead of taken one by one: smoother images, for looks and not for
    evaluation. For plans that were exported with it."""
    control_cfg: float = field(
        default=0.0,
        metadata=_flag("sampling", "--control-cfg G", float, "guidance by the control; 0 = off (default)"),
    )
    """Strength of guidance by the control, 0…1000: what the control changes is exaggerated; takes a row more per
    image. For plans of format 2."""
    watermark: str | bytes | None = field(
        default=None,
        repr=False,
        metadata=_flag(
            "sampling",
            "--watermark KEY",
            key_text,
            "mark images so that car-run detect finds it; @FILE reads the key",
        ),
    )
    """Key of a watermark: the drawn codes lean to a pattern that `Plan.detect` finds with the same key. None: no
    watermark. For plans of format 2."""
    cfg_scales: Scales | None = field(
        default=None,
        metadata=_flag(
            "schedule", "--cfg-scales A-B", str, "guidance at these scales only; A-, -B or one number will do"
        ),
    )
    """Scales with guidance: "2-5", "2-", "-5", 3, or a range."""
    control_scales: Scales | None = field(
        default=None,
        metadata=_flag(
            "schedule", "--control-scales A-B", str, "control at these scales only; A-, -B or one number will do"
        ),
    )
    """Scales with control, likewise; at the others its features are zero."""
    control_strength: float | None = field(
        default=None,
        metadata=_flag("schedule", "--control-strength S", float, "times the control's features, 0…2 (default: 1)"),
    )
    """0…2, by what the control's features are multiplied."""
    stop_after: int | None = field(
        default=None,
        metadata=_flag("schedule", "--stop-after K", int, "draw no scale after this one: a coarser image"),
    )
    """The last scale to draw, 0…K−1; the image is what the scales so far come to."""
    fit: str | None = field(
        default=None,
        metadata=_flag(
            "input", "--fit HOW", str, "images that aren't square: crop, pad or stretch (default: the plan's, crop)"
        ),
    )
    """ "crop", "pad" or "stretch": what becomes of a control that isn't square; None for the plan's own, "crop"."""
    known_tokens: ArrayLike | None = None
    """int [L] or [n, L]: tokens to keep where `known_mask` is true (VAR's zero-shot editing; see `Plan.encode`)."""
    known_mask: ArrayLike | None = None
    """bool [L] or [n, L], given together with `known_tokens` (see `Plan.known_mask`)."""
    blend: Blend | None = None
    """Another class, seed, or both, towards which the images go (`Blend`)."""
    edit: Edit | None = None
    """An image to change instead of `known_tokens`: in-painting, out-painting, another class (`Edit`)."""


def flags(group: str | None = None) -> dict[str, Flag]:
    """Field name → flag, of all settings that have one or of one group."""
    found = {f.name: f.metadata["flag"] for f in fields(GenerationConfig) if "flag" in f.metadata}
    return {name: flag for name, flag in found.items() if group in (None, flag.group)}


def config_of(*given: Any, **settings: Any) -> GenerationConfig:
    """The config that a call's arguments make: a config, or up to four values in the order of `POSITIONAL`.

    Settings by name are added; those of a config are replaced by them. Raises RequestError for what is no setting.
    """
    for name in settings.keys() - {f.name for f in fields(GenerationConfig)}:
        raise RequestError(f"there is no setting {name!r}{_remedy(name)}")
    if given and isinstance(given[0], GenerationConfig):
        if len(given) > 1:
            raise RequestError(f"{given[1]!r} follows a config; give by name what the config is to change")
        return replace(given[0], **settings)
    if len(given) > len(POSITIONAL):
        raise RequestError(
            f"{given[len(POSITIONAL)]!r} has no name; only {', '.join(POSITIONAL)} go without, name the others"
        )
    named: Mapping[str, Any] = dict(zip(POSITIONAL, given, strict=False))
    for name in named.keys() & settings.keys():
        values = f"{reprlib.repr(named[name])} and {reprlib.repr(settings[name])}"
        raise RequestError(f"{name} is given twice, {values}; give it once")
    return GenerationConfig(**named, **settings)


def _remedy(name: str) -> str:
    names = [f.name for f in fields(GenerationConfig)]
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; the settings are {', '.join(names)}"

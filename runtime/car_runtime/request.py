"""A config made exact: control, class, seeds, guidance, schedule and known tokens, checked against a plan.

`resolve` is the one place where a `GenerationConfig` is checked. The draw itself (guidance, top-k, top-p, inverse
CDF) is inside the step graph; what leaves here are its inputs.

Shapes: n images asked for, L tokens per image over all scales.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from car_runtime.config import PRESETS, Blend, GenerationConfig
from car_runtime.control_checks import prepare_control
from car_runtime.conventions import FITS
from car_runtime.editing.edit import Edit, PreparedEdit, prepare
from car_runtime.errors import RequestError
from car_runtime.format.manifest import Manifest
from car_runtime.images import BLACK, open_image
from car_runtime.schedule import MAX_STRENGTH, Schedule, parse_scales
from car_runtime.values import integer, number
from car_runtime.watermark import check_plan

MAX_IMAGES = 1024
"""Images of one request: they are all held in memory until it ends (200 MB at 256×256)."""
MAX_CFG = 1000.0
"""Far above any use (4 is usual); beyond it float32 logits lose what distinguishes them."""
MAX_SEED = 2**63 - 1
MAX_COMPARED = 10_000
"""Class names that a misspelt one is compared with: a million would take minutes."""
MAX_WEIGHT = 2.0
"""Of a branch that is mixed in."""
TOP_P_OFF = 2.0
"""What the step graph is given for "no top-p": no share of the probability ever reaches it."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Resolved sampling settings, in the caller's terms (`top_p` 0 = off; `top_k` = vocabulary is off)."""

    cfg: float
    top_k: int
    top_p: float

    @property
    def guided(self) -> bool:
        """Whether the unconditional rows are needed: without guidance they would be half the work for nothing."""
        return self.cfg > 0

    @property
    def top_p_input(self) -> float:
        """`top_p` as the step graph takes it."""
        return self.top_p if self.top_p > 0 else TOP_P_OFF


@dataclass(frozen=True, kw_only=True)
class ResolvedBlend:
    """`Blend`, checked against a plan."""

    share: float
    label: int
    """Class index; the request's own where no other class was named."""
    seeds: tuple[int, ...]
    """One per image; the request's own where no other seed was named."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BranchControl:
    """A control image for one of a plan's branches."""

    branch: str
    """The branch's name; in a plan of format 1, whose one branch has none, its type."""
    image: Image.Image = field(repr=False)
    """8-bit RGB of the model's size."""
    weight: float = 1.0
    """0…2: x + Σ weightᵢ·(𝓖ᵢ(x, cᵢ) − x) where branches are mixed in."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """Images for a plan to make: a control, a class, consecutive seeds, and the tokens that are given, not drawn."""

    manifest: Manifest = field(repr=False)
    """Of the plan that it was checked against."""
    controls: tuple[BranchControl, ...]
    """What is followed, in the order of the plan's branches; empty for plain VAR."""
    label: int
    """Class index; `classes` itself is "no class"."""
    classless: bool
    """Whether the label is "no class"."""
    seeds: tuple[int, ...]
    sampling: Sampling
    schedule: Schedule
    known: NDArray[np.int64] = field(repr=False)
    """[n, L], 0 where the mask is false."""
    known_mask: NDArray[np.bool_] = field(repr=False)
    """[n, L]."""
    more_smooth: bool = False
    """Whether codes are mixed by `smooth_noise`."""
    control_cfg: float = 0.0
    """Strength of guidance by the control."""
    watermark: bytes | None = field(default=None, repr=False)
    """The SHA-256 of its key."""
    blend: ResolvedBlend | None = None
    """Towards which other class and seeds the images go."""
    warnings: tuple[str, ...] = ()
    """What about the control is probably not as meant, a line each."""
    edit: PreparedEdit | None = field(default=None, repr=False)
    """What is changed of an image."""
    encoded: bool = False
    """Whether the tokens of that image are in `known`; a plan puts them there."""

    @property
    def control(self) -> Image.Image | None:
        """The first control's image; None without control."""
        return self.controls[0].image if self.controls else None

    @property
    def control_setting(self) -> dict[str, tuple[Image.Image, float]] | None:
        """The controls as `GenerationConfig.control` takes them."""
        return {c.branch: (c.image, c.weight) for c in self.controls} or None

    @property
    def guided(self) -> bool:
        """Whether any scale needs the unconditional rows.

        Without a class no scale does: both kinds of rows would be the same, and (1 + t)·x − t·x is x.
        """
        return self.sampling.guided and self.schedule.guided and not self.classless


def resolve(manifest: Manifest, config: GenerationConfig) -> Request:
    """Check a config against a plan, fill in the plan's defaults, and read the control image.

    Raises RequestError, which names the value and its range, and ImageError for a control that cannot be read.
    """
    request = resolve_settings(manifest, config)
    named = named_controls(manifest, config.control)
    check_control(manifest, bool(named))
    if request.control_cfg and not named:
        raise RequestError(
            f"control_cfg is {request.control_cfg}, but there is no control; give one, or leave it out"
        )
    edit = _resolve_edit(manifest, config, request.schedule.drawn)
    controls, warnings = _resolve_controls(manifest, config, named, edit)
    return replace(request, controls=controls, warnings=warnings, edit=edit)


def resolve_settings(manifest: Manifest, config: GenerationConfig) -> Request:
    """All of `resolve` that needs no image: a request without control and edit. Raises RequestError."""
    n = integer("n", config.n, 1, MAX_IMAGES, "ask for fewer and go on with another seed")
    seed = integer("seed", config.seed, 0, MAX_SEED + 1 - n, "choose a seed in that range")
    known_nL, mask_nL = _resolve_known(manifest, n, config.known_tokens, config.known_mask)
    label, sampling = resolve_label(manifest, config.label), _resolve_sampling(manifest, config)
    schedule, seeds = _resolve_schedule(manifest, config), tuple(range(seed, seed + n))
    check_fit(config.fit)
    blend = _resolve_blend(manifest, config, label, seeds)
    classless = label == manifest.model.classes and (blend is None or blend.label == label)
    return Request(
        manifest=manifest,
        controls=(),
        label=label,
        classless=classless,
        seeds=seeds,
        sampling=sampling,
        schedule=schedule,
        known=known_nL,
        known_mask=mask_nL,
        more_smooth=_resolve_smooth(manifest, config.more_smooth),
        control_cfg=_resolve_control_cfg(manifest, config.control_cfg),
        watermark=resolve_watermark(manifest, config.watermark),
        blend=blend,
    )


def _resolve_blend(
    manifest: Manifest, config: GenerationConfig, label: int, seeds: tuple[int, ...]
) -> ResolvedBlend | None:
    blend = config.blend
    if blend is None:
        return None
    if not isinstance(blend, Blend):
        raise RequestError(f"blend is {blend!r}; give a car_runtime.config.Blend, or leave it out")
    if blend.label is None and blend.seed is None:
        raise RequestError("blend names neither another class nor another seed; give one of them, or both")
    share = number("share", blend.share, 0.0, 1.0, "0 is the image itself, 1 the other one")
    other = seeds
    if blend.seed is not None:
        if config.more_smooth:
            raise RequestError("more_smooth has noise that seeds can't be blended by; leave one of the two out")
        first = integer("seed", blend.seed, 0, MAX_SEED + 1 - len(seeds), "choose a seed in that range")
        other = tuple(range(first, first + len(seeds)))
    towards = label if blend.label is None else resolve_label(manifest, blend.label)
    return ResolvedBlend(share=share, label=towards, seeds=other)


def _resolve_edit(manifest: Manifest, config: GenerationConfig, drawn: int) -> PreparedEdit | None:
    if config.edit is None:
        return None
    if not isinstance(config.edit, Edit):
        raise RequestError(f"edit is {config.edit!r}; give a car_runtime.editing.edit.Edit, or leave it out")
    if config.known_tokens is not None:
        raise RequestError("edit and known_tokens are both given, and each says which tokens are kept; give one")
    return prepare(manifest, config.edit, drawn)


def named_controls(manifest: Manifest, given: object) -> dict[str, tuple[Any, float]]:
    """Branch → control image and weight, in the order of the plan's branches.

    given: as `GenerationConfig.control` has it; no image is looked at. Raises RequestError: branch, weight.
    """
    branches = list(manifest.model.conventions)
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        return {manifest.model.default_branch or manifest.model.control_type or "": (given, 1.0)}
    found: dict[str, tuple[Any, float]] = {}
    for name, one in given.items():
        if not branches:
            break  # check_control says so
        if name not in branches:
            what = "branch" if manifest.format > 1 else "control"
            raise RequestError(
                f"there is no {what} {str(name)[:60]!r} in the plan {manifest.name!r}; it has {', '.join(branches)}"
            )
        source, weight = one if isinstance(one, tuple) and len(one) == 2 else (one, 1.0)
        weight = number(f"the weight of {name}", weight, 0.0, MAX_WEIGHT, "1 is what the branch was trained on")
        if weight != 1 and manifest.format == 1:
            raise RequestError(
                f"the weight of {name} is {weight}, but the plan {manifest.name!r} is of format 1, which mixes "
                "nothing; leave it out, or upgrade the plan with export/build_engines.py --upgrade"
            )
        found[name] = (source, weight)
    return {name: found[name] for name in branches if name in found} if branches else {"": (None, 1.0)}


def _resolve_controls(
    manifest: Manifest,
    config: GenerationConfig,
    named: Mapping[str, tuple[Any, float]],
    edit: PreparedEdit | None,
) -> tuple[tuple[BranchControl, ...], tuple[str, ...]]:
    """The control images as the model's square, and what is to be said of them. Those of an edit cover its frame."""
    model, controls, said = manifest.model, [], []
    for branch, (source, weight) in named.items():
        image = open_image(source)
        if edit is not None and not edit.whole:
            convention = model.conventions[branch]
            image = edit.frame.cut_alike(image, convention.ground if convention else BLACK)
        square, warnings = prepare_control(image, model.conventions[branch], model.image_size, config.fit)
        controls.append(BranchControl(branch=branch, image=square, weight=weight))
        said += [warning if len(named) == 1 else f"{branch}: {warning}" for warning in warnings]
    return tuple(controls), tuple(said)


def _resolve_control_cfg(manifest: Manifest, given: object) -> float:
    """Check the strength of guidance by the control, 0…1000."""
    strength = number("control_cfg", given, 0.0, MAX_CFG, "0 turns guidance by the control off")
    if strength and manifest.format == 1:
        raise RequestError(
            f"control_cfg is {strength}, but the plan {manifest.name!r} is of format 1, which has no such guidance; "
            "leave it out, or upgrade the plan with export/build_engines.py --upgrade"
        )
    return strength


def resolve_watermark(manifest: Manifest, key: object) -> bytes | None:
    """The SHA-256 of a watermark's key. Raises RequestError: no key, or a plan that marks no images."""
    if key is None:
        return None
    if not isinstance(key, (str, bytes)) or not key:
        raise RequestError("the key of a watermark must be text or bytes, and not empty; give one, or leave it out")
    check_plan(manifest)
    return hashlib.sha256(key.encode(errors="surrogateescape") if isinstance(key, str) else key).digest()


def check_fit(fit: object) -> None:
    """Raise RequestError for what is none of `FITS`, or None."""
    if fit is not None and not (isinstance(fit, str) and fit in FITS):
        raise RequestError(f"fit is {fit!r}; choose {', '.join(FITS[:-1])} or {FITS[-1]}")


def check_threads(threads: object) -> None:
    """Raise RequestError for what is no number of threads, or None."""
    if threads is not None and not (type(threads) is int and 1 <= threads <= 1024):
        raise RequestError(
            f"threads is {threads!r}, but must be a whole number in 1…1024; leave it out to use all cores"
        )


def check_control(manifest: Manifest, given: bool) -> None:
    """Raise RequestError when a control image is missing, or given to a plan that has no control branch."""
    kind = manifest.model.control_type
    if kind is not None and not given and manifest.format == 1:
        raise RequestError(
            f"the plan {manifest.name!r} follows a control image of type {kind!r} and none was given; "
            "give control=…, on the command line --control FILE or --photo FILE"
        )
    if kind is None and given:
        raise RequestError(
            f"the plan {manifest.name!r} has no control branch (plain VAR); leave the control image out"
        )


def _resolve_sampling(manifest: Manifest, config: GenerationConfig) -> Sampling:
    """Fill in the preset's values and check ranges.

    cfg 0…1000 (0 = off), top_k 0…vocab (0 = off), top_p 0…1 (0 or 1 = off). A default top_k above the vocabulary is
    cut to it (the published 900 suits a vocabulary of 4096); an explicit one is an error.
    """
    vocab, cfg, top_k, top_p = manifest.model.vocab, config.cfg, config.top_k, config.top_p
    preset = "plan" if config.preset is None else config.preset
    if not isinstance(preset, str) or preset not in PRESETS:
        raise RequestError(f"there is no preset {preset!r}; choose {', '.join(PRESETS)}")
    defaults = replace(manifest.sampling, **PRESETS[preset])
    cfg = number("cfg", defaults.cfg if cfg is None else cfg, 0.0, MAX_CFG, "4 is usual, 0 turns guidance off")
    top_k = integer("top_k", min(defaults.top_k, vocab) if top_k is None else top_k, 0, vocab, "0 turns it off")
    top_p = number("top_p", defaults.top_p if top_p is None else top_p, 0.0, 1.0, "0 turns it off")
    return Sampling(cfg=cfg, top_k=top_k or vocab, top_p=top_p if top_p < 1 else 0.0)


def _resolve_smooth(manifest: Manifest, wanted: object) -> bool:
    if not isinstance(wanted, (bool, np.bool_)):
        raise RequestError(f"more_smooth is {wanted!r}, but must be True or False; leave it out for False")
    if wanted and not manifest.more_smooth:
        raise RequestError(
            f"more_smooth is asked for, but the plan {manifest.name!r} was exported without; leave it out, or export "
            "the plan again with --more-smooth"
        )
    return bool(wanted)


def _resolve_schedule(manifest: Manifest, config: GenerationConfig) -> Schedule:
    """Check scales (0…K−1) and strength (0…2); what is None is as in the exact loop."""
    K = len(manifest.scales)
    if manifest.model.control_type is None:
        for name in ("control_scales", "control_strength"):
            if (value := getattr(config, name)) is not None:
                raise RequestError(
                    f"{name} is {value!r}, but the plan {manifest.name!r} has no control branch (plain VAR); "
                    "leave it out"
                )
    strength = 1.0 if config.control_strength is None else config.control_strength
    last = K - 1 if config.stop_after is None else config.stop_after
    return Schedule(
        scales=K,
        cfg_scales=parse_scales("cfg_scales", config.cfg_scales, K),
        control_scales=parse_scales("control_scales", config.control_scales, K),
        control_strength=number(
            "control_strength", strength, 0.0, MAX_STRENGTH, "1 is what the branch was trained on"
        ),
        drawn=1 + integer("stop_after", last, 0, K - 1, f"{K - 1} draws them all, as leaving it out does"),
    )


def resolve_label(manifest: Manifest, label: int | str | None) -> int:
    """Class index of an index, a name (any case; one of its comma-separated synonyms will do) or None, "no class"."""
    classes = manifest.model.classes
    if label is None:
        return classes
    if isinstance(label, str):
        found = _by_name(manifest.model.names or (), label)
        if len(found) > 1:
            raise RequestError(
                f"class {label!r} means any of {', '.join(map(str, found))}; give one of these indices"
            )
        if not found and not re.fullmatch(r"\s*[-+]?[0-9]{1,18}\s*", label):
            raise RequestError(f"there is no class {label!r}{_near(manifest, label)}")
        label = found[0] if found else int(label)
    return integer("class", label, 0, classes - 1, "leave it out for no class; --list-classes shows them")


def _by_name(names: Sequence[str], wanted: str) -> list[int]:
    """Indices of the classes of that whole name or, failing that, with that synonym; each time in this case first."""
    wanted, key = wanted.strip(), wanted.strip().casefold()
    synonyms = [[part.strip() for part in name.split(",")] for name in names]
    ways = (
        [name == wanted for name in names],
        [name.casefold() == key for name in names],
        [wanted in parts for parts in synonyms],
        [key in (part.casefold() for part in parts) for parts in synonyms],
    )
    return next(([i for i, match in enumerate(way) if match] for way in ways if any(way)), [])


def _near(manifest: Manifest, label: str) -> str:
    names = manifest.model.names
    last = manifest.model.classes - 1
    if names is None:
        return f", since this plan has no class names; give an index, 0…{last}"
    words = {part.strip().casefold(): part.strip() for name in names[:MAX_COMPARED] for part in name.split(",")}
    near = [words[key] for key in difflib.get_close_matches(label.strip().casefold(), words, n=3, cutoff=0.6)]
    return (
        f"; did you mean {' or '.join(map(repr, near))}?"
        if near
        else f"; give an index, 0…{last}, or see --list-classes"
    )


def _resolve_known(manifest: Manifest, n: int, tokens: Any, mask: Any) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    L, vocab = manifest.tokens, manifest.model.vocab
    if (tokens is None) != (mask is None):
        missing = "known_mask" if mask is None else "known_tokens"
        raise RequestError(f"known_tokens and known_mask come together, but {missing} is missing; give both")
    if tokens is None:
        return np.zeros((n, L), np.int64), np.zeros((n, L), np.bool_)
    tokens, mask = np.asarray(tokens), np.asarray(mask)
    for name, value, kinds, what in (
        ("known_tokens", tokens, "iu", "integers"),
        ("known_mask", mask, "b", "booleans"),
    ):
        if value.shape not in ((L,), (n, L)) or value.dtype.kind not in kinds:
            raise RequestError(
                f"{name} is {value.dtype} {list(value.shape)}; give {what} of shape [{L}] or [{n}, {L}]"
            )
    tokens, mask = np.broadcast_to(tokens, (n, L)), np.broadcast_to(mask, (n, L))
    bad = tokens[mask & ((tokens < 0) | (tokens >= vocab))]
    if bad.size:
        raise RequestError(f"known_tokens holds {int(bad[0])}; keep tokens in 0…{vocab - 1} where known_mask is true")
    return np.where(mask, tokens, 0).astype(np.int64), mask.copy()


def uniforms(seeds: Sequence[int], L: int) -> NDArray[np.float32]:
    """All the randomness: float32 [n, L] in [0, 1), row i from seed i alone, scale after scale, row by row."""
    return np.stack([np.random.default_rng(seed).random(L, dtype=np.float32) for seed in seeds])


def noise_of(request: Request, images: Sequence[int]) -> NDArray[np.float32]:
    """`uniforms` of some of a request's images, float32 [B, L], blended where it asks for that."""
    L, blend = request.known.shape[1], request.blend
    own = uniforms([request.seeds[i] for i in images], L)
    if blend is None:
        return own
    return blended_uniforms(own, uniforms([blend.seeds[i] for i in images], L), blend.share)


def blended_uniforms(one: NDArray[np.float32], other: NDArray[np.float32], share: float) -> NDArray[np.float32]:
    """Numbers [n, L] between two arrays of uniform ones: `one` at share 0, `other` at 1.

    Each token goes from one number to the other at a share of its own, drawn once for all images and independently of
    them. So each number stays uniform, and every image on the way is a fair sample. Mixing the numbers along a sphere
    (as normal ones) keeps that too, but moves all tokens at each step: the 64×64 plan's way was then 4.7 times as
    long as from end to end, instead of 3.2.
    """
    turns_L = np.random.default_rng([0, 0, 2]).random(one.shape[1])  # no seed's own stream, nor `SmoothNoise`'s
    return np.where(turns_L < share, other, one)


class SmoothNoise:
    """The noise of `more_smooth`: standard Gumbel, f32 [B, L, V] scale after scale, image i from seed i alone.

    −log of the standard exponential float32 numbers of numpy's default generator, seeded with [seed, 1]: a stream
    apart from that of `uniforms`. The exponential numbers are at least 2⁻¹⁰⁰, so that all noise is finite. It is made
    as the loop goes: of all scales together it would be 11 MB an image at d16.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._streams = [np.random.default_rng([seed, 1]) for seed in seeds]

    def part(self, images: Sequence[int]) -> SmoothNoise:
        """That of some of the images, which goes on where theirs is."""
        part = SmoothNoise(())
        part._streams = [self._streams[i] for i in images]
        return part

    def next(self, tokens: int, vocab: int) -> NDArray[np.float32]:
        """That of the next tokens of each image, f32 [B, tokens, vocab]."""
        drawn = [stream.standard_exponential((tokens, vocab), dtype=np.float32) for stream in self._streams]
        return np.asarray(-np.log(np.maximum(np.stack(drawn), np.float32(2**-100))), np.float32)

"""How far a plan, on an engine and machine, is from float32 PyTorch: it draws the goldens again, and all is compared.

Shapes: L tokens per image; K scales; S side of a scale; V vocabulary; G logits kept per token, the largest.

**Limits.** A d16 step rounds some 300 results one after the other, and guidance of 4 multiplies what comes out by up
to nine. fp32: the same sums in another order differ by 1e-5 of the logits' range at most; 1e-3 leaves room for
kernels and depth, and is what TF32 products with their 11 bits reach: who exports float32 is to get it. fp16: at d16
3e-4 where chains stay in float32 and 1.2e-3 where every result is rounded (`export/numerics.py`); trained weights
have larger outliers, and 3e-2 is what an export allows a graph as well. bf16 has 8 bits instead of 11, so eight times
fp16's. int8 plans round every product's factors to 256 steps: on the plan that ships a divergence of 3e-3, at d16
with random weights 1e-2 (one channel that takes all the steps for itself, which an export looks for, made it 0.17).
The divergence of two distributions is quadratic in the errors of their logits. All limits are far below what a wrong
weight, row, slot or scale does, which is of the order of the range itself. Codes may differ where two are a near
tie: nearer than twice the limit of a logit. Drawn codes differ more often the flatter the distribution: at d16 with
random weights 6 % of them by fp16 alone, three quarters by int8. A pixel in fp32 may fall on the other side of a
rounding border.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from car_runtime.config import GenerationConfig
from car_runtime.format.goldens import Goldens
from car_runtime.format.manifest import Manifest
from car_runtime.plan import Plan
from car_runtime.request import TOP_P_OFF, uniforms

DRAWN = 0.995
"""Share of draws that must agree given the same logits: a uniform number may fall on a border of the running sum."""

Floats = NDArray[np.float32]
Tokens = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How far a plan may be from float32 PyTorch; the docstring above says why."""

    logits: float
    """Largest error of a guided logit, ÷ the largest |logit| of the image."""
    divergence: float
    """Mean Kullback-Leibler divergence of the distributions over the G largest logits, nats."""
    top1: float
    """Least share of tokens whose most probable code is the same, given the same past."""
    sampled: float
    """Least share of tokens drawn alike from the same uniform numbers, given the same past."""
    levels: int
    """Largest difference of a pixel, of 255."""


LIMITS = {
    "fp32": Limits(logits=1e-3, divergence=1e-6, top1=0.99, sampled=0.99, levels=1),
    "fp16": Limits(logits=3e-2, divergence=1e-3, top1=0.9, sampled=0.85, levels=12),
    "bf16": Limits(logits=0.15, divergence=3e-2, top1=0.75, sampled=0.5, levels=32),
    "int8": Limits(logits=0.3, divergence=0.1, top1=0.6, sampled=0.15, levels=32),
}
"""Best first."""


def compare(plan: Plan, goldens: Goldens) -> dict[str, Any]:
    """All differences between a plan and its goldens, per scale and over all."""
    forced, _, image = _run(plan, goldens, known=goldens.tokens)
    forced_sampled, _, _ = _run(plan, goldens, known=goldens.sampled_tokens)
    own, drawn, _ = _run(plan, goldens, draws=(goldens.seed, goldens.top_k, goldens.top_p))
    config = GenerationConfig(control=goldens.source, label=goldens.label, cfg=goldens.cfg, top_k=1, top_p=0)
    greedy = plan.generate(config).tokens[0]
    noise = uniforms([goldens.seed], plan.manifest.tokens)[0]
    top_p = goldens.top_p if 0 < goldens.top_p < 1 else TOP_P_OFF
    keep = (goldens.top_k or plan.manifest.model.vocab, top_p)
    levels = np.abs(image.astype(np.int32) - goldens.image)
    return {
        "teacher_forced": _logits(plan.manifest, goldens, forced),
        "greedy": _tokens(plan.manifest, goldens, greedy, goldens.tokens),
        "sampled": {
            **_tokens(plan.manifest, None, drawn, goldens.sampled_tokens),
            "given_the_past": _share(draw(forced_sampled, noise, *keep) == goldens.sampled_tokens),
            "drawn_by_the_definition": _share(draw(own, noise, *keep) == drawn),
        },
        "picture": {"largest": int(levels.max()), "mean": float(levels.mean())},
    }


def _run(
    plan: Plan, goldens: Goldens, *, known: Tokens | None = None, draws: tuple[int, int, float] = (0, 1, 0.0)
) -> tuple[Floats, Tokens, NDArray[np.uint8]]:
    """One image of the goldens' control and class: guided logits [L, V], tokens [L], and the image [H, W, 3].

    With `known` every token is given (teacher forcing), without it drawn with `draws`: seed, top_k, top_p.
    """
    seed, top_k, top_p = draws
    config = GenerationConfig(
        control=goldens.source,
        label=goldens.label,
        seed=seed,
        cfg=goldens.cfg,
        top_k=top_k,
        top_p=top_p,
        known_tokens=known,
        known_mask=None if known is None else np.ones(known.shape, np.bool_),
    )
    scales = list(plan.stream(config, logits=True))
    V = plan.manifest.model.vocab
    logits = np.concatenate([np.asarray(scale.logits).reshape(-1, V) for scale in scales])
    tokens = np.concatenate([scale.tokens.reshape(-1) for scale in scales])
    return logits, tokens, scales[-1].preview()[0]


def _logits(manifest: Manifest, goldens: Goldens, logits_LV: Floats) -> dict[str, Any]:
    scales = [
        {"side": scale.side, **_logits_of(goldens, logits_LV, slice(scale.start, scale.stop))}
        for scale in manifest.scales
    ]
    return {"scales": scales, "all": _logits_of(goldens, logits_LV, slice(0, manifest.tokens))}


def _logits_of(goldens: Goldens, logits_LV: Floats, part: slice) -> dict[str, Any]:
    """Errors at the golden indices (`relative`: the largest ÷ range), divergence, and greedy agreement."""
    index, want, got_NV = goldens.logit_index[part], goldens.logit_value[part], logits_LV[part]
    if not np.isfinite(got_NV).all():
        return {"finite": False, **dict.fromkeys(("largest", "mean", "relative", "divergence", "top1", "gap"))}
    got = np.take_along_axis(got_NV, index, axis=1)
    error = np.abs(got - want)
    chosen = got_NV.argmax(axis=1)
    return {
        "finite": True,
        "largest": float(error.max()),
        "mean": float(error.mean()),
        "relative": float(error.max()) / goldens.logit_range,
        "divergence": float(_divergence(want, got).mean()),
        "top1": _share(chosen == index[:, 0]),
        "gap": float(_gaps(index, want, chosen).max()) / goldens.logit_range,
    }


def _divergence(want_NG: Floats, got_NG: Floats) -> NDArray[np.float64]:
    """Kullback-Leibler divergence per token, nats [N], of the distributions over the kept logits alone."""
    want, got = (_log_softmax(logits) for logits in (want_NG, got_NG))
    divergence: NDArray[np.float64] = np.maximum((np.exp(want) * (want - got)).sum(axis=1), 0)
    return divergence


def _log_softmax(logits: Floats) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def _gaps(index_NG: Tokens, value_NG: Floats, chosen_N: Tokens) -> Floats:
    """Distance of each chosen code's golden logit from the largest one, [N], at least 0.

    Of a code that is not among the kept ones only the least is known: the distance of the last kept.
    """
    at = index_NG == chosen_N[:, None]
    column = np.where(at.any(axis=1), at.argmax(axis=1), index_NG.shape[1] - 1)
    return np.asarray(value_NG[:, 0] - value_NG[np.arange(len(column)), column])


def _tokens(manifest: Manifest, goldens: Goldens | None, got: Tokens, want: Tokens) -> dict[str, Any]:
    """Share of tokens that are equal, and where a free run first left the golden one.

    With `goldens` (a greedy run) `gap` is the largest of that scale's differing tokens, ÷ range: all tokens of a
    scale come from the same past, those of later scales from another one.
    """
    differs = got != want
    found: dict[str, Any] = {"equal": _share(~differs), "first_difference": None}
    if not differs.any():
        return found
    first = int(differs.argmax())
    k, scale = next((k, s) for k, s in enumerate(manifest.scales) if first < s.stop)
    row, column = divmod(first - scale.start, scale.side)
    part = slice(scale.start, scale.stop)
    gap = None
    if goldens is not None:
        gaps = _gaps(goldens.logit_index[part], goldens.logit_value[part], got[part])
        gap = float(gaps[differs[part]].max()) / goldens.logit_range
    found["first_difference"] = {
        "token": first,
        "scale": k,
        "row": row,
        "column": column,
        "in_this_scale": int(differs[part].sum()),
        "gap": gap,
    }
    return found


def draw(logits_NV: Floats, uniforms_N: Floats, top_k: int, top_p: float) -> Tokens:
    """The draw of docs/reference/plan-format.md in float64, int64 [N]. top_k: 1…V; top_p above 1 keeps all.

    Logits that are not finite give code 0.
    """
    logits = np.nan_to_num(logits_NV.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    ranked = -np.sort(-logits, axis=-1)
    kept = ranked >= ranked[:, top_k - 1 : top_k]
    p = _softmax(np.where(kept, ranked, -np.inf))
    kept &= p.cumsum(axis=-1) - p < top_p
    border = np.where(kept, ranked, np.inf).min(axis=-1, keepdims=True)
    running = _softmax(np.where(logits < border, -np.inf, logits)).cumsum(axis=-1)
    tokens: Tokens = (running <= uniforms_N[:, None].astype(np.float64) * running[:, -1:]).sum(axis=-1)
    return tokens


def _softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def _share(equal: NDArray[np.bool_]) -> float:
    return float(equal.mean())


def judge(agreement: Mapping[str, Any], limits: Limits) -> list[dict[str, Any]]:
    """The differences against the limits: name, value, bound ("at most" or "at least"), limit, passed."""
    logits, greedy, sampled = agreement["teacher_forced"]["all"], agreement["greedy"], agreement["sampled"]
    tie, first = 2 * limits.logits, greedy["first_difference"]
    rows: list[tuple[str, float | None, str, float]] = [
        ("logits: largest error ÷ range", logits["relative"], "at most", limits.logits),
        ("logits: mean divergence, nats", logits["divergence"], "at most", limits.divergence),
        ("greedy codes given the past: share equal", logits["top1"], "at least", limits.top1),
        ("greedy codes given the past: gap of those that differ ÷ range", logits["gap"], "at most", tie),
        ("greedy run: gap where it first differs ÷ range", first["gap"] if first else 0.0, "at most", tie),
        ("sampled codes given the past: share equal", sampled["given_the_past"], "at least", limits.sampled),
        ("sampled run: share drawn by the definition", sampled["drawn_by_the_definition"], "at least", DRAWN),
        ("image of the golden tokens: levels off", agreement["picture"]["largest"], "at most", limits.levels),
    ]
    return [
        {"name": name, "value": value, "bound": bound, "limit": limit, "passed": _within(value, bound, limit)}
        for name, value, bound, limit in rows
    ]


def _within(value: float | None, bound: str, limit: float) -> bool:
    """None, for logits that are not finite, is never within."""
    return value is not None and (value <= limit if bound == "at most" else value >= limit)

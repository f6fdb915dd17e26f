"""`car-run verify PLAN`: does this plan, on this engine and machine, do what the PyTorch model did, and how fast?

An export stores what the float32 PyTorch model computes for one control image, `goldens.npz`. Here the plan computes
it again, through the same loop as `car-run`, and every difference is measured; then the time of each stage, the cold
start and the memory. docs/acceptance.md describes the report.

Shapes: L tokens per picture; K scales; S side of a scale; V vocabulary; G logits kept per token, the largest.

**Limits.** A d16 step rounds some 300 results one after the other, and guidance of 4 multiplies what comes out by up
to nine. fp32: the same sums in another order differ by 1e-5 of the logits' range at most; 1e-3 leaves room for
kernels and depth, and is what TF32 products with their 11 bits reach: who exports float32 is to get it. fp16: at d16
3e-4 where chains stay in float32 and 1.2e-3 where every result is rounded (`export/numerics.py`); trained weights
have larger outliers, and 3e-2 is what an export allows a graph as well. bf16 has 8 bits instead of 11, so eight times
fp16's. int8 plans round every product's factors to 256 steps: on the plan that ships a divergence of 3e-3, at d16
with made-up weights 1e-2 (one channel that takes all the steps for itself, which an export looks for, made it 0.17).
The divergence of two distributions is quadratic in the errors of their logits. All limits are far below what a wrong
weight, row, slot or scale does, which is of the order of the range itself. Codes may differ where two are a near
tie: nearer than twice the limit of a logit. Drawn codes differ more often the flatter the distribution: at d16 with
made-up weights 6 % of them by fp16 alone, three quarters by int8. A pixel in fp32 may fall on the other side of a
rounding border.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from car_runtime import __version__
from car_runtime import plan as plan_module
from car_runtime import request as sampling
from car_runtime.backends.registry import on_cpu
from car_runtime.errors import PlanError, RequestError
from car_runtime.format.manifest import MANIFEST, WEIGHTS, Manifest, read_manifest
from car_runtime.generate import State, run_scales
from car_runtime.plan import Plan, open_plan
from car_runtime.system.machine import machine

FORMAT = 1
GOLDENS = "goldens.npz"
WARMUP_AND_RUNS = {True: (3, 10), False: (10, 100)}
"""Whether the backend is a CPU's → pictures before measuring, and measured ones."""
DRAWN = 0.995
"""Share of draws that must agree given the same logits: a uniform number may fall on a border of the running sum."""

Log = Callable[[str], None]
Floats = NDArray[np.float32]
Tokens = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How far a plan may be from float32 PyTorch; the module's docstring says why."""

    logits: float
    """Largest error of a guided logit, ÷ the largest |logit| of the picture."""
    divergence: float
    """Mean Kullback-Leibler divergence of the distributions over the G largest logits, nats."""
    top1: float
    """Least share of tokens whose likeliest code is the same, given the same past."""
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
_TYPES = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "fp32": "fp32", "fp16": "fp16"}
"""What a backend calls the type that it multiplies in, where it chooses that itself."""


@dataclass(frozen=True, kw_only=True)
class Goldens:
    """The arrays of `goldens.npz`; docs/plan-format.md lists them."""

    control: NDArray[np.uint8] | None
    label: int
    cfg: float
    tokens: Tokens
    """[L], greedy."""
    logit_index: Tokens
    """[L, G]."""
    logit_value: Floats
    """[L, G], largest first."""
    logit_range: float
    image: NDArray[np.uint8]
    """[H, W, 3], the greedy picture."""
    sampled_tokens: Tokens
    """[L]."""
    seed: int
    top_k: int
    top_p: float


def read_goldens(root: Path, manifest: Manifest) -> Goldens:
    """The goldens of a plan. Raises PlanError: an older export has none."""
    outputs = {port.name for port in manifest.graphs["step"].outputs}
    if GOLDENS not in manifest.files or "logits" not in outputs:
        lacks = GOLDENS if GOLDENS not in manifest.files else "the step's output 'logits'"
        raise PlanError(
            f"the plan {manifest.name!r} lacks {lacks}, which verifying needs; export it again with this version"
        )
    try:
        with np.load(root / GOLDENS, allow_pickle=False) as stored:
            arrays: dict[str, Any] = dict(stored)
    except (OSError, ValueError) as error:
        raise PlanError(f"cannot read {GOLDENS} ({error}); export the plan again") from error
    L, size, vocab = manifest.tokens, manifest.model.image_size, manifest.model.vocab
    kept = arrays["logit_index"].shape[-1] if "logit_index" in arrays else 1
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "control": ("uint8", (size, size, 3)),
        "label": ("int64", ()),
        "cfg": ("float32", ()),
        "tokens": ("int64", (L,)),
        "logit_index": ("int64", (L, kept)),
        "logit_value": ("float32", (L, kept)),
        "logit_range": ("float32", ()),
        "image": ("uint8", (size, size, 3)),
        "sampled_tokens": ("int64", (L,)),
        "seed": ("int64", ()),
        "top_k": ("int64", ()),
        "top_p": ("float32", ()),
    }
    if manifest.model.control_type is None:
        del expected["control"]
    for name, (dtype, shape) in expected.items():
        found = arrays.get(name)
        if found is None or (found.dtype.name, found.shape) != (dtype, shape):
            have = "missing" if found is None else f"{found.dtype.name} {list(found.shape)}"
            raise PlanError(f"{GOLDENS}: {name} is {have}, not {dtype} {list(shape)}; export the plan again")
    for name in ("tokens", "logit_index", "sampled_tokens"):
        if arrays[name].size and not 0 <= arrays[name].min() <= arrays[name].max() < vocab:
            raise PlanError(f"{GOLDENS}: {name} leaves 0…{vocab - 1}; export the plan again")
    values = {name: arrays[name] if expected[name][1] else arrays[name].item() for name in expected}
    return Goldens(**{"control": None, **values})


def verify(
    path: str | os.PathLike[str] | None = None,
    backend: str = "auto",
    *,
    threads: int | None = None,
    warmup: int | None = None,
    runs: int | None = None,
    batches: Sequence[int] = (1,),
    log: Log = lambda _: None,
) -> dict[str, Any]:
    """Open a plan on a backend, compare it with its goldens, and measure it. Returns the report; `passed` sums it up.

    warmup, runs: pictures before measuring, and measured ones (None: 3 and 10 on a CPU, 10 and 100 on a GPU).
    batches: numbers of pictures at once to measure. log: told what goes on, a line each.

    Raises PlanError, BackendError, RequestError and RunError, as `open_plan` and `Plan.generate` do.
    """
    for name, value, low in (("warmup", warmup, 0), ("runs", runs, 1), *(("batch", b, 1) for b in batches)):
        if value is not None and not (type(value) is int and low <= value <= 100_000):
            raise RequestError(f"{name} is {value!r}, but must be a whole number from {low}; 10 runs are usual")
    root = plan_module.default_plan() if path is None else Path(path)
    manifest = read_manifest(root)
    goldens = read_goldens(root, manifest)
    age, began = process_age(), perf_counter()
    with open_plan(root, backend, threads=threads) as plan:
        opened = perf_counter() - began
        log(f"{manifest.name} on {plan.backend_name} ({plan.why}), opened in {opened:.2f} s")
        cold_start = _cold_start(plan, goldens, age, opened)
        log(f"first picture after {cold_start['first_image']:.2f} s")
        agreement = compare(plan, goldens)
        facts = plan._backend.report()
        chosen = _TYPES.get(str(facts.get("precision")), "fp32")  # what the backend itself decided to multiply in
        given = manifest.precision
        kinds = [given.compute, chosen, *([given.weights] if given.weights == "int8" else [])]
        precision = max(kinds, key=list(LIMITS).index)
        checks = judge(agreement, LIMITS[precision])
        failed = sum(not check["passed"] for check in checks)
        log(f"compared with the goldens: {f'{failed} of {len(checks)} checks FAIL' if failed else 'agrees'}")
        defaults = WARMUP_AND_RUNS[on_cpu(plan.backend_name)]
        warm, count = (d if given is None else given for d, given in zip(defaults, (warmup, runs), strict=True))
        latency = []
        for batch in batches:
            log(f"measuring {warm} + {count} runs, batch {batch}")
            latency.append(measure(plan, goldens, batch, warm, count))
        image = latency[0]["stages"]["image"]["p50"] / latency[0]["batch"] if latency else None
        cold_start["jit"] = None if image is None else max(0.0, cold_start["first_image"] - image)
        facts = plan._backend.report()
        return {
            "format": FORMAT,
            "passed": all(check["passed"] for check in checks),
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "version": __version__,
            "plan": _plan_facts(root, manifest),
            "backend": {"name": plan.backend_name, "why": plan.why, **facts},
            "machine": machine(),
            "settings": {"warmup": warm, "runs": count, "threads": threads, "cfg": goldens.cfg, "limits": precision},
            "checks": checks,
            "agreement": agreement,
            "latency": latency,
            "cold_start": cold_start,
            "memory": {"peak_rss": peak_rss(), "device": facts.get("memory_bytes")},
        }


# -- agreement -----------------------------------------------------------------------------------------------------


def compare(plan: Plan, goldens: Goldens) -> dict[str, Any]:
    """All differences between a plan and its goldens, per scale and over all."""
    state = State(plan._backend, plan.manifest, 1, 2, logits=True)
    forced, _, image = _loop(plan, state, goldens, known=goldens.tokens)
    forced_sampled, _, _ = _loop(plan, state, goldens, known=goldens.sampled_tokens)
    own, drawn, _ = _loop(plan, state, goldens, draws=(goldens.seed, goldens.top_k, goldens.top_p))
    del state
    greedy = plan.generate(goldens.control, goldens.label, cfg=goldens.cfg, top_k=1, top_p=0).tokens[0]
    noise = sampling.uniforms([goldens.seed], plan.manifest.tokens)[0]
    top_p = goldens.top_p if 0 < goldens.top_p < 1 else sampling.TOP_P_OFF
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


def _loop(
    plan: Plan,
    state: State,
    goldens: Goldens,
    *,
    known: Tokens | None = None,
    draws: tuple[int, int, float] = (0, 1, 0.0),
) -> tuple[Floats, Tokens, NDArray[np.uint8]]:
    """One picture of the goldens' control and class: guided logits [L, V], tokens [L], and the picture [H, W, 3].

    With `known` every token is given (teacher forcing), without it drawn with `draws`: seed, top_k, top_p.
    """
    seed, top_k, top_p = draws
    request = sampling.resolve(
        plan.manifest,
        label=goldens.label,
        seed=seed,
        cfg=goldens.cfg,
        top_k=top_k,
        top_p=top_p,
        known_tokens=known,
        known_mask=None if known is None else np.ones(known.shape, np.bool_),
    )
    features = None if goldens.control is None else plan._control_features(Image.fromarray(goldens.control))
    state.load(request, plan._condition(request.label, 1, 2), features)
    *_, last = run_scales(plan._backend, plan.manifest.scales, plan._constants, state)
    plan._decode(last.f_hat, state.image)
    assert state.logits is not None
    V = plan.manifest.model.vocab
    logits = np.concatenate([plan._backend.read(logits_BSSV).reshape(-1, V) for logits_BSSV in state.logits])
    return logits, state.all_tokens()[0], plan._backend.read(state.image)[0]


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
    """By how much the golden logit of each chosen code is below the largest one, [N].

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
    """The draw of docs/plan-format.md in float64, int64 [N]. top_k: 1…V; top_p above 1 keeps all.

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
        (
            "picture of the golden tokens: levels off",
            agreement["picture"]["largest"],
            "at most",
            limits.levels,
        ),
    ]
    return [
        {"name": name, "value": value, "bound": bound, "limit": limit, "passed": _within(value, bound, limit)}
        for name, value, bound, limit in rows
    ]


def _within(value: float | None, bound: str, limit: float) -> bool:
    """None, for logits that are not finite, is never within."""
    return value is not None and (value <= limit if bound == "at most" else value >= limit)


# -- time and memory -------------------------------------------------------------------------------------------------


def measure(plan: Plan, goldens: Goldens, batch: int, warmup: int, runs: int) -> dict[str, Any]:
    """Seconds of each stage and of whole pictures, control image in host memory → pictures in host memory.

    Control and class are computed anew in every run. `image` is by the clock on the wall; the stages are by the
    backend's marks, which on a GPU are events on its stream.
    """
    seconds: dict[str, list[float]] = {}
    for i in range(warmup + runs):
        timings = _one(plan, goldens, batch, seed=i)
        if i >= warmup:
            for stage, value in timings.items():
                seconds.setdefault("image" if stage == "total" else stage, []).append(value)
    stages = {stage: {"p50": _percentile(v, 50), "p95": _percentile(v, 95)} for stage, v in seconds.items()}
    return {"batch": batch, "runs": runs, "stages": stages}


def _one(plan: Plan, goldens: Goldens, batch: int, seed: int) -> dict[str, float]:
    """The timings of one call that finds nothing computed before."""
    plan._features.clear()
    plan._conditions.clear()
    return plan.generate(goldens.control, goldens.label, seed, batch, cfg=goldens.cfg).timings


def _percentile(values: Sequence[float], share: float) -> float:
    return float(np.percentile(values, share))


def _cold_start(plan: Plan, goldens: Goldens, age: float | None, opened: float) -> dict[str, Any]:
    """Seconds: process start → opening, opening, the first picture, and all of it."""
    first = _one(plan, goldens, 1, seed=0)["total"]
    total = None if age is None else age + opened + first
    return {"before_open": age, "open": opened, "first_image": first, "process_start_to_image": total}


def process_age() -> float | None:
    """Seconds since this process was started, where the system tells (Linux)."""
    try:
        after_name = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(after_name[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None


def peak_rss() -> int | None:
    """Largest resident memory of this process so far, bytes, where the system tells.

    On Linux from the kernel's account of this very process: `getrusage` hands a child its parent's peak.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _plan_facts(root: Path, manifest: Manifest) -> dict[str, Any]:
    sizes = {name: entry.bytes for name, entry in manifest.files.items()}
    return {
        "name": manifest.name,
        "path": str(root),
        "precision": {field.name: getattr(manifest.precision, field.name) for field in fields(manifest.precision)},
        "depth": manifest.model.depth,
        "width": manifest.model.width,
        "image_size": manifest.model.image_size,
        "control_type": manifest.model.control_type,
        "bytes": sum(sizes.values()) + (root / MANIFEST).stat().st_size,
        "weight_bytes": sizes.get(WEIGHTS, 0),
        "engine_bytes": sum(size for name, size in sizes.items() if name.endswith(".engine")),
        "provenance": manifest.provenance,
    }


# -- for people ------------------------------------------------------------------------------------------------------


def table(report: Mapping[str, Any]) -> str:
    """The report as text: agreement per scale, checks, times, memory."""
    return "\n".join([*_agreement_lines(report), "", *_time_lines(report), "", *_memory_lines(report)])


def _agreement_lines(report: Mapping[str, Any]) -> Iterator[str]:
    forced = report["agreement"]["teacher_forced"]
    yield f"{'scale':>8} {'logits off by':>14} {'÷ range':>9} {'divergence':>11} {'greedy equal':>13}"
    for row in (*forced["scales"], {"side": "all", **forced["all"]}):
        side = row["side"] if row["side"] == "all" else f"{row['side']}×{row['side']}"
        numbers = (
            f"{row['largest']:>14.2e} {row['relative']:>9.1e} {row['divergence']:>11.1e} {row['top1']:>13.2%}"
            if row["finite"]
            else f"{'inf or nan':>14}"
        )
        yield f"{side:>8} {numbers}"
    yield ""
    yield from (f"{'pass' if check['passed'] else 'FAIL'}  {_check_line(check)}" for check in report["checks"])
    yield "passed" if report["passed"] else "FAILED"


def _check_line(check: Mapping[str, Any]) -> str:
    value = "not finite" if check["value"] is None else f"{check['value']:.4g}"
    return f"{check['name']}: {value} ({check['bound']} {check['limit']:.4g})"


def _time_lines(report: Mapping[str, Any]) -> Iterator[str]:
    for entry in report["latency"]:
        pictures = "1 picture" if entry["batch"] == 1 else f"{entry['batch']} pictures"
        yield f"{pictures}, {entry['runs']} runs: {'p50':>22} {'p95':>12}"
        for stage, found in entry["stages"].items():
            yield f"{stage:>24} {found['p50'] * 1e3:>12.2f} ms {found['p95'] * 1e3:>9.2f} ms"
    cold = report["cold_start"]
    parts = {"open": "open", "first_image": "first picture", "jit": "of it once only"}
    parts |= {"process_start_to_image": "process start to picture"}
    yield "cold start: " + ", ".join(f"{text} {_seconds(cold[key])}" for key, text in parts.items())


def _seconds(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f} s"


def _memory_lines(report: Mapping[str, Any]) -> Iterator[str]:
    plan, memory = report["plan"], report["memory"]
    yield f"plan {_megabytes(plan['bytes'])}, of it engines {_megabytes(plan['engine_bytes'])}"
    yield f"memory: process {_megabytes(memory['peak_rss'])}, device {_megabytes(memory['device'])}"


def _megabytes(count: float | None) -> str:
    return "unknown" if count is None else "0 MB" if count == 0 else f"{math.ceil(count / 1e6)} MB"

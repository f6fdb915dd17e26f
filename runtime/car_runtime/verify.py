"""`car-run verify PLAN`: does this plan, on this engine and machine, do what the PyTorch model did, and how fast?

An export stores what the float32 PyTorch model computes for one control image, `goldens.npz`. Here the plan computes
it again, through the same loop as `car-run`, and every difference is measured (`car_runtime.agreement`); then the
time of each stage, the cold start and the memory. docs/verification.md describes the report.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from car_runtime import __version__
from car_runtime.agreement import LIMITS, compare, judge
from car_runtime.backends.registry import on_cpu
from car_runtime.config import GenerationConfig
from car_runtime.errors import RequestError
from car_runtime.format.goldens import Goldens, read_all_goldens
from car_runtime.format.manifest import MANIFEST, WEIGHTS, Manifest, read_manifest
from car_runtime.plan import Plan, default_plan, open_plan
from car_runtime.system.machine import machine
from car_runtime.system.process import peak_rss, process_age

FORMAT = 1
WARMUP_AND_RUNS = {True: (3, 10), False: (10, 100)}
"""Whether the backend is a CPU's → images before measuring, and measured ones."""
_TYPES = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "fp32": "fp32", "fp16": "fp16"}
"""What a backend calls the type that it multiplies in, where it chooses that itself."""

Log = Callable[[str], None]


def verify(
    path: str | os.PathLike[str] | None = None,
    backend: str = "auto",
    *,
    threads: int | None = None,
    warmup: int | None = None,
    runs: int | None = None,
    batches: Sequence[int] = (1,),
    require_signature: str | os.PathLike[str] | None = None,
    trust_engines: bool = False,
    log: Log = lambda _: None,
) -> dict[str, Any]:
    """Open a plan on a backend, compare it with its goldens, and measure it. Returns the report; `passed` sums it up.

    warmup, runs: images before measuring, and measured ones (None: 3 and 10 on a CPU, 10 and 100 on a GPU).
    batches: numbers of images at once to measure. require_signature, trust_engines: as `open_plan` has them.
    log: is called with what goes on, a line each.

    Raises PlanError, BackendError, RequestError and RunError, as `open_plan` and `Plan.generate` do.
    """
    _check_counts(warmup, runs, batches)
    root = default_plan() if path is None else Path(path)
    manifest = read_manifest(root, require_signature)
    goldens, *others = read_all_goldens(root, manifest)
    age, began = process_age(), perf_counter()
    signed = require_signature
    with open_plan(root, backend, threads=threads, require_signature=signed, trust_engines=trust_engines) as plan:
        opened = perf_counter() - began
        log(f"{manifest.name} on {plan.backend_name} ({plan.why}), opened in {opened:.2f} s")
        cold_start = _cold_start(plan, goldens, age, opened)
        log(f"first image after {cold_start['first_image']:.2f} s")
        agreement, limits = compare(plan, goldens), _limits_of(plan)
        checks = judge(agreement, LIMITS[limits])
        compared = {one.branch: compare(plan, one) for one in others}
        for branch, found in compared.items():
            where = f"branch {branch}" if branch else "without control"
            checks += [{**check, "name": f"{where}, {check['name']}"} for check in judge(found, LIMITS[limits])]
        failed = sum(not check["passed"] for check in checks)
        log(f"compared with the goldens: {f'{failed} of {len(checks)} checks FAIL' if failed else 'agrees'}")
        defaults = WARMUP_AND_RUNS[on_cpu(plan.backend_name)]
        warmup, runs = defaults[0] if warmup is None else warmup, defaults[1] if runs is None else runs
        latency = []
        for batch in batches:
            log(f"measuring {warmup} + {runs} runs, batch {batch}")
            latency.append(measure(plan, goldens, batch, warmup, runs))
        facts = plan.backend_report()
    return {
        "format": FORMAT,
        "passed": not failed,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "version": __version__,
        "plan": _plan_facts(root, manifest),
        "backend": {"name": plan.backend_name, "why": plan.why, **facts},
        "machine": machine(),
        "settings": {"warmup": warmup, "runs": runs, "threads": threads, "cfg": goldens.cfg, "limits": limits},
        "checks": checks,
        "agreement": agreement,
        "others": compared,
        "latency": latency,
        "cold_start": cold_start | {"jit": _only_once(cold_start["first_image"], latency)},
        "memory": {"peak_rss": peak_rss(), "device": facts.get("memory_bytes")},
    }


def _check_counts(warmup: int | None, runs: int | None, batches: Sequence[int]) -> None:
    """Raise RequestError for what is no number of images."""
    for name, value, low in (("warmup", warmup, 0), ("runs", runs, 1), *(("batch", b, 1) for b in batches)):
        if value is not None and not (type(value) is int and low <= value <= 100_000):
            raise RequestError(f"{name} is {value!r}, but must be a whole number from {low}; 10 runs are usual")


def _limits_of(plan: Plan) -> str:
    """Key of `LIMITS`: the coarsest of what the plan computes in and what the backend itself chose to multiply in."""
    given = plan.manifest.precision
    chosen = _TYPES.get(str(plan.backend_report().get("precision")), "fp32")
    kinds = [given.compute, chosen, *([given.weights] if given.weights == "int8" else [])]
    return max(kinds, key=list(LIMITS).index)


# -- time ------------------------------------------------------------------------------------------------------------


def measure(plan: Plan, goldens: Goldens, batch: int, warmup: int, runs: int) -> dict[str, Any]:
    """Seconds of each stage and of whole images, control in host memory → images in host memory.

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
    plan.forget()
    config = GenerationConfig(control=goldens.source, label=goldens.label, seed=seed, n=batch, cfg=goldens.cfg)
    return plan.generate(config).timings


def _percentile(values: Sequence[float], share: float) -> float:
    return float(np.percentile(values, share))


def _cold_start(plan: Plan, goldens: Goldens, age: float | None, opened: float) -> dict[str, Any]:
    """Seconds: process start → opening, opening, the first image, and all of it."""
    first = _one(plan, goldens, 1, seed=0)["total"]
    total = None if age is None else age + opened + first
    return {"before_open": age, "open": opened, "first_image": first, "process_start_to_image": total}


def _only_once(first_image: float, latency: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds of the first image that later ones do not take, to compile and record; None where none was measured."""
    if not latency:
        return None
    later: float = latency[0]["stages"]["image"]["p50"] / latency[0]["batch"]
    return max(0.0, first_image - later)


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
        images = "1 image" if entry["batch"] == 1 else f"{entry['batch']} images"
        yield f"{images}, {entry['runs']} runs: {'p50':>22} {'p95':>12}"
        for stage, found in entry["stages"].items():
            yield f"{stage:>24} {found['p50'] * 1e3:>12.2f} ms {found['p95'] * 1e3:>9.2f} ms"
    cold = report["cold_start"]
    parts = {"open": "open", "first_image": "first image", "jit": "of it once only"}
    parts |= {"process_start_to_image": "process start to image"}
    yield "cold start: " + ", ".join(f"{text} {_seconds(cold[key])}" for key, text in parts.items())


def _seconds(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f} s"


def _memory_lines(report: Mapping[str, Any]) -> Iterator[str]:
    plan, memory = report["plan"], report["memory"]
    yield f"plan {_megabytes(plan['bytes'])}, of it engines {_megabytes(plan['engine_bytes'])}"
    yield f"memory: process {_megabytes(memory['peak_rss'])}, device {_megabytes(memory['device'])}"


def _megabytes(count: float | None) -> str:
    return "unknown" if count is None else "0 MB" if count == 0 else f"{math.ceil(count / 1e6)} MB"

"""How long an image takes: our runtime on every backend that opens here, and CAR's loop in PyTorch, in one run.

    python -m benchmarks.latency                                        # the shipped plan
    python -m benchmarks.latency --plan emoji.plan --checkpoint runs/car     # and the loop with its weights
    python -m benchmarks.latency --model d16 --batch 1,4 -o results.jsonl    # published sizes, random weights
    python -m benchmarks.latency --model d16 --int8          # and the INT8 plan that is made from it, on CPU backends

Measured end to end: control image in host memory → RGB in host memory, with guidance, nothing kept from the call
before. "published way" is `benchmarks.baselines.reference_loop`: the same weights in eager PyTorch, in float32 and
under bfloat16 autocast. All candidates take turns in one process, and every ratio is the median of the ratios within
one round, so that it holds on a busy machine. Memory and starting are measured in processes of their own; the files
that a start reads are in the page cache.

Each stage is compared with PyTorch's rates on this machine: the time of its matrix products alone, at their own sizes
and in the same type and number of threads (the fastest of five), or of reading its weights, K/V, inputs and outputs
once, whichever is more (with --device cuda: of its products). "vs. PyTorch's GEMM rate" is that time ÷ the measured
one; a backend whose kernels are faster than PyTorch's exceeds 100 %. Of an INT8 plan the products with weights and
the convolutions are compared with INT8 products, attention's with those of the type that the backend has for them.

Tables go to stdout, then one line of JSON (`benchmarks.harness.records`) whose results are flat rows, each with
"question":

    end_to_end  candidate, backend (null: PyTorch), precision, batch, p50, p95, min, runs, images_per_s;
                speedup, speedup_p10, speedup_p90 (against the loop in float32), speedup_bf16 (against its autocast);
                batch_gain (images a second against the same candidate's first batch size);
                tokens_equal (share, against the loop in float32; without it, against the first backend);
                gflop, limit_s, of_limit (limit_s ÷ p50)
    stage       candidate, batch, stage, p50, p95, share (of the image), gflop, limit_s, bound, gemm_gflops_limit,
                of_limit
    next_seed   candidate, p50, p95, ratio (to an image of a new control), control_p50, condition_p50
    start       candidate, import_s, open_s, first_image_s, cold_start_s, rss_before, peak_rss, weights_bytes,
                rss_less_weights, plan_bytes
    limit       dtype, threads, gemm_gflops (at this image's sizes, by operations), gemm_gflops_best, memory_gbs
    roofline    card, stage, compute_s, memory_s, floor_s, bound: computed from the counts, not measured

Times are seconds; null is what doesn't apply or wasn't measured.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.analysis.columns import LATENCY
from benchmarks.analysis.counting import ImageCount, count_image
from benchmarks.analysis.limits import RTX_4090, Limits, roofline
from benchmarks.baselines.candidates import (
    BF16,
    FP32,
    Candidate,
    device_of,
    opened_backends,
    published_candidate,
    runtime_candidates,
    take_turns,
)
from benchmarks.harness.cli import (
    Log,
    add_run_options,
    add_workload_options,
    check_options,
    choose_workload,
    make_parser,
    model_settings,
    numbers,
    run_command,
)
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.measure import in_subprocess, quantiles, ratio, run_python
from benchmarks.harness.records import Record, Row, record, rows_of
from benchmarks.harness.tables import table
from benchmarks.harness.workload import Workload, int8
from car_runtime.backends.base import Backend
from car_runtime.format.manifest import WEIGHTS

WARMUP_AND_RUNS = {"cpu": (3, 10), "cuda": (10, 100)}
STARTS = 3


# ---- Rows ----


def end_to_end_rows(
    candidates: Sequence[Candidate], counts: Mapping[int, ImageCount], limits: Limits, equal: Mapping[str, float]
) -> list[Row]:
    """One row per candidate and batch size."""
    by_name = {(c.name, c.batch): c for c in candidates if not c.next_seed}
    rows = []
    for c in by_name.values():
        t, count = quantiles(c.seconds), counts[c.batch]
        loop, autocast = by_name.get((FP32, c.batch)), by_name.get((BF16, c.batch))
        first = next(other for other in by_name.values() if other.name == c.name)
        speedup = ratio(c.seconds, loop.seconds) if loop is not None else (None, None, None)
        limit = limits.image(count, c.precision, c.rest)
        rows.append(
            {
                "question": "end_to_end",
                "candidate": c.name,
                "backend": c.backend,
                "precision": c.precision,
                "batch": c.batch,
                **t,
                "images_per_s": c.batch / t["p50"],
                **dict(zip(("speedup", "speedup_p10", "speedup_p90"), speedup, strict=True)),
                "speedup_bf16": ratio(c.seconds, autocast.seconds)[0] if autocast is not None else None,
                "batch_gain": c.batch / first.batch * ratio(c.seconds, first.seconds)[0],
                "tokens_equal": equal.get(c.key),
                "gflop": count.total("flops") / 1e9,
                "limit_s": limit,
                "of_limit": limit / t["p50"],
            }
        )
    return rows


def stage_rows(candidates: Sequence[Candidate], counts: Mapping[int, ImageCount], limits: Limits) -> list[Row]:
    """One row per candidate, batch size and stage. The loop has no stage for the class: it is in every scale."""
    rows: list[Row] = []
    for c in candidates:
        image = float(np.median(c.seconds))
        for stage in counts[c.batch].stages:
            seconds = c.stage_times(stage.name)
            if c.next_seed or not seconds:
                continue
            t, limit = quantiles(seconds), limits.stage(stage, c.precision, c.rest)
            rows.append(
                {
                    "question": "stage",
                    "candidate": c.name,
                    "batch": c.batch,
                    "stage": stage.name,
                    "p50": t["p50"],
                    "p95": t["p95"],
                    "share": t["p50"] / image,
                    "gflop": stage.count.flops * stage.runs / 1e9,
                    **limit,
                    "of_limit": limit["limit_s"] / t["p50"],
                }
            )
    return rows


def next_seed_rows(candidates: Sequence[Candidate]) -> list[Row]:
    """A further seed on the control and class of the call before, against an image of which nothing is known."""
    whole = {c.name: c for c in reversed(candidates) if not c.next_seed}
    return [
        {
            "question": "next_seed",
            "candidate": c.name,
            **{key: quantiles(c.seconds)[key] for key in ("p50", "p95")},
            "ratio": ratio(whole[c.name].seconds, c.seconds)[0],
            **{f"{name}_p50": float(np.median(c.stage_times(name))) for name in ("control", "condition")},
        }
        for c in candidates
        if c.next_seed
    ]


def equal_tokens(candidates: Sequence[Candidate]) -> dict[str, float]:
    """The share of tokens that each candidate draws like the first one, from one seed, at the first batch size."""
    chosen = [c for c in candidates if c.batch == candidates[0].batch and not c.next_seed]
    first, *others = [(c.key, c.make(0)[0]) for c in chosen]
    return {first[0]: 1.0, **{key: float((tokens == first[1]).mean()) for key, tokens in others}}


# ---- Starting, in processes of their own ----

IMPORT = "import time; began = time.perf_counter(); import car_runtime; print(time.perf_counter() - began)"


def start_rows(workload: Workload, backends: Sequence[str], threads: int) -> list[Row]:
    """Import, opening, first image, cold start and memory of each backend; of the loop, memory alone."""
    files = workload.manifest.files
    weights, plan_bytes = files[WEIGHTS].bytes, sum(entry.bytes for entry in files.values())
    imported = float(np.median([float(run_python("-c", IMPORT)) for _ in range(STARTS)]))
    suffix = ", int8" if workload.manifest.precision.weights == "int8" else ""
    rows = []
    for name in backends:
        alone = in_subprocess(
            "benchmarks.harness.workload:first_image", str(workload.plan), name, threads, workload.cfg
        )
        rows.append(
            {
                "question": "start",
                "candidate": f"{name}{suffix}",
                "import_s": imported,
                **alone["result"],
                "cold_start_s": cold_start(workload, name, threads),
                **_memory(alone, weights),
                "plan_bytes": plan_bytes,
            }
        )
    if workload.source is not None:
        of = (str(workload.plan), asdict(workload.source), threads)
        alone = in_subprocess("benchmarks.baselines.candidates:published_alone", *of)
        nothing = dict.fromkeys(("import_s", "open_s", "first_image_s", "cold_start_s", "plan_bytes"))
        rows.append({"question": "start", "candidate": FP32, **nothing, **_memory(alone, weights)})
    return rows


def _memory(alone: Mapping[str, Any], weights: int) -> Row:
    return {
        "rss_before": alone["rss_before"],
        "peak_rss": alone["peak_rss"],
        "weights_bytes": weights,
        "rss_less_weights": alone["peak_rss"] - weights,
    }


def cold_start(workload: Workload, backend: str, threads: int) -> float:
    """Seconds from starting `car-run` to its end with the PNG written; the median of `STARTS`."""
    control, seconds = workload.control(), []
    with tempfile.TemporaryDirectory() as folder:
        image, flags = Path(folder) / "image.png", list[str]()
        if control is not None:
            Image.fromarray(control).save(Path(folder) / "control.png")
            flags = ["--control", str(Path(folder) / "control.png")]
        flags += ["--engine", str(workload.plan), "--class", "0", "--cfg", str(workload.cfg)]
        flags += ["--backend", backend, "--threads", str(threads), "-o", str(image)]
        for _ in range(STARTS):
            image.unlink(missing_ok=True)
            began = time.perf_counter()
            run_python("-m", "car_runtime", *flags)
            seconds.append(time.perf_counter() - began)
            if not image.is_file():
                raise BenchmarkError(f"car-run wrote no image on {backend}; run it by hand to see why")
    return float(np.median(seconds))


# ---- The command ----


def measure(args: argparse.Namespace, log: Log) -> Record:
    """Everything, as one record. Raises BenchmarkError and the runtime's errors."""
    workload = choose_workload(args, args.batch, log)
    if not args.reference:
        workload = replace(workload, source=None)
    counts = {batch: count_image(workload.plan, batch) for batch in args.batch}
    forms = [workload, *([int8(workload, args.cache, log)] if args.int8 else [])]
    with ExitStack() as stack:
        candidates = reference_candidates(args, workload)
        opened: list[dict[str, Backend]] = []
        for form in forms:
            found = stack.enter_context(opened_backends(form, args.backends, args.device, args.threads, log))
            opened.append(found)
            candidates += runtime_candidates(form, found, args.batch)
        log("comparing tokens")
        equal = equal_tokens(candidates)
        log(f"measuring {', '.join(c.key for c in candidates)}: {args.warmup} + {args.runs} rounds")
        take_turns(candidates, args.warmup, args.runs)
        reports = {
            f"{name}{suffix}": backend.report()
            for suffix, backends in zip(("", ", int8"), opened, strict=False)
            for name, backend in backends.items()
        }
    log("measuring PyTorch's rates")
    types = [kind for c in candidates for kind in (c.precision, c.rest) if kind is not None]
    limits = Limits(args.threads, list(counts.values()), types, args.device)
    first = counts[args.batch[0]]
    rows = [
        *end_to_end_rows(candidates, counts, limits, equal),
        *stage_rows(candidates, counts, limits),
        *next_seed_rows(candidates),
        *(limits.row(first, precision) for precision in limits.rates),
    ]
    log("measuring starts")
    for form, backends in zip(forms, opened, strict=True):
        rows += start_rows(form, list(backends), args.threads)
    rows += [{"question": "roofline", "card": RTX_4090.name, **row} for row in roofline(first)]
    return record("latency", settings_of(args, workload, reports), rows)


def reference_candidates(args: argparse.Namespace, workload: Workload) -> list[Candidate]:
    """The published loop at every batch size, in float32 and under autocast; none without its weights."""
    if workload.source is None:
        return []
    import torch

    torch.set_num_threads(args.threads)
    model = workload.reference().to(args.device)
    return [
        published_candidate(workload, model, batch, precision, args.device)
        for batch in args.batch
        for precision in ("fp32", "bf16")
    ]


def settings_of(args: argparse.Namespace, workload: Workload, reports: Mapping[str, Any]) -> Row:
    return {
        **model_settings(args, workload),
        "tokens": workload.manifest.tokens,
        "cfg": workload.cfg,
        "batch": list(args.batch),
        **{name: getattr(args, name) for name in ("threads", "device", "warmup", "runs")},
        "starts": STARTS,
        "backends": dict(reports),
    }


def tables(found: Record) -> Iterator[str]:
    """A heading and a table per question."""
    for question, (heading, columns) in LATENCY.items():
        yield heading
        yield table(rows_of(found, question), columns)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("latency", __doc__)
    add_workload_options(parser)
    parser.add_argument("--checkpoint", type=Path, help="the run that --plan was exported from, for the loop")
    parser.add_argument(
        "--no-reference", dest="reference", action="store_false", help="leave the loop in PyTorch out"
    )
    parser.add_argument(
        "--backends",
        type=lambda text: text.split(","),
        help="e.g. ort-cpu,openvino (default: all of --device that open here)",
    )
    parser.add_argument("--batch", type=numbers, default=(1,), help="images at once, e.g. 1,4 (default: 1)")
    add_run_options(parser, "10, with cuda 100", "3, with cuda 10", list(WARMUP_AND_RUNS))
    args = parser.parse_args(argv)
    warmup, runs = WARMUP_AND_RUNS[args.device]
    args.warmup, args.runs = warmup if args.warmup is None else args.warmup, runs if args.runs is None else args.runs
    check_options(parser, args)
    if args.checkpoint is not None and args.plan is None:
        parser.error("--checkpoint without --plan; name the plan that was exported from it")
    if "auto" in (args.backends or ()):
        parser.error("auto is no backend to compare; leave --backends out for all that open")
    elsewhere = [name for name in args.backends or () if device_of(name) != args.device]
    if elsewhere:
        other = device_of(elsewhere[0])
        parser.error(f"{elsewhere[0]} runs on {other}, the loop and the rates on {args.device}; add --device {other}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("benchmarks.latency", parse_args(argv), measure, tables)


if __name__ == "__main__":
    sys.exit(main())

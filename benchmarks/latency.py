"""How long a picture takes: our runtime on every engine that opens here, beside CAR's loop in PyTorch, and the limit.

    python -m benchmarks.latency                                        # the shipped plan
    python -m benchmarks.latency --plan emoji.plan --checkpoint runs/car     # and the loop with its weights
    python -m benchmarks.latency --model d16 --batch 1,4 -o results.jsonl    # published sizes, weights made up
    python -m benchmarks.latency --model d16 --int8          # and the int8 plan that is made from it, on CPU engines

Measured end to end: control image in host memory → RGB in host memory, with guidance, nothing kept from the call
before. "published way" is `benchmarks.baselines.reference_loop`: the same weights in eager PyTorch, in float32 and
under bfloat16 autocast. All candidates take turns in one process, and every ratio is the median of the ratios within
one round, so that it holds on a busy machine. Memory and starting are measured in processes of their own; the files
that a start reads are in the page cache.

The limit of a stage is what this machine needs for its matrix products alone, at their own sizes and in the same type
and number of threads (PyTorch's; the fastest of five), or for reading its weights, K/V, inputs and outputs once,
whichever is more (with --device cuda: for its products). "of the limit" is that time ÷ the measured one. Operations
and bytes are counted in the plan's graphs (`benchmarks.counting`). Of an int8 plan the products with weights and the
convolutions are held to the rate of int8 products, attention's to that of the type that the engine has for the rest.

Tables go to stdout, then one line of JSON (`benchmarks.harness.machine`) whose results are flat rows, each with
"question":

    end_to_end  candidate, backend (null: PyTorch), precision, batch, p50, p95, min, runs, images_per_s;
                speedup, speedup_p10, speedup_p90 (against the loop in float32), speedup_bf16 (against its autocast);
                batch_gain (images a second against the same candidate's first batch size);
                tokens_equal (share, against the loop in float32; without it, against the first backend);
                gflop, limit_s, of_limit
    stage       candidate, batch, stage, p50, p95, share (of the picture), gflop, limit_s, bound, gemm_gflops_limit,
                of_limit
    next_seed   candidate, p50, p95, ratio (to a picture of a new control), control_p50, condition_p50
    start       candidate, import_s, open_s, first_image_s, cold_start_s, rss_before, peak_rss, weights_bytes,
                rss_less_weights, plan_bytes
    limit       dtype, threads, gemm_gflops (at this picture's sizes, by operations), gemm_gflops_best, memory_gbs
    roofline    card, stage, compute_s, memory_s, floor_s, bound: computed from the counts, not measured

Times are seconds; null is what doesn't apply or wasn't measured.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.counting import (
    RTX_4090,
    ImageCount,
    Product,
    Stage,
    count_image,
    parse_batches,
    roofline,
    roofline_rows,
)
from benchmarks.harness import workload as subjects
from benchmarks.harness.cli import Log, run_command
from benchmarks.harness.machine import (
    BenchmarkError,
    cores,
    gemm_rate,
    in_subprocess,
    interleaved,
    markdown_table,
    memory_rate,
    quantiles,
    record,
)
from benchmarks.harness.workload import CACHE, MODELS, Subject
from car_runtime.backends.base import Backend
from car_runtime.backends.registry import BACKENDS, check_name, on_cpu, open_backend
from car_runtime.errors import BackendError
from car_runtime.format.manifest import WEIGHTS
from car_runtime.plan import Plan, default_plan
from car_runtime.request import uniforms

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
PRECISIONS = {"f32": "fp32", "bf16": "bf16", "f16": "fp16"}
"""Names in a backend's report → ours."""
WARMUP_AND_RUNS = {"cpu": (3, 10), "cuda": (10, 100)}
ROWS = 4096
"""Products of more rows are measured with so many: the rate has long been reached."""
STARTS = 3
FP32, BF16 = "published way, fp32", "published way, bf16 autocast"
PUBLISHED = {"fp32": FP32, "bf16": BF16, "fp16": "published way, fp16 autocast"}

Record = dict[str, Any]


# ---- Candidates ----


@dataclass
class Candidate:
    """One way to make pictures; a call makes `batch` of them and keeps what it took."""

    name: str
    precision: str
    batch: int
    make: Callable[[int], tuple[NDArray[np.int64], dict[str, float]]]
    """Seed → tokens [B, L] and seconds of each stage."""
    backend: str | None = None
    next_seed: bool = False
    rest: str | None = None
    """What is multiplied beside weights, attention, where that is another type."""
    seconds: list[float] = field(default_factory=list)
    stages: list[dict[str, float]] = field(default_factory=list)

    def __call__(self) -> None:
        began = time.perf_counter()
        _, stages = self.make(len(self.seconds))
        self.seconds.append(time.perf_counter() - began)
        self.stages.append(stages)

    @property
    def key(self) -> str:
        return f"{self.name}{', next seed' if self.next_seed else ''} ×{self.batch}"

    def stage_times(self, name: str) -> list[float]:
        return [stages[name] for stages in self.stages if name in stages]


@contextmanager
def opened_backends(args: argparse.Namespace, subject: Subject, log: Log) -> Iterator[dict[str, Backend]]:
    """The engines to measure: those named, which must open, or all of the device that do; others are logged."""
    with ExitStack() as stack:
        found: dict[str, Backend] = {}
        for name in args.backends or [name for name in BACKENDS if device_of(name) == args.device]:
            try:
                backend, _ = open_backend(name, subject.plan, subject.manifest, args.threads)
            except BackendError as error:
                if args.backends:
                    raise
                log(f"{name} is left out: {error}")
                continue
            stack.callback(backend.close)
            found[name] = backend
        if not found:
            raise BenchmarkError(f"no backend of {args.device} opens here; `car-run doctor` says what is missing")
        yield found


def device_of(backend: str) -> str:
    return "cpu" if on_cpu(backend) else "cuda"


def runtime_candidates(subject: Subject, name: str, backend: Backend, batches: Sequence[int]) -> list[Candidate]:
    """An engine at each batch size, and with a further seed on the same control and class.

    Each has a plan of its own on the same engine: buffers stay what they are from one of its calls to the next.
    """
    floats = PRECISIONS.get(str(backend.report().get("precision")), subject.manifest.precision.compute)
    precision = "int8" if subject.manifest.precision.weights == "int8" else floats
    control = subject.control()

    def candidate(batch: int, next_seed: bool) -> Candidate:
        plan = Plan(subject.plan, subject.manifest, backend, "benchmark")

        def make(seed: int) -> tuple[NDArray[np.int64], dict[str, float]]:
            if not next_seed:
                plan.forget()
            result = plan.generate(control, 0, seed, batch, cfg=subject.cfg)
            return result.tokens, result.timings

        shown = name if precision == "fp32" else f"{name}, {precision}"
        return Candidate(shown, precision, batch, make, name, next_seed, floats)

    return [*(candidate(batch, False) for batch in batches), candidate(batches[0], True)]


def published_candidates(
    subject: Subject,
    batches: Sequence[int],
    device: str,
    precisions: Sequence[str] = ("fp32", "bf16"),
    compiled: bool = False,
) -> list[Candidate]:
    """The loop in PyTorch at each batch size, in float32 and under autocast to what else is asked for."""
    import torch

    model = subject.reference().to(device)

    def candidate(precision: str, batch: int) -> Candidate:
        def make(seed: int) -> tuple[NDArray[np.int64], dict[str, float]]:
            return published(subject, model, seed, batch, getattr(torch, DTYPES[precision]), device, compiled)

        return Candidate(PUBLISHED[precision] + (", compiled" if compiled else ""), precision, batch, make)

    return [candidate(precision, batch) for batch in batches for precision in precisions]


def own_loop(subject: Subject, device: str, precision: str) -> Candidate:
    """`car_train.model.sample` in eager PyTorch with weights in `precision`, convolutions channels last.

    AdaLN is computed once, keys and values are written into one cache, and nothing is cast but at norms.
    """
    import torch

    from car_export.plan import compute_model
    from car_train.model.sample import sample

    model = compute_model(subject.reference(), precision).to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert model.car is not None
    car, manifest, dtype = model.car, subject.manifest, getattr(torch, DTYPES[precision])

    def make(seed: int) -> tuple[NDArray[np.int64], dict[str, float]]:
        controls = _pyramid(subject)
        if controls is not None:
            controls = [c.to(device, dtype, memory_format=torch.channels_last) for c in controls]
        tokens_BL, pixels = sample(
            model.vqvae,
            car,
            torch.zeros(1, dtype=torch.int64, device=device),
            torch.from_numpy(uniforms([seed], manifest.tokens)).to(device),
            controls,
            cfg=subject.cfg,
            top_k=manifest.sampling.top_k,
            top_p=manifest.sampling.top_p,
        )
        _to_host(pixels)
        return tokens_BL.cpu().numpy(), {}

    return Candidate(f"PyTorch, {precision}", precision, 1, make)


def published(
    subject: Subject, model: Any, seed: int, batch: int, dtype: Any, device: str, compiled: bool = False
) -> tuple[NDArray[np.int64], dict[str, float]]:
    """Control image in host memory → RGB in host memory, by the published loop: tokens, and seconds of each stage."""
    import torch

    from benchmarks.baselines.reference_loop import sample_published

    manifest, stages = subject.manifest, dict[str, float]()

    def clock(stage: str, seconds: float) -> None:
        stages[stage] = stages.get(stage, 0.0) + seconds

    controls = _pyramid(subject)
    if controls is not None:
        controls = [c.expand(batch, -1, -1, -1).to(device) for c in controls]
    tokens_BL, pixels = sample_published(
        model,
        torch.zeros(batch, dtype=torch.int64, device=device),
        torch.from_numpy(uniforms(range(seed, seed + batch), manifest.tokens)).to(device),
        controls,
        cfg=subject.cfg,
        top_k=manifest.sampling.top_k,
        top_p=manifest.sampling.top_p,
        dtype=dtype,
        clock=clock if device == "cpu" else None,
        compiled=compiled,
    )
    _to_host(pixels)
    return tokens_BL.cpu().numpy(), stages


def _pyramid(subject: Subject) -> list[Any] | None:
    """The control image at the size of every scale, f32 [1, 3, s, s]; None for a plan without control."""
    from car_train.model.sample import control_pyramid

    control = subject.control()
    if control is None:
        return None
    return control_pyramid(Image.fromarray(control), [s.control_size for s in subject.manifest.scales])


def _to_host(pixels: Any) -> NDArray[np.uint8]:
    """Pixels f32 [B, 3, H, W] in [-1, 1] as uint8 [B, H, W, 3] in host memory."""
    import torch

    pictures: NDArray[np.uint8] = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return pictures


# ---- The limit ----


class Limits:
    """What this machine needs at least for a stage, by type: rates are measured once for each size of product."""

    def __init__(self, threads: int, counts: Sequence[ImageCount], precisions: Sequence[str], device: str) -> None:
        self.threads, self._device = threads, device
        self.memory = 1e9 * memory_rate(threads) if device == "cpu" else None
        products = {_size(p): None for count in counts for stage in count.stages for p in stage.count.products}
        kinds = dict.fromkeys(map(self._multiplied_in, precisions))
        self.rates = {p: gemm_rate(DTYPES.get(p, p), threads, products, device) for p in kinds}

    def products(self, stage: Stage, precision: str, rest: str | None = None) -> float:
        """Seconds for a stage's matrix products, each size at its own rate; rest: attention's type, if another."""
        return stage.runs * sum(
            1e-9 * p.flops / self._rate(p, (rest or precision) if p.kind == "activation" else precision)
            for p in stage.count.products
        )

    def stage(self, stage: Stage, precision: str, rest: str | None = None) -> dict[str, Any]:
        """{"limit_s", "bound", "gemm_gflops_limit"} of one stage."""
        c, arithmetic = stage.count, self.products(stage, precision, rest)
        cache = (c.kv_read + c.kv_written) * BYTES[rest or precision]
        moved = stage.runs * (c.weight_elements * BYTES[precision] + cache + c.io_bytes)
        reading = moved / self.memory if self.memory is not None else 0.0
        return {
            "limit_s": max(arithmetic, reading),
            "bound": "compute" if arithmetic >= reading else "memory",
            "gemm_gflops_limit": 1e-9 * c.flops * stage.runs / arithmetic if arithmetic else None,
        }

    def image(self, counts: ImageCount, precision: str, rest: str | None = None) -> float:
        """Seconds of a whole batch: its stages one after the other."""
        return float(sum(self.stage(stage, precision, rest)["limit_s"] for stage in counts.stages))

    def row(self, counts: ImageCount, precision: str) -> Record:
        arithmetic = sum(self.products(stage, precision) for stage in counts.stages)
        return {
            "question": "limit",
            "dtype": DTYPES.get(precision, precision),
            "threads": self.threads,
            "gemm_gflops": 1e-9 * counts.total("flops") / arithmetic,
            "gemm_gflops_best": self.rates[precision]["best"],
            "memory_gbs": None if self.memory is None else self.memory / 1e9,
        }

    def _rate(self, product: Product, precision: str) -> float:
        m, n, k = _size(product)
        return self.rates[self._multiplied_in(precision)][f"{m}×{n}×{k}"]

    def _multiplied_in(self, precision: str) -> str:
        """CPUs store and read halves, but engines multiply them in float32 there."""
        return "fp32" if precision == "fp16" and self._device == "cpu" else precision


def _size(product: Product) -> tuple[int, int, int]:
    """As what a product is measured: batched ones as one of as many rows."""
    return min(product.batch * product.M, ROWS), product.N, product.K


# ---- Rows ----


def ratio(of: Sequence[float], to: Sequence[float]) -> tuple[float, float, float]:
    """to ÷ of within each round: median, p10, p90."""
    found = np.quantile(np.array(to) / np.array(of), (0.5, 0.1, 0.9))
    return float(found[0]), float(found[1]), float(found[2])


def end_to_end_rows(
    candidates: Sequence[Candidate],
    times: Mapping[str, Mapping[str, Any]],
    counts: Mapping[int, ImageCount],
    limits: Limits,
    equal: Mapping[str, float],
) -> list[Record]:
    """One row per candidate and batch size."""
    by_name = {(c.name, c.batch): c for c in candidates if not c.next_seed}
    rows = []
    for c in by_name.values():
        t, count = times[c.key], counts[c.batch]
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
                **{key: t[key] for key in ("p50", "p95", "min", "runs")},
                "images_per_s": c.batch / t["p50"],
                "speedup": speedup[0],
                "speedup_p10": speedup[1],
                "speedup_p90": speedup[2],
                "speedup_bf16": ratio(c.seconds, autocast.seconds)[0] if autocast is not None else None,
                "batch_gain": c.batch / first.batch * ratio(c.seconds, first.seconds)[0],
                "tokens_equal": equal.get(c.key),
                "gflop": count.total("flops") / 1e9,
                "limit_s": limit,
                "of_limit": limit / t["p50"],
            }
        )
    return rows


def stage_rows(candidates: Sequence[Candidate], counts: Mapping[int, ImageCount], limits: Limits) -> list[Record]:
    """One row per candidate, batch size and stage. The loop has no stage for the class: it is in every scale."""
    rows: list[Record] = []
    for c in candidates:
        if c.next_seed:
            continue
        image = float(np.median(c.seconds))
        for stage in counts[c.batch].stages:
            seconds = c.stage_times(stage.name)
            if not seconds:
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


def next_seed_rows(candidates: Sequence[Candidate], times: Mapping[str, Mapping[str, Any]]) -> list[Record]:
    """A further seed on the control and class of the call before, beside a picture of which nothing is known."""
    whole = {c.name: c for c in reversed(candidates) if not c.next_seed}
    rows = []
    for c in candidates:
        if c.next_seed:
            medians = {name: float(np.median(c.stage_times(name))) for name in ("control", "condition")}
            rows.append(
                {
                    "question": "next_seed",
                    "candidate": c.name,
                    "p50": times[c.key]["p50"],
                    "p95": times[c.key]["p95"],
                    "ratio": ratio(whole[c.name].seconds, c.seconds)[0],
                    "control_p50": medians["control"],
                    "condition_p50": medians["condition"],
                }
            )
    return rows


def equal_tokens(candidates: Sequence[Candidate]) -> dict[str, float]:
    """The share of tokens that each candidate draws like the first one, from one seed, at the first batch size."""
    chosen = [c for c in candidates if c.batch == candidates[0].batch and not c.next_seed]
    first, *others = [(c.key, c.make(0)[0]) for c in chosen]
    return {first[0]: 1.0, **{key: float((tokens == first[1]).mean()) for key, tokens in others}}


# ---- Starting, in processes of their own ----

IMPORT = "import time; began = time.perf_counter(); import car_runtime; print(time.perf_counter() - began)"


def published_picture(plan: str, source: dict[str, Any], threads: int) -> None:
    """One picture by the loop in float32, for `in_subprocess`."""
    import torch

    torch.set_num_threads(threads)
    subject = Subject(plan=Path(plan), manifest=subjects.read(Path(plan)), source=subjects.Source(**source))
    published(subject, subject.reference(), 0, 1, torch.float32, "cpu")


def start_rows(subject: Subject, backends: Sequence[str], threads: int) -> list[Record]:
    """Import, opening, first picture, cold start and memory of each engine; of the loop, memory alone."""
    files = subject.manifest.files
    weights, plan_bytes = files[WEIGHTS].bytes, sum(entry.bytes for entry in files.values())
    imported = float(np.median([float(_python("-c", IMPORT)) for _ in range(STARTS)]))
    suffix = ", int8" if subject.manifest.precision.weights == "int8" else ""
    rows = []
    for name in backends:
        alone = in_subprocess(
            "benchmarks.harness.workload:first_picture", str(subject.plan), name, threads, subject.cfg
        )
        rows.append(
            {
                "question": "start",
                "candidate": f"{name}{suffix}",
                "import_s": imported,
                **alone["result"],
                "cold_start_s": cold_start(subject, name, threads),
                **_memory(alone, weights),
                "plan_bytes": plan_bytes,
            }
        )
    if subject.source is not None:
        source = subjects.as_json(subject.source)
        alone = in_subprocess("benchmarks.latency:published_picture", str(subject.plan), source, threads)
        nothing = dict.fromkeys(("import_s", "open_s", "first_image_s", "cold_start_s"))
        memory = {**_memory(alone, weights), "plan_bytes": None}
        rows.append({"question": "start", "candidate": FP32, **nothing, **memory})
    return rows


def _memory(alone: Mapping[str, Any], weights: int) -> dict[str, Any]:
    return {
        "rss_before": alone["rss_before"],
        "peak_rss": alone["peak_rss"],
        "weights_bytes": weights,
        "rss_less_weights": alone["peak_rss"] - weights,
    }


def cold_start(subject: Subject, backend: str, threads: int) -> float:
    """Seconds from starting `car-run` to its end with the PNG written; the median of `STARTS`."""
    control, seconds = subject.control(), []
    with tempfile.TemporaryDirectory() as folder:
        picture, flags = Path(folder) / "picture.png", list[str]()
        if control is not None:
            Image.fromarray(control).save(Path(folder) / "control.png")
            flags = ["--control", str(Path(folder) / "control.png")]
        flags += ["--engine", str(subject.plan), "--class", "0", "--cfg", str(subject.cfg)]
        flags += ["--backend", backend, "--threads", str(threads), "-o", str(picture)]
        for _ in range(STARTS):
            picture.unlink(missing_ok=True)
            began = time.perf_counter()
            _python("-m", "car_runtime", *flags)
            seconds.append(time.perf_counter() - began)
            if not picture.is_file():
                raise BenchmarkError(f"car-run wrote no picture on {backend}; run it by hand to see why")
    return float(np.median(seconds))


def _python(*arguments: str) -> str:
    """Standard output of a new Python with this one's path. BenchmarkError with its last line if it fails."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    child = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    if child.returncode:
        last = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        raise BenchmarkError(f"python {arguments[0]} {arguments[1][:40]} failed: {last}")
    return child.stdout


# ---- The command ----


def measure(args: argparse.Namespace, log: Log) -> Record:
    """Everything, as one record. Raises BenchmarkError and the runtime's errors."""
    subject = choose_subject(args, log)
    counts = {batch: count_image(subject.plan, batch) for batch in args.batch}
    small = subjects.int8(subject, args.cache, log) if args.int8 else None
    with ExitStack() as stack:
        backends = stack.enter_context(opened_backends(args, subject, log))
        eight = stack.enter_context(opened_backends(args, small, log)) if small is not None else {}
        candidates = []
        if subject.source is not None and args.reference:
            import torch

            torch.set_num_threads(args.threads)
            candidates += published_candidates(subject, args.batch, args.device)
        for name, backend in backends.items():
            candidates += runtime_candidates(subject, name, backend, args.batch)
        for name, backend in eight.items():
            assert small is not None
            candidates += runtime_candidates(small, name, backend, args.batch)
        log("comparing tokens")
        equal = equal_tokens(candidates)
        log(f"measuring {', '.join(c.key for c in candidates)}: {args.warmup} + {args.runs} rounds")
        times = interleaved({c.key: c for c in candidates}, args.warmup, args.runs)
        for c in candidates:
            del c.seconds[: args.warmup], c.stages[: args.warmup]
        reports = {name: backend.report() for name, backend in backends.items()}
        reports |= {f"{name}, int8": backend.report() for name, backend in eight.items()}
    log("measuring the machine's limit")
    types = [kind for c in candidates for kind in (c.precision, c.rest) if kind is not None]
    limits = Limits(args.threads, list(counts.values()), types, args.device)
    first = counts[args.batch[0]]
    rows = [
        *end_to_end_rows(candidates, times, counts, limits, equal),
        *stage_rows(candidates, counts, limits),
        *next_seed_rows(candidates, times),
        *(limits.row(first, precision) for precision in limits.rates),
    ]
    log("measuring starts")
    rows += start_rows(subject if args.reference else without_source(subject), list(backends), args.threads)
    if small is not None:
        rows += start_rows(small, list(eight), args.threads)
    card = (RTX_4090.flops_per_s, RTX_4090.bytes_per_s, RTX_4090.precision_bytes)
    rows += [{"question": "roofline", "card": RTX_4090.name, **row} for row in roofline(first, *card)]
    return record("latency", settings_of(args, subject, reports), rows)


def without_source(subject: Subject) -> Subject:
    return Subject(plan=subject.plan, manifest=subject.manifest, source=None)


def choose_subject(args: argparse.Namespace, log: Log) -> Subject:
    if args.model is not None:
        return subjects.made_up(args.model, args.depth, args.precision, args.batch, args.cache, log)
    return subjects.existing(args.plan or default_plan(), args.checkpoint)


def settings_of(args: argparse.Namespace, subject: Subject, reports: Mapping[str, Any]) -> Record:
    model = subject.manifest.model
    return {
        "plan": subject.plan.name,
        "model": {
            key: getattr(model, key) for key in ("depth", "width", "vocab", "image_size", "control_type", "classes")
        },
        "tokens": subject.manifest.tokens,
        "made_up_weights": args.model is not None,
        "precision": vars(subject.manifest.precision),
        "cfg": subject.cfg,
        "batch": list(args.batch),
        "threads": args.threads,
        "device": args.device,
        "warmup": args.warmup,
        "runs": args.runs,
        "starts": STARTS,
        "backends": dict(reports),
    }


def tables(found: Record) -> Iterator[str]:
    """A heading and a table per question."""
    rows = {q: [r for r in found["results"] if r["question"] == q] for q in ("end_to_end", "stage", "next_seed")}
    yield "How long does a picture take? Control image in host memory → RGB in host memory, guided"
    columns = {
        "candidate": "candidate",
        "batch": "batch",
        "p50": "p50, s",
        "p95": "p95, s",
        "images_per_s": "images/s",
        "speedup": "× loop fp32",
        "speedup_bf16": "× loop bf16",
        "batch_gain": "images/s ÷ first batch",
        "tokens_equal": "tokens equal",
        "limit_s": "limit, s",
        "of_limit": "of the limit",
    }
    yield _table(rows["end_to_end"], columns)
    yield "Where does it go?"
    columns = {
        "candidate": "candidate",
        "batch": "batch",
        "stage": "stage",
        "p50": "p50, s",
        "p95": "p95, s",
        "share": "share",
        "gflop": "GFLOP",
        "limit_s": "limit, s",
        "bound": "bound by",
        "of_limit": "of the limit",
    }
    yield _table(rows["stage"], columns)
    yield "What does a further seed on the same control and class cost?"
    columns = {
        "candidate": "candidate",
        "p50": "p50, s",
        "ratio": "÷ new control",
        "control_p50": "control, s",
        "condition_p50": "condition, s",
    }
    yield _table(rows["next_seed"], columns)
    yield "What do starting and memory cost? Each in a process of its own"
    start = [
        {**r} | {f"{key}, MB": r[key] and r[key] / 1e6 for key in ("peak_rss", "rss_less_weights", "plan_bytes")}
        for r in found["results"]
        if r["question"] == "start"
    ]
    columns = {
        "candidate": "candidate",
        "import_s": "import, s",
        "open_s": "open, s",
        "first_image_s": "first picture, s",
        "cold_start_s": "car-run, start to PNG, s",
        "peak_rss, MB": "peak memory, MB",
        "rss_less_weights, MB": "less weights.bin, MB",
        "plan_bytes, MB": "plan, MB",
    }
    yield _table(start, columns)
    yield "What can this machine do? PyTorch's matrix products at this picture's sizes, and reading memory"
    limit = [r for r in found["results"] if r["question"] == "limit"]
    columns = {
        "dtype": "type",
        "threads": "threads",
        "gemm_gflops": "GFLOP/s",
        "gemm_gflops_best": "best size, GFLOP/s",
        "memory_gbs": "GB/s",
    }
    yield _table(limit, columns)
    yield f"What could a GPU do at best? {RTX_4090.name}: computed from the counts, not measured"
    yield markdown_table(roofline_rows([r for r in found["results"] if r["question"] == "roofline"]))


def _table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    return markdown_table([{shown: row[key] for key, shown in columns.items()} for row in rows])


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.latency",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--plan", type=Path, help="plan directory (default: the shipped plan)")
    what.add_argument("--model", choices=list(MODELS), help="published sizes with made-up weights, exported once")
    parser.add_argument("--checkpoint", type=Path, help="the run that --plan was exported from, for the loop")
    parser.add_argument("--depth", type=int, help="cut --model to so many blocks; its width stays")
    parser.add_argument("--precision", choices=list(DTYPES), default="fp32", help="of --model's plan (default: fp32)")
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help=f"where --model's plans are kept (default: {CACHE})"
    )
    parser.add_argument(
        "--int8", action="store_true", help="measure the plan's int8 form too, made once into --cache"
    )
    parser.add_argument("--backends", help="e.g. ort-cpu,openvino (default: all of --device that open here)")
    parser.add_argument("--batch", type=parse_batches, default=(1,), help="pictures at once, e.g. 1,4 (default: 1)")
    parser.add_argument("--threads", type=int, default=cores(), help="CPU threads of everything (default: all cores)")
    parser.add_argument(
        "--device", choices=list(WARMUP_AND_RUNS), default="cpu", help="of engines, loop and limit (default: cpu)"
    )
    parser.add_argument("--runs", type=int, help="rounds (default: 10, with cuda 100)")
    parser.add_argument("--warmup", type=int, help="rounds before them (default: 3, with cuda 10)")
    parser.add_argument(
        "--no-reference", dest="reference", action="store_false", help="leave out the loop in PyTorch"
    )
    parser.add_argument("-o", "--output", type=Path, help="append the line of JSON to this file")
    args = parser.parse_args(argv)
    warmup, runs = WARMUP_AND_RUNS[args.device]
    args.warmup, args.runs = warmup if args.warmup is None else args.warmup, runs if args.runs is None else args.runs
    if args.runs < 1 or args.warmup < 0:
        parser.error(f"runs {args.runs}, warmup {args.warmup}: give at least 1 and 0")
    if not 1 <= args.threads <= 1024:
        parser.error(f"threads is {args.threads}; give 1…1024")
    if args.checkpoint is not None and args.plan is None:
        parser.error("--checkpoint without --plan; name the plan that was exported from it")
    if args.int8 and (args.device != "cpu" or args.precision != "fp32"):
        parser.error("--int8 is for CPUs and made from float32 plans; leave out --device cuda and --precision")
    if args.depth is not None and args.model is None:
        parser.error("--depth cuts --model; give one, e.g. --model d16")
    if args.depth is not None and args.depth < 2:
        parser.error(f"depth is {args.depth}; a control branch needs at least 2")
    if args.backends is not None:
        args.backends = args.backends.split(",")
        try:
            for name in args.backends:
                check_name(name)
        except BackendError as error:
            parser.error(str(error))
        if "auto" in args.backends:
            parser.error("auto is no backend to compare; leave --backends out for all that open")
        elsewhere = [name for name in args.backends if device_of(name) != args.device]
        if elsewhere:
            other = device_of(elsewhere[0])
            parser.error(
                f"{elsewhere[0]} runs on {other}, the loop and the limit on {args.device}; add --device {other}"
            )
    return args


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("benchmarks.latency", parse_args(argv), measure, tables)


if __name__ == "__main__":
    sys.exit(main())

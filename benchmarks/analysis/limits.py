"""What a stage needs at least: on this machine by rates that are measured, on a GPU by its maker's figures.

Operations and bytes are counted in the plan's graphs (`benchmarks.analysis.counting`). Bytes are those of every
weight, K/V, input and output once; activations in between are taken to stay in caches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.analysis.counting import Gemm, ImageCount, Stage
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.measure import timed
from benchmarks.harness.records import Row

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
ROWS = 4096
"""Products of more rows are measured with so many: the rate has long been reached."""


# ---- This machine ----


def gemm_rate(
    dtype: str, threads: int, shapes: Iterable[tuple[int, int, int]], device: str = "cpu", runs: int = 5
) -> dict[str, float]:
    """GFLOP/s of matrix products by PyTorch: {"1024×1024×1024": …, "best": …}.

    shapes: (M, N, K), counted as 2·M·N·K operations. dtype: float32, bfloat16, float16, or int8 with int32 sums. The
    fastest of `runs` calls counts: what the machine can do, not what it does while it is disturbed.
    """
    import torch

    if dtype not in (*DTYPES.values(), "int8"):
        raise BenchmarkError(f"no data type {dtype!r} here; give {', '.join(DTYPES.values())} or int8")
    whole = dtype == "int8"
    multiply, sums = (torch._int_mm, torch.int32) if whole else (torch.mm, getattr(torch, dtype))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rates: dict[str, float] = {}
    try:
        for m, n, k in shapes:
            a, b = (
                (torch.randn(size, device=device) * (30 if whole else 1)).to(getattr(torch, dtype))
                for size in ((m, k), (k, n))
            )
            out = torch.empty(m, n, device=device, dtype=sums)

            def product(a: Any = a, b: Any = b, out: Any = out) -> None:
                multiply(a, b, out=out)
                if device.startswith("cuda"):
                    torch.cuda.synchronize()

            rates[f"{m}×{n}×{k}"] = 2e-9 * m * n * k / timed(product, warmup=2, runs=runs)["min"]
    finally:
        torch.set_num_threads(before)
    return {**rates, "best": max(rates.values())}


def memory_rate(threads: int, size: int = 1 << 28, runs: int = 5) -> float:
    """GB/s of reading `size` bytes of float32 by PyTorch, the fastest of `runs` sums; far more than a cache holds."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        data = torch.ones(size // 4)
        return 1e-9 * size / timed(lambda: data.sum().item(), warmup=1, runs=runs)["min"]
    finally:
        torch.set_num_threads(before)


class Limits:
    """What a stage takes at PyTorch's rates, by type: each size of product is measured once."""

    def __init__(self, threads: int, counts: Sequence[ImageCount], precisions: Sequence[str], device: str) -> None:
        self.threads, self._device = threads, device
        self.memory = 1e9 * memory_rate(threads) if device == "cpu" else None
        products = {_size(p): None for count in counts for stage in count.stages for p in stage.count.gemms}
        kinds = dict.fromkeys(map(self._multiplied_in, precisions))
        self.rates = {p: gemm_rate(DTYPES.get(p, p), threads, products, device) for p in kinds}

    def gemm_seconds(self, stage: Stage, precision: str, rest: str | None = None) -> float:
        """Seconds for a stage's matrix products, each size at its own rate; rest: attention's type, if another."""
        return stage.runs * sum(
            1e-9 * p.flops / self._rate(p, (rest or precision) if p.kind == "activation" else precision)
            for p in stage.count.gemms
        )

    def stage(self, stage: Stage, precision: str, rest: str | None = None) -> dict[str, Any]:
        """{"limit_s", "bound", "gemm_gflops_limit"} of one stage."""
        c, arithmetic = stage.count, self.gemm_seconds(stage, precision, rest)
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

    def row(self, counts: ImageCount, precision: str) -> Row:
        arithmetic = sum(self.gemm_seconds(stage, precision) for stage in counts.stages)
        return {
            "question": "limit",
            "dtype": DTYPES.get(precision, precision),
            "threads": self.threads,
            "gemm_gflops": 1e-9 * counts.total("flops") / arithmetic,
            "gemm_gflops_best": self.rates[precision]["best"],
            "memory_gbs": None if self.memory is None else self.memory / 1e9,
        }

    def _rate(self, product: Gemm, precision: str) -> float:
        m, n, k = _size(product)
        return self.rates[self._multiplied_in(precision)][f"{m}×{n}×{k}"]

    def _multiplied_in(self, precision: str) -> str:
        """CPUs store and read FP16, but engines multiply it in float32 there."""
        return "fp32" if precision == "fp16" and self._device == "cpu" else precision


def _size(product: Gemm) -> tuple[int, int, int]:
    """M, N, K of the product that is measured in its place: batched ones count as one of as many rows."""
    return min(product.batch * product.M, ROWS), product.N, product.K


# ---- A GPU ----


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU by its maker's figures."""

    name: str
    flops_per_s: float
    bytes_per_s: float
    precision_bytes: int


RTX_4090 = Card(
    name="RTX 4090, FP16 (dense, sums in FP32)", flops_per_s=165e12, bytes_per_s=1.008e12, precision_bytes=2
)


def roofline(counts: ImageCount, card: Card = RTX_4090) -> list[Row]:
    """The least time of each stage and of the image, by count: max(operations ÷ rate, bytes ÷ rate).

    One row per stage, then "image", their sum: {"stage", "compute_s", "memory_s", "floor_s", "bound"}. Nothing in it
    is measured.
    """
    rows: list[Row] = []
    for stage in counts.stages:
        c = stage.count
        size = (c.weight_elements + c.kv_read + c.kv_written) * card.precision_bytes + c.io_bytes
        compute, memory = stage.runs * c.flops / card.flops_per_s, stage.runs * size / card.bytes_per_s
        floor, bound = max(compute, memory), "compute" if compute > memory else "memory"
        rows.append({"stage": stage.name, "compute_s": compute, "memory_s": memory, "floor_s": floor, "bound": bound})
    sums = {key: sum(row[key] for row in rows) for key in ("compute_s", "memory_s", "floor_s")}
    return [*rows, {"stage": "image", **sums, "bound": ""}]

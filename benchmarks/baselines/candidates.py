"""The ways to an image that are compared: our runtime on each backend, and CAR's loops in PyTorch.

Every one goes from a control image in host memory to RGB in host memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.analysis.limits import DTYPES
from benchmarks.harness.cli import Log
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.measure import Timing, interleaved
from benchmarks.harness.workload import Workload
from car_runtime.backends.base import Backend
from car_runtime.backends.registry import BACKENDS, on_cpu, open_backend
from car_runtime.errors import BackendError
from car_runtime.plan import Plan
from car_runtime.request import uniforms

PRECISIONS = {"f32": "fp32", "bf16": "bf16", "f16": "fp16"}
"""Names in a backend's report → ours."""
FP32, BF16 = "published way, fp32", "published way, bf16 autocast"
PUBLISHED = {"fp32": FP32, "bf16": BF16, "fp16": "published way, fp16 autocast"}

Made = tuple[NDArray[np.int64], dict[str, float]]
"""Tokens [B, L], and seconds of each stage."""


@dataclass
class Candidate:
    """One way to generate images; a call makes `batch` of them and keeps what it took."""

    name: str
    precision: str
    batch: int
    make: Callable[[int], Any]
    """Seed → `Made`; of what isn't CAR, its pixels in the place of tokens."""
    backend: str | None = None
    next_seed: bool = False
    rest: str | None = None
    """What attention is multiplied in, where that is another type."""
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


def take_turns(candidates: Sequence[Candidate], warmup: int, runs: int) -> dict[str, Timing]:
    """`interleaved` by their keys; afterwards each candidate has its times without the warm-up."""
    for c in candidates:
        c.seconds.clear()
        c.stages.clear()
    times = interleaved({c.key: c for c in candidates}, warmup, runs)
    for c in candidates:
        del c.seconds[:warmup], c.stages[:warmup]
    return times


# ---- Our runtime ----


def device_of(backend: str) -> str:
    return "cpu" if on_cpu(backend) else "cuda"


@contextmanager
def opened_backends(
    workload: Workload, names: Sequence[str] | None, device: str, threads: int, log: Log
) -> Iterator[dict[str, Backend]]:
    """Those named, which must open, or all of the device that do; others are logged. They are closed at the end."""
    with ExitStack() as stack:
        found: dict[str, Backend] = {}
        for name in names or [name for name in BACKENDS if device_of(name) == device]:
            try:
                backend, _ = open_backend(name, workload.plan, workload.manifest, threads)
            except BackendError as error:
                if names:
                    raise
                log(f"{name} is left out: {error}")
                continue
            stack.callback(backend.close)
            found[name] = backend
        if not found:
            raise BenchmarkError(f"no backend of {device} opens here; `car-run doctor` says what is missing")
        yield found


def runtime_candidate(
    workload: Workload, name: str, backend: Backend, batch: int = 1, next_seed: bool = False
) -> Candidate:
    """A backend at a batch size, cold or with a further seed on the same control and class.

    Each has a plan of its own on the same backend: buffers stay what they are from one of its calls to the next.
    """
    floats = PRECISIONS.get(str(backend.report().get("precision")), workload.manifest.precision.compute)
    precision = "int8" if workload.manifest.precision.weights == "int8" else floats
    control = workload.control()
    plan = Plan(workload.plan, workload.manifest, backend, "benchmark")

    def make(seed: int) -> Made:
        if not next_seed:
            plan.forget()
        result = plan.generate(control, 0, seed, batch, cfg=workload.cfg)
        return result.tokens, result.timings

    shown = name if precision == "fp32" else f"{name}, {precision}"
    return Candidate(shown, precision, batch, make, name, next_seed, floats)


def runtime_candidates(
    workload: Workload, backends: Mapping[str, Backend], batches: Sequence[int]
) -> list[Candidate]:
    """Each backend at each batch size, and with a further seed at the first."""
    return [
        runtime_candidate(workload, name, backend, batch, next_seed)
        for name, backend in backends.items()
        for batch, next_seed in [*((batch, False) for batch in batches), (batches[0], True)]
    ]


# ---- CAR in PyTorch ----


def published_candidate(
    workload: Workload, model: Any, batch: int, precision: str, device: str, compiled: bool = False
) -> Candidate:
    """The published loop in float32, or under autocast. model: `workload.reference()` on the device."""
    import torch

    dtype = getattr(torch, DTYPES[precision])

    def make(seed: int) -> Made:
        return published(workload, model, seed, batch, dtype, device, compiled)

    return Candidate(PUBLISHED[precision] + (", compiled" if compiled else ""), precision, batch, make)


def published(
    workload: Workload, model: Any, seed: int, batch: int, dtype: Any, device: str, compiled: bool = False
) -> Made:
    """A batch by `benchmarks.baselines.reference_loop`."""
    import torch

    from benchmarks.baselines.reference_loop import sample_published

    stages = dict[str, float]()

    def clock(stage: str, seconds: float) -> None:
        stages[stage] = stages.get(stage, 0.0) + seconds

    controls = _pyramid(workload)
    if controls is not None:
        controls = [c.expand(batch, -1, -1, -1).to(device) for c in controls]
    tokens_BL, pixels = sample_published(
        model,
        torch.zeros(batch, dtype=torch.int64, device=device),
        torch.from_numpy(uniforms(range(seed, seed + batch), workload.manifest.tokens)).to(device),
        controls,
        **_sampling(workload),
        dtype=dtype,
        clock=clock if device == "cpu" else None,
        compiled=compiled,
    )
    _to_host(pixels)
    return tokens_BL.cpu().numpy(), stages


def own_loop(workload: Workload, device: str, precision: str) -> Candidate:
    """`car_train.model.sample` in eager PyTorch with weights in `precision`, convolutions channels last.

    AdaLN is computed once, keys and values are written into one cache, and nothing is cast but at norms.
    """
    import torch

    from car_export.plan import compute_model
    from car_train.model.sample import sample

    model = compute_model(workload.reference(), precision).to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert model.car is not None
    car, dtype = model.car, getattr(torch, DTYPES[precision])

    def make(seed: int) -> Made:
        controls = _pyramid(workload)
        if controls is not None:
            controls = [c.to(device, dtype, memory_format=torch.channels_last) for c in controls]
        tokens_BL, pixels = sample(
            model.vqvae,
            car,
            torch.zeros(1, dtype=torch.int64, device=device),
            torch.from_numpy(uniforms([seed], workload.manifest.tokens)).to(device),
            controls,
            **_sampling(workload),
        )
        _to_host(pixels)
        return tokens_BL.cpu().numpy(), {}

    return Candidate(f"PyTorch, {precision}", precision, 1, make)


def published_alone(plan: str, source: dict[str, Any], threads: int) -> None:
    """One image by the published loop in float32, for `in_subprocess`."""
    from pathlib import Path

    import torch

    from benchmarks.harness.workload import Source, read

    torch.set_num_threads(threads)
    workload = Workload(plan=Path(plan), manifest=read(Path(plan)), source=Source(**source))
    published(workload, workload.reference(), 0, 1, torch.float32, "cpu")


def _sampling(workload: Workload) -> dict[str, Any]:
    sampling = workload.manifest.sampling
    return {"cfg": workload.cfg, "top_k": sampling.top_k, "top_p": sampling.top_p}


def _pyramid(workload: Workload) -> list[Any] | None:
    """The control image at the size of every scale, f32 [1, 3, s, s]; None for a plan without control."""
    from car_train.model.sample import control_pyramid

    control = workload.control()
    if control is None:
        return None
    return control_pyramid(Image.fromarray(control), [s.control_size for s in workload.manifest.scales])


def _to_host(pixels: Any) -> NDArray[np.uint8]:
    """Pixels f32 [B, 3, H, W] in [-1, 1] as uint8 [B, H, W, 3] in host memory."""
    import torch

    images: NDArray[np.uint8] = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return images

"""How long an image that follows a control image takes: ours vs. ControlNet, T2I-Adapter and LCM.

    python -m benchmarks.controlnet                                          # 256² and 512², all methods
    python -m benchmarks.controlnet --methods controlnet --sizes 512 --precisions bf16
    python -m benchmarks.controlnet --device cuda -o results.jsonl
    python -m benchmarks.controlnet --small --model tiny                     # toys, to try the command in a minute

The others are Stable Diffusion 1.5 exactly (`benchmarks.baselines.diffusion`): ControlNet with 20 steps of UniPC and
guidance, which is the headline, and with the 50 of CAR's paper; T2I-Adapter with 20; LCM with ControlNet with 4 and
without a second row for guidance. At 256×256 they make as many pixels as ours, 512×512 is their native size. All
weights are random: what is compared is time, and nothing is said about quality.

Measured end to end, one image at a time: control image in host memory, for theirs with a tokenised prompt → RGB in
host memory. Text encoder, control, steps with their scheduler and decoder are in it, and of ours all stages. Ours and
theirs take turns in one process, and a ratio is the median of the ratios within one round. Compared are only equals:

    eager       theirs by diffusers in PyTorch, ours by `car_train.model.sample` and by
                `benchmarks.baselines.reference_loop`, CAR's published way
    compiled    theirs and the published way under torch.compile, the step as one graph
    engine      cpu: theirs by OpenVINO, ours by our runtime on OpenVINO, our code for AMX and (fp32) ONNX Runtime
                cuda: ours by our runtime; theirs, for which there is no engine here, eager and compiled (--against)

Precision fp32 is that throughout. bf16 and fp16: theirs has its weights in that type, as diffusers loads them, and so
has `car_train.model.sample`; the published way of ours is autocast over float32 weights, which are cast again in
every product. Engines choose by themselves what they multiply in the lower type. PyTorch has convolutions channels
last.

Where a step takes seconds only the first --timed-steps are run, and their time is scaled to all: such rows say
"scaled": true. Every step does the same work.

Tables go to stdout, then one line of JSON (`benchmarks.harness.records`) whose results are flat rows, each with
"question":

    end_to_end  whose ("ours", "theirs"), method, candidate, backend (null: PyTorch), tier (its own), precision, size,
                steps (ours: scales), timed_steps, scaled, p50, p95, min, runs, gflop, finite (theirs: no infinity or
                NaN in the latents); theirs: text_s, control_s, step_s (of one step), decode_s, medians;
                group (method, size, tier and precision of what it was measured with)
    ratio       method, tier, precision, size, steps, candidate, against (theirs), scaled, times_ours (theirs ÷ ours,
                the median of the rounds), p10, p90, compares (sizes in words)
    parameters  part, parameters, published (null: the part is nobody's)

Times are seconds; null is what doesn't apply.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.analysis.columns import RATIOS, THEIRS
from benchmarks.analysis.counting import count_image
from benchmarks.analysis.limits import DTYPES
from benchmarks.baselines.candidates import (
    Candidate,
    opened_backends,
    own_loop,
    published_candidate,
    runtime_candidate,
    take_turns,
)
from benchmarks.harness.cli import (
    Log,
    add_plan_options,
    add_run_options,
    check_options,
    make_parser,
    names_of,
    run_command,
)
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.measure import peak_rss, quantiles, ratio
from benchmarks.harness.records import Record, Row, record, rows_of
from benchmarks.harness.tables import table
from benchmarks.harness.workload import MODELS, Workload, int8, random_weights
from car_runtime.backends.registry import open_backend
from car_runtime.errors import BackendError

if TYPE_CHECKING:
    from benchmarks.baselines.diffusion import Architecture, Method, NetworkCache, Networks

TIERS = ("eager", "engine", "compiled")
WITHOUT_ENGINE = ("eager", "compiled")
METHODS = ("controlnet", "t2i", "lcm")
OURS_ON_CPU = {"fp32": ("amx-fp32", "ort-cpu"), "bf16": ("amx",)}
"""Backends of each precision besides OpenVINO."""
OFFERED = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "bf16", "fp16")}
"""Precisions of each device. CPUs multiply no FP16."""
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"tiers": ("eager", "engine"), "precisions": ("fp32", "bf16"), "timed_steps": 2, "warmup": 1, "runs": 5},
    "cuda": {"tiers": TIERS, "precisions": ("fp16",), "timed_steps": None, "warmup": 3, "runs": 20},
}


@dataclass(frozen=True, kw_only=True)
class Group:
    """What takes turns: one method at one size, in one tier and precision, and ours."""

    method: Method
    size: int
    tier: str
    precision: str

    def __str__(self) -> str:
        return f"{self.method.name} {self.size}² {self.tier} {self.precision}"


@dataclass(frozen=True, kw_only=True)
class Ours:
    """Our candidates of a tier and precision, in the order in which they stand in the tables."""

    workload: Workload
    candidates: list[Candidate]
    gflop: float
    """Operations of one image in 10⁹, by count."""

    @property
    def size(self) -> int:
        """Pixels of an image, each way."""
        return self.workload.manifest.model.image_size


@dataclass
class Rival:
    """One way to run a method; images of `steps` steps, of which the candidate takes `timed`."""

    candidate: Candidate
    tier: str
    steps: int
    timed: int
    finite: bool

    def seconds(self, steps: int) -> list[float]:
        """Seconds of an image in every round, scaled from the steps that were taken to `steps`."""
        return scaled_seconds(self.candidate.seconds, self.candidate.stage_times("steps"), self.timed, steps)


def scaled_seconds(whole: Sequence[float], loop: Sequence[float], timed: int, steps: int) -> list[float]:
    """Whole times in which the loop, by itself `loop` seconds, takes `steps` steps instead of `timed`."""
    return [w + part * (steps / timed - 1) for w, part in zip(whole, loop, strict=True)]


# ---- Theirs ----


def rivals_of(networks: Networks, tier: str, group: Group, control: Any, timed_steps: int | None) -> list[Rival]:
    """One rival for every number of steps; one for all of them where no more than `timed_steps` are taken.

    Each has made an image when this returns, so that nothing is compiled while others are timed.
    """
    from benchmarks.baselines.diffusion import draw

    rivals: dict[int, Rival] = {}
    for steps in group.method.steps:
        timed = min(steps, timed_steps or steps)
        if timed in rivals:
            continue

        def make(seed: int, steps: int = steps, timed: int = timed) -> tuple[Any, dict[str, float]]:
            drawn = draw(networks, control, seed, group.size, steps, timed)
            return drawn.pixels, drawn.seconds

        first = draw(networks, control, 0, group.size, steps, timed)
        if first.pixels.shape != (1, group.size, group.size, 3):
            raise BenchmarkError(
                f"{group}: the image is {first.pixels.shape}; give sizes that the networks halve evenly"
            )
        name = f"{group.method.name}, {tier}, {timed} steps"
        rivals[timed] = Rival(
            Candidate(name, group.precision, 1, make), tier, steps, timed, bool(first.latents.isfinite().all())
        )
    return list(rivals.values())


def networks_of(args: argparse.Namespace, group: Group, cache: NetworkCache) -> Iterator[tuple[str, Networks]]:
    """Theirs for a group, with the tier that they really are of."""
    from benchmarks.baselines import diffusion

    architecture = architecture_of(args)
    if group.tier == "engine" and args.device == "cpu":
        precision = {"fp32": "f32"}.get(group.precision, group.precision)
        yield (
            "engine",
            diffusion.openvino_networks(architecture, group.method, group.size, precision, args.threads),
        )
        return
    eager = diffusion.assemble(architecture, group.method, cache, cache.dtype, args.device)
    wanted = args.against if group.tier == "engine" else (group.tier,)
    if "eager" in wanted:
        yield "eager", eager
    if "compiled" in wanted:
        yield "compiled", diffusion.compiled(eager)


def architecture_of(args: argparse.Namespace) -> Architecture:
    from benchmarks.baselines import diffusion

    return diffusion.SMALL if args.small else diffusion.SD15


# ---- Ours ----


@contextmanager
def opened(args: argparse.Namespace, tier: str, precision: str, log: Log) -> Iterator[Ours]:
    """Ours of a tier and precision, each of which has generated an image."""
    # On a CPU one float32 plan serves all: OpenVINO is asked to multiply it in the other type.
    stored = "fp32" if args.device == "cpu" else precision
    workload = random_weights(args.model, None, stored, (1,), args.cache, log)
    with ExitStack() as stack:
        if tier == "engine":
            candidates = our_engines(stack, args, workload, precision, log)
        else:
            model = workload.reference().to(args.device)
            candidates = [published_candidate(workload, model, 1, precision, args.device, tier == "compiled")]
            if tier == "eager":
                candidates.append(own_loop(workload, args.device, precision))
        for c in candidates:
            c.make(0)
        yield Ours(workload=workload, candidates=candidates, gflop=count_image(workload.plan).total("flops") / 1e9)


def our_engines(
    stack: ExitStack, args: argparse.Namespace, workload: Workload, precision: str, log: Log
) -> list[Candidate]:
    """Our runtime on every backend that opens, with `--int8` on the plan's INT8 form too."""
    if args.device == "cuda":
        backends = stack.enter_context(opened_backends(workload, None, args.device, args.threads, log))
        return [runtime_candidate(workload, name, backend) for name, backend in backends.items()]
    forms = [workload, *([int8(workload, args.cache, log)] if args.int8 else [])]
    return [
        runtime_candidate(form, name, backend)
        for form in forms
        for name, backend in _cpu_engines(stack, args, form, precision, log)
    ]


def _cpu_engines(
    stack: ExitStack, args: argparse.Namespace, workload: Workload, precision: str, log: Log
) -> Iterator[tuple[str, Any]]:
    """OpenVINO in the precision that is asked for, our code for AMX, and ONNX Runtime, which has float32 alone."""
    from car_runtime.backends.openvino.backend import OpenVino

    where = (workload.plan, workload.manifest, args.threads)
    openvino = OpenVino(*where, precision="f32" if precision == "fp32" else precision)  # theirs needs it too
    stack.callback(openvino.close)
    yield "openvino", openvino
    for name in OURS_ON_CPU[precision]:
        try:
            backend, _ = open_backend(name, *where)
        except BackendError as error:
            log(f"{name} is left out: {error}")
            continue
        stack.callback(backend.close)
        yield name, backend


# ---- Rows ----


def our_row(group: Group, ours: Ours, c: Candidate) -> Row:
    scales = len(ours.workload.manifest.scales)
    return {
        "question": "end_to_end",
        "whose": "ours",
        "method": "CAR",
        "candidate": c.name,
        "backend": c.backend,
        "tier": group.tier,
        "precision": c.precision,
        "size": ours.size,
        "steps": scales,
        "timed_steps": scales,
        "scaled": False,
        **quantiles(c.seconds),
        "gflop": ours.gflop,
        "finite": None,
        **dict.fromkeys(("text_s", "control_s", "step_s", "decode_s")),
        "group": str(group),
    }


def rivals_for(rivals: Sequence[Rival], steps: int) -> list[Rival]:
    """The rival of each tier that makes images of `steps` steps, or that they are scaled from."""
    tiers = dict.fromkeys(r.tier for r in rivals)
    return [max((r for r in rivals if r.tier == tier and r.timed <= steps), key=lambda r: r.timed) for tier in tiers]


def their_row(group: Group, rival: Rival, steps: int, gflops: dict[str, float]) -> Row:
    c = rival.candidate
    medians = {part: float(np.median(c.stage_times(part))) for part in ("text", "control", "steps", "decode")}
    return {
        "question": "end_to_end",
        "whose": "theirs",
        "method": group.method.name,
        "candidate": f"{group.method.name}, {rival.tier}",
        "backend": "openvino" if rival.tier == "engine" else None,
        "tier": rival.tier,
        "precision": group.precision,
        "size": group.size,
        "steps": steps,
        "timed_steps": rival.timed,
        "scaled": rival.timed != steps,
        **quantiles(rival.seconds(steps)),
        "gflop": sum(gflops[part] for part in ("text", "control", "decode")) + steps * gflops["step"],
        "finite": rival.finite,
        "text_s": medians["text"],
        "control_s": medians["control"],
        "step_s": medians["steps"] / rival.timed,
        "decode_s": medians["decode"],
        "group": str(group),
    }


def ratio_row(group: Group, rival: Rival, steps: int, c: Candidate, image_size: int) -> Row:
    times, p10, p90 = ratio(c.seconds, rival.seconds(steps))
    return {
        "question": "ratio",
        "method": group.method.name,
        "tier": group.tier,
        "precision": group.precision,
        "size": group.size,
        "steps": steps,
        "candidate": c.name,
        "against": rival.tier,
        "scaled": rival.timed != steps,
        "times_ours": times,
        "p10": p10,
        "p90": p90,
        "compares": compares(group.size, image_size),
    }


def compares(theirs: int, ours: int) -> str:
    if theirs == ours:
        return f"{theirs}×{theirs} with {ours}×{ours}: the same number of pixels"
    return f"theirs of {theirs}×{theirs} with ours of {ours}×{ours}: not the same number of pixels"


def parameter_rows(architecture: Architecture) -> list[Row]:
    """Counted on networks without weights; a published number that isn't met stops the benchmark."""
    from benchmarks.baselines import diffusion

    return [
        {
            "question": "parameters",
            "part": part,
            "parameters": diffusion.parameters(diffusion.skeleton(architecture, part)),
            "published": architecture.parameters.get(part),
        }
        for part in diffusion.PARTS
    ]


# ---- The command ----


def measure(args: argparse.Namespace, log: Log) -> Record:
    """Everything, as one record. Raises BenchmarkError and the runtime's errors."""
    import torch

    torch.set_num_threads(args.threads)
    architecture = architecture_of(args)
    rows, measured = parameter_rows(architecture), list[Workload]()
    for tier in args.tiers:
        for precision in args.precisions:
            with opened(args, tier, precision, log) as ours:
                rows += tier_rows(args, tier, precision, ours, log)
            measured.append(ours.workload)
    return record("controlnet", settings_of(args, architecture, measured), rows)


def tier_rows(args: argparse.Namespace, tier: str, precision: str, ours: Ours, log: Log) -> list[Row]:
    """All methods and sizes of one tier and precision against ours."""
    import torch

    from benchmarks.baselines import diffusion

    cache = diffusion.NetworkCache(architecture_of(args), getattr(torch, DTYPES[precision]), args.device)
    groups = [
        Group(method=diffusion.METHODS[name], size=size, tier=tier, precision=precision)
        for name in args.methods
        for size in args.sizes
    ]
    return [row for group in groups for row in group_rows(args, group, cache, ours, log)]


def group_rows(args: argparse.Namespace, group: Group, cache: NetworkCache, ours: Ours, log: Log) -> list[Row]:
    """Measure a group: its end_to_end and ratio rows. Its networks are let go of when this returns."""
    from benchmarks.baselines.diffusion import count_flops

    log(f"{group}: making the networks")
    rivals = [
        rival
        for tier, networks in networks_of(args, group, cache)
        for rival in rivals_of(networks, tier, group, ours.workload.control(), args.timed_steps)
    ]
    everyone = [*ours.candidates, *(rival.candidate for rival in rivals)]
    if group.tier == "compiled":  # theirs began with forgetting all that had been compiled
        for c in ours.candidates:
            c.make(0)
    log(f"{group}: {args.warmup} + {args.runs} rounds of {'; '.join(c.name for c in everyone)}")
    take_turns(everyone, args.warmup, args.runs)
    log(f"{group}: {'; '.join(f'{c.name} {np.median(c.seconds):.4g} s' for c in everyone)}")
    gflops = {part: n / 1e9 for part, n in count_flops(architecture_of(args), group.method, group.size).items()}
    rows = [our_row(group, ours, c) for c in ours.candidates]
    for steps in group.method.steps:
        for rival in rivals_for(rivals, steps):
            rows.append(their_row(group, rival, steps, gflops))
            rows += [ratio_row(group, rival, steps, c, ours.size) for c in ours.candidates]
    return rows


def settings_of(args: argparse.Namespace, architecture: Architecture, measured: Sequence[Workload]) -> Row:
    from benchmarks.baselines.diffusion import METHODS as DETAILS

    model = measured[0].manifest.model
    return {
        "theirs": architecture.name,
        "ours": {
            "plans": sorted({workload.plan.name for workload in measured}),
            **{key: getattr(model, key) for key in ("depth", "width", "image_size", "control_type")},
        },
        "random_weights": True,
        "guidance": {"CAR": measured[0].cfg, **{m.name: m.guidance for m in DETAILS.values()}},
        "batch": 1,
        "sizes": list(args.sizes),
        **{name: getattr(args, name) for name in ("timed_steps", "threads", "device", "warmup", "runs")},
        "peak_rss": peak_rss(),
    }


def tables(found: Record) -> Iterator[str]:
    """A heading and a table per question."""
    yield "How many times as long as ours do others take? Theirs ÷ ours, the median of the rounds"
    yield table(rows_of(found, "ratio"), {**RATIOS, "compares": "compares"})
    yield "How long does an image take? Control image in host memory → RGB in host memory, guided"
    yield table(rows_of(found, "end_to_end"), {**THEIRS, "group": "measured with"})
    yield f"What is compared with? {found['settings']['theirs']}"
    columns = {"part": "part", "parameters": "parameters", "published": "published"}
    yield table(rows_of(found, "parameters"), columns)


def sizes_of(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(dict.fromkeys(map(int, text.split(","))))
    except ValueError:
        sizes = (0,)
    if any(size < 16 or size % 16 for size in sizes):
        raise argparse.ArgumentTypeError(f"sizes are {text!r}; give multiples of 16, e.g. 256,512")
    return sizes


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("controlnet", __doc__)
    parser.add_argument("--model", choices=list(MODELS), default="d16", help="ours, exported once (default: d16)")
    add_plan_options(parser)
    parser.add_argument("--sizes", type=sizes_of, help="of their images (default: 256,512; with --small 16)")
    parser.add_argument("--methods", type=names_of(METHODS), default=METHODS, help="default: controlnet,t2i,lcm")
    parser.add_argument("--tiers", type=names_of(TIERS), help="default: eager,engine; with cuda compiled too")
    parser.add_argument("--precisions", type=names_of(tuple(DTYPES)), help="default: fp32,bf16; with cuda fp16")
    parser.add_argument(
        "--against",
        type=names_of(WITHOUT_ENGINE),
        default=WITHOUT_ENGINE,
        help="theirs against our engine where they have none, with cuda (default: eager,compiled)",
    )
    parser.add_argument("--timed-steps", type=int, help="steps that are run, then scaled (default: 2; with cuda all)")
    parser.add_argument("--small", action="store_true", help="theirs in toy sizes, which is not Stable Diffusion 1.5")
    add_run_options(parser, "5; with cuda 20", "1; with cuda 3", list(DEFAULTS))
    args = parser.parse_args(argv)
    for name, value in DEFAULTS[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.sizes = args.sizes or ((16,) if args.small else (256, 512))
    check_options(parser, args)
    missing = [precision for precision in args.precisions if precision not in OFFERED[args.device]]
    if missing:
        parser.error(f"{missing[0]} is not compared on {args.device}; give {','.join(OFFERED[args.device])}")
    if not args.small and any(size % 64 for size in args.sizes):
        parser.error(f"sizes are {','.join(map(str, args.sizes))}; Stable Diffusion 1.5 wants multiples of 64")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("benchmarks.controlnet", parse_args(argv), measure, tables)


if __name__ == "__main__":
    sys.exit(main())

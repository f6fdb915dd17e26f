"""What each schedule of the scale loop costs and what it changes, against the exact loop, in one run.

    python -m benchmarks.schedules -o results.jsonl             # the shipped plan, on the held-out emoji
    python -m benchmarks.schedules --model d16                  # random weights: time and tokens alone
    python -m benchmarks.schedules --schedule "--cfg-scales -3" --schedule "--cfg-scales -3 --stop-after 4"
    python -m benchmarks.schedules --int8                       # and the exact loop of the plan's INT8 form

Time: images of a new control image (in host memory → RGB in host memory), all schedules in turn, so that whatever
else the machine does hits all alike; ratios are medians of the ratios within a round. `loop` is the scale steps,
alone, by the backend's marks. Schedules with guidance share one set of buffers, those without it have another, so
that none pays for what the one before it left.

Tokens, quality, control: each held-out image of `--data` is generated once by each schedule, with its own control and
class and the seed that `python -m car_train eval` gives it. All is measured by what `eval` measures with:
`car_train.evaluation.sets` and `car_train.evaluation.metrics`. Distances between sets have a noise floor: real
images against real ones, one half against the other half, over random halvings; compare `kid_half` with it, which
is taken likewise. Controls are compared with the one that was given: Canny's edges as F1 with one pixel of tolerance.
One token that differs changes all that come after it, so `tokens_equal` says how different images are, not how much
worse.

Tables go to stdout, then one line of JSON (`benchmarks.harness.records`) whose results are flat rows, each with
"question":

    schedule    schedule, flags (car-run's), p50, p95, min, runs, ratio, ratio_p10, ratio_p90 (÷ exact), loop_p50,
                loop_ratio, rows_shrink (whether steps without guidance have half the rows here), images,
                tokens_equal (share of the tokens drawn that are the exact loop's), kid, kid_std, kid_half,
                kid_half_std, kid_floor, kid_floor_std, precision, recall, f1, f1_change, f1_change_error (mean
                difference to exact of the same image, and its standard error), control_NAME for the other measures
                of the control
    scale       scale, side, tokens, guided_p50, unguided_p50, ratio: steps of the exact loop, and of one without
                guidance if that is among the schedules

Times are seconds; null is what doesn't apply or wasn't measured. Backends whose steps always have the rows of
guidance (`rtx`, `trt`) generate the same images on a schedule of it, and save nothing by it: `rows_shrink` is false.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.analysis.columns import SCALES, SCHEDULE_CHANGES, SCHEDULE_TIMES
from benchmarks.harness.cli import (
    Log,
    add_run_options,
    add_workload_options,
    check_options,
    choose_workload,
    make_parser,
    model_settings,
    run_command,
)
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.measure import interleaved
from benchmarks.harness.records import Record, Row, record, rows_of
from benchmarks.harness.tables import table
from benchmarks.harness.workload import Workload, draw_control, int8
from car_runtime.backends.base import Backend
from car_runtime.backends.registry import open_backend
from car_runtime.cli.options import add_setting, add_settings
from car_runtime.config import GenerationConfig
from car_runtime.format.manifest import Manifest
from car_runtime.plan import Plan, Result
from car_runtime.request import Request, resolve

if TYPE_CHECKING:
    from car_train.evaluation.features import FeatureNetwork

EMOJI = Path("~/.cache/car/data/emoji-128")
"""What the shipped plan was trained on, all but the held-out images."""
SEEDS = 4
"""Behind `tokens_equal` where there are no images to generate after."""
BATCH = 16
"""Images whose features are computed at once."""

Pixels = NDArray[np.uint8]


# ---- Schedules ----


class _Parser(argparse.ArgumentParser):
    """Reads the flags of one schedule; a mistake in them is the benchmark's own error."""

    def error(self, message: str) -> Any:
        raise BenchmarkError(f"a schedule's flags: {message}; give car-run's, such as --cfg-scales -3")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A schedule by name, as flags of `car-run` and as arguments of `Plan.generate`."""

    name: str
    flags: str
    settings: dict[str, Any]
    request: Request
    """The request of one image, with all that the plan decides filled in."""
    int8: bool = False
    """Whether it is the plan's INT8 form that is run."""

    @property
    def exact(self) -> bool:
        return not self.flags and not self.int8


def default_schedules(K: int, steered: bool) -> dict[str, str]:
    """Name → flags, for a plan of K scales; those about control only for a plan that has one."""
    half, third = max(K // 2 - 1, 0), K // 3
    late, later = max(K - 3, 0), max(K - 2, 0)
    guidance = {
        f"guided to scale {later}": f"--cfg-scales -{later}",
        f"guided to scale {late}": f"--cfg-scales -{late}",
        "guided on the first half": f"--cfg-scales -{half}",
        "guided on the middle": f"--cfg-scales {third}-{K - 1 - third}",
        "guided on the second half": f"--cfg-scales {half + 1}-",
        "no guidance": "--cfg 0",
    }
    control = {
        "control on the first half": f"--control-scales -{half}",
        "control on the second half": f"--control-scales {half + 1}-",
        "control × 0.5": "--control-strength 0.5",
        "control × 1.5": "--control-strength 1.5",
    }
    ends = {
        f"stop after scale {later}": f"--stop-after {later}",
        f"stop after scale {late}": f"--stop-after {late}",
        f"guided on the first half, stop after scale {later}": f"--cfg-scales -{half} --stop-after {later}",
    }
    both = {"guided on the first half, control × 1.5": f"--cfg-scales -{half} --control-strength 1.5"}
    return {"exact": "", **guidance, **(control if steered else {}), **ends, **(both if steered else {})}


def _drawn_alike(request: Request) -> object:
    """What is equal for schedules that come to the same."""
    return request.sampling, request.schedule, request.control_cfg, request.watermark


def candidates(manifest: Manifest, named: Mapping[str, str], base: Mapping[str, Any]) -> list[Candidate]:
    """The schedules, exact first; of several that come to the same, as short plans have them, the first.

    base: guidance and draws of all. BenchmarkError or RequestError for flags that are none, or don't fit the plan.
    """
    parser = _Parser(prog="--schedule", add_help=False, allow_abbrev=False)
    for setting in ("cfg", "control_cfg", "watermark"):
        add_setting(parser, setting)
    add_settings(parser, "schedule")
    control = None if manifest.model.control_type is None else draw_control(manifest.model.image_size)
    found: list[Candidate] = []
    for name, flags in {"exact": "", **named}.items():
        given = {k: v for k, v in vars(parser.parse_args(shlex.split(flags))).items() if v is not None}
        settings = {**base, **given}
        # Of any class: without one there is no guidance, and images are drawn with theirs.
        request = resolve(manifest, GenerationConfig(control=control, label=0, **settings))
        if all(_drawn_alike(request) != _drawn_alike(c.request) for c in found):
            found.append(Candidate(name=name, flags=flags, settings=settings, request=request))
    return found


class Generator:
    """Generates images on one backend, with a plan, and so a set of buffers, for each number of rows."""

    def __init__(self, engines: Sequence[tuple[Workload, Backend]]) -> None:
        """engines: the plan's, and that of its INT8 form, if that is measured too."""
        self._plans = [
            [Plan(workload.plan, workload.manifest, backend, "benchmark") for _ in range(2)]
            for workload, backend in engines
        ]

    def __call__(
        self, candidate: Candidate, control: Pixels | None, label: int, seed: int, n: int = 1, *, anew: bool = False
    ) -> Result:
        """Images. anew: what is kept of control and class is computed again."""
        plan = self._plans[candidate.int8][candidate.request.guided]
        if anew:
            plan.forget()
        return plan.generate(control, label, seed, n, **candidate.settings)


# ---- Time ----


def measure_time(
    generator: Generator, chosen: Sequence[Candidate], workload: Workload, args: argparse.Namespace
) -> tuple[dict[str, Row], dict[str, list[dict[str, float]]]]:
    """By schedule: the times of whole images and of the loop, and the seconds of each stage, run by run."""
    control, stages = workload.control(), defaultdict[str, list[dict[str, float]]](list)

    def call(candidate: Candidate) -> Callable[[], None]:
        def make() -> None:
            found = generator(candidate, control, 0, len(stages[candidate.name]), args.batch, anew=True)
            stages[candidate.name].append(found.timings)

        return make

    times = interleaved({c.name: call(c) for c in chosen}, args.warmup, args.runs)
    for seconds in stages.values():
        del seconds[: args.warmup]
    loops = {name: np.array([_loop(s) for s in seconds]) for name, seconds in stages.items()}
    exact = loops[chosen[0].name]
    loop_times = {
        name: {"loop_p50": float(np.median(loop)), "loop_ratio": float(np.median(loop / exact))}
        for name, loop in loops.items()
    }
    return {name: {**times[name], **loop_times[name]} for name in times}, dict(stages)


def _loop(stages: Mapping[str, float]) -> float:
    return sum(seconds for name, seconds in stages.items() if name.startswith("scale_"))


def scale_rows(
    workload: Workload, chosen: Sequence[Candidate], stages: Mapping[str, Sequence[Mapping[str, float]]]
) -> list[Row]:
    """What each scale costs with guidance and without, if both were measured."""
    unguided = next((c for c in chosen if not c.request.guided and c.request.schedule.settings() == {}), None)
    rows = []
    for k, scale in enumerate(workload.manifest.scales):
        exact = np.array([run[f"scale_{k}"] for run in stages[chosen[0].name]])
        free = None if unguided is None else np.array([run[f"scale_{k}"] for run in stages[unguided.name]])
        rows.append(
            {
                "question": "scale",
                "scale": k,
                "side": scale.side,
                "tokens": scale.tokens,
                "guided_p50": float(np.median(exact)),
                "unguided_p50": None if free is None else float(np.median(free)),
                "ratio": None if free is None else float(np.median(free / exact)),
            }
        )
    return rows


# ---- What is drawn ----


@dataclass
class Drawn:
    """What one schedule came to on the images, one entry each."""

    equal: list[float] = field(default_factory=list)
    features: list[NDArray[Any]] = field(default_factory=list)
    control: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, tokens: NDArray[np.int64], exact: NDArray[np.int64]) -> None:
        drawn = tokens >= 0
        self.equal.append(float((tokens == exact)[drawn].mean()))


def draw_seeds(generator: Generator, chosen: Sequence[Candidate], workload: Workload, seed: int) -> dict[str, Drawn]:
    """Some seeds of the benchmark's own control: tokens alone, since images of random weights show nothing."""
    drawn = {c.name: Drawn() for c in chosen}
    for i in range(SEEDS):
        tokens = {c.name: generator(c, workload.control(), 0, seed + i).tokens for c in chosen}
        for name, found in tokens.items():
            drawn[name].add(found, tokens[chosen[0].name])
    return drawn


Draw = Callable[[Candidate, Pixels | None, int, int], Result]
"""An image of a candidate: of a control, a class and a seed."""


class HeldOut:
    """The images of a split with their controls, and what measures drawn ones by them."""

    def __init__(self, manifest: Manifest, args: argparse.Namespace, network: FeatureNetwork | None) -> None:
        from car_train.conventions import PRESETS
        from car_train.data.dataset import ControlledImages
        from car_train.evaluation.controls import control_maker
        from car_train.evaluation.evaluate import choose
        from car_train.evaluation.options import EvalOptions

        model = manifest.model
        options = EvalOptions(
            checkpoint=Path(),
            data=args.data.expanduser(),
            split=args.split,
            control_root=args.control_root,
            limit=args.limit,
            seed=args.seed,
        )
        self.network, self.control_type = network, model.control_type
        stated = model.convention
        self.convention = None if stated is None else PRESETS.get(stated.name, PRESETS[stated.control_type])
        self.data = ControlledImages(
            args.data,
            model.image_size,
            split=options.split,
            control_type=model.control_type,
            convention=self.convention,
            control_root=options.control_root,
            preload=False,
        )
        names = tuple(self.data.class_names)
        if len(names) != model.classes or (model.class_names is not None and names != model.class_names):
            raise BenchmarkError(
                f"{args.data} has {len(names)} classes ({', '.join(names[:3])}, …), the plan {model.classes}; "
                "give a folder of the plan's classes"
            )
        self.order = choose(self.data, options)
        self._maker = None if self.convention is None else control_maker(self.convention, options)[0]
        self.truth: list[NDArray[Any]] = []
        """Features of the real images, in batches."""

    def draw(self, generator: Draw, chosen: Sequence[Candidate], seed: int, log: Log) -> dict[str, Drawn]:
        """Every image on every schedule."""
        drawn = {c.name: Drawn() for c in chosen}
        began = time.monotonic()
        for start in range(0, len(self.order), BATCH):
            self._draw_batch(generator, chosen, self.order[start : start + BATCH], seed, drawn)
            done = min(start + BATCH, len(self.order))
            rest = (time.monotonic() - began) / done * (len(self.order) - done)
            log(f"drew {done} of {len(self.order)} images on {len(chosen)} schedules, {rest:.0f} s to go")
        return drawn

    def _draw_batch(
        self,
        generator: Draw,
        chosen: Sequence[Candidate],
        positions: Sequence[int],
        seed: int,
        drawn: Mapping[str, Drawn],
    ) -> None:
        from car_train.images import to_pixels

        images: dict[str, list[Pixels]] = {c.name: [] for c in chosen}
        truth = []
        for position in positions:
            item = self.data[position]
            truth.append(to_pixels(item["image"][None])[0])
            given = item["control"].numpy() if self._maker is not None else None
            results = {c.name: generator(c, given, item["label"], seed + position) for c in chosen}
            exact = results[chosen[0].name].tokens
            for name, result in results.items():
                drawn[name].add(result.tokens, exact)
                images[name].append(result.images[0])
                if given is not None:
                    self._follow(given, result.images[0], drawn[name])
        if self.network is not None:
            self.truth.append(self.network(np.stack(truth)))
            for name, made in images.items():
                drawn[name].features.append(self.network(np.stack(made)))

    def _follow(self, given: Pixels, image: Pixels, drawn: Drawn) -> None:
        from car_train.evaluation.metrics import control_errors

        assert self._maker is not None
        assert self.convention is not None
        (found,) = self._maker([image])
        for measure, value in control_errors(self.convention, given, found).items():
            drawn.control[measure].append(value)

    def distances(self, drawn: Mapping[str, Drawn], seed: int, log: Log) -> Row:
        """`compare_sets`: by schedule, and "floor"; empty without a network."""
        from car_train.evaluation.sets import compare_sets

        if self.network is None:
            return {}
        notes: list[str] = []
        bank = {"truth": np.concatenate(self.truth)}
        bank |= {name: np.concatenate(found.features) for name, found in drawn.items()}
        distances = compare_sets(bank, seed, notes)
        for note in notes:
            log(f"note: {note}")
        return distances


# ---- Rows ----


def schedule_row(
    candidate: Candidate, t: Mapping[str, Any], drawn: Drawn, exact: Drawn, distances: Mapping[str, Any], shrink: bool
) -> Row:
    sets, floor = distances.get(candidate.name, {}), distances.get("floor", {})
    means = {name: _mean(values) for name, values in drawn.control.items()}
    f1 = means.pop("f1", None)
    change = np.array(drawn.control.get("f1", [])) - np.array(exact.control.get("f1", []))
    compared = f1 is not None and not candidate.exact
    return {
        "question": "schedule",
        "schedule": candidate.name,
        "flags": candidate.flags,
        **{name: t[name] for name in ("p50", "p95", "min", "runs", "ratio", "ratio_p10", "ratio_p90")},
        **{name: t[name] for name in ("loop_p50", "loop_ratio")},
        "rows_shrink": shrink,
        "images": len(drawn.equal),
        "tokens_equal": _mean(drawn.equal),
        **{name: sets.get(name) for name in ("kid", "kid_std", "kid_half", "kid_half_std")},
        "kid_floor": floor.get("kid_half"),
        "kid_floor_std": floor.get("kid_half_std"),
        **{name: sets.get(name) for name in ("precision", "recall")},
        "f1": f1,
        "f1_change": float(change.mean()) if compared else None,
        "f1_change_error": float(change.std(ddof=1) / math.sqrt(len(change)))
        if compared and len(change) > 1
        else None,
        **{f"control_{name}": value for name, value in means.items()},
    }


def _mean(values: Sequence[float]) -> float | None:
    """The mean of what is a number; None without any."""
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else None


# ---- The command ----


def measure(args: argparse.Namespace, log: Log, network: FeatureNetwork | None = None) -> Record:
    """Everything, as one record. `network`: other features than those of `--features`.

    Raises BenchmarkError and the runtime's errors.
    """
    workload = choose_workload(args, sorted({1, args.batch}), log)  # tokens are compared image by image
    manifest = workload.manifest
    named = args.schedules or default_schedules(len(manifest.scales), manifest.model.control_type is not None)
    base = {"cfg": workload.cfg if args.cfg is None else args.cfg, "top_k": args.top_k, "top_p": args.top_p}
    chosen = candidates(manifest, named, base)
    forms = [workload]
    if args.int8:
        forms.append(int8(workload, args.cache, log))
        chosen.append(replace(chosen[0], name="int8", int8=True))
    held_out = None
    if args.data is not None:
        held_out = HeldOut(manifest, args, network or features(args))
    with ExitStack() as stack:
        backends: list[Backend] = []
        for form in forms:
            name = backends[0].name if backends else args.backend
            backend, why = open_backend(name, form.plan, form.manifest, args.threads)
            stack.callback(backend.close)
            backends.append(backend)
            log(f"{form.manifest.name} on {backend.name} ({why}), {len(chosen)} schedules")
        generator = Generator(list(zip(forms, backends, strict=True)))
        log(f"measuring {args.warmup} + {args.runs} rounds")
        times, stages = measure_time(generator, chosen, workload, args)
        if held_out is None:
            drawn, distances = draw_seeds(generator, chosen, workload, args.seed), dict[str, Any]()
        else:
            drawn = held_out.draw(generator, chosen, args.seed, log)
            distances = held_out.distances(drawn, args.seed, log)
        settings = settings_of(args, workload, backends[0], chosen[0], held_out)
    exact, shrink = drawn[chosen[0].name], not backends[0].guided_only
    rows = [schedule_row(c, times[c.name], drawn[c.name], exact, distances, shrink) for c in chosen]
    return record("schedules", settings, [*rows, *scale_rows(workload, chosen, stages)])


def features(args: argparse.Namespace) -> FeatureNetwork | None:
    """The network of `eval`, fetched once; None where it isn't wanted."""
    import cv2
    import torch

    from car_train.data.pretrained import fetch
    from car_train.evaluation.features import EfficientNetLite0

    torch.set_num_threads(args.threads)
    cv2.setNumThreads(args.threads)
    if args.features == "none":
        return None
    return EfficientNetLite0(Path(args.features).expanduser() if args.features else fetch("efficientnet"))


def settings_of(
    args: argparse.Namespace, workload: Workload, backend: Backend, exact: Candidate, held_out: HeldOut | None
) -> Row:
    sampling = exact.request.sampling
    about = dict(held_out.network.about) if held_out is not None and held_out.network is not None else None
    return {
        **model_settings(args, workload),
        "sides": [scale.side for scale in workload.manifest.scales],
        **{name: getattr(sampling, name) for name in ("cfg", "top_k", "top_p")},
        **{name: getattr(args, name) for name in ("batch", "threads", "warmup", "runs", "seed")},
        "backend": {"name": backend.name, **backend.report()},
        "data": None
        if held_out is None
        else {"name": args.data.name, "split": args.split, "images": len(held_out.order)},
        "features": about,
    }


def tables(found: Record) -> Iterator[str]:
    """A heading and a table per question."""
    rows = rows_of(found, "schedule")
    yield "What does each schedule cost? An image of a new control image; `loop`: the scale steps alone"
    yield table(rows, SCHEDULE_TIMES)
    data = found["settings"]["data"]
    after = f"{rows[0]['images']} seeds of a drawn control"
    if data is not None:
        after = f"{rows[0]['images']} controls and classes of {data['name']}, split {data['split']}"
    yield f"What does it change? {after}"
    others = {name: name.removeprefix("control_") for name in rows[0] if name.startswith("control_")}
    floor = {"schedule": "real images (noise floor)", "kid_half": rows[0]["kid_floor"]}
    floor |= {"kid_half_std": rows[0]["kid_floor_std"]}
    yield table([*rows, floor] if rows[0]["kid_floor"] is not None else rows, {**SCHEDULE_CHANGES, **others})
    yield "What does each scale cost?"
    yield table(rows_of(found, "scale"), SCALES)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("schedules", __doc__)
    add_workload_options(parser)
    parser.add_argument(
        "--schedule",
        dest="schedules",
        action="append",
        metavar="FLAGS",
        help='car-run\'s flags in quotes, after exact, instead of the default list; may be repeated; "--cfg 0" too',
    )
    parser.add_argument("--backend", default="auto", help="auto, or a backend such as ort-cpu (default: auto)")
    parser.add_argument("--cfg", type=float, help="guidance of all schedules (default: the plan's; 4 if that is 0)")
    parser.add_argument("--top-k", type=int, help="(default: the plan's)")
    parser.add_argument("--top-p", type=float, help="(default: the plan's)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images at once to time (default: 1)")
    add_data_options(parser)
    add_run_options(parser, 10, 3)
    args = parser.parse_args(argv)
    check_options(parser, args)
    if args.model is not None and args.data not in (None, "none"):
        parser.error(f"--data {args.data} with --model; images of random weights show nothing, leave one out")
    if args.data is None and args.plan is None and args.model is None:
        args.data = str(EMOJI)
        if not EMOJI.expanduser().is_dir():
            parser.error(
                f"there is no {EMOJI}; fetch it: python -m car_train data emoji --size 128, or give --data none"
            )
    args.data = None if args.data in (None, "none") else Path(args.data)
    args.schedules = {flags: flags for flags in args.schedules or []}
    return args


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Held-out images, and what measures generated ones by them."""
    parser.add_argument(
        "--data",
        metavar="DIR",
        help=f"folder of the plan's classes; none: time and tokens alone (default for the shipped plan: {EMOJI})",
    )
    parser.add_argument("--split", default="val", help="of --data (default: val)")
    parser.add_argument("--control-root", type=Path, metavar="DIR", help="ready control images that mirror --data")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="at most N of its images (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the images generated (default: 0)")
    parser.add_argument(
        "--features",
        metavar="FILE",
        help="EfficientNet-Lite0 as .safetensors (default: fetched once); none leaves KID out",
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("benchmarks.schedules", parse_args(argv), measure, tables)


if __name__ == "__main__":
    sys.exit(main())

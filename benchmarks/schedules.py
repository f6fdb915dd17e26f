"""What each schedule of the scale loop costs and what it gains, beside the exact loop, in one run.

    python -m benchmarks.schedules -o results.jsonl             # the shipped plan, on the held-out emoji
    python -m benchmarks.schedules --model d16                  # weights made up: time and tokens alone
    python -m benchmarks.schedules --schedule "--cfg-scales -3" --schedule "--cfg-scales -3 --stop-after 4"
    python -m benchmarks.schedules --int8                       # and the exact loop of the plan's int8 form

Time: pictures of a new control image (in host memory → RGB in host memory), all schedules in turn, so that whatever
else the machine does hits all alike; ratios are medians of the ratios within a round. `loop` is the scale steps,
alone, by the backend's marks. Schedules with guidance share one set of buffers, those without it have another, so
that none pays for what the one before it left.

Tokens, quality, control: each held-out picture of `--data` is drawn once by each schedule, with its own control and
class and the seed that `python -m car_train eval` gives it. All is measured by what `eval` measures with:
`car_train.evaluation.sets` and `car_train.evaluation.metrics`. Distances between sets have a noise floor: real
pictures against real ones, one half against the other half, over random halvings; compare `kid_half` with it, which
is taken likewise. Controls are compared with the one that was given: Canny's edges as F1 with one pixel of tolerance.
One token that differs changes all that come after it, so `tokens_equal` says how different pictures are, not how much
worse.

Tables go to stdout, then one line of JSON (`benchmarks.harness.machine`) whose results are flat rows, each with
"question":

    schedule    schedule, flags (car-run's), p50, p95, min, runs, ratio, ratio_p10, ratio_p90 (÷ exact), loop_p50,
                loop_ratio, rows_shrink (whether steps without guidance have half the rows here), pictures,
                tokens_equal (share of the tokens drawn that are the exact loop's), kid, kid_std, kid_half,
                kid_half_std, kid_floor, kid_floor_std, precision, recall, f1, f1_change, f1_change_error (mean
                difference to exact of the same picture, and its standard error), control_NAME for the other measures
                of the control
    scale       scale, side, tokens, guided_p50, unguided_p50, ratio: steps of the exact loop, and of one without
                guidance if that is among the schedules

Times are seconds; null is what doesn't apply or wasn't measured. Backends whose steps always have the rows of
guidance (`rtx`, `trt`) draw the same pictures on a schedule of it, and save nothing by it: `rows_shrink` is false.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import workload as subjects
from benchmarks.harness.cli import Log, run_command
from benchmarks.harness.machine import BenchmarkError, cores, interleaved, markdown_table, record
from benchmarks.harness.workload import CACHE, MODELS, Subject, draw_control
from car_runtime.backends.base import Backend
from car_runtime.backends.registry import check_name, open_backend
from car_runtime.cli.options import add_setting, add_settings
from car_runtime.config import GenerationConfig
from car_runtime.errors import BackendError
from car_runtime.format.manifest import Manifest
from car_runtime.plan import Plan, Result, default_plan
from car_runtime.request import Request, resolve

if TYPE_CHECKING:
    from car_train.evaluation.features import FeatureNetwork

EMOJI = Path("~/.cache/car/data/emoji")
"""What the shipped plan was trained on, all but the held-out pictures."""
MADE_UP_PICTURES = 4
"""Seeds behind `tokens_equal` where there are no pictures to draw after."""
BATCH = 16
"""Pictures whose features are computed at once."""

Record = dict[str, Any]
Pixels = NDArray[np.uint8]


# ---- Schedules ----


class _Parser(argparse.ArgumentParser):
    """Flags of one schedule; a mistake in them is the benchmark's own error."""

    def error(self, message: str) -> Any:
        raise BenchmarkError(f"a schedule's flags: {message}; give car-run's, such as --cfg-scales -3")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A schedule by name, as flags of `car-run` and as arguments of `Plan.generate`."""

    name: str
    flags: str
    settings: dict[str, Any]
    request: Request
    """Of one picture, with all that the plan decides filled in."""
    int8: bool = False
    """Whether it is the plan's int8 form that draws."""

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


def candidates(manifest: Manifest, named: Mapping[str, str], base: Mapping[str, Any]) -> list[Candidate]:
    """The schedules, exact first; of several that come to the same, as short plans have them, the first.

    base: guidance and draws of all. BenchmarkError or RequestError for flags that are none, or don't fit the plan.
    """
    parser = _Parser(prog="--schedule", add_help=False, allow_abbrev=False)
    add_setting(parser, "cfg")
    add_settings(parser, "schedule")
    control = None if manifest.model.control_type is None else draw_control(manifest.model.image_size)
    found: list[Candidate] = []
    for name, flags in {"exact": "", **named}.items():
        given = {k: v for k, v in vars(parser.parse_args(shlex.split(flags))).items() if v is not None}
        settings = {**base, **given}
        request = resolve(manifest, GenerationConfig(control=control, **settings))
        if all((request.sampling, request.schedule) != (c.request.sampling, c.request.schedule) for c in found):
            found.append(Candidate(name=name, flags=flags, settings=settings, request=request))
    return found


class Maker:
    """Makes pictures on one engine, with a plan, and so a set of buffers, for each number of rows."""

    def __init__(self, engines: Sequence[tuple[Subject, Backend]]) -> None:
        """engines: the plan's, and that of its int8 form, if that is measured too."""
        self._plans = [
            [Plan(subject.plan, subject.manifest, backend, "benchmark") for _ in range(2)]
            for subject, backend in engines
        ]

    def __call__(
        self, candidate: Candidate, control: Pixels | None, label: int, seed: int, n: int = 1, *, anew: bool = False
    ) -> Result:
        """Pictures. anew: what is kept of control and class is computed again."""
        plan = self._plans[candidate.int8][candidate.request.guided]
        if anew:
            plan.forget()
        return plan.generate(control, label, seed, n, **candidate.settings)


# ---- Time ----


def measure_time(
    maker: Maker, chosen: Sequence[Candidate], subject: Subject, args: argparse.Namespace
) -> tuple[dict[str, Record], dict[str, list[dict[str, float]]]]:
    """Of each schedule by name: times of whole pictures and of the loop; the seconds of each stage, run by run."""
    control, stages = subject.control(), defaultdict[str, list[dict[str, float]]](list)

    def call(candidate: Candidate) -> Callable[[], None]:
        def make() -> None:
            found = maker(candidate, control, 0, len(stages[candidate.name]), args.batch, anew=True)
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
    subject: Subject, chosen: Sequence[Candidate], stages: Mapping[str, Sequence[Mapping[str, float]]]
) -> list[Record]:
    """What each scale costs with guidance and without, if both were measured."""
    unguided = next((c for c in chosen if not c.request.guided and c.request.schedule.settings() == {}), None)
    rows = []
    for k, scale in enumerate(subject.manifest.scales):
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
    """What one schedule came to on the pictures, one entry each."""

    equal: list[float] = field(default_factory=list)
    features: list[NDArray[Any]] = field(default_factory=list)
    control: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, tokens: NDArray[np.int64], exact: NDArray[np.int64]) -> None:
        drawn = tokens >= 0
        self.equal.append(float((tokens == exact)[drawn].mean()))


def draw_made_up(maker: Maker, chosen: Sequence[Candidate], subject: Subject, seed: int) -> dict[str, Drawn]:
    """Some seeds of the benchmark's own control: tokens alone, since made-up weights draw nothing."""
    drawn = {c.name: Drawn() for c in chosen}
    for i in range(MADE_UP_PICTURES):
        tokens = {c.name: maker(c, subject.control(), 0, seed + i).tokens for c in chosen}
        for name, found in tokens.items():
            drawn[name].add(found, tokens[chosen[0].name])
    return drawn


class HeldOut:
    """The pictures of a split with their controls, and what measures drawn ones by them."""

    def __init__(self, manifest: Manifest, args: argparse.Namespace, network: FeatureNetwork | None) -> None:
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
        self.data = ControlledImages(
            options.data,
            model.image_size,
            split=options.split,
            control_type=model.control_type,
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
        self._maker = None if model.control_type is None else control_maker(model.control_type, options)[0]
        self.truth: list[NDArray[Any]] = []
        """Features of the real pictures, in batches."""

    def draw(self, maker: Maker, chosen: Sequence[Candidate], seed: int, log: Log) -> dict[str, Drawn]:
        """Every picture on every schedule."""
        drawn = {c.name: Drawn() for c in chosen}
        began = time.monotonic()
        for start in range(0, len(self.order), BATCH):
            self._draw_batch(maker, chosen, self.order[start : start + BATCH], seed, drawn)
            done = min(start + BATCH, len(self.order))
            rest = (time.monotonic() - began) / done * (len(self.order) - done)
            log(f"drew {done} of {len(self.order)} pictures on {len(chosen)} schedules, {rest:.0f} s to go")
        return drawn

    def _draw_batch(
        self,
        maker: Maker,
        chosen: Sequence[Candidate],
        positions: Sequence[int],
        seed: int,
        drawn: Mapping[str, Drawn],
    ) -> None:
        from car_train.images import to_pixels

        pictures: dict[str, list[Pixels]] = {c.name: [] for c in chosen}
        truth = []
        for position in positions:
            item = self.data[position]
            truth.append(to_pixels(item["image"][None])[0])
            given = item["control"].numpy() if self._maker is not None else None
            results = {c.name: maker(c, given, item["label"], seed + position) for c in chosen}
            exact = results[chosen[0].name].tokens
            for name, result in results.items():
                drawn[name].add(result.tokens, exact)
                pictures[name].append(result.images[0])
                if given is not None:
                    self._follow(given, result.images[0], drawn[name])
        if self.network is not None:
            self.truth.append(self.network(np.stack(truth)))
            for name, images in pictures.items():
                drawn[name].features.append(self.network(np.stack(images)))

    def _follow(self, given: Pixels, image: Pixels, drawn: Drawn) -> None:
        from car_train.evaluation.metrics import control_errors

        assert self._maker is not None
        assert self.control_type is not None
        (found,) = self._maker([image])
        for measure, value in control_errors(self.control_type, given, found).items():
            drawn.control[measure].append(value)

    def distances(self, drawn: Mapping[str, Drawn], seed: int, log: Log) -> Record:
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
) -> Record:
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
        "pictures": len(drawn.equal),
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
    subject = choose_subject(args, log)
    manifest = subject.manifest
    named = args.schedules or default_schedules(len(manifest.scales), manifest.model.control_type is not None)
    base = {"cfg": subject.cfg if args.cfg is None else args.cfg, "top_k": args.top_k, "top_p": args.top_p}
    chosen = candidates(manifest, named, base)
    small = subjects.int8(subject, args.cache, log) if args.int8 else None
    if small is not None:
        chosen.append(replace(chosen[0], name="int8", int8=True))
    held_out = None
    if args.data is not None:
        with training_errors():
            held_out = HeldOut(manifest, args, network or features(args))
    with ExitStack() as stack:
        backend, why = open_backend(args.backend, subject.plan, manifest, args.threads)
        stack.callback(backend.close)
        log(f"{manifest.name} on {backend.name} ({why}), {len(chosen)} schedules")
        engines = [(subject, backend)]
        if small is not None:
            other, _ = open_backend(backend.name, small.plan, small.manifest, args.threads)
            stack.callback(other.close)
            engines.append((small, other))
        maker = Maker(engines)
        log(f"measuring {args.warmup} + {args.runs} rounds")
        times, stages = measure_time(maker, chosen, subject, args)
        if held_out is None:
            drawn, distances = draw_made_up(maker, chosen, subject, args.seed), dict[str, Any]()
        else:
            drawn = held_out.draw(maker, chosen, args.seed, log)
            distances = held_out.distances(drawn, args.seed, log)
        settings = settings_of(args, subject, backend, chosen[0], held_out)
        shrink = not backend.guided_only
    exact = drawn[chosen[0].name]
    rows = [schedule_row(c, times[c.name], drawn[c.name], exact, distances, shrink) for c in chosen]
    return record("schedules", settings, [*rows, *scale_rows(subject, chosen, stages)])


def choose_subject(args: argparse.Namespace, log: Log) -> Subject:
    if args.model is not None:
        batches = tuple(sorted({1, args.batch}))  # tokens are compared picture by picture
        return subjects.made_up(args.model, args.depth, args.precision, batches, args.cache, log)
    return subjects.existing(args.plan or default_plan(), None)


@contextmanager
def training_errors() -> Iterator[None]:
    """What data, weights and annotators raise, as the benchmark's own errors."""
    from car_train.data.annotator import AnnotatorError
    from car_train.data.folder import DataError
    from car_train.data.pretrained import WeightsError
    from car_train.evaluation.options import EvaluationError

    try:
        yield
    except (AnnotatorError, DataError, EvaluationError, WeightsError) as error:
        raise BenchmarkError(str(error)) from error


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
    args: argparse.Namespace, subject: Subject, backend: Backend, exact: Candidate, held_out: HeldOut | None
) -> Record:
    model, sampling = subject.manifest.model, exact.request.sampling
    about = dict(held_out.network.about) if held_out is not None and held_out.network is not None else None
    return {
        "plan": subject.plan.name,
        "model": {
            key: getattr(model, key) for key in ("depth", "width", "vocab", "image_size", "control_type", "classes")
        },
        "sides": [scale.side for scale in subject.manifest.scales],
        "made_up_weights": args.model is not None,
        "precision": vars(subject.manifest.precision),
        "cfg": sampling.cfg,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "batch": args.batch,
        "threads": args.threads,
        "warmup": args.warmup,
        "runs": args.runs,
        "seed": args.seed,
        "backend": {"name": backend.name, **backend.report()},
        "data": None
        if held_out is None
        else {"name": args.data.name, "split": args.split, "pictures": len(held_out.order)},
        "features": about,
    }


def tables(found: Record) -> Iterator[str]:
    """A heading and a table per question."""
    rows = [row for row in found["results"] if row["question"] == "schedule"]
    yield "What does each schedule cost? A picture of a new control image; `loop`: the scale steps alone"
    columns = {
        "schedule": "schedule",
        "flags": "flags",
        "p50": "p50, s",
        "ratio": "÷ exact",
        "loop_p50": "loop, s",
        "loop_ratio": "loop ÷ exact",
    }
    yield _table(rows, columns)
    yield f"What does it draw? {_drawn_after(found['settings'], rows[0]['pictures'])}"
    columns = {
        "schedule": "schedule",
        "tokens_equal": "tokens as exact",
        "kid_half": "KID of halves",
        "kid_half_std": "±",
        "precision": "precision",
        "recall": "recall",
        "f1": "control F1",
        "f1_change": "F1 less exact",
        "f1_change_error": "± error",
    }
    columns |= {name: name.removeprefix("control_") for name in rows[0] if name.startswith("control_")}
    floor = {"schedule": "real pictures (noise floor)", "kid_half": rows[0]["kid_floor"]}
    floor |= {"kid_half_std": rows[0]["kid_floor_std"]}
    measured = [*rows, floor] if rows[0]["kid_floor"] is not None else rows
    yield _table(
        measured, {key: shown for key, shown in columns.items() if any(r.get(key) is not None for r in rows)}
    )
    yield "What does each scale cost?"
    columns = {
        "scale": "scale",
        "side": "side",
        "guided_p50": "guided, s",
        "unguided_p50": "unguided, s",
        "ratio": "unguided ÷ guided",
    }
    yield _table([row for row in found["results"] if row["question"] == "scale"], columns)


def _drawn_after(settings: Record, pictures: int) -> str:
    data = settings["data"]
    if data is None:
        return f"{pictures} seeds of a drawn control"
    return f"{pictures} controls and classes of {data['name']}, split {data['split']}"


def _table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    return markdown_table([{shown: row.get(key) for key, shown in columns.items()} for row in rows])


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.schedules",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--plan", type=Path, help="plan directory (default: the shipped plan)")
    what.add_argument("--model", choices=list(MODELS), help="published sizes with made-up weights, exported once")
    parser.add_argument("--depth", type=int, help="cut --model to so many blocks; its width stays")
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16"], default="fp32", help="of --model's plan")
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help=f"where plans made here are kept (default: {CACHE})"
    )
    parser.add_argument(
        "--schedule",
        dest="schedules",
        action="append",
        metavar="FLAGS",
        help='car-run\'s flags in quotes, beside exact, instead of the default list; may be repeated; "--cfg 0" too',
    )
    parser.add_argument(
        "--int8", action="store_true", help="draw with the plan's int8 form too, made once into --cache"
    )
    parser.add_argument(
        "--data",
        metavar="DIR",
        help=f"folder of the plan's classes; none: time and tokens alone (default for the shipped plan: {EMOJI})",
    )
    parser.add_argument("--split", default="val", help="of --data (default: val)")
    parser.add_argument("--control-root", type=Path, metavar="DIR", help="ready control images that mirror --data")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="at most N of its pictures (default: all)")
    parser.add_argument(
        "--features",
        metavar="FILE",
        help="EfficientNet-Lite0 as .safetensors (default: fetched once); none leaves KID out",
    )
    parser.add_argument("--backend", default="auto", help="auto, or an engine such as ort-cpu (default: auto)")
    parser.add_argument("--threads", type=int, default=cores(), help="CPU threads of everything (default: all cores)")
    parser.add_argument("--cfg", type=float, help="guidance of all schedules (default: the plan's)")
    parser.add_argument("--top-k", type=int, help="(default: the plan's)")
    parser.add_argument("--top-p", type=float, help="(default: the plan's)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="pictures at once to time (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures drawn (default: 0)")
    parser.add_argument("--runs", type=int, default=10, help="rounds (default: 10)")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before them (default: 3)")
    parser.add_argument("-o", "--output", type=Path, help="append the line of JSON to this file")
    args = parser.parse_args(argv)
    _check(parser, args)
    return args


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Leave with a message where the arguments cannot be used; fill in `data`, and the names of schedules."""
    low = {"runs": 1, "warmup": 0, "batch": 1, "limit": 0, "seed": 0}
    for name, least in low.items():
        if getattr(args, name) < least:
            parser.error(f"{name} is {getattr(args, name)}; give at least {least}")
    if not 1 <= args.threads <= 1024:
        parser.error(f"threads is {args.threads}; give 1…1024")
    if args.depth is not None and (args.model is None or args.depth < 2):
        parser.error(f"depth is {args.depth}; it cuts --model to at least 2 blocks")
    if args.model is not None and args.data not in (None, "none"):
        parser.error(f"--data {args.data} with --model; weights are made up and draw nothing, leave one of them out")
    try:
        check_name(args.backend)
    except BackendError as error:
        parser.error(str(error))
    if args.data is None and args.plan is None and args.model is None:
        args.data = str(EMOJI)
        if not EMOJI.expanduser().is_dir():
            parser.error(f"there is no {EMOJI}; fetch it: python -m car_train data emoji, or give --data none")
    args.data = None if args.data in (None, "none") else Path(args.data)
    args.schedules = {flags: flags for flags in args.schedules or []}


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("benchmarks.schedules", parse_args(argv), measure, tables)


if __name__ == "__main__":
    sys.exit(main())

"""What the benchmarks' commands share: options, each described once here, and the way a command runs and fails.

    def parse_args(argv):
        parser = make_parser("latency", __doc__)
        add_workload_options(parser)
        add_run_options(parser, runs=10, warmup=3)
        args = parser.parse_args(argv)
        check_options(parser, args)
        return args

    def main(argv=None):
        return run_command("benchmarks.latency", parse_args(argv), measure, tables)

What was measured goes to stdout and into `--output`, all else to stderr.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.harness.records import Record, emit
from benchmarks.harness.workload import CACHE, MODELS, Workload, existing, random_weights
from car_export.command import Log
from car_export.command import run_command as exit_code_of
from car_runtime.backends.registry import check_name
from car_runtime.errors import BackendError
from car_runtime.plan import default_plan
from car_runtime.system.cpu import usable_cores

LEAST = {"runs": 1, "warmup": 0, "timed_steps": 1, "batch": 1, "depth": 1, "limit": 0, "seed": 0, "keys": 0}
"""Option → its least value, where a benchmark has it and it is given."""


# ---- Running ----


def run_command(
    name: str,
    args: argparse.Namespace,
    measure: Callable[[argparse.Namespace, Log], Record],
    tables: Callable[[Record], Iterable[str]],
) -> int:
    """Measure, print the tables and the record's line of JSON, append that to `args.output` if it is given.

    name: in messages. The exit code is that of `guarded`.
    """

    def run(log: Log) -> None:
        with ExitStack() as stack:
            # Opened first: nobody wants to learn after the measurement that it can't be written.
            file = stack.enter_context(args.output.open("a", encoding="utf-8")) if args.output else None
            found = measure(args, log)
            for text in tables(found):
                print(f"\n{text}")
            print()
            emit(found)
            if file is not None:
                emit(found, file)

    return guarded(name, run)


def guarded(name: str, run: Callable[[Log], None], stopped: str = "nothing was written") -> int:
    """Run, and return the exit code: 0, 2 for what is raised on purpose or can't be written, 130 if interrupted.

    stopped: what an interruption leaves.
    """

    def command(log: Log) -> int:
        run(log)
        return 0

    return exit_code_of(name, command, stopped)


# ---- Options ----


def make_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m benchmarks.NAME`; the module's docstring is its help."""
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_workload_options(parser: argparse.ArgumentParser) -> None:
    """Which plan is measured; `choose_workload` reads them."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--plan", type=Path, help="plan directory (default: the shipped plan)")
    what.add_argument("--model", choices=list(MODELS), help="published sizes with random weights, exported once")
    parser.add_argument("--depth", type=int, help="cut --model to so many blocks; its width stays")
    parser.add_argument(
        "--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="of --model's plan (default: fp32)"
    )
    add_plan_options(parser)


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Where exported plans are kept, and whether the int8 form is measured too."""
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"where exported plans are kept (default: {CACHE})")
    parser.add_argument(
        "--int8", action="store_true", help="measure the plan's INT8 form too, made once into --cache"
    )


def add_run_options(
    parser: argparse.ArgumentParser, runs: int | str, warmup: int | str, devices: Sequence[str] = ()
) -> None:
    """How often, where, with how many threads; where the result goes. runs, warmup: defaults, or words for them."""
    worded = isinstance(runs, str)
    parser.add_argument("--runs", type=int, default=None if worded else runs, help=f"rounds (default: {runs})")
    parser.add_argument(
        "--warmup", type=int, default=None if worded else warmup, help=f"rounds before them (default: {warmup})"
    )
    parser.add_argument(
        "--threads", type=int, default=usable_cores(), help="CPU threads of everything (default: all cores)"
    )
    if devices:
        parser.add_argument("--device", choices=devices, default="cpu", help="of everything (default: cpu)")
    parser.add_argument("-o", "--output", type=Path, help="append the line of JSON to this file")


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Leave with a message where options that are shared cannot be used."""
    given = vars(args)
    for name, least in LEAST.items():
        value = given.get(name)
        if isinstance(value, int) and value < least:
            parser.error(f"{name.replace('_', '-')} is {value}; give at least {least}")
    if not 1 <= args.threads <= 1024:
        parser.error(f"threads is {args.threads}; give 1…1024")
    if "model" in given and given.get("depth") is not None:
        if args.model is None:
            parser.error("--depth cuts --model; give one, e.g. --model d16")
        if args.depth < 2:
            parser.error(f"depth is {args.depth}; a control branch needs at least 2")
    if given.get("int8") and (given.get("device", "cpu") != "cpu" or given.get("precision", "fp32") != "fp32"):
        parser.error("--int8 is for CPUs and made from float32 plans; leave out --device cuda and --precision")
    try:
        for name in [*(given.get("backends") or ()), *filter(None, [given.get("backend")])]:
            check_name(name)
    except BackendError as error:
        parser.error(str(error))


def choose_workload(args: argparse.Namespace, batches: Sequence[int], log: Log) -> Workload:
    """What `add_workload_options` asked for. batches: for which a plan of --model has static steps."""
    if args.model is not None:
        return random_weights(args.model, args.depth, args.precision, tuple(batches), args.cache, log)
    return existing(args.plan or default_plan(), getattr(args, "checkpoint", None))


def numbers(text: str) -> tuple[int, ...]:
    """ "1,4" as different numbers from 1, for argparse."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1 or len(set(found)) != len(found):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of different numbers from 1; give e.g. 1,4")
    return found


def names_of(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """A reader of comma-separated names, each once, for argparse."""

    def read(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(text.split(",")))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"there is no {unknown[0]!r}; give some of {','.join(known)}")
        return names

    return read


def model_settings(args: argparse.Namespace, workload: Workload) -> dict[str, Any]:
    """What a record says of the model that was measured."""
    model = workload.manifest.model
    return {
        "plan": workload.plan.name,
        "model": {
            key: getattr(model, key) for key in ("depth", "width", "vocab", "image_size", "control_type", "classes")
        },
        "random_weights": args.model is not None,
        "precision": vars(workload.manifest.precision),
    }

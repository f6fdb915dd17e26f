"""What control branches cost in a plan of format 2: nothing where they aren't used, and what mixing requests costs.

    python -m benchmarks.branches both.plan
    python -m benchmarks.branches --model d16 --batch 4 --runs 3   # random weights, exported once

One branch is taken out of a copy, and both plans draw with the branch that is left:

    size   the plan's bytes; base and branches: those of their parameters; over: plan ÷ their sum − 1
    open   open_s, first_image_s and the peak of resident memory, each in a process of its own, in turns: medians, and
           the plan with all branches ÷ the one with one
    next   the first image of each branch on one open plan
    many   seconds of `Plan.generate_many`: seeds of one control, as many controls, and controls of two branches
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.harness.cli import Log, add_run_options, check_options, make_parser, run_command
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.measure import in_subprocess, interleaved
from benchmarks.harness.records import Record, Row, record, rows_of
from benchmarks.harness.tables import markdown_table
from benchmarks.harness.workload import CACHE, MODELS, draw_control, random_branches, read
from car_runtime import GenerationConfig, open_plan
from car_runtime.errors import CarError
from car_runtime.format.manifest import Manifest

CFG = 4.0


def config(manifest: Manifest, branch: str, i: int = 0, seed: int = 0) -> GenerationConfig:
    """A guided request: a control image of a branch, the i-th of many."""
    size = manifest.model.image_size
    control = np.roll(draw_control(size), i * size // 16, axis=1).copy()
    return GenerationConfig(control={branch: control}, label=0, seed=seed, cfg=CFG)


def one_image(plan: str, branch: str, backend: str, threads: int) -> dict[str, float]:
    """Open a plan and draw an image, for `in_subprocess`: seconds of each."""
    began = time.perf_counter()
    with open_plan(plan, backend, threads=threads) as opened:
        ready = time.perf_counter()
        opened.generate(config(opened.manifest, branch))
        return {"open_s": ready - began, "first_image_s": time.perf_counter() - ready}


def size_row(plan: Path, manifest: Manifest) -> Row:
    """Bytes of a plan, and of the parameters that it has to have."""
    parts: dict[bool, int] = {True: 0, False: 0}
    for name, parameter in manifest.parameters.items():
        parts[name.startswith("branches.")] += parameter.bytes
    size = sum(file.stat().st_size for file in plan.rglob("*") if file.is_file())
    needed = sum(parts.values())
    row = {"question": "size", "branches": len(manifest.model.branches), "plan": size}
    return row | {"base": parts[False], "branch_parameters": parts[True], "over": size / needed - 1}


def open_rows(plans: dict[str, Path], branch: str, args: argparse.Namespace, log: Log) -> list[Row]:
    """Medians of a start of each plan, and the last one's ÷ the first one's."""
    found: dict[str, list[Row]] = {name: [] for name in plans}
    for turn in range(args.runs):
        for name in list(plans)[:: -1 if turn % 2 else 1]:
            log(f"open: {name}, {turn + 1} of {args.runs}")
            child = in_subprocess(
                "benchmarks.branches:one_image", str(plans[name]), branch, args.backend, args.threads
            )
            found[name].append(child["result"] | {"peak_rss": child["peak_rss"]})
    rows = [
        {"question": "open", "plan": name} | {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for name, runs in found.items()
    ]
    first, last = rows[0], rows[-1]
    ratios = {key: last[key] / first[key] for key in ("open_s", "first_image_s", "peak_rss") if first[key]}
    return [*rows, {"question": "open", "plan": "ratio", **ratios}]


def open_plan_rows(plan: Path, branch: str, args: argparse.Namespace, log: Log) -> list[Row]:
    """What one open plan does: the first image of each branch, and many requests in one call."""
    with open_plan(plan, args.backend, threads=args.threads) as opened:
        manifest, rows = opened.manifest, list[Row]()
        others = [name for name in manifest.model.branches if name != branch]
        for name in (branch, *others):
            log(f"next: {name}")
            began = time.perf_counter()
            opened.generate(config(manifest, name))
            rows.append({"question": "next", "branch": name, "first_image_s": time.perf_counter() - began})
        numbers = range(args.batch)
        calls = {
            "seeds": [config(manifest, branch, 0, i) for i in numbers],
            "controls": [config(manifest, branch, i, i) for i in numbers],
            "two branches": [config(manifest, (branch, others[0])[i % 2], 0, i) for i in numbers],
        }
        log(f"many: batch {args.batch}")
        times = interleaved(
            {name: lambda given=given: opened.generate_many(given) for name, given in calls.items()},  # type: ignore[misc]
            args.warmup,
            args.runs,
        )
        return rows + [{"question": "many", "requests": name, **timing} for name, timing in times.items()]


def measure(args: argparse.Namespace, log: Log) -> Record:
    from car_export.branches import remove_branch

    plan = args.plan or random_branches(args.model, args.cache, log)
    manifest = read(plan)
    if len(manifest.model.branches) < 2:
        raise BenchmarkError(f"{plan} has {len(manifest.model.branches)} branches; give one with at least two")
    branch = str(manifest.model.default_branch)
    with tempfile.TemporaryDirectory() as folder:
        one = plan
        for name in (name for name in manifest.model.branches if name != branch):
            one = remove_branch(one, name, output=Path(folder) / f"without-{name}.plan")
        try:
            rows = [size_row(one, read(one)), size_row(plan, manifest)]
            rows += open_rows({"one branch": one, "all branches": plan}, branch, args, log)
            rows += open_plan_rows(plan, branch, args, log)
        except CarError as error:
            raise BenchmarkError(str(error)) from error
    settings = {"plan": manifest.name, "backend": args.backend, "threads": args.threads, "batch": args.batch}
    return record("branches", settings | {"branch": branch, "runs": args.runs}, rows)


def tables(found: Record) -> list[str]:
    def shown(question: str) -> str:
        return markdown_table([{k: v for k, v in row.items() if k != "question"} for row in rows_of(found, question)])

    return [shown(question) for question in ("size", "open", "next", "many")]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("branches", __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("plan", type=Path, nargs="?", help="plan of format 2 with at least two branches")
    what.add_argument("--model", choices=list(MODELS), help="published sizes with two branches of random weights")
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"where that plan is kept (default: {CACHE})")
    parser.add_argument("--batch", type=int, default=4, help="requests of a call (default: 4)")
    parser.add_argument("--backend", default="ort-cpu", help="of everything (default: ort-cpu)")
    add_run_options(parser, runs=5, warmup=1)
    args = parser.parse_args(argv)
    check_options(parser, args)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("benchmarks.branches", parse_args(argv), measure, tables)


if __name__ == "__main__":
    sys.exit(main())

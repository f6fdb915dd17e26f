"""Many pictures on one opened plan: does memory stay where it is, and does a seed keep giving its picture?

    python -m benchmarks.soak                                  # 500 pictures of the shipped plan: minutes
    python -m benchmarks.soak --backend openvino -o results.jsonl
    python -m benchmarks.soak --plan d16.plan --images 60 --threads 2

Three parts, one after the other:

    one thread   --images pictures by calls of 1 to 4 at once, each with its own seed, class, control image and
                 guidance (a third without); more control images than the plan remembers, so that some are forgotten.
                 Between them the same request again and again, which must give the same tokens and pixels.
    threads      the same calls by --threads threads at once on the same plan, round after round: each must give what
                 it gave alone.
    reopening    the plan is opened, makes a picture and is closed again, --opens times, in a process of its own.

Memory is sampled after every call, round or closing, when garbage is collected and what is free given back to the
system, so that it is what is held: resident pages of the process's own (RssAnon). Pages of files, such as libraries
and mapped weights, are the page cache's, and the kernel takes them back when it wants to. The first third of a part
is warm-up: allocators and engines grow to what they need. Of the rest, the median of the second half may exceed the
first's by --tolerance. Of closings the slope counts, the median of the slopes between any two: an opening may leave
--tolerance of what an open plan holds. Their process has one heap (glibc's M_ARENA_MAX). Otherwise threads allocate
in several, where small blocks keep large ones' pages: what a closed plan leaves then goes up and down by a quarter of
what an open one holds, and drifts for hundreds of openings, without a leak. No file descriptor and no thread of the
operating system may be left that wasn't there after the first closing. Linux only: all this is told in /proc.

Tables go to stdout, then one line of JSON (`benchmarks.harness.machine`) whose results are flat rows, each with
"question":

    memory      part, samples (after the warm-up), rss_first, rss_last (medians of the halves), growth (their ratio
                − 1), tolerance, bytes_per_picture, passed
    pictures    part, calls, pictures, different (calls that gave another picture than before), passed
    reopening   openings, rss_held (open less closed, median), rss_first, rss_last (closed, medians of the halves),
                bytes_per_opening (the slope), left (÷ rss_held), tolerance, descriptors_first, descriptors_last,
                threads_first, threads_last, passed
    sample      part, pictures (made so far in that part), rss

Bytes of memory. The exit code is 1 if anything did not pass; stderr says what.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness.cli import Log, run_command
from benchmarks.harness.machine import BenchmarkError, in_subprocess, markdown_table, record
from benchmarks.harness.workload import draw_control
from car_runtime.backends.registry import check_name
from car_runtime.conditioning import CACHED
from car_runtime.errors import BackendError
from car_runtime.plan import Plan, default_plan, open_plan

PROC = Path("/proc/self")
ALONE, TOGETHER, REOPENING = "one thread", "threads", "reopening"
CONTROLS = CACHED + 4
PROBE_EVERY = 20
"""Pictures between two of the request that is repeated."""
ROUNDS = 24
"""Of several threads, that are sampled."""
MEETINGS = 12
"""Rounds before them in which all threads ask for equally many pictures at once. An engine's buffers grow until as
many calls as there are threads have met in every graph: of the shipped plan with 4 threads on ONNX Runtime from 122
to 147 MB, over 260 calls of the other rounds or 10 of these, and then no more."""
SEED = 0
M_ARENA_MAX = -8
"""Of mallopt(3)."""

Control = NDArray[np.uint8] | None
Row = dict[str, Any]


# ---- What is asked for ----


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of `Plan.generate`."""

    control: int
    label: int | None
    seed: int
    n: int
    cfg: float | None
    """None: the plan's own."""


PROBE = Call(control=0, label=0, seed=1234, n=2, cfg=None)


def calls(classes: int) -> Iterator[Call]:
    """Ever different calls; the same ones each time."""
    generator = np.random.default_rng(SEED)
    while True:
        yield Call(
            control=int(generator.integers(CONTROLS)),
            label=None if generator.random() < 0.1 else int(generator.integers(classes)),
            seed=int(generator.integers(1 << 31)),
            n=int(generator.integers(1, 5)),
            cfg=0.0 if generator.random() < 1 / 3 else None,
        )


def controls_of(plan: Plan) -> list[Control]:
    """Control images, each another; of a plan without control, none."""
    model = plan.manifest.model
    if model.control_type is None:
        return [None] * CONTROLS
    image = draw_control(model.image_size)
    return [np.roll(image, i * max(1, model.image_size // CONTROLS), axis=1) for i in range(CONTROLS)]


def make(plan: Plan, controls: Sequence[Control], call: Call) -> str:
    """A digest of the pictures and tokens of a call."""
    result = plan.generate(controls[call.control], call.label, call.seed, call.n, cfg=call.cfg)
    return hashlib.sha256(result.images.tobytes() + result.tokens.tobytes()).hexdigest()


# ---- What is looked at ----


def resident() -> int:
    """Bytes of memory of its own that this process has now, without garbage and, with glibc, without what is free."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    status = (PROC / "status").read_text(encoding="ascii", errors="replace")
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def handles() -> tuple[int, int]:
    """Open file descriptors and threads of this process."""
    # The listing has a descriptor of its own while it is read; it is counted every time.
    return len(os.listdir(PROC / "fd")), len(os.listdir(PROC / "task"))


def one_heap() -> None:
    """With glibc, have all threads of this process allocate in the same heap from now on."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 1)


@dataclass
class Part:
    """What was seen in a part."""

    name: str
    pictures: int = 0
    calls: int = 0
    different: int = 0
    samples: list[tuple[int, int]] = field(default_factory=list)
    """Pictures so far in this part, and resident bytes then."""

    def compare(self, call: Call, found: str, expected: str) -> None:
        self.calls += 1
        self.pictures += call.n
        self.different += found != expected

    def sample(self) -> None:
        self.samples.append((self.pictures, resident()))

    def memory_row(self, tolerance: float) -> Row:
        """Whether memory grew from the first half after the warm-up to the second."""
        first, last = halves(self.samples)
        growth = last[1] / first[1] - 1
        return {
            "question": "memory",
            "part": self.name,
            "samples": len(self.samples) - len(self.samples) // 3,
            "rss_first": int(first[1]),
            "rss_last": int(last[1]),
            "growth": growth,
            "tolerance": tolerance,
            "bytes_per_picture": (last[1] - first[1]) / (last[0] - first[0]),
            "passed": growth <= tolerance,
        }

    def pictures_row(self) -> Row:
        return {
            "question": "pictures",
            "part": self.name,
            "calls": self.calls,
            "pictures": self.pictures,
            "different": self.different,
            "passed": not self.different,
        }

    def sample_rows(self) -> list[Row]:
        return [
            {"question": "sample", "part": self.name, "pictures": pictures, "rss": rss}
            for pictures, rss in self.samples
        ]


def halves(samples: Sequence[tuple[int, int]]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Medians (pictures, bytes) of the first and of the second half of what follows the first third."""
    settled = np.array(samples[len(samples) // 3 :], np.float64)
    if len(settled) < 2:
        raise BenchmarkError(f"{len(samples)} samples are too few to see growth; give --images 20 or more")
    middle = len(settled) // 2
    first, last = np.median(settled[:middle], axis=0), np.median(settled[middle:], axis=0)
    return (float(first[0]), float(first[1])), (float(last[0]), float(last[1]))


def slope(closed: Sequence[int]) -> float:
    """Bytes that an opening leaves: the median slope between any two closings after the first third."""
    settled = np.array(closed[len(closed) // 3 :], np.float64)
    i, j = np.triu_indices(len(settled), 1)
    return float(np.median((settled[j] - settled[i]) / (j - i)))


# ---- The parts ----


def alone(plan: Plan, controls: Sequence[Control], images: int) -> tuple[Part, list[tuple[Call, str]]]:
    """Pictures by one thread; also every call with its digest."""
    part, made, probed = Part(ALONE), list[tuple[Call, str]](), 0
    expected = make(plan, controls, PROBE)
    for call in calls(plan.manifest.model.classes):
        if part.pictures >= images:
            return part, made
        made.append((call, make(plan, controls, call)))
        part.pictures += call.n
        if part.pictures >= probed + PROBE_EVERY or part.pictures >= images:
            probed = part.pictures
            part.compare(PROBE, make(plan, controls, PROBE), expected)
        part.sample()
    raise AssertionError("calls() has no end")


def together(plan: Plan, controls: Sequence[Control], known: Sequence[tuple[Call, str]], threads: int) -> Part:
    """The known calls by several threads at once, each thread beginning at another one."""
    part = Part(TOGETHER)
    each = max(1, len(known) // 60)

    def run(number: int) -> list[tuple[Call, str, str]]:
        chosen = [known[(number * each + i) % len(known)] for i in range(each)]
        return [(call, make(plan, controls, call), expected) for call, expected in chosen]

    with ThreadPoolExecutor(threads) as pool:
        for turn in range(min(MEETINGS, 1 + len(known) // 20)):
            meet(part, partial(make, plan, controls), pool, threads, turn)
        for turn in range(ROUNDS):
            for results in pool.map(run, range(turn, turn + threads)):
                for call, found, expected in results:
                    part.compare(call, found, expected)
            make(plan, controls, PROBE)  # the plan keeps the buffers of its last call: always of this one
            part.sample()
    return part


def meet(part: Part, one: Callable[[Call], str], pool: ThreadPoolExecutor, threads: int, turn: int) -> None:
    """All threads ask for the same picture, two, three and four at once; every other turn without guidance."""
    for n in range(1, 5):
        equal = Call(control=turn % CONTROLS, label=0, seed=turn, n=n, cfg=0.0 if turn % 2 else None)
        found = list(pool.map(one, [equal] * threads))
        expected = one(equal)  # afterwards: what it computes for the control would be there already
        for digest in found:
            part.compare(equal, digest, expected)


def reopening(path: Path, args: argparse.Namespace, backend: str) -> tuple[Part, Row]:
    """Openings with a picture each; what an open plan holds, and what is left of it after closing."""
    where = (str(path.resolve()), backend, args.cpu_threads)
    seen = in_subprocess("benchmarks.soak:openings", *where, args.opens)["result"]
    part = Part(REOPENING)
    for digest, rss in zip(seen["digests"], seen["closed"], strict=True):
        part.compare(PROBE, digest, seen["digests"][0])
        part.samples.append((part.pictures, rss))
    return part, reopening_row(part, seen["opened"], seen["left"], args.tolerance)


def openings(path: str, backend: str, cpu_threads: int | None, opens: int) -> dict[str, list[Any]]:
    """Of each opening its digest, bytes when open and when closed, handles left; for `in_subprocess`."""
    one_heap()
    gc.collect()
    gc.freeze()
    seen: dict[str, list[Any]] = {"digests": [], "opened": [], "closed": [], "left": []}
    for _ in range(opens):
        with open_plan(path, backend, threads=cpu_threads, verify=False) as plan:
            seen["digests"].append(make(plan, controls_of(plan), PROBE))
            seen["opened"].append(resident())
        del plan
        seen["closed"].append(resident())
        seen["left"].append(handles())
    gc.unfreeze()
    return seen


def reopening_row(part: Part, opened: Sequence[int], left: Sequence[tuple[int, int]], tolerance: float) -> Row:
    """Whether closing gives back what opening took. opened: bytes with the plan open; left: handles after closing."""
    first, last = halves(part.samples)
    each = slope([rss for _, rss in part.samples])
    held = float(np.median([rss - closed for rss, (_, closed) in zip(opened, part.samples, strict=True)]))
    (descriptors, threads), (descriptors_last, threads_last) = left[0], left[-1]
    return {
        "question": "reopening",
        "openings": len(opened),
        "rss_held": int(held),
        "rss_first": int(first[1]),
        "rss_last": int(last[1]),
        "bytes_per_opening": each,
        "left": each / held,
        "tolerance": tolerance,
        "descriptors_first": descriptors,
        "descriptors_last": descriptors_last,
        "threads_first": threads,
        "threads_last": threads_last,
        "passed": each <= tolerance * held and descriptors_last <= descriptors and threads_last <= threads,
    }


def soak(args: argparse.Namespace, log: Log) -> Row:
    """All parts as one record. Raises BenchmarkError and the runtime's errors."""
    if not (PROC / "status").is_file():
        raise BenchmarkError(
            f"{PROC / 'status'} isn't there; run this on Linux, which tells a process's memory in it"
        )
    path, began = args.plan or default_plan(), time.monotonic()
    gc.collect()
    gc.freeze()  # what was there before isn't looked through again at every sample
    with open_plan(path, args.backend, threads=args.cpu_threads) as plan:
        backend, controls = plan.backend_name, controls_of(plan)
        log(f"{args.images} pictures on {backend}, one thread")
        first, known = alone(plan, controls, args.images)
        log(f"the same calls by {args.threads} threads at once")
        second = together(plan, controls, known, args.threads)
    del plan
    log(f"opening {args.opens} times")
    third, row = reopening(path, args, backend)
    gc.unfreeze()
    parts = (first, second, third)
    rows = [part.memory_row(args.tolerance) for part in (first, second)]
    rows += [part.pictures_row() for part in parts]
    rows += [row, *(sample for part in parts for sample in part.sample_rows())]
    settings = {"plan": path.name, "backend": backend, "seconds": time.monotonic() - began}
    settings |= {name: getattr(args, name) for name in ("images", "threads", "cpu_threads", "opens", "tolerance")}
    return record("soak", settings, rows)


# ---- The command ----


def failures(found: Mapping[str, Any]) -> list[str]:
    """What did not pass, a line each."""
    lines = []
    for row in found["results"]:
        if row.get("passed", True):
            continue
        if row["question"] == "memory":
            grew = f"{row['rss_first'] / 1e6:.1f} → {row['rss_last'] / 1e6:.1f} MB, {row['growth']:.2%}"
            lines.append(
                f"memory grew in part {row['part']!r}: {grew}, {row['bytes_per_picture']:,.0f} bytes a picture"
            )
        elif row["question"] == "pictures":
            lines.append(f"{row['different']} of {row['calls']} calls gave another picture in part {row['part']!r}")
        else:
            grown = [f"{k} {row[f'{k}_first']} → {row[f'{k}_last']}" for k in ("descriptors", "threads")]
            memory = f"{row['bytes_per_opening']:,.0f} bytes an opening, {row['left']:.2%} of what it holds"
            lines.append(f"left after closing: {', '.join(grown)}, {memory}")
    return lines


def tables(found: Mapping[str, Any]) -> Iterator[str]:
    """A heading and a table per question."""
    rows = {q: [r for r in found["results"] if r["question"] == q] for q in ("memory", "pictures", "reopening")}
    yield "Does memory stay where it is? After the first third, medians of the two halves"
    yield markdown_table(
        [
            {
                "part": r["part"],
                "samples": r["samples"],
                "first half, MB": r["rss_first"] / 1e6,
                "second half, MB": r["rss_last"] / 1e6,
                "growth": f"{r['growth']:+.2%}",
                "allowed": f"{r['tolerance']:.2%}",
                "bytes a picture": r["bytes_per_picture"],
                "passed": "yes" if r["passed"] else "no",
            }
            for r in rows["memory"]
        ]
    )
    yield "Does a request give the same picture every time?"
    columns = ("part", "calls", "pictures", "different")
    yield markdown_table(
        [{k: r[k] for k in columns} | {"passed": "yes" if r["passed"] else "no"} for r in rows["pictures"]]
    )
    yield "Is anything left when a plan is closed?"
    (left,) = rows["reopening"]
    yield markdown_table(
        [
            {
                "openings": left["openings"],
                "an open plan holds, MB": left["rss_held"] / 1e6,
                "left an opening, MB": left["bytes_per_opening"] / 1e6,
                "share": f"{left['left']:+.2%}",
                "allowed": f"{left['tolerance']:.2%}",
                "descriptors": f"{left['descriptors_first']} → {left['descriptors_last']}",
                "threads": f"{left['threads_first']} → {left['threads_last']}",
                "passed": "yes" if left["passed"] else "no",
            }
        ]
    )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--plan", type=Path, help="plan directory (default: the shipped plan)")
    parser.add_argument("--backend", default="auto", help="as car-run's (default: auto)")
    parser.add_argument("--images", type=int, default=500, help="pictures by one thread (default: 500)")
    parser.add_argument("--threads", type=int, default=4, help="threads that call at once (default: 4)")
    parser.add_argument("--cpu-threads", type=int, help="the engine's own threads (default: all cores)")
    parser.add_argument("--opens", type=int, default=100, help="openings of the plan (default: 100)")
    parser.add_argument("--tolerance", type=float, default=0.01, help="growth that passes (default: 0.01, 1 %%)")
    parser.add_argument("-o", "--output", type=Path, help="append the line of JSON to this file")
    args = parser.parse_args(argv)
    if args.images < 20 or args.opens < 3:
        parser.error(f"images {args.images}, opens {args.opens}: growth can't be seen; give at least 20 and 3")
    if not 1 <= args.threads <= 256:
        parser.error(f"threads is {args.threads}; give 1…256")
    if not 0 <= args.tolerance < 1:
        parser.error(f"tolerance is {args.tolerance}; give a share such as 0.01")
    try:
        check_name(args.backend)
    except BackendError as error:
        parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("benchmarks.soak", parse_args(argv), soak, tables, failures)


if __name__ == "__main__":
    sys.exit(main())

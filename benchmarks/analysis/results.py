"""What `benchmarks.report` reads: results as the benchmarks append them, and which of several counts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.records import FORMAT, Row
from benchmarks.harness.tables import plural

BENCHMARKS = ("latency", "controlnet", "schedules", "training")
"""Those that a report knows, in its order."""
RETIRED = ("growth", "soak")
"""Those of earlier versions, whose results are passed over."""
RENAMED = {"made_up_weights": "random_weights", "pictures": "images"}
"""Keys of settings and rows as earlier versions wrote them."""
EXPORT = re.compile(r"-b[\d.]+-[0-9a-f]{12}$")
"""What the name of a plan with random weights says of its export: batch sizes and a hash of the code."""


# ---- Results ----


@dataclass(frozen=True, kw_only=True)
class Result:
    """A line of a file."""

    where: str
    """File and line, for messages."""
    benchmark: str
    time: datetime
    machine: Row
    settings: Row
    rows: tuple[Row, ...]
    note: str | None = None
    """What a reader has to know besides the figures; written into the line by hand."""
    parts: tuple[Result, ...] = ()
    """Older ones, of which it has what it did not measure itself (`joined`)."""

    def of(self, question: str) -> list[Row]:
        return [row for row in self.rows if row.get("question") == question]

    @property
    def device(self) -> str:
        return str(self.settings.get("device") or "cpu")

    @property
    def place(self) -> str:
        """The machine in a few words."""
        if self.device != "cpu":
            return str(self.machine.get("gpu") or self.device)
        return f"{self.machine.get('cpu') or 'unknown processor'}, {plural(self.machine.get('cores'), 'core')}"

    @property
    def short_place(self) -> str:
        """`place` for a heading: without what only distinguishes one processor from another."""
        return re.sub(r"\s*(\((R|TM|family[^)]*)\)|\b(Processor|CPU)\b)", "", self.place)

    @property
    def subject(self) -> str:
        """What was measured: a plan without the marks of its export, a model, a preset."""
        s = self.settings
        if self.benchmark == "training":
            return f"{s['preset']}, {s['precision']}, batch {s['batch']}, {'+'.join(s['stages'])}"
        if self.benchmark == "controlnet":
            return f"{', '.join(map(plan_name, s['ours']['plans']))} vs. {s['theirs']}"
        if self.benchmark == "latency":
            batches = "batch" if len(s["batch"]) == 1 else "batches"
            return f"{plan_name(s['plan'])}, {batches} {' and '.join(map(str, s['batch']))}"
        backend = s.get("backend")
        name = backend["name"] if isinstance(backend, dict) else backend
        return plan_name(s["plan"]) + (f" on {name}" if name else "")

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.benchmark, self.place, self.device, self.subject


def plan_name(name: str) -> str:
    """A plan's name without its ending and, if its weights are random, without the marks of its export."""
    return EXPORT.sub("", name.removesuffix(".plan"))


TIERS, METHODS = ("engine", "compiled", "eager"), ("ControlNet", "T2I-Adapter", "LCM + ControlNet")
"""Tiers and methods of `benchmarks.controlnet`, in the order in which they stand where several runs are joined."""


def group_of(row: Row) -> tuple[str, int, str, str]:
    """Method, size, tier and precision of theirs that a row of `benchmarks.controlnet` was measured for."""
    if row["question"] == "ratio":
        return row["method"], row["size"], row["tier"], row["precision"]
    method, size, tier, precision = row["group"].rsplit(maxsplit=3)
    return method, int(size.removesuffix("²")), tier, precision


def theirs(row: Row) -> str:
    """The tier that theirs is really of."""
    return str(row["against"] if row["question"] == "ratio" else row["tier"])


def comparison(row: Row) -> tuple[Any, ...] | None:
    """What theirs of a row is, and with what it was measured. None where a row is of no comparison alone."""
    if row["question"] == "ratio" or row.get("whose") == "theirs":
        return (*group_of(row), theirs(row))
    return None


def joined(results: Sequence[Result]) -> Result:
    """Results of one subject, oldest first, as one: comparisons that took several runs.

    Of what was measured more than once the newest counts. Rows that are no comparison are the newest run's.
    """
    *older, newest = results
    rows, there, parts = list(newest.rows), {comparison(row) for row in newest.rows} | {None}, list[Result]()
    for run in reversed(older):
        new = [row for row in run.rows if comparison(row) not in there]
        there |= {comparison(row) for row in new}
        rows += new
        parts += [run] if new else []

    def position(row: Row) -> tuple[Any, ...]:
        if comparison(row) is None:
            return (-1,)
        method, size, tier, precision = group_of(row)
        return TIERS.index(tier), METHODS.index(method), size, precision, -TIERS.index(theirs(row)), row["steps"]

    return replace(newest, rows=tuple(sorted(rows, key=position)), parts=tuple(reversed(parts)))


def read(files: Sequence[Path]) -> list[Result]:
    """The results of each subject, in the document's order: the newest, of comparisons what `joined` makes of all.
    BenchmarkError names the file and line."""
    found: dict[tuple[str, str, str, str], list[Result]] = {}
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BenchmarkError(f"{file}: can't be read ({error}); give a file that a benchmark wrote") from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            result = parse(line, f"{file}:{number}")
            if result is None:
                continue
            found.setdefault(checked(result, lambda r: r.key), []).append(result)
    if not found:
        raise BenchmarkError(
            f"no results in {', '.join(map(str, files))}; write some, e.g. with benchmarks.latency -o"
        )
    newest = [newest_of(sorted(results, key=lambda r: r.time)) for results in found.values()]
    return sorted(newest, key=lambda r: (BENCHMARKS.index(r.benchmark), r.device, r.place, r.subject))


def newest_of(results: Sequence[Result]) -> Result:
    """The newest of the results of one subject, given oldest first; of ControlNet's, all of them joined."""
    if results[-1].benchmark != "controlnet" or len(results) == 1:
        return results[-1]
    return checked(results[-1], lambda _: joined(results))


def parse(line: str, where: str) -> Result | None:
    """A line as a result; None of a retired benchmark. BenchmarkError for what a report can't read."""
    try:
        found = json.loads(line)
        version, benchmark = found["format"], found["benchmark"]
    except (ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(f"{where}: no result of a benchmark ({error!r}); take the line out") from error
    if version != FORMAT:
        raise BenchmarkError(
            f"{where}: format {version!r}, and this version reads {FORMAT}; measure again with this version"
        )
    if benchmark in RETIRED:
        return None
    if benchmark not in BENCHMARKS:
        raise BenchmarkError(
            f"{where}: benchmark {benchmark!r}, and this report knows {', '.join(BENCHMARKS)}; take the line out"
        )
    try:
        return Result(
            where=where,
            benchmark=benchmark,
            time=datetime.fromisoformat(found["time"]),
            machine=found["machine"],
            settings=_renamed(found["settings"]),
            rows=tuple(map(_renamed, found["results"])),
            note=found.get("note"),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise BenchmarkError(f"{where}: {benchmark} without {error}; measure again with this version") from error


def _renamed(found: Row) -> Row:
    return {RENAMED.get(key, key): value for key, value in found.items()}


def checked(result: Result, use: Callable[[Result], Any]) -> Any:
    """What `use` makes of a result; BenchmarkError if it lacks something."""
    try:
        return use(result)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise BenchmarkError(
            f"{result.where}: a result of {result.benchmark} that can't be shown ({error!r}); "
            "measure again with this version"
        ) from error

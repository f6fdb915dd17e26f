"""What `benchmarks.report` reads: results as the benchmarks append them, and numbers in words."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import FORMAT, BenchmarkError

BENCHMARKS = ("latency", "controlnet", "growth", "schedules", "soak", "training")
"""Those that a report knows, in its order."""
EXPORT = re.compile(r"-b[\d.]+-[0-9a-f]{12}$")
"""What the name of a made-up plan says of its export: batch sizes and a hash of the code."""

Row = dict[str, Any]


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
    """What a reader has to know beside the figures; written into the line by hand."""
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
        """The same without what only tells one processor from another: enough for a heading."""
        return re.sub(r"\s*(\((R|TM|family[^)]*)\)|\b(Processor|CPU)\b)", "", self.place)

    @property
    def subject(self) -> str:
        """What was measured: a plan without the marks of its export, a model, a preset."""
        s = self.settings
        if self.benchmark == "training":
            return f"{s['preset']}, {s['precision']}, batch {s['batch']}, {'+'.join(s['stages'])}"
        if self.benchmark == "growth":
            return ", ".join(s["models"]) if s["measure"] else "on paper"
        if self.benchmark == "controlnet":
            return f"{', '.join(map(plan_name, s['ours']['plans']))} beside {s['theirs']}"
        if self.benchmark == "latency":
            return f"{plan_name(s['plan'])}, {'batch' if len(s['batch']) == 1 else 'batches'} {listed(s['batch'])}"
        backend = s.get("backend")
        name = backend["name"] if isinstance(backend, dict) else backend
        return plan_name(s["plan"]) + (f" on {name}" if name else "")

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.benchmark, self.place, self.device, self.subject


def plan_name(name: str) -> str:
    """A plan's name without its ending and, if its weights were made up, without the marks of its export."""
    return EXPORT.sub("", name.removesuffix(".plan"))


TIERS, METHODS = ("engine", "compiled", "eager"), ("ControlNet", "T2I-Adapter", "LCM + ControlNet")
"""Of `benchmarks.controlnet`, in the order in which they stand where several runs are joined."""


def group_of(row: Row) -> tuple[str, int, str, str]:
    """Method, size, tier and precision of theirs that a row of `benchmarks.controlnet` was measured for."""
    if row["question"] == "ratio":
        return row["method"], row["size"], row["tier"], row["precision"]
    method, size, tier, precision = row["group"].rsplit(maxsplit=3)
    return method, int(size.removesuffix("²")), tier, precision


def comparison(row: Row) -> tuple[Any, ...] | None:
    """What theirs of a row is, and beside what it was measured. None where a row is of no comparison alone."""
    if row["question"] == "ratio":
        return (*group_of(row), row["against"])
    if row["question"] == "end_to_end" and row["whose"] == "theirs":
        return (*group_of(row), row["tier"])
    return None


def joined(results: Sequence[Result]) -> Result:
    """Results of one subject, oldest first, as one: a comparison that took several runs. Of what was measured more
    than once the newest counts; ours stands before theirs of the same run."""
    *older, newest = results
    rows = [(len(older), row) for row in newest.rows]
    there = {None, *(comparison(row) for row in newest.rows)}
    for run in reversed(range(len(older))):
        new = [row for row in older[run].rows if comparison(row) not in there]
        groups = {group_of(row) for row in new}
        there |= {comparison(row) for row in new}
        rows += [(run, row) for row in new]
        rows += [(run, r) for r in older[run].rows if r.get("whose") == "ours" and group_of(r) in groups]

    def position(run_and_row: tuple[int, Row]) -> tuple[Any, ...]:
        run, row = run_and_row
        if row["question"] == "parameters":
            return (-1,)
        method, size, tier, precision = group_of(row)
        return TIERS.index(tier), METHODS.index(method), size, precision, run, row.get("whose", ""), row["steps"]

    rows.sort(key=position)
    runs = {run for run, _ in rows}
    parts = tuple(result for run, result in enumerate(older) if run in runs)
    return replace(newest, rows=tuple(row for _, row in rows), parts=parts)


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
            found.setdefault(checked(result, lambda r: r.key), []).append(result)
    if not found:
        raise BenchmarkError(
            f"no results in {', '.join(map(str, files))}; write some, e.g. with benchmarks.latency -o"
        )
    newest = [newest_of(sorted(results, key=lambda r: r.time)) for results in found.values()]
    return sorted(newest, key=lambda r: (BENCHMARKS.index(r.benchmark), r.device, r.place, r.subject))


def newest_of(results: Sequence[Result]) -> Result:
    """Of one subject, oldest first."""
    if results[-1].benchmark != "controlnet" or len(results) == 1:
        return results[-1]
    return checked(results[-1], lambda _: joined(results))


def parse(line: str, where: str) -> Result:
    """A line as a result. BenchmarkError for what is none of a benchmark that this report knows."""
    try:
        found = json.loads(line)
        version, benchmark = found["format"], found["benchmark"]
    except (ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(f"{where}: no result of a benchmark ({error!r}); take the line out") from error
    if version != FORMAT:
        raise BenchmarkError(
            f"{where}: format {version!r}, and this version reads {FORMAT}; measure again with this version"
        )
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
            settings=found["settings"],
            rows=tuple(found["results"]),
            note=found.get("note"),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise BenchmarkError(f"{where}: {benchmark} without {error}; measure again with this version") from error


def checked(result: Result, use: Callable[[Result], Any]) -> Any:
    """What `use` makes of a result; BenchmarkError if it lacks something."""
    try:
        return use(result)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise BenchmarkError(
            f"{result.where}: a result of {result.benchmark} that can't be told ({error!r}); "
            "measure again with this version"
        ) from error


# ---- Numbers in words ----


def seconds(value: float) -> str:
    """Three digits, in the unit that suits."""
    if value >= 100:
        return f"{value:,.0f} s"
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms" if value >= 1e-3 else f"{1e6 * value:.3g} µs"


def times(value: float) -> str:
    return f"× {value:.3g}" if value < 100 else f"× {value:,.0f}"


def percent(value: float | None, digits: int = 0) -> str | None:
    return None if value is None else f"{100 * value:.{digits}f} %"


def signed(value: float) -> str:
    """A change, in percent."""
    return f"{'−' if value < 0 else '+'}{100 * abs(value):.2f} %"


def listed(parts: Sequence[Any]) -> str:
    return " and ".join(filter(None, [", ".join(map(str, parts[:-1])), str(parts[-1])]))


def plural(number: Any, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")

"""What `benchmarks.report` reads: results as the benchmarks append them, and numbers in words."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.machine import FORMAT, BenchmarkError

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
        backend = s.get("backend")
        name = backend["name"] if isinstance(backend, dict) else backend
        return plan_name(s["plan"]) + (f" on {name}" if name else "")

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.benchmark, self.place, self.device, self.subject


def plan_name(name: str) -> str:
    """A plan's name without its ending and, if its weights were made up, without the marks of its export."""
    return EXPORT.sub("", name.removesuffix(".plan"))


def read(files: Sequence[Path]) -> list[Result]:
    """The newest result of each subject, in the document's order. BenchmarkError names the file and line."""
    newest: dict[tuple[str, str, str, str], Result] = {}
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BenchmarkError(f"{file}: can't be read ({error}); give a file that a benchmark wrote") from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            result = parse(line, f"{file}:{number}")
            key = checked(result, lambda r: r.key)
            if key not in newest or result.time >= newest[key].time:
                newest[key] = result
    if not newest:
        raise BenchmarkError(
            f"no results in {', '.join(map(str, files))}; write some, e.g. with benchmarks.latency -o"
        )
    return sorted(newest.values(), key=lambda r: (BENCHMARKS.index(r.benchmark), r.device, r.place, r.subject))


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


def plural(number: Any, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")

"""How results are written: one line of JSON each, so that they can be appended to one file and read line by line.

    {"format": 1, "benchmark": NAME, "time": "2025-01-31T12:00:00+00:00",
     "machine": {…},      `benchmarks.harness.machine.machine`
     "settings": {…},     what was chosen: batch, data type, model
     "results": [{…}, …]} one flat object per row; names end with their unit where it is not seconds

Times are seconds, memory is bytes, rates are GFLOP/s or GB/s (10⁹). Where a benchmark answers several questions, each
row names its own in "question".
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, TextIO

from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.machine import machine

FORMAT = 1
KEYS = ("format", "benchmark", "time", "machine", "settings", "results")

Record = dict[str, Any]
Row = dict[str, Any]


def record(benchmark: str, settings: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> Record:
    """A result of now, here, in the form that the module's docstring describes."""
    return {
        "format": FORMAT,
        "benchmark": benchmark,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "settings": dict(settings),
        "results": [dict(result) for result in results],
    }


def emit(found: Mapping[str, Any], file: TextIO | None = None) -> None:
    """Write a `record` as one line of JSON, to stdout if nothing else is given.

    Raises BenchmarkError if it lacks a key or holds what JSON hasn't; NaN and infinity are such.
    """
    missing = [key for key in KEYS if key not in found]
    if missing:
        raise BenchmarkError(f"a result without {', '.join(missing)}; make it with record()")
    try:
        line = json.dumps(found, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise BenchmarkError(f"{found['benchmark']}: is no JSON ({error}); give numbers, texts and None") from error
    print(line, file=file or sys.stdout, flush=True)


def rows_of(found: Mapping[str, Any], question: str) -> list[Row]:
    """The rows of a record that answer one question."""
    return [row for row in found["results"] if row.get("question") == question]

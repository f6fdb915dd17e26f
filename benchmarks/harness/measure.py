"""How time and memory are taken.

    times = interleaved({"ours": ours, "theirs": theirs}, warmup=3, runs=20)

Candidates that are compared take turns in one process. What can only be seen in a process of its own (memory, a
start) is measured there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.machine import ROOT

Timing = dict[str, Any]


def timed(function: Callable[[], object], warmup: int = 3, runs: int = 10) -> Timing:
    """Seconds of a call: {"p50", "p95", "min", "runs"}. What runs on a GPU has to wait for it within `function`."""
    return interleaved({"": function}, warmup, runs)[""]


def interleaved(candidates: Mapping[str, Callable[[], object]], warmup: int = 3, runs: int = 10) -> dict[str, Timing]:
    """Seconds of each candidate's call, taken in turn, so that whatever else the machine does hits all alike.

    {"p50", "p95", "min", "runs", "ratio", "ratio_p10", "ratio_p90"} of each. `ratio`: its time ÷ the first
    candidate's in the same round, the median over the rounds; p10 and p90 are its spread. Who begins a round changes
    from round to round, so that none always finds the caches as the same other one left them.
    """
    if not candidates or warmup < 0 or runs < 1:
        raise BenchmarkError(f"{len(candidates)} candidates, warmup {warmup}, runs {runs}; give at least 1, 0 and 1")
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup + runs):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            began = time.perf_counter()
            candidates[name]()
            took = time.perf_counter() - began
            if number >= warmup:
                seconds[name].append(took)
    found = {}
    for name, values in seconds.items():
        median, p10, p90 = ratio(seconds[names[0]], values)
        found[name] = {**quantiles(values), "ratio": median, "ratio_p10": p10, "ratio_p90": p90}
    return found


def quantiles(values: Sequence[float]) -> Timing:
    """{"p50", "p95", "min", "runs"} of times measured by other means."""
    p50, p95 = np.quantile(values, (0.5, 0.95))
    return {"p50": float(p50), "p95": float(p95), "min": float(min(values)), "runs": len(values)}


def ratio(of: Sequence[float], to: Sequence[float]) -> tuple[float, float, float]:
    """to ÷ of within each round: median, p10, p90."""
    found = np.quantile(np.array(to) / np.array(of), (0.5, 0.1, 0.9))
    return float(found[0]), float(found[1]), float(found[2])


# ---- Processes of their own ----


def peak_rss() -> int:
    """Most bytes of memory that this process has had resident so far; 0 where the system doesn't report it."""
    from car_runtime.system import process

    return process.peak_rss() or 0


def run_python(*arguments: str, given: str = "") -> str:
    """Standard output of a new Python with this one's path. BenchmarkError with its last line if it fails.

    given: its standard input.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *(p for p in sys.path if p)])}
    child = subprocess.run(
        [sys.executable, *arguments], env=environment, input=given, capture_output=True, text=True, check=False
    )
    if child.returncode:
        last = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        shown = " ".join(arguments).strip().splitlines()[0][:60]
        raise BenchmarkError(f"python {shown} failed in a process of its own ({last}); run it here to see why")
    return child.stdout


CHILD = """# {target}
import contextlib, importlib, json, sys
request = json.load(sys.stdin)
from benchmarks.harness.measure import peak_rss
function = getattr(importlib.import_module(request["module"]), request["function"])
before = peak_rss()
with contextlib.redirect_stdout(sys.stderr):
    result = function(*request["args"])
print(json.dumps({{"result": result, "rss_before": before, "peak_rss": peak_rss()}}))
"""


def in_subprocess(target: str, *args: Any) -> dict[str, Any]:
    """Call "module:function" alone in a new Python: {"result", "rss_before", "peak_rss"}.

    Memory can only be measured so: what an earlier candidate has used, a process does not all give back. Arguments
    and result are JSON's own. `rss_before`: bytes after the module's import. What the function prints is dropped.
    BenchmarkError: the process failed.
    """
    module, _, function = target.partition(":")
    request = json.dumps({"module": module, "function": function, "args": args})
    found: dict[str, Any] = json.loads(run_python("-c", CHILD.format(target=target), given=request).splitlines()[-1])
    return found

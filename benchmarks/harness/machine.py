"""What every benchmark needs: which machine it ran on, how time and memory are taken, how results are written.

    from benchmarks.harness.machine import emit, interleaved, record

    times = interleaved({"ours": ours, "theirs": theirs}, warmup=3, runs=20)
    emit(record("latency", settings={"batch": 1}, results=[{"name": name, **t} for name, t in times.items()]))

A result is one line of JSON, so that results can be appended to one file and read line by line:

    {"format": 1, "benchmark": NAME, "time": "2025-01-31T12:00:00+00:00",
     "machine": {…},      what `machine()` says
     "settings": {…},     what was chosen: batch, data type, model
     "results": [{…}, …]} one flat object per row of the table; names end with their unit where it is not seconds

Times are seconds, memory is bytes, rates are GFLOP/s or GB/s (10⁹).
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

import numpy as np

FORMAT = 1
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("numpy", "torch", "onnxruntime", "onnxruntime-gpu", "openvino", "diffusers", "transformers")


class BenchmarkError(RuntimeError):
    """A measurement that can't be made or written; the message ends with the remedy."""


# ---- The machine ----


def machine() -> dict[str, Any]:
    """Where and with what a benchmark runs; every value is JSON's own, what can't be found out is None.

    `cores`: those this process may use. `threads`: PyTorch's, if it is loaded. `ram`: bytes this process may use.
    `commit`: of this checkout, with a "+" if files differ from it.
    """
    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "threads": _threads(),
        "ram": ram(),
        "gpu": gpu_name(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "commit": commit(),
        "command": command_line(),
    }


def cpu_name() -> str | None:
    """The processor's model; on Linux as the kernel has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    found = {key.strip(): value.strip() for key, colon, value in (line.partition(":") for line in lines) if colon}
    if "model name" not in found:
        return platform.processor() or platform.machine() or None
    # Virtual machines hide the model's name but not its numbers.
    family, model = found.get("cpu family"), found.get("model")
    return found["model name"] + (f" (family {family}, model {model})" if family and model else "")


def cores() -> int:
    """Cores this process may use: its affinity, and no more than a container's share of time."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _control_group("cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit() and int(period):
        allowed = min(allowed, max(1, math.ceil(int(quota) / int(period))))
    return allowed


def ram() -> int | None:
    """Bytes of memory this process may use: the machine's, and no more than a container's share."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    limit = _control_group("memory.max")
    return min(total, int(limit)) if limit.isdigit() else total


def _control_group(name: str) -> str:
    try:
        return (Path("/sys/fs/cgroup") / name).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def gpu_name() -> str | None:
    """The first GPU that a loaded PyTorch sees; nothing is loaded to find out."""
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name(0) if torch is not None and torch.cuda.is_available() else None


def _threads() -> int | None:
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch is not None else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The checkout's commit, 12 digits; None outside a checkout."""
    try:
        git = ["git", "-C", str(ROOT)]
        found = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip() + ("+" if changed.stdout.strip() else "")


def command_line() -> str:
    """The command as one would type it; absolute paths by their last part, which is all that others can use."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name:
        program = ["python", "-m", spec.name.removesuffix(".__main__")]
    else:
        program = ["python", Path(sys.argv[0]).name]
    return shlex.join([*program, *(Path(a).name if os.path.isabs(a) else a for a in sys.argv[1:])])


# ---- Time ----

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
    first = np.array(seconds[names[0]])
    found = {}
    for name, values in seconds.items():
        ratios = np.array(values) / first
        found[name] = {
            **quantiles(values),
            "ratio": float(np.median(ratios)),
            "ratio_p10": float(np.quantile(ratios, 0.1)),
            "ratio_p90": float(np.quantile(ratios, 0.9)),
        }
    return found


def quantiles(values: Sequence[float]) -> Timing:
    """{"p50", "p95", "min", "runs"} of times measured by other means."""
    p50, p95 = np.quantile(values, (0.5, 0.95))
    return {"p50": float(p50), "p95": float(p95), "min": float(min(values)), "runs": len(values)}


# ---- Memory ----


def peak_rss() -> int:
    """Most bytes of memory that this process has had resident so far; 0 where the system doesn't tell."""
    from car_runtime.system import process

    return process.peak_rss() or 0


CHILD = """
import importlib, json, sys
request = json.load(sys.stdin)
sys.path[:] = request["path"]
from benchmarks.harness.machine import peak_rss
function = getattr(importlib.import_module(request["module"]), request["function"])
before = peak_rss()
result = function(*request["args"], **request["kwargs"])
json.dump({"result": result, "rss_before": before, "peak_rss": peak_rss()}, open(request["output"], "w"))
"""


def in_subprocess(target: str, *args: Any, timeout: float | None = None, **kwargs: Any) -> dict[str, Any]:
    """Call "module:function" alone in a new Python: {"result", "rss_before", "peak_rss", "seconds"}.

    Memory can only be measured so: what an earlier candidate has used, a process does not all give back. Arguments
    and result are JSON's own. `rss_before`: bytes after the module's import; `seconds`: from start to end of the
    process. What the function prints goes to stderr. BenchmarkError: the process failed or took longer than
    `timeout` seconds.
    """
    import tempfile

    module, _, function = target.partition(":")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        request = {"module": module, "function": function, "args": args, "kwargs": kwargs, "output": str(output)}
        path = [str(ROOT), *(p for p in sys.path if p)]
        began = time.perf_counter()
        try:
            child = subprocess.run(
                [sys.executable, "-c", CHILD],
                input=json.dumps({**request, "path": path}),
                stdout=sys.stderr.fileno() if _has_descriptor(sys.stderr) else subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                timeout=timeout,
                cwd=ROOT,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise BenchmarkError(f"{target} took longer than {timeout:g} s; allow more, or measure less") from error
        seconds = time.perf_counter() - began
        if child.returncode or not output.is_file():
            last = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
            raise BenchmarkError(f"{target} failed in a process of its own ({last}); call it here to see why")
        return {**json.loads(output.read_text(encoding="utf-8")), "seconds": seconds}


def _has_descriptor(stream: Any) -> bool:
    try:
        return isinstance(stream.fileno(), int)
    except (OSError, ValueError, AttributeError):
        return False


# ---- The machine's limits ----

GEMM_SHAPES = ((1024, 1024, 1024), (2048, 2048, 2048))


def gemm_rate(
    dtype: str = "float32",
    threads: int | None = None,
    shapes: Iterable[tuple[int, int, int]] = GEMM_SHAPES,
    device: str = "cpu",
    runs: int = 5,
) -> dict[str, float]:
    """GFLOP/s of matrix products by PyTorch: {"1024×1024×1024": …, "best": …}: the limit to hold others against.

    shapes: (M, N, K), counted as 2·M·N·K operations. dtype: float32, bfloat16, float16, float64, or int8, whose sums
    are int32. The fastest of `runs` calls counts: a limit is what the machine can do, not what it does while it is
    disturbed.
    """
    import torch

    if dtype not in ("float32", "float64", "bfloat16", "float16", "int8"):
        raise BenchmarkError(f"no data type {dtype!r} here; give float32, float64, bfloat16, float16 or int8")
    whole = dtype == "int8"
    multiply, sums = (torch._int_mm, torch.int32) if whole else (torch.mm, getattr(torch, dtype))
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    rates: dict[str, float] = {}
    try:
        for m, n, k in shapes:
            a, b = (
                (torch.randn(size, device=device) * (30 if whole else 1)).to(getattr(torch, dtype))
                for size in ((m, k), (k, n))
            )
            out = torch.empty(m, n, device=device, dtype=sums)

            def product(a: Any = a, b: Any = b, out: Any = out) -> None:
                multiply(a, b, out=out)
                if device.startswith("cuda"):
                    torch.cuda.synchronize()

            rates[f"{m}×{n}×{k}"] = 2e-9 * m * n * k / timed(product, warmup=2, runs=runs)["min"]
    finally:
        torch.set_num_threads(before)
    return {**rates, "best": max(rates.values())}


def memory_rate(threads: int | None = None, size: int = 1 << 28, runs: int = 5) -> float:
    """GB/s of reading `size` bytes of float32 by PyTorch, the fastest of `runs` sums; far more than a cache holds."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        data = torch.ones(size // 4)
        return 1e-9 * size / timed(lambda: data.sum().item(), warmup=1, runs=runs)["min"]
    finally:
        torch.set_num_threads(before)


# ---- Results ----


def record(benchmark: str, settings: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A result in the form that the module's docstring describes."""
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

    BenchmarkError if it lacks something or holds what JSON hasn't; NaN and infinity are such.
    """
    missing = [k for k in ("format", "benchmark", "time", "machine", "settings", "results") if k not in found]
    if missing:
        raise BenchmarkError(f"a result without {', '.join(missing)}; make it with record()")
    try:
        line = json.dumps(found, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise BenchmarkError(f"{found['benchmark']}: is no JSON ({error}); give numbers, texts and None") from error
    print(line, file=file or sys.stdout, flush=True)


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Rows as a table for a document, numbers to three digits and to the right; columns in the rows' own order."""
    columns = list(dict.fromkeys(k for row in rows for k in row)) if columns is None else list(columns)
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    right = [_is_number_column(rows, column) for column in columns]
    widths = [max([3, len(c), *(len(row[i]) for row in cells)]) for i, c in enumerate(columns)]

    def line(values: Sequence[str]) -> str:
        padded = (v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, right, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = [("-" * (w - 1) + ":") if r else "-" * w for w, r in zip(widths, right, strict=True)]
    return "\n".join([line(columns), line(rule), *map(line, cells)])


def _is_number_column(rows: Sequence[Mapping[str, Any]], column: str) -> bool:
    values = [row[column] for row in rows if row.get(column) is not None]
    return bool(values) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value).replace("|", "\\|").replace("\n", " ")

"""What is to be learnt from a GPU, in at most ten minutes: JSON lines, one per step, as soon as it is done.

    python -m benchmarks.gpu_session tiny.plan d16.plan -o session.jsonl

Plans are fp16 ones of format 2, exported before, since that takes no GPU. Each step is a process of its own, stopped
when its time or the session's is up, so that a fault of one leaves the others; a session that is cut off leaves the
lines that it had written. Steps: what the machine is; the kernels loaded, and each compared with numpy; each plan
verified and measured, one image and four, by `cuda` and by `ort-cuda`; the last plan's stages and next seed; each
product timed with each of its tiles; and, if time is left, ControlNet and CAR's own loop in PyTorch, both under
`torch.compile`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from car_runtime.backends.cuda.buffers import Memory
from car_runtime.backends.cuda.driver import CudaDevice, Device
from car_runtime.backends.cuda.kernels import kernels, read_cubins

SECONDS = 570.0
"""Of a session, which leaves half a minute of ten to fetch the results."""
STEP_SECONDS = 180.0
BACKENDS = ("cuda", "ort-cuda")
WIDTH, VOCAB = 1024, 4096
"""Of a d16, whose products are timed."""
ROWS = (2, 8, 18, 32, 50, 72, 128, 200, 338, 512)
"""Rows of its ten scales, guided."""
LAUNCHES = 50


@dataclass(frozen=True)
class Step:
    """A command whose last line is JSON."""

    name: str
    command: tuple[str, ...]


def steps(plans: Sequence[Path], backends: Sequence[str], runs: int) -> Iterator[Step]:
    """In the order of what would be missed most."""
    python, on_gpu = (sys.executable, "-m"), ("--device", "cuda", "--runs", str(runs))
    car_run, own = (*python, "car_runtime"), (*python, "benchmarks.gpu_session", "--step")
    yield Step("machine", (*car_run, "doctor", "--json"))
    yield Step("load", (*own, "load"))
    yield Step("kernels", (*own, "kernels"))
    for plan in plans:
        for backend in backends:
            settings = ("--backend", backend, "--batch", "1,4", "--runs", str(runs), "--json")
            yield Step(f"verify {plan.name} {backend}", (*car_run, "verify", str(plan), *settings))
    for plan in plans[-1:]:
        measured = ("--plan", str(plan), "--backends", ",".join(backends), "--batch", "1,4", "--no-reference")
        yield Step(f"latency {plan.name}", (*python, "benchmarks.latency", *measured, *on_gpu))
    yield Step("tiles", (*own, "tiles"))
    if plans:
        theirs = ("--methods", "controlnet", "--tiers", "compiled", "--sizes", "256")
        yield Step("controlnet", (*python, "benchmarks.controlnet", *theirs, *on_gpu))


def session(todo: Sequence[Step], output: Path, seconds: float, step_seconds: float) -> int:
    """Run the steps while there is time; how many failed or were left out."""
    began, bad = monotonic(), 0
    with output.open("a", encoding="utf-8") as file:
        for step in todo:
            left = seconds - (monotonic() - began)
            record = run(step, min(left, step_seconds)) if left > 1 else {"error": "no time was left"}
            bad += "error" in record
            file.write(json.dumps({"step": step.name, "at": round(monotonic() - began, 1), **record}) + "\n")
            file.flush()
            os.fsync(file.fileno())
            print(f"{step.name}: {record.get('error', 'done')}", file=sys.stderr)
    return bad


def run(step: Step, seconds: float) -> dict[str, Any]:
    """What a step found, or why it found nothing."""
    began = monotonic()
    try:
        done = subprocess.run(step.command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {seconds:.0f} s"}
    took = {"seconds": round(monotonic() - began, 2)}
    last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
    try:
        found = {"result": json.loads((done.stdout.strip().splitlines() or [""])[-1])}
    except ValueError:
        return {**took, "error": last[0]}
    return {**took, **found, **({} if done.returncode == 0 else {"error": last[0]})}


def load(device: Device) -> dict[str, Any]:
    """The time that the driver takes to load all kernels, in seconds."""
    code = read_cubins(device.gpu.target)
    began = monotonic()
    device.load_kernels(code)
    return {"target": device.gpu.target, "kernels": len(code), "seconds": monotonic() - began}


def check_kernels() -> dict[str, Any]:
    """Outcome → names of the tests that compare the compiled kernels with numpy, those that passed counted."""
    import pytest

    found: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}

    class Outcomes:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                found[report.outcome].append(report.nodeid.rpartition("::")[2])

    with redirect_stdout(sys.stderr):
        pytest.main(["-q", "-m", "gpu", "tests/export/test_cuda_kernels.py"], plugins=[Outcomes()])
    return {**found, "passed": len(found["passed"])}


def tiles(
    device: Device, width: int = WIDTH, vocab: int = VOCAB, rows: Sequence[int] = ROWS, launches: int = LAUNCHES
) -> list[dict[str, Any]]:
    """Microseconds of each product of a step with each of its tiles, recorded and launched as one."""
    load(device)
    memory, largest = Memory(device), max(rows)
    half = [memory.zeros((largest * 4 * width,), "float16") for _ in range(2)]
    matrix, bias = (
        memory.zeros((4 * width * max(width, vocab // 4),), "float16"),
        memory.zeros((4 * width,), "float16"),
    )
    stream = memory.zeros((largest * max(width, vocab),), "float32")
    gamma = memory.zeros((2 * width,), "float32")
    shapes = {"gelu": (4 * width, width), "gate": (width, 4 * width), "head": (vocab, width)}
    found = []
    for kind, (N, K) in shapes.items():
        for M in rows:
            given = {"a": half[0].address, "w": matrix.address, "bias": bias.address, "M": M, "K": K}
            given |= {"gamma": gamma.address, "x": stream.address, "R": 2, "mod_stride": width, "N": N, "C": N}
            given["out"] = half[1].address if kind == "gelu" else stream.address
            times = {}
            for name, kernel in kernels().items():
                if kernel.kernel != kind or name.endswith(".bf16"):
                    continue
                tile = kernel.constants
                grid = (-(-N // tile["BN"]), -(-M // tile["BM"]), 1)
                arguments = tuple(given[argument] for argument in kernel.arguments)
                times[name] = _microseconds(device, memory, name, grid, arguments, launches)
            found.append({"kernel": kind, "M": M, "N": N, "K": K, "us": times})
    memory.close()
    return found


def _microseconds(
    device: Device, memory: Memory, name: str, grid: tuple[int, int, int], arguments: Sequence[int], launches: int
) -> float:
    device.begin_capture()
    for _ in range(launches):
        device.put_kernel(name, grid, arguments)
    graph = device.end_capture()
    times = []
    for _ in range(4):  # the first is not counted
        began = memory.mark()
        device.launch(graph)
        times.append(memory.seconds(began, memory.mark()))
    device.free_graph(graph)
    return round(1e6 * float(np.median(times[1:])) / launches, 2)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_session", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("plans", nargs="*", type=Path, metavar="PLAN", help="fp16 plans of format 2")
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu_session.jsonl"), help="lines go to its end")
    parser.add_argument("--backends", default=",".join(BACKENDS), metavar="NAME,…", help="(%(default)s)")
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="measured images of each (%(default)s)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the whole session (%(default)s)")
    parser.add_argument("--step-seconds", type=float, default=STEP_SECONDS, help="of one step (%(default)s)")
    parser.add_argument(
        "--step", choices=("load", "kernels", "tiles"), help="one of the session's own steps, to stdout"
    )
    options = parser.parse_args(arguments)
    if options.step is not None:
        on_device: dict[str, Callable[[Device], Any]] = {"load": load, "tiles": tiles}
        kernels_step = options.step == "kernels"
        print(json.dumps(check_kernels() if kernels_step else on_device[options.step](CudaDevice())))
        return 0
    todo = list(steps(options.plans, options.backends.split(","), options.runs))
    return min(1, session(todo, options.output, options.seconds, options.step_seconds))


if __name__ == "__main__":
    sys.exit(main())

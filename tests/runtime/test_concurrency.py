"""One plan in many threads gives each request what it gives alone, and nothing grows."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from car_runtime import open_plan
from car_runtime.errors import CarError

CONTROLS = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.png"))
REQUESTS = 80


def _request(plan: Any, i: int) -> Any:
    """One of four kinds, all of whose settings follow from `i`."""
    control, label = CONTROLS[i % len(CONTROLS)], i % plan.manifest.model.classes
    if i % 4 == 0:
        return plan.generate(control, label=label, seed=i, n=1 + i % 3).tokens
    if i % 4 == 1:
        return np.concatenate([step.tokens.reshape(1, -1) for step in plan.stream(control, label=label, seed=i)], 1)
    if i % 4 == 2:
        return plan.encode(control)
    return plan.generate(control, label=None, seed=i, cfg=0, stop_after=3).images


def test_mixed_requests_in_8_threads_are_equal_to_the_bit() -> None:
    order = list(range(REQUESTS))
    random.Random(1).shuffle(order)
    with open_plan(backend="ort-cpu", threads=1) as plan:
        wanted = [_request(plan, i) for i in range(REQUESTS)]
        with ThreadPoolExecutor(8) as pool:
            made = list(pool.map(lambda i: _request(plan, i), order))
    for i, result in zip(order, made, strict=True):
        assert np.array_equal(wanted[i], result), f"request {i}"


def test_closing_a_plan_in_use_ends_requests_with_an_error_of_the_package() -> None:
    plan, ended = open_plan(backend="ort-cpu", threads=1), []

    def work() -> None:
        try:
            for i in range(1000):
                _request(plan, i)
        except Exception as error:
            ended.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    plan.close()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert len(ended) == 4
    assert all(isinstance(error, CarError) for error in ended), ended


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_memory_is_flat_over_300_requests() -> None:
    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    with open_plan(backend="ort-cpu", threads=1) as plan:
        for i in range(40):
            _request(plan, i)
        before, files = resident(), len(os.listdir("/proc/self/fd"))
        for i in range(300):
            _request(plan, 100 + i)
        assert resident() - before < 60 * 2**20
        assert len(os.listdir("/proc/self/fd")) <= files

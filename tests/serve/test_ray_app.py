"""`car_serve.ray_app` on this machine: two replicas, streams through Ray, one replica killed under load."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from car_runtime import open_plan
from car_runtime.format.manifest import read_manifest
from fixtures.ray_cluster import replicas, started
from fixtures.serving import ROOT, SHIPPED, body, pixels

SHIPPED_NAME = read_manifest(SHIPPED).name
pytestmark = pytest.mark.slow  # a cluster takes half a minute to start and to end


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of two replicas."""
    with started(tmp_path_factory.mktemp("ray"), 2, 2) as address:
        yield address


def test_two_plans_share_the_replicas(cluster: str) -> None:
    answer = httpx.get(f"{cluster}/v1/models").json()
    assert [model["id"] for model in answer["data"]] == [SHIPPED_NAME, "copy"]
    images = {}
    for name in ("copy", SHIPPED_NAME, "copy"):
        named = httpx.post(f"{cluster}/v1/pictures", json=body(plan=name), timeout=120).json()["images"][0]
        header = {"serve_multiplexed_model_id": name}
        routed = httpx.post(f"{cluster}/v1/pictures", json=body(), headers=header, timeout=120).json()["images"][0]
        assert named["receipt"]["plan"] == routed["receipt"]["plan"] == name
        images[name] = named["png"]
    assert np.array_equal(pixels(images["copy"]), pixels(images[SHIPPED_NAME]))
    backends = [plan["backend"] for plan in httpx.get(f"{cluster}/v1/capabilities").json()["plans"]]
    assert sum(backend is not None for backend in backends) == 1  # one place for a plan in each replica


def test_streams_arrive_scale_by_scale(cluster: str) -> None:
    with httpx.stream(
        "POST", f"{cluster}/v1/pictures", json=body(n=2), headers={"Accept": "text/event-stream"}, timeout=60
    ) as answer:
        parts = [(time.monotonic(), part) for part in answer.iter_text()]
    text = "".join(part for _, part in parts)
    assert text.count("event: scale") == 2 * 7
    assert len(parts) >= 4  # and not all of it at the end


def test_a_replica_killed_under_load_costs_only_its_own_requests(cluster: str) -> None:
    with open_plan(SHIPPED, threads=1) as plan:
        expected = [
            plan.generate(ROOT / "examples/umbrella.png", "fluent-travel-places", seed).images[0]
            for seed in range(20)
        ]
    before = replicas()
    assert len(before) == 2

    def one(i: int) -> str:
        try:
            answer = httpx.post(f"{cluster}/v1/pictures", json=body(seed=i % 20), timeout=120)
        except httpx.TransportError:
            return "broken"
        if answer.status_code != 200:
            return "error" if answer.status_code >= 500 else f"status {answer.status_code}"
        return "ok" if np.array_equal(pixels(answer.json()["images"][0]["png"]), expected[i % 20]) else "wrong"

    with ThreadPoolExecutor(8) as users:
        outcomes = [users.submit(one, i) for i in range(100)]
        time.sleep(1.0)
        os.kill(min(before), signal.SIGKILL)
        results = [outcome.result() for outcome in outcomes]
    assert set(results) <= {"ok", "error", "broken"}, set(results)
    assert results.count("ok") >= 80  # at most what one replica had, 16, is lost
    for _ in range(120):
        if len(replicas()) == 2 and replicas() != before:
            break
        time.sleep(0.5)
    assert len(replicas()) == 2  # it is replaced
    assert all(one(i) == "ok" for i in range(8))

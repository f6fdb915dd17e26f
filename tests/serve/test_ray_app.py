"""`car_serve.ray_app` on this machine: two replicas, streams through Ray, one replica killed under load."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import numpy as np
import pytest

from car_runtime import open_plan
from fixtures.serving import ROOT, SHIPPED, body, pixels

pytestmark = pytest.mark.slow  # a cluster takes half a minute to start and to end
MARK = f"of-test-{os.getpid()}"
"""In the environment of this cluster's processes: no other one's replica is killed."""
CLUSTER = """
import sys, ray
from ray import serve
ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100_000_000)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
from car_serve.ray_app import app
serve.run(app)
print("up", flush=True)
sys.stdin.read()
serve.shutdown()
"""


@contextmanager
def started(folder: Path, least: int, most: int) -> Iterator[str]:
    """The address of a cluster with so many replicas."""
    pytest.importorskip("ray")
    pytest.importorskip("fastapi")
    port = 20_000 + os.getpid() % 10_000
    copy = folder / "copy.plan"
    shutil.copytree(SHIPPED, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"name": "copy"}))
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "runtime"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "CAR_THREADS": "1",
        "CAR_PLANS": f"{SHIPPED}{os.pathsep}{copy}",
        "CAR_PLANS_PER_REPLICA": "1",
        "CAR_MIN_REPLICAS": str(least),
        "CAR_MAX_REPLICAS": str(most),
        "CAR_REPLICA_CPUS": "0.5",
        "CAR_TEST_CLUSTER": MARK,
    }
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER, str(port)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.strip() == "up":
                break
        assert process.poll() is None
        yield f"http://127.0.0.1:{port}"
    finally:
        process.stdin.close()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of two replicas."""
    with started(tmp_path_factory.mktemp("ray"), 2, 2) as address:
        yield address


def test_two_plans_share_the_replicas(cluster: str) -> None:
    answer = httpx.get(f"{cluster}/v1/models").json()
    assert [model["id"] for model in answer["data"]] == ["emoji-canny", "copy"]
    images = {}
    for name in ("copy", "emoji-canny", "copy"):
        named = httpx.post(f"{cluster}/v1/pictures", json=body(plan=name), timeout=120).json()["images"][0]
        header = {"serve_multiplexed_model_id": name}
        routed = httpx.post(f"{cluster}/v1/pictures", json=body(), headers=header, timeout=120).json()["images"][0]
        assert named["receipt"]["plan"] == routed["receipt"]["plan"] == name
        images[name] = named["png"]
    assert np.array_equal(pixels(images["copy"]), pixels(images["emoji-canny"]))
    backends = [plan["backend"] for plan in httpx.get(f"{cluster}/v1/capabilities").json()["plans"]]
    assert sum(backend is not None for backend in backends) == 1  # one place for a plan in each replica


def replicas() -> set[int]:
    """Process numbers of this cluster's replicas."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is somebody else's
            own = MARK.encode() in (folder / "environ").read_bytes()
            if own and b"ServeReplica" in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
    return found


def test_streams_arrive_scale_by_scale(cluster: str) -> None:
    with httpx.stream(
        "POST", f"{cluster}/v1/pictures", json=body(n=2), headers={"Accept": "text/event-stream"}, timeout=60
    ) as answer:
        parts = [(time.monotonic(), part) for part in answer.iter_text()]
    text = "".join(part for _, part in parts)
    assert text.count("event: scale") == 12
    assert len(parts) >= 4  # and not all of it at the end


def test_a_replica_killed_under_load_costs_only_its_own_requests(cluster: str) -> None:
    with open_plan(SHIPPED, threads=1) as plan:
        expected = [plan.generate(ROOT / "examples/umbrella.png", 8, seed).images[0] for seed in range(20)]
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


def test_replicas_are_added_by_the_requests_that_wait(tmp_path: Path) -> None:
    """Last: its cluster takes the place of the others'."""
    with started(tmp_path, 1, 2) as address:
        assert len(replicas()) == 1
        until, codes = time.monotonic() + 120, []

        def user(number: int) -> None:
            while len(replicas()) < 2 and time.monotonic() < until:
                answer = httpx.post(f"{address}/v1/pictures", json=body(seed=number, n=4), timeout=120)
                codes.append(answer.status_code)

        with ThreadPoolExecutor(12) as users:
            list(users.map(user, range(12)))
        assert len(replicas()) == 2
        assert set(codes) == {200}

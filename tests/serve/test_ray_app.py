"""`car_serve.ray_app` on this machine: two replicas, streams through Ray, one replica killed under load."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of two replicas."""
    pytest.importorskip("ray")
    pytest.importorskip("fastapi")
    port = 20_000 + os.getpid() % 10_000
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "runtime"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "CAR_THREADS": "1",
        "CAR_MIN_REPLICAS": "2",
        "CAR_MAX_REPLICAS": "2",
        "CAR_REPLICA_CPUS": "0.5",
        "CAR_TEST_CLUSTER": MARK,
    }
    log = (tmp_path_factory.mktemp("ray") / "log.txt").open("w")
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

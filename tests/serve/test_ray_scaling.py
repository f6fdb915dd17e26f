"""`car_serve.ray_app` on this machine grows with its queue."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from fixtures.ray_cluster import replicas, started
from fixtures.serving import body

pytestmark = pytest.mark.slow  # a cluster takes half a minute to start and to end


def test_replicas_are_added_by_the_requests_that_wait(tmp_path: Path) -> None:
    """Twelve users, three times what a replica is meant to have; half of them read events."""
    with started(tmp_path, 1, 2) as address:
        assert len(replicas()) == 1
        until = time.monotonic() + 240
        ends: list[tuple[int, bool]] = []
        grown: list[float] = []

        def user(number: int) -> None:
            headers = {"Accept": "text/event-stream"} if number % 2 else {}
            while not grown and time.monotonic() < until:
                asked = {"json": body(seed=number), "headers": headers, "timeout": 240}
                answer = httpx.post(f"{address}/v1/pictures", **asked)
                ends.append((answer.status_code, ("event: done" if headers else '"state":"done"') in answer.text))

        began = time.monotonic()
        with ThreadPoolExecutor(12) as users:
            running = [users.submit(user, number) for number in range(12)]
            while len(replicas()) < 2 and time.monotonic() < until:
                time.sleep(0.5)
            grown.append(time.monotonic() - began)
            for one in running:
                one.result()
        print(f"a second replica after {grown[0]:.1f} s, {len(ends)} requests")
        assert len(replicas()) == 2
        assert set(ends) == {(200, True)}

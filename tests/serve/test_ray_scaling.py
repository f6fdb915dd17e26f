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

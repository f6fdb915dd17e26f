"""Real servers with the shipped plan, one for the tests of a file that change nothing, and a real browser."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fixtures.serving import SHIPPED, Server
from fixtures.studio import CHROMIUM, REQUIRED, Studio


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Start servers with flags; they end with the file's tests."""
    for needed in ("fastapi", "uvicorn", "prometheus_client", "python_multipart"):
        pytest.importorskip(needed)
    if not (SHIPPED / "manifest.json").is_file():
        pytest.skip("this checkout has no plan in runtime/car_runtime/plans")
    servers: list[Server] = []

    def begin(*flags: str, plan: Path = SHIPPED) -> Server:
        servers.append(Server(*flags, plan=plan, log=tmp_path_factory.mktemp("serve") / "log.txt"))
        return servers[-1]

    yield begin
    for server in servers:
        if server.process.poll() is None:
            server.end()


@pytest.fixture(scope="module")
def url(start: Callable[..., Server]) -> str:
    """A server with its defaults."""
    return start().url


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    """A server in this process, whose service the tests can look at."""
    uvicorn = pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    from car_runtime import open_plan
    from car_serve.app import create_app
    from car_serve.limits import Limits

    app = create_app([open_plan(threads=2)], Limits(queue=1))
    running = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    until = time.monotonic() + 60
    while not running.started and time.monotonic() < until:
        time.sleep(0.02)
    running.address = f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    running.service = app.state.service
    yield running
    running.should_exit = True
    thread.join(20)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser; without one the tests skip, but where it is required."""
    if CHROMIUM is None and not REQUIRED:
        pytest.skip("no chromium on this machine: apt install chromium")
    if not REQUIRED:
        pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    from playwright import sync_api

    assert CHROMIUM is not None, "no chromium on this machine; apt install chromium"
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture
def studio(chromium: Any, server: Any) -> Iterator[Studio]:
    """An open studio at 1280 px."""
    opened = Studio(chromium, server.address)
    yield opened
    opened.close()

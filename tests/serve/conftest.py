"""A real server with the shipped plan, one for the tests of a file that change nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fixtures.serving import SHIPPED, Server


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

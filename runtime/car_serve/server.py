"""`car-run serve`: plans over HTTP in one process, by uvicorn.

SIGTERM drains: accepted requests end, new ones are answered 503.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import webbrowser
from collections.abc import Sequence
from time import monotonic
from types import FrameType
from urllib.parse import quote

import uvicorn

from car_runtime import Plan, RequestError, default_plan, open_plan
from car_runtime.errors import printable
from car_serve.app import create_app
from car_serve.limits import Limits
from car_serve.security import LOOPBACK, is_loopback
from car_serve.service import Service

log = logging.getLogger("car_serve")


class DrainingServer(uvicorn.Server):
    """uvicorn, which on the first signal goes on until accepted requests are done, and on the second ends at once."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come."""
        if self._service.draining:
            self.should_exit = self.force_exit = True
            return
        self._service.draining = True
        log.warning("draining: %d requests to finish", len(self._service.results.unfinished()))
        loop = asyncio.get_running_loop()  # signals come on its thread
        loop.call_soon_threadsafe(lambda: setattr(self, "_draining", loop.create_task(self._drain())))

    async def _drain(self) -> None:
        until = monotonic() + self._service.limits.drain_seconds
        while self._service.busy and monotonic() < until:
            await asyncio.sleep(0.02)
        self.should_exit = True  # uvicorn then waits for answers on their way


def serve(
    paths: Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    backend: str = "auto",
    threads: int | None = None,
    limits: Limits | None = None,
    token: str | None = None,
    allow_hosts: Sequence[str] = (),
    browse: bool = False,
) -> None:
    """Serve plans (the shipped one by default) until a signal ends it. Raises UserError."""
    limits = limits or Limits()
    if token is None and not is_loopback(host):
        raise RequestError(f"--host {host!r} is open to other machines; give a token with --token-file")
    listening = _listen(host, port)
    port = listening.getsockname()[1]
    plans = _open(paths or [str(default_plan())], backend, threads)
    if not is_loopback(host) and not allow_hosts:
        allow_hosts = ["*"]  # the token keeps other sites' pages out
    app = create_app(plans, limits, token=token, hosts=(*LOOPBACK, *allow_hosts))
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
        limit_concurrency=None,
        ws="none",
        h11_max_incomplete_event_size=64 * 1024,
    )
    name = f"[{host}]" if ":" in host else host
    address = f"http://{name}:{port}/"
    for plan in plans:
        log.info("%s on %s (%s)", printable(plan.manifest.name), plan.backend_name, plan.why)
    log.info("studio and API: %s", address)
    if browse:
        webbrowser.open(address if token is None else f"{address}?token={quote(token, safe='')}")
    with listening:
        DrainingServer(config, app.state.service).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    """The port is taken before plans are opened: a mistake answers at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(256)
    except (OSError, OverflowError) as error:
        listening.close()
        why = getattr(error, "strerror", None) or error
        raise RequestError(f"cannot listen on {host!r} port {port} ({why}); choose another with --port") from error
    return listening


def _open(paths: Sequence[str], backend: str, threads: int | None) -> list[Plan]:
    plans: list[Plan] = []
    try:
        for path in paths:
            plans.append(open_plan(path, backend, threads=threads))
            names = [plan.manifest.name for plan in plans]
            if len(set(names)) < len(names):
                raise RequestError(f"two plans have the name {names[-1]!r}; export one of them under another")
    except BaseException:
        for plan in plans:
            plan.close()
        raise
    return plans

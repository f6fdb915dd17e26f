"""The same API on a Ray cluster: `serve run car_serve.ray_app:app`.

A replica is one process with engines of its own, a batcher for each open plan, and all routes; Ray routes requests to
replicas, starts and ends them by the requests that wait, and replaces one that died. Results are kept by replica: an
id is found on the one that drew it, so branching by id needs one replica, or the image itself.

Several plans are multiplexed: a replica opens a plan when it is first asked for, keeps at most CAR_PLANS_PER_REPLICA
open and closes the one that was not used for longest, once its requests are done. A request with the header
`serve_multiplexed_model_id: PLAN` goes to a replica that has the plan open, if one has; it need not name it again.

Settings are environment variables, as Ray's command takes none: CAR_PLANS (plan folders, separated as in PATH, the
default first; without it the shipped plan), CAR_PLANS_PER_REPLICA (0: all), CAR_BACKEND, CAR_THREADS,
CAR_MIN_REPLICAS, CAR_MAX_REPLICAS (1, 4), CAR_REPLICA_CPUS (1), CAR_REPLICA_GPUS (0), CAR_TOKEN (asked of every
request), CAR_ALLOW_HOST (names, separated by commas).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass

from anyio import to_thread
from fastapi import FastAPI
from ray import serve

from car_runtime import RequestError, default_plan, open_plan
from car_runtime.format.manifest import read_manifest
from car_serve.app import create_app
from car_serve.batcher import Batcher
from car_serve.limits import Limits
from car_serve.own_routes import warm_up
from car_serve.security import LOOPBACK
from car_serve.service import Service


@dataclass(eq=False)
class OpenPlan:
    """What Ray keeps of an open plan; it deletes it to have it closed."""

    service: Service
    batcher: Batcher

    def __del__(self) -> None:
        self.service.remove(self.batcher)


def build() -> FastAPI:
    """The application of one replica, by the environment."""
    given = [path for path in os.environ.get("CAR_PLANS", "").split(os.pathsep) if path] or [str(default_plan())]
    manifests = [read_manifest(path) for path in given]
    paths = {manifest.name: path for manifest, path in zip(manifests, given, strict=True)}
    if len(paths) < len(given):
        raise RequestError(f"CAR_PLANS names {len(given)} plans and {len(paths)} names; export one under another")
    hosts = tuple(name for name in os.environ.get("CAR_ALLOW_HOST", "").split(",") if name)
    shelf = {manifest.name: manifest for manifest in manifests}
    app = create_app([], Limits(), token=os.environ.get("CAR_TOKEN"), hosts=(*LOOPBACK, *hosts), shelf=shelf)
    service: Service = app.state.service

    @serve.multiplexed(max_num_models_per_replica=int(os.environ.get("CAR_PLANS_PER_REPLICA", "0")) or -1)
    async def opened(name: str) -> OpenPlan:
        backend, threads = os.environ.get("CAR_BACKEND", "auto"), os.environ.get("CAR_THREADS")
        plan = await to_thread.run_sync(
            lambda: open_plan(paths[name], backend, threads=None if threads is None else int(threads))
        )
        batcher = service.add(plan)
        await warm_up(service, batcher)
        return OpenPlan(service, batcher)

    started = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(application: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        service.opener = lambda name: _wait(asyncio.run_coroutine_threadsafe(opened(name), loop))
        service.preferred = lambda: serve.get_multiplexed_model_id() or None
        async with started(application):
            yield

    app.router.lifespan_context = lifespan
    return app


def _wait(opening: Future[OpenPlan]) -> None:
    opening.result()


@serve.deployment(
    max_ongoing_requests=16,
    autoscaling_config={
        "min_replicas": int(os.environ.get("CAR_MIN_REPLICAS", "1")),
        "max_replicas": int(os.environ.get("CAR_MAX_REPLICAS", "4")),
        "target_ongoing_requests": 4,  # that wait or are drawn, for each replica
        "metrics_interval_s": 2,  # Ray's defaults, 10 and 30 s, see a wave of requests when it is over
        "look_back_period_s": 6,
        "upscale_delay_s": 5,
        "downscale_delay_s": 120,
    },
    ray_actor_options={
        "num_cpus": float(os.environ.get("CAR_REPLICA_CPUS", "1")),
        "num_gpus": float(os.environ.get("CAR_REPLICA_GPUS", "0")),
    },
    graceful_shutdown_timeout_s=60,
)
@serve.ingress(build)
class Replica:
    """One replica; the routes are all that it has."""


app = Replica.bind()  # type: ignore[attr-defined]  # what the decorator made of it

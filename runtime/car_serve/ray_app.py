"""The same API on a Ray cluster: `serve run car_serve.ray_app:app`.

A replica is one process with an engine of its own, its batchers and all routes; Ray routes requests to replicas,
starts and ends them by the requests that wait, and replaces one that died. Results are kept by replica: an id is
found on the one that drew it, so branching by id needs one replica, or the image itself.

Settings are environment variables, as Ray's command takes none: CAR_PLANS (plan folders, separated as in PATH;
default: the shipped plan), CAR_BACKEND, CAR_THREADS, CAR_MIN_REPLICAS, CAR_MAX_REPLICAS (1, 4), CAR_REPLICA_CPUS (1),
CAR_REPLICA_GPUS (0), CAR_TOKEN (asked of every request), CAR_ALLOW_HOST (names, separated by commas).
"""

from __future__ import annotations

import os

from fastapi import FastAPI
from ray import serve

from car_runtime import default_plan, open_plan
from car_serve.app import create_app
from car_serve.limits import Limits
from car_serve.security import LOOPBACK


def build() -> FastAPI:
    """The application of one replica, by the environment; its plans are opened here."""
    paths = os.environ.get("CAR_PLANS", "").split(os.pathsep)
    threads = os.environ.get("CAR_THREADS")
    plans = [
        open_plan(path, os.environ.get("CAR_BACKEND", "auto"), threads=None if threads is None else int(threads))
        for path in [path for path in paths if path] or [str(default_plan())]
    ]
    names = tuple(name for name in os.environ.get("CAR_ALLOW_HOST", "").split(",") if name)
    return create_app(plans, Limits(), token=os.environ.get("CAR_TOKEN"), hosts=(*LOOPBACK, *names))


@serve.deployment(
    max_ongoing_requests=16,
    autoscaling_config={
        "min_replicas": int(os.environ.get("CAR_MIN_REPLICAS", "1")),
        "max_replicas": int(os.environ.get("CAR_MAX_REPLICAS", "4")),
        "target_ongoing_requests": 4,
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

"""What can be asked of a server: the studio builds its form from it, and a program its checks."""

from __future__ import annotations

from typing import Any

from car_runtime import __version__
from car_runtime.plan import DEFAULT_PLAN
from car_serve.about import plan_about
from car_serve.service import Service


def capabilities(service: Service) -> dict[str, Any]:
    """Plans with classes, controls, defaults and ranges; limits; versions."""
    limits = service.limits
    return {
        "version": __version__,
        "default_plan": service.names[0],
        "plans": [_plan(service, name) for name in service.names],
        "limits": {
            "queue": limits.queue,
            "max_batch": limits.max_batch,
            "n": limits.max_images,
            "body_bytes": limits.max_body,
            "pixels": limits.max_pixels,
            "keep_seconds": limits.keep_seconds,
            "rate_per_minute": limits.rate_per_minute,
        },
        "edits": ["branch", "paint", "extend", "restyle"],
        "formats": {"preview": "image/webp", "image": "image/png"},
    }


def _plan(service: Service, name: str) -> dict[str, Any]:
    """One plan's part; `backend` is null while it is not open."""
    batcher = service.batchers.get(name)
    plan = None if batcher is None else batcher.plan
    manifest = service.shelf[name] if plan is None else plan.manifest
    return {
        **plan_about(manifest),
        "shipped": plan is not None and plan.path == DEFAULT_PLAN,
        "backend": None if plan is None else {"name": plan.backend_name, "why": plan.why},
    }

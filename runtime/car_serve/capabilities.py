"""What can be asked of a server: the studio builds its form from it, and a program its checks."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from car_runtime import __version__
from car_runtime.plan import DEFAULT_PLAN
from car_runtime.request import MAX_CFG
from car_runtime.schedule import MAX_STRENGTH
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
    model, K = manifest.model, len(manifest.scales)
    controls = [
        {"type": branch, "convention": None if convention is None else asdict(convention)}
        for branch, convention in model.conventions.items()
    ]
    return {
        "name": manifest.name,
        "shipped": plan is not None and plan.path == DEFAULT_PLAN,
        "image_size": model.image_size,
        "classes": list(model.names) if model.names else [str(i) for i in range(model.classes)],
        "controls": controls,
        "scales": [scale.side for scale in manifest.scales],
        "tokens": manifest.tokens,
        "vocab": model.vocab,
        "has_encoder": "encoder" in manifest.graphs,
        "defaults": {**asdict(manifest.sampling), "control_strength": 1.0, "n": 1, "stop_after": K - 1},
        "ranges": {
            "cfg": [0, MAX_CFG],
            "top_k": [0, model.vocab],
            "top_p": [0, 1],
            "control_strength": [0, MAX_STRENGTH],
            "stop_after": [0, K - 1],
            "seed": [0, 2**53 - 1],
        },
        "more_smooth": bool(manifest.more_smooth),
        "backend": None if plan is None else {"name": plan.backend_name, "why": plan.why},
    }

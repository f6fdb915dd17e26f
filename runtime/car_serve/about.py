"""What can be asked of a plan: classes, controls, defaults and ranges, as the studio builds its form from them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from car_runtime.format.manifest import Manifest
from car_runtime.request import MAX_CFG
from car_runtime.schedule import MAX_STRENGTH


def plan_about(manifest: Manifest) -> dict[str, Any]:
    """One plan's part of the capabilities: all that its manifest says."""
    model, K = manifest.model, len(manifest.scales)
    controls = [
        {"type": branch, "convention": None if convention is None else asdict(convention)}
        for branch, convention in sorted(model.conventions.items(), key=lambda item: item[0] != model.default_branch)
    ]  # what a control without a name is comes first
    return {
        "name": manifest.name,
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
    }

"""What a plan is, as facts from its manifest: `car-run plan info`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from car_runtime.format.manifest import MANIFEST, Manifest, Parameter, read_manifest


def plan_facts(root: str | os.PathLike[str]) -> dict[str, Any]:
    """The facts of a plan, as they go into JSON. No file but the manifest is read. Raises PlanError.

    `base_bytes` and a branch's `bytes` are those of its parameters in weights.bin, each byte once; None in format 1,
    which has no table of them.
    """
    manifest = read_manifest(root)
    model = manifest.model
    names = ("depth", "width", "heads", "vocab", "latent_channels", "image_size")
    return {
        "name": manifest.name,
        "path": str(root),
        "format": manifest.format,
        "bytes": sum(entry.bytes for entry in manifest.files.values()) + (Path(root) / MANIFEST).stat().st_size,
        "model": {name: getattr(model, name) for name in names},
        "scales": len(manifest.scales),
        "tokens": manifest.tokens,
        "base_bytes": _bytes(manifest, "vqvae.", "base."),
        "branches": _branches(manifest),
        "default_branch": model.control_type if manifest.format == 1 else model.default_branch,
        "precision": asdict(manifest.precision),
        "sampling": asdict(manifest.sampling),
        "more_smooth": manifest.more_smooth,
        "batches": list(manifest.batches),
        "engines": len(manifest.engines),
        "classes": model.classes,
        "class_names": None if model.names is None else list(model.names),
        "provenance": manifest.provenance,
    }


def _branches(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Name → facts; the one of format 1 is called as its control type."""
    model = manifest.model
    if manifest.format == 1:
        convention = model.convention
        facts = {"control_type": model.control_type, "convention": convention.name if convention else None}
        return {model.control_type: {**facts, "bytes": None}} if model.control_type is not None else {}
    return {
        name: {
            "control_type": branch.control_type,
            "convention": branch.convention.name if branch.convention is not None else None,
            "fusion": branch.fusion,
            "transformer": branch.transformer,
            "bytes": _bytes(manifest, f"branches.{name}."),
        }
        for name, branch in model.branches.items()
    }


def _bytes(manifest: Manifest, *prefixes: str) -> int | None:
    if not manifest.parameters:
        return None
    return _covered(one for name, one in manifest.parameters.items() if name.startswith(prefixes))


def _covered(parameters: Iterable[Parameter]) -> int:
    """Bytes of these parameters; those that share a place count once."""
    return sum(length for _, length in {(one.offset, one.bytes) for one in parameters})

"""The plan's manifest: reading, writing, and under one roof what it consists of (`schema`) and lists (`hashing`).

Reading is strict about what is there (every key, type, range and file name is checked) and ignores keys that it does
not know, so that a later version may add some without a new format number.
"""

from __future__ import annotations

import os
from pathlib import Path

from car_runtime.errors import PlanError
from car_runtime.format.folder import PlanFolder
from car_runtime.format.hashing import describe_files, hash_file, verify_files
from car_runtime.format.schema import (
    CHUNK_BYTES,
    CONSTANTS,
    DTYPES,
    FORMAT,
    ITEM_BYTES,
    MANIFEST,
    PRECISIONS,
    REMEDY,
    STORED,
    WEIGHTS,
    Branch,
    Engine,
    FileEntry,
    Graph,
    Manifest,
    Model,
    Parameter,
    Port,
    Precision,
    SamplingDefaults,
    Scale,
    Tensor,
    graphs_digest,
)
from car_runtime.format.sizes import problem_with_sizes
from car_runtime.format.typed_json import parse_json
from car_runtime.system.files import write_atomically

MANIFEST_BYTES = 16 * 1024 * 1024
"""A larger manifest isn't read; a d16's has 0.2 MB."""

__all__ = [
    "CHUNK_BYTES",
    "CONSTANTS",
    "DTYPES",
    "FORMAT",
    "ITEM_BYTES",
    "MANIFEST",
    "PRECISIONS",
    "STORED",
    "WEIGHTS",
    "Branch",
    "Engine",
    "FileEntry",
    "Graph",
    "Manifest",
    "Model",
    "Parameter",
    "Port",
    "Precision",
    "SamplingDefaults",
    "Scale",
    "Tensor",
    "describe_files",
    "graphs_digest",
    "hash_file",
    "parse_manifest",
    "read_manifest",
    "verify_files",
    "write_manifest",
]


def read_manifest(root: str | os.PathLike[str]) -> Manifest:
    """Read and check `root/manifest.json`; no other file is touched.

    Raises PlanError: no such directory, not a plan, not JSON, a newer format, or a broken rule.
    """
    root = Path(root)
    try:
        if os.path.lexists(root / MANIFEST):
            with PlanFolder(root) as folder:
                return parse_manifest(folder.read(MANIFEST, MANIFEST_BYTES))
        kind = "directory" if root.is_dir() else "file" if root.exists() else "missing"
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise PlanError(
            f"cannot read {str(root / MANIFEST)!r} ({why}); check the path and its permissions"
        ) from error
    raise PlanError(
        {
            "directory": f"{str(root)!r} is not a plan: it has no {MANIFEST}; give the directory that holds it",
            "file": f"{str(root)!r} is a file, but a plan is a directory; give the directory, NAME.plan",
            "missing": f"no plan at {str(root)!r}; check the path, or make one with export/build_engines.py",
        }[kind]
    )


def parse_manifest(text: str | bytes) -> Manifest:
    """Read a manifest from its JSON text (UTF-8 when bytes). Raises PlanError."""
    try:
        whole = parse_json(text, MANIFEST, REMEDY)
    except ValueError as error:
        raise PlanError(f"{MANIFEST} is not JSON ({error}); copy the plan again, or {REMEDY}") from error
    version = whole.field("format").read(int)
    if version > FORMAT:
        raise PlanError(
            f"{MANIFEST}: format is {version}, but this car_runtime reads up to {FORMAT}; upgrade car_runtime"
        )
    manifest = whole.read(Manifest)
    problem = problem_with_sizes(manifest)
    if problem is not None:
        raise PlanError(f"{MANIFEST}: {problem}; {REMEDY}")
    return manifest


def write_manifest(root: str | os.PathLike[str], manifest: Manifest) -> None:
    """Write `root/manifest.json`, aside first, so that no reader ever sees half of it."""
    write_atomically({Path(root) / MANIFEST: manifest.to_json().encode()})

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
from car_runtime.format.signature import check_signature
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
    "manifest_in",
    "open_plan_folder",
    "parse_manifest",
    "read_manifest",
    "verify_files",
    "write_manifest",
]


def read_manifest(root: str | os.PathLike[str], signed_by: str | os.PathLike[str] | None = None) -> Manifest:
    """Read and check `root/manifest.json`; no other file is touched but, if asked for, the signature.

    Raises PlanError: as `open_plan_folder` and `manifest_in`; RequestError for a key that can't be used.
    """
    with open_plan_folder(root) as folder:
        return manifest_in(folder, signed_by)


def open_plan_folder(root: str | os.PathLike[str]) -> PlanFolder:
    """The directory of a plan, held open. Raises PlanError: there is none, or it has no manifest."""
    root = Path(root)
    try:
        if os.path.lexists(root / MANIFEST):
            return PlanFolder(root)
        kind = "directory" if root.is_dir() else "file" if root.exists() else "missing"
    except (OSError, ValueError) as error:
        raise _unreadable(root, error) from error
    raise PlanError(
        {
            "directory": f"{str(root)!r} is not a plan: it has no {MANIFEST}; give the directory that holds it",
            "file": f"{str(root)!r} is a file, but a plan is a directory; give the directory, NAME.plan",
            "missing": f"no plan at {str(root)!r}; check the path, or make one with export/build_engines.py",
        }[kind]
    )


def manifest_in(folder: PlanFolder, signed_by: str | os.PathLike[str] | None = None) -> Manifest:
    """Read and check the manifest of a directory that is held open.

    signed_by: a public key (PEM file) whose owner must have signed the very bytes that are read.

    Raises PlanError: not JSON, a newer format, a broken rule, or not so signed; RequestError for a key that can't be
    used.
    """
    try:
        text = folder.read(MANIFEST, MANIFEST_BYTES)
    except (OSError, ValueError) as error:
        raise _unreadable(folder.root, error) from error
    if signed_by is not None:
        check_signature(folder, text, signed_by)
    return parse_manifest(text)


def _unreadable(root: Path, error: OSError | ValueError) -> PlanError:
    why = getattr(error, "strerror", None) or error
    return PlanError(f"cannot read {str(root / MANIFEST)!r} ({why}); check the path and its permissions")


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
    try:
        manifest = whole.read(Manifest)
    except PlanError as error:  # its values are a stranger's, of any length
        raise PlanError(_bounded(str(error))) from error
    problem = problem_with_sizes(manifest)
    if problem is not None:
        raise PlanError(_bounded(f"{MANIFEST}: {problem}; {REMEDY}"))
    return manifest


def _bounded(message: str) -> str:
    """A message whose values may have any length, cut in the middle."""
    return message if len(message) <= 600 else f"{message[:400]}…{message[-100:]}"


def write_manifest(root: str | os.PathLike[str], manifest: Manifest) -> None:
    """Write `root/manifest.json`, aside first, so that no reader ever sees half of it."""
    write_atomically({Path(root) / MANIFEST: manifest.to_json().encode()})

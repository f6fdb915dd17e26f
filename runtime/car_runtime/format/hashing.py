"""Hashes of a plan's files, a SHA-256 per chunk: an export writes them, opening a plan checks them."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from car_runtime.errors import PlanError
from car_runtime.format.schema import CHUNK_BYTES, FileEntry, Manifest

_READ_BYTES = 1024 * 1024


def describe_files(
    root: str | os.PathLike[str], names: Iterable[str], chunk_bytes: int = CHUNK_BYTES
) -> dict[str, FileEntry]:
    """The `files` table of a manifest for files that exist under `root`."""
    return {
        name: FileEntry(
            bytes=(Path(root) / name).stat().st_size,
            sha256=tuple(hash_file(Path(root) / name, chunk_bytes)),
        )
        for name in names
    }


def hash_file(path: str | os.PathLike[str], chunk_bytes: int = CHUNK_BYTES) -> list[str]:
    """SHA-256 of each `chunk_bytes` of a file, as hex; none for an empty file. Chunks are hashed on all cores."""
    chunks = -(-os.stat(path).st_size // chunk_bytes)
    with ThreadPoolExecutor(_hash_threads()) as pool:
        return list(pool.map(lambda i: _hash_chunk(path, i, chunk_bytes), range(chunks)))


def verify_files(
    root: str | os.PathLike[str], manifest: Manifest, *, hashes: bool = True, names: Iterable[str] | None = None
) -> None:
    """Check that every file of the plan is there, inside it, of its size and, with `hashes`, of its content.

    `names`: these files alone. hashlib lets go of the interpreter's lock, so the chunks of all files are hashed at
    once: 2.5 GB take about a second on 2 cores with SHA instructions. Raises PlanError, which says whether
    a file was truncated or edited.
    """
    paths = {name: _inside(Path(root), name) for name in (manifest.files if names is None else names)}
    for name, path in paths.items():
        expected, found = manifest.files[name].bytes, path.stat().st_size
        if found != expected:
            what = "is truncated: it" if found < expected else "has grown: it"
            raise PlanError(f"{name} {what} has {found} bytes of {expected}; copy the plan again")
    if not hashes:
        return
    work = [(name, i) for name in paths for i in range(len(manifest.files[name].sha256))]
    with ThreadPoolExecutor(_hash_threads()) as pool:
        digests = pool.map(lambda item: _hash_chunk(paths[item[0]], item[1], manifest.chunk_bytes), work)
        for (name, i), digest in zip(work, digests, strict=True):
            if digest != manifest.files[name].sha256[i]:
                raise PlanError(
                    f"{name} was changed after the export: the SHA-256 of its chunk {i} is {digest[:12]}…, "
                    f"not {manifest.files[name].sha256[i][:12]}…; copy the plan again"
                )


def _inside(root: Path, name: str) -> Path:
    """The real path of a plan's file. A link may point elsewhere in the plan, not out of it."""
    try:
        path = (root / name).resolve(strict=True)
        mode = path.stat().st_mode
    except (OSError, RuntimeError) as error:
        raise PlanError(f"{name} is missing from {str(root)!r}; copy the plan again") from error
    if not path.is_relative_to(root.resolve()):
        raise PlanError(f"{name} is a link that leads out of the plan, to {str(path)!r}; replace it by the file")
    if not stat.S_ISREG(mode):
        raise PlanError(f"{name} in {str(root)!r} is not a file; copy the plan again")
    return path


def _hash_threads() -> int:
    return min(os.cpu_count() or 1, 8)


def _hash_chunk(path: str | os.PathLike[str], index: int, chunk_bytes: int) -> str:
    """One chunk, through a buffer of 1 MiB: resident memory stays small however large the file is."""
    digest, left, buffer = hashlib.sha256(), chunk_bytes, memoryview(bytearray(min(_READ_BYTES, chunk_bytes)))
    with open(path, "rb", buffering=0) as file:
        file.seek(index * chunk_bytes)
        while left and (count := file.readinto(buffer[: min(left, len(buffer))])):
            digest.update(buffer[:count])
            left -= count
    return digest.hexdigest()

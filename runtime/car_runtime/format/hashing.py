"""Hashes of a plan's files, a SHA-256 per chunk: an export writes them, opening a plan checks them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from car_runtime.errors import PlanError
from car_runtime.format.folder import PlanFolder, read_at
from car_runtime.format.graph_check import GRAPH_BYTES, Checked, check_graph
from car_runtime.format.schema import CHUNK_BYTES, WEIGHTS, FileEntry, Manifest

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
    with open(path, "rb") as file, ThreadPoolExecutor(_hash_threads()) as pool:
        chunks = -(-os.fstat(file.fileno()).st_size // chunk_bytes)
        return list(pool.map(lambda i: _hash_chunk(file.fileno(), i, chunk_bytes), range(chunks)))


def verify_files(
    root: str | os.PathLike[str], manifest: Manifest, *, hashes: bool = True, names: Iterable[str] | None = None
) -> None:
    """`verify_folder` of a plan that isn't opened otherwise, its graphs' structure included. Raises PlanError."""
    try:
        folder = PlanFolder(root)
    except OSError as error:
        raise PlanError(f"cannot open {str(root)!r} ({error.strerror}); check the path") from error
    with folder:
        verify_folder(folder, manifest, hashes=hashes, names=names)


def verify_folder(
    folder: PlanFolder, manifest: Manifest, *, hashes: bool = True, names: Iterable[str] | None = None
) -> None:
    """Check that every file of the plan is there, regular, of its size and, with `hashes`, of its content.

    Graphs are also looked into, with hashes or without: what `check_graph` refuses no engine gets to see. `names`:
    these files alone. hashlib lets go of the interpreter's lock, so the chunks of all files are hashed at once: it
    takes about a second for 2.5 GB on 2 cores with SHA instructions. Raises PlanError, which says whether a file was
    truncated or edited.
    """
    wanted = list(manifest.files if names is None else names)
    for name in wanted:
        expected, found = manifest.files[name].bytes, folder.size(name)
        if found != expected:
            what = "is truncated: it" if found < expected else "has grown: it"
            raise PlanError(f"{name} {what} has {found} bytes of {expected}; copy the plan again")
    if hashes:
        _check_hashes(folder, manifest, wanted)
    checked = Checked()
    for graph in manifest.graphs.values():
        if graph.file in wanted:
            check_graph(folder.read(graph.file, GRAPH_BYTES), graph, manifest.files[WEIGHTS].bytes, checked)


def _check_hashes(folder: PlanFolder, manifest: Manifest, names: Sequence[str]) -> None:
    work = [(name, i) for name in names for i in range(len(manifest.files[name].sha256))]
    with ThreadPoolExecutor(_hash_threads()) as pool:
        digests = pool.map(lambda item: _hash_chunk(folder.file(item[0]), item[1], manifest.chunk_bytes), work)
        for (name, i), digest in zip(work, digests, strict=True):
            if digest != manifest.files[name].sha256[i]:
                raise PlanError(
                    f"{name} was changed after the export: the SHA-256 of its chunk {i} is {digest[:12]}…, "
                    f"not {manifest.files[name].sha256[i][:12]}…; copy the plan again"
                )


def _hash_threads() -> int:
    return min(os.cpu_count() or 1, 8)


def _hash_chunk(descriptor: int, index: int, chunk_bytes: int) -> str:
    """One chunk, 1 MiB at a time: resident memory stays small however large the file is."""
    digest, at, end = hashlib.sha256(), index * chunk_bytes, (index + 1) * chunk_bytes
    while at < end and (part := read_at(descriptor, min(_READ_BYTES, end - at), at)):
        digest.update(part)
        at += len(part)
    return digest.hexdigest()

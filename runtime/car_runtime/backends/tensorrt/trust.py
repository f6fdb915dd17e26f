"""What was compiled on this machine: digests of engines and runtime caches, an empty file each in ~/.cache/car.

An engine is code that TensorRT loads as it is, and so is a runtime cache. What came with a plan is loaded only if it
is in this record, or the person trusts the plan. The record counts only where nobody else can write to it.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from car_runtime.system.ownership import is_closed, is_ours

RECORD = Path("~/.cache/car/built")


def digest(content: bytes | memoryview) -> str:
    """SHA-256, in hex."""
    return hashlib.sha256(content).hexdigest()


def digest_of(file: Path) -> str:
    """`digest` of a file of any size. Raises OSError."""
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def remember(known: str) -> None:
    """Note a digest as of something that was compiled here. Where it can't be noted it isn't trusted, no more."""
    with suppress(OSError, RuntimeError):  # RuntimeError: nobody's home
        folder = RECORD.expanduser()
        for made in (folder.parent, folder):
            made.mkdir(parents=True, exist_ok=True, mode=0o700)
        flags = os.O_CREAT | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0)
        os.close(os.open(folder / known, flags, 0o600))


def is_built_here(known: str) -> bool:
    """Whether a digest is in the record, and none but this user (or root) can have noted it."""
    if not hasattr(os, "geteuid"):
        return False
    try:
        folder = RECORD.expanduser()
        return is_closed(folder) and is_ours(folder / known)
    except (OSError, RuntimeError):
        return False

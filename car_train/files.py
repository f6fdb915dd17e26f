"""Files and folders that are whole or not there, and their digests."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A file next to `target`, to be written within, that takes its name at the end; on any error it goes.

    The folder must exist. A process that is killed leaves a hidden `.NAME.….part`. Raises OSError.
    """
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.absolute().parent)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o644)  # mkstemp makes it private
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_text(target: Path, text: str) -> None:
    """Write a whole UTF-8 file, or leave what was there. Raises OSError."""
    with written_aside(target) as file:
        file.write_text(text, encoding="utf-8")


@contextmanager
def folder_aside(target: Path) -> Iterator[Path]:
    """A folder next to `target`, to be filled within, that takes its name at the end; on any error it goes.

    A folder of that name is replaced only when the new one is whole. Parents are made. Raises OSError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.absolute().parent))
    try:
        yield aside
        put_in_place(aside, target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def put_in_place(aside: Path, target: Path) -> None:
    """Rename a finished folder to its name; what was there goes once the new one is in place, or comes back."""
    os.chmod(aside, 0o755)  # mkdtemp makes it private
    if not target.exists():
        os.replace(aside, target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    os.replace(target, old / target.name)
    try:
        os.replace(aside, target)
    except BaseException:
        os.replace(old / target.name, target)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Delete a folder: renamed first, so that an interrupted deletion leaves nothing that looks whole."""
    aside = path.with_name(f".{path.name}.removed")
    os.replace(path, aside)
    shutil.rmtree(aside, ignore_errors=True)


def sha256(path: Path) -> str:
    """Hex digest of a file of any size."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()

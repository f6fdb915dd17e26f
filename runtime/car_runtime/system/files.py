"""Files that are whole or not there: written under another name in the same directory, then renamed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


def write_atomically(contents: Mapping[Path, bytes]) -> None:
    """Write all of the files or none, replacing what is there. Raises OSError with the file's path as `filename`."""
    asides = {path: aside_of(path) for path in contents}
    try:
        for path, content in contents.items():
            with _named(path), open(asides[path], "xb") as file:
                file.write(content)
        for path in contents:
            with _named(path):
                os.replace(asides[path], path)
    finally:
        for left in asides.values():
            left.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name next to `path` for somebody else to write to: renamed to `path` at the end, deleted after an error."""
    aside = aside_of(path)
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def aside_of(path: Path) -> Path:
    """A hidden name in the same directory that nobody else uses.

    Not one of tempfile's, whose files are private: a result should have the permissions that new files get.
    """
    return path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """An error names the file that was to be written, not the hidden one."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise

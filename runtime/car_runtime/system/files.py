"""Files that are whole or not there: written under another name in the same directory, then renamed.

The other name says whose it is, `.NAME.car-PID-part…`; the next writer in that directory removes those of processes
that are gone (`car_train.files` has the same names, and folders).
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

_LEFT = re.compile(r"\..+\.car-(\d+)-part[0-9a-f]{8}")


def write_atomically(contents: Mapping[Path, bytes]) -> None:
    """Write all of the files or none, replacing what is there. Raises OSError with the file's path as `filename`."""
    for folder in {path.absolute().parent for path in contents}:
        sweep(folder)
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
    return path.with_name(f".{path.name[:40]}.car-{os.getpid()}-part{secrets.token_hex(4)}")


def sweep(folder: Path) -> None:
    """Remove the files that writers which are gone left in a folder; not on Windows, where asking would end them."""
    if os.name != "posix":
        return
    with suppress(OSError):
        for left in list(folder.iterdir()):
            found = _LEFT.fullmatch(left.name)
            if found is not None and not _runs(int(found[1])) and not left.is_dir():
                with suppress(OSError):  # another start sweeps, too
                    left.unlink()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """An error names the file that was to be written, not the hidden one."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise

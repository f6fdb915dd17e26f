"""Files that are whole or not there, written under another name and then renamed; and one writer to a place.

The other name says whose it is, `.NAME.car-PID-part…`; the next writer in that directory removes those of processes
that are gone (`car_train.files` has the same names, and folders; `tests/test_twins.py` holds the two together).
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from car_runtime.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None  # type: ignore[assignment]

_LEFT = re.compile(r"\..+\.car-(\d+)-part[0-9a-f]{8}")


class BusyError(OutputError):
    """Another process writes to the same place. The message names it."""


def read_regular(path: str | os.PathLike[str], limit: int) -> bytes:
    """All of a regular file of at most `limit` bytes.

    Raises OSError: it can't be opened, is larger, or is something else (a FIFO would wait for a writer).
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(limit + 1)
    finally:
        os.close(descriptor)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"it has over {limit} bytes")
    return data


def write_atomically(contents: Mapping[Path, bytes]) -> None:
    """Write all of the files or none, replacing what is there. Raises OSError with the file's path as `filename`."""
    for folder in {path.absolute().parent for path in contents}:
        _sweep_once(folder)
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


@cache
def _sweep_once(folder: Path) -> None:
    """`sweep`, the first time that this process writes there: a folder of many images is not listed for each."""
    sweep(folder)


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
def one_writer(target: Path) -> Iterator[None]:
    """Hold `target` for this process: a second one that wants it gets BusyError, with the first one's number.

    The lock is on a hidden file next to it, which goes at the end. What died lets go of it by itself.
    """
    if fcntl is None:
        yield
        return
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    place = target.absolute().parent / f".{target.name}.car-lock"
    descriptor = _locked(place, target)
    try:
        _sweep_once(place.parent)
        yield
    finally:
        place.unlink(missing_ok=True)  # before it is let go of: who opened it meanwhile sees that it is gone
        os.close(descriptor)


def _locked(place: Path, target: Path) -> int:
    """The open lock file, locked, with this process's number in it."""
    while True:
        descriptor = os.open(place, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise BusyError(
                f"{target} is being written by process {owner or '(unknown)'}; wait for it, or choose another name"
            ) from error
        try:
            current = os.stat(place).st_ino
        except FileNotFoundError:
            current = None
        if os.fstat(descriptor).st_ino == current:
            with suppress(OSError):  # a full disk: the lock holds all the same, but names no process
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            return descriptor
        os.close(descriptor)  # it was removed between opening and locking


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """An error names the file that was to be written, not the hidden one."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise

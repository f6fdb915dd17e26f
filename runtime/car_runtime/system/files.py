"""Files and folders that are whole or not there, written under another name, then renamed; and one writer to a place.

The other name says whose it is, `.NAME.car-PID-…`; the next writer in that directory removes those of processes that
are gone. A folder that replaces another is exchanged with it where the system can (Linux); elsewhere the old one is
set aside first, and put back by the next start if the process died in between. (`car_train.files` does the same;
`tests/test_twins.py` holds the two together.)
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from car_runtime.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows: no locks, and nothing is swept
    fcntl = None  # type: ignore[assignment]

_LEFT = re.compile(r"\.(?P<name>.+)\.car-(?P<process>\d+)-(?P<kind>new|old|gone|part)[0-9a-f]{8}")
_EXCHANGE = 2
"""RENAME_EXCHANGE of Linux's renameat2."""


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


def _aside(target: Path, kind: str) -> Path:
    """A hidden name in the folder of `target` that says who made it and what it is."""
    return target.absolute().parent / f".{target.name}.car-{os.getpid()}-{kind}{secrets.token_hex(4)}"


@contextmanager
def folder_aside(target: Path) -> Iterator[Path]:
    """A folder next to `target`, to be filled within, that takes its name at the end; on any error it goes.

    A folder of that name is replaced only when the new one is whole. Parents are made. Raises OSError.
    """
    aside = new_folder(target)
    try:
        yield aside
        put_in_place(aside, target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def new_folder(target: Path) -> Path:
    """An empty hidden folder next to `target`, which the caller removes. Raises OSError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep_once(target.absolute().parent)
    folder = _aside(target, "new")
    folder.mkdir(mode=0o755)
    return folder


def put_in_place(aside: Path, target: Path) -> None:
    """Rename a finished folder to its name; what was there goes once the new one is in place, or comes back."""
    if not target.exists():
        os.replace(aside, target)
        return
    if exchange(aside, target):
        _remove(aside)
        return
    old = _aside(target, "old")
    os.replace(target, old)
    try:
        os.replace(aside, target)
    except BaseException:
        os.replace(old, target)
        raise
    _remove(old)


def _remove(replaced: Path) -> None:
    """Delete a folder that was replaced; of a link to one, the link."""
    if replaced.is_symlink():
        replaced.unlink(missing_ok=True)
    else:
        shutil.rmtree(replaced, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Let two names change places at once; False where the system or the file system has no such thing."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):  # a C library before 2.28, or another
        return False
    here = -100  # AT_FDCWD
    done = renameat2(here, os.fsencode(one), here, os.fsencode(other), ctypes.c_uint(_EXCHANGE))
    return int(done) == 0


@cache
def _sweep_once(folder: Path) -> None:
    """`sweep`, the first time that this process writes there: a folder of many images is not listed for each."""
    sweep(folder)


def sweep(folder: Path) -> None:
    """Remove what processes that are gone left in a folder, or put back what they had set aside.

    Only names that `_aside` makes are touched. A process is gone if none of its number runs here; one of another
    machine on the same file system could be taken for gone, so that a run's folder belongs on one machine at a time.
    """
    if fcntl is None:
        return
    with suppress(OSError):
        for left in list(folder.iterdir()):
            found = _LEFT.fullmatch(left.name)
            if found is None or _runs(int(found["process"])):
                continue
            target = folder / found["name"]
            with suppress(OSError):  # another start sweeps, too
                if found["kind"] == "old" and not target.exists():
                    os.replace(left, target)
                elif left.is_dir() and not left.is_symlink():
                    shutil.rmtree(left)
                else:
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

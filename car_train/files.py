"""Files and folders that are whole or not there, whatever stops the process, and their digests.

What is being written has a hidden name next to its place, `.NAME.car-PID-…`, and takes its place by one rename. A
folder that replaces another is exchanged with it where the system can (Linux); elsewhere the old one is set aside
first, and put back by the next start if the process died in between. `sweep` removes what dead processes left.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import secrets
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from car_train.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: no locks, and nothing is swept
    fcntl = None  # type: ignore[assignment]

_LEFT = re.compile(r"\.(?P<name>.+)\.car-(?P<process>\d+)-(?P<kind>new|old|gone|part)[0-9a-f]{8}")
_EXCHANGE = 2
"""RENAME_EXCHANGE of Linux's renameat2."""


class BusyError(UserError):
    """Another process writes to the same place. The message names it."""


class OutputError(UserError):
    """A file that can't be written where it is wanted. The message names it."""


def check_writable(file: Path, suffix: str) -> None:
    """See that a file can be written before hours are spent on what goes into it. Raises OutputError."""
    why = "" if file.suffix.lower() == suffix else f"it does not end with {suffix}"
    why = why or ("it is a folder" if file.is_dir() else "")
    try:
        tempfile.TemporaryFile(dir=file.absolute().parent).close()
    except OSError as error:
        why = why or str(error.strerror)
    if why:
        raise OutputError(f"can't write {file}: {why}; give a {suffix} in a folder that exists and can be written to")


def _aside(target: Path, kind: str) -> Path:
    """A hidden name in the folder of `target` that says who made it and what it is."""
    return target.absolute().parent / f".{target.name}.car-{os.getpid()}-{kind}{secrets.token_hex(4)}"


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A file next to `target`, to be written within, that takes its name at the end; on any error it goes.

    The folder must exist. Raises OSError.
    """
    _sweep_once(target.absolute().parent)
    aside = _aside(target, "part")
    os.close(os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    try:
        yield aside
        os.replace(aside, target)
    except BaseException:
        aside.unlink(missing_ok=True)
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


@contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """A hidden folder next to `target` to work in, on the same file system; it goes at the end. Raises OSError."""
    folder = new_folder(target)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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


def remove_folder(path: Path) -> None:
    """Delete a folder: renamed first, so that an interrupted deletion leaves nothing that looks whole."""
    aside = _aside(path, "gone")
    os.replace(path, aside)
    shutil.rmtree(aside, ignore_errors=True)


@cache
def _sweep_once(folder: Path) -> None:
    """`sweep`, the first time that this process writes there."""
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


def sha256(path: Path) -> str:
    """Hex digest of a file of any size."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_archive(path: Path) -> None:
    """Refuse a zip archive, as `torch.save` writes, that holds more than its own bytes. Raises OSError, ValueError.

    torch unpacks whatever is packed, a thousand times its size, and believes it.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":
            return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(one.compress_type != zipfile.ZIP_STORED for one in members):
        raise ValueError("it is packed, which torch.save never does")
    if sum(one.file_size for one in members) > path.stat().st_size:
        raise ValueError("its members are longer than it is")

"""The directory of a plan, from which nothing but its own regular files is opened."""

from __future__ import annotations

import errno
import mmap
import os
import stat
from contextlib import suppress
from itertools import islice
from pathlib import Path
from threading import Lock
from types import TracebackType

from car_runtime.errors import PlanError, printable

_RELATIVE = os.open in os.supports_dir_fd
"""Whether this system opens a file relative to a directory that is open. Windows doesn't: there names are joined."""
_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)  # a FIFO would wait for a writer
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)
_DIRECTORY = getattr(os, "O_DIRECTORY", 0)
MOST_HELD = 128
"""Files that are opened before they are asked for; a plan has some 15 at one batch size, and 11 a branch."""


class PlanFolder:
    """A plan's directory, held open: a file is opened once, relative to it, and stays the one that it was.

    Renaming or replacing the directory or a file in it changes nothing for who has this. Links are refused, within
    the plan too, and so is what is no regular file. May be used by several threads at once.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        """Raises OSError where `root` is no directory that can be opened."""
        self.root = Path(root)
        self._lock = Lock()
        self._files: dict[str, int] = {}
        self._found: dict[str, os.stat_result] = {}
        self._directories: dict[str, int] = {}
        self._closed = False
        if _RELATIVE:
            self._directories[""] = os.open(self.root, os.O_RDONLY | _DIRECTORY | getattr(os, "O_CLOEXEC", 0))

    def __enter__(self) -> PlanFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all that was opened. Closing twice does nothing."""
        with self._lock:
            self._closed = True
            for descriptor in (*self._files.values(), *self._directories.values()):
                os.close(descriptor)
            self._files, self._directories = {}, {}

    def file(self, name: str) -> int:
        """The descriptor of a file of the plan, NAME or engines/NAME; the same one each time. It stays this object's.

        Raises PlanError: missing, a link, or no regular file.
        """
        with self._lock:
            if self._closed:
                raise PlanError(f"{name} is asked for after the plan was closed; open it again")
            if name not in self._files:
                self._files[name] = self._open(name)
                self._found[name] = os.fstat(self._files[name])
            return self._files[name]

    def size(self, name: str) -> int:
        """Bytes of a file. Raises PlanError."""
        return os.fstat(self.file(name)).st_size

    def read(self, name: str, limit: int) -> bytes:
        """All of a file. Raises PlanError where it has more than `limit` bytes."""
        descriptor = self.file(name)
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise PlanError(f"{name} has {size} bytes, but at most {limit} are read; export the plan again")
        found = bytearray()
        while len(found) < size and (part := read_at(descriptor, size - len(found), len(found))):
            found += part
        return bytes(found)

    @property
    def held(self) -> Path:
        """A path that leads to the directory that is open here, whatever has its name by now, for engines.

        It is good in this process, until `close`. Where the system has none: the directory's own path.
        """
        path = Path(f"/proc/self/fd/{self._directories.get('', -1)}")
        return path if path.is_dir() else self.root

    def hold(self) -> None:
        """Open the files that are there now, so that one who replaces the directory and removes it takes none away.

        What can't be opened, or isn't regular, is refused when it is asked for.
        """
        if "" in self._directories:
            with os.scandir(self._directories[""]) as entries:
                for entry in islice(entries, MOST_HELD):
                    with suppress(PlanError):
                        self.file(entry.name)

    @property
    def is_replaced(self) -> bool:
        """Whether another directory has the place by now, or none."""
        held = self._directories.get("")
        if held is None:
            return False
        try:
            now = os.stat(self.root)
        except OSError:
            return True
        return not os.path.samestat(now, os.fstat(held))

    def check_unchanged(self) -> None:
        """Raise PlanError where a file that was opened has been written to, or has another one in its place.

        Engines open some files again, by name in `held`. Who swaps one meanwhile, and swaps it back, changes its
        inode's time; who swaps a directory above changes nothing in `held`.
        """
        with self._lock:
            for name, found in self._found.items():
                try:
                    now = [os.fstat(self._files[name]), self._named(name)]
                except OSError:
                    now = []
                if not now or any(_identity(one) != _identity(found) for one in now):
                    raise PlanError(f"{name} was changed while the plan was opened; open it again")

    def _named(self, name: str) -> os.stat_result:
        """What has a file's name by now."""
        folder, _, last = name.rpartition("/")
        if not _RELATIVE or folder not in self._directories:
            return os.stat(self.root / name, follow_symlinks=False)
        return os.stat(last, dir_fd=self._directories[folder], follow_symlinks=False)

    def _open(self, name: str) -> int:
        folder, _, last = name.rpartition("/")
        try:
            descriptor = self._open_relative(folder, last)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENOTDIR):
                raise PlanError(f"{name} is a link; replace it by the file, a plan holds no links") from error
            if error.errno in (errno.ENOENT, errno.ENXIO, errno.EISDIR):
                raise PlanError(f"{name} is missing from {str(self.root)!r}; copy the plan again") from error
            why = printable(error.strerror or str(error))
            raise PlanError(f"cannot open {name} ({why}); check its permissions, or copy the plan again") from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise PlanError(f"{name} in {str(self.root)!r} is not a file; copy the plan again")
        return descriptor

    def _open_relative(self, folder: str, last: str) -> int:
        if not _RELATIVE:
            path = self.root / folder / last
            if any(os.path.islink(one) for one in (path, self.root / folder) if one != self.root):
                raise OSError(errno.ELOOP, "it is a link")
            return os.open(path, _FLAGS)
        if folder not in self._directories:
            flags = os.O_RDONLY | _DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            self._directories[folder] = os.open(folder, flags, dir_fd=self._directories[""])
        return os.open(last, _FLAGS, dir_fd=self._directories[folder])


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def open_folder(root: str | os.PathLike[str]) -> PlanFolder:
    """The directory of a plan. Raises PlanError where it can't be opened."""
    try:
        return PlanFolder(root)
    except OSError as error:
        raise PlanError(f"cannot open {str(root)!r} ({error.strerror}); check the path") from error


def map_file(folder: PlanFolder, name: str) -> mmap.mmap | bytes:
    """A file's bytes, mapped to be read. It outlives the folder. Raises PlanError."""
    return mmap.mmap(folder.file(name), 0, access=mmap.ACCESS_READ) if folder.size(name) else b""


def read_at(descriptor: int, count: int, offset: int) -> bytes:
    """At most `count` bytes from `offset` on, whatever other threads read."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, count, offset)
    with _SEEKING:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, count)


_SEEKING = Lock()

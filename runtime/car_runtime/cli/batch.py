"""`car-run batch`: many controls, classes and seeds in one process, to a folder that can be gone on with."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

from car_runtime import __version__
from car_runtime.cli.errors import note
from car_runtime.cli.options import Parser, add_setting, add_settings, settings_of
from car_runtime.cli.outputs import check_distinct
from car_runtime.cli.run import (
    add_engine_flags,
    add_plan_flag,
    image_files,
    opened,
    plan_of,
    settings_report,
)
from car_runtime.errors import CarError, OutputError, RequestError, UserError, error_line, printable

if TYPE_CHECKING:
    from car_runtime.cli.jobs import Job
    from car_runtime.plan import Plan, Result
    from car_runtime.request import Request

ABOUT = "Draw many images in one process: a job per row of a file, or per image of a folder."
EXAMPLES = """examples:
  car-run batch edges/ -o drawn --class cat -n 4      every control image of a folder, 4 seeds each
  car-run batch jobs.csv -o drawn                     columns: control, class, seed, cfg … or any other setting
                                                      (control:canny, control:depth … for single branches)
  car-run batch jobs.jsonl -o drawn --resume          go on where it was interrupted; failed jobs are tried again
"""
RESULTS = "results.jsonl"
RESULTS_BYTES = 4 * 1024**3
"""Of the results of a million jobs, some 2 KB each."""
LISTED = 20
"""Failed jobs that are listed on stderr; the others are in the results."""


class Failure(NamedTuple):
    """A job that failed. No exception is kept: its traceback would keep the job's arrays."""

    job: Job
    why: str
    given: bool
    """Whether what it was given is the reason, and not the engine."""


def parse_args(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Raises RequestError on misuse."""
    parser = Parser("car-run batch", ABOUT, EXAMPLES)
    parser.add_argument(
        "jobs", type=Path, metavar="JOBS", help="a file .csv or .jsonl, or a folder of control images"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--resume", action="store_true", help="skip what is done in DIR, and do the rest")
    parser.add_argument("--photos", action="store_true", help="the folder's images are photos: controls are derived")
    inputs = parser.add_argument_group("what rows don't say")
    add_plan_flag(inputs)
    for name in ("control", "fit", "label"):
        add_setting(inputs, name)
    add_engine_flags(inputs)
    for group in ("sampling", "schedule"):
        add_settings(parser, group)
    outputs = parser.add_argument_group("what to write")
    outputs.add_argument("--no-receipt", action="store_true", help="leave settings and tokens out of the PNGs")
    outputs.add_argument("--json", action="store_true", help="print one JSON object instead of the path")
    outputs.add_argument("--debug", action="store_true", help="show a traceback when the program itself fails")
    return parser.parse_args(arguments)


def run(arguments: Sequence[str]) -> int:
    """Do all jobs. Returns the exit code: 2 if any failed for what it was given, 1 for the engine's failures."""
    args = parse_args(arguments)
    if args.control == "-":
        raise RequestError("--control - is stdin, which can be read once; name a file")
    if args.control is not None and (args.jobs.is_dir() or args.photos):
        raise RequestError("--control is given, and the folder's images are controls, too; leave one of them out")
    from car_runtime.cli.jobs import read_jobs
    from car_runtime.receipt import plan_digest
    from car_runtime.system.files import one_writer

    root, manifest = plan_of(args)
    common = settings_of(args)
    jobs = read_jobs(args.jobs, common, manifest, photos=args.photos)
    _check_outputs(args, jobs, common)
    with one_writer(args.output / RESULTS):
        results = Results(args.output / RESULTS)
        digest = plan_digest(manifest)
        left = (
            [job for job in jobs if not results.has(job, job.digest(common, digest), args.output)]
            if args.resume
            else jobs
        )
        results.begin({job.name for job in left})
        failed: list[Failure] = []
        try:
            if left:
                with opened(args, root) as plan:
                    failed = Batch(args, plan, results, common, digest).run(left)
        except KeyboardInterrupt:
            note(f"car-run: {results.done} of {len(left)} jobs are done; go on with --resume")
            raise
        finally:
            results.close()
    return _report(args, len(jobs) - len(left), len(left), failed)


def _report(args: argparse.Namespace, skipped: int, left: int, failed: Sequence[Failure]) -> int:
    for job, why, _ in failed[:LISTED]:
        note(f"car-run: job {printable(job.name)} (row {job.row}) failed: {why}")
    if len(failed) > LISTED:
        note(f"car-run: {len(failed) - LISTED} more failed; {RESULTS} lists them all")
    path = args.output / RESULTS
    report = {"done": left - len(failed), "skipped": skipped, "failed": [failure.job.name for failure in failed]}
    print(json.dumps({"version": __version__, "results": str(path), **report}) if args.json else path)
    sys.stdout.flush()
    note(f"car-run: {report['done']} done, {skipped} skipped, {len(failed)} failed")
    return 0 if not failed else 2 if all(failure.given for failure in failed) else 1


def _check_outputs(args: argparse.Namespace, jobs: Sequence[Job], common: Mapping[str, Any]) -> None:
    """See that the folder can be written to and that no job replaces an input or another's image; make the folder."""
    from car_runtime.images import check_writable

    out: Path = args.output
    if out.exists() and not out.is_dir():
        raise OutputError(f"the output {str(out)!r} is a file; name a folder")
    if (out / RESULTS).exists() and not args.resume:
        raise OutputError(f"{str(out)!r} has results already; go on with --resume, or choose another folder")
    if out.exists() and args.jobs.is_dir() and out.samefile(args.jobs):
        raise OutputError(f"the output {str(out)!r} is the folder of the jobs; choose another -o")
    wanted: dict[str, tuple[Path, Job]] = {}
    for job in jobs:
        for path in job.paths(out, job.settings(common)["n"]):
            _, other = wanted.setdefault(path.name.casefold(), (path, job))
            if other is not job:
                raise RequestError(
                    f"row {job.row}: {path.name!r} is an image of row {other.row}, too; rename one of these jobs"
                )
    # Inputs are compared by the folders that they are in: resolving each of 10,000 files would take seconds.
    inputs = [args.jobs, *(path for job in jobs for path in job.inputs)]
    inputs += [Path(common["control"])] if common["control"] else []
    folders = {parent: parent.resolve() for parent in {path.parent for path in inputs}}
    close = [path for path in inputs if folders[path.parent] == out.resolve() or path.is_symlink()]
    images = [path for path, _ in wanted.values()] if close else []
    check_distinct([("-o", path) for path in (out / RESULTS, *images)], close)
    check_writable(out / RESULTS if out.is_dir() else out)
    out.mkdir(exist_ok=True)


class Results:
    """`results.jsonl`: a line per job that is done or failed, written when its images are."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: dict[str, dict[str, Any]] = {}
        self.done = 0
        """Jobs of this process that ended well."""
        for text in _content(path).split(b"\n"):
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):  # the last one, torn when the machine went down
                continue
            if isinstance(line, dict) and isinstance(line.get("name"), str):
                self._lines[line["name"]] = line

    def has(self, job: Job, digest: str, out: Path) -> bool:
        """Whether that very job is done and its images are there."""
        line = self._lines.get(job.name, {})
        if line.get("status") != "done" or line.get("digest") != digest or not isinstance(line.get("images"), list):
            return False
        return all(path.is_file() for path in job.paths(out, len(line["images"])))

    def begin(self, anew: set[str]) -> None:
        """Open the file for more lines, without those of the jobs that are to be done anew."""
        from car_runtime.images import write_files

        kept = [json.dumps(line) + "\n" for name, line in self._lines.items() if name not in anew]
        write_files({self._path: "".join(kept).encode()})
        self._lines.clear()
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115

    def add(self, line: Mapping[str, Any]) -> None:
        """One more job."""
        text = json.dumps(line).encode() + b"\n"
        try:
            if self._file.write(text) != len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise OutputError(f"cannot write {str(self._path)!r} ({error.strerror}); make room") from error
        self.done += line["status"] == "done"

    def close(self) -> None:
        """No more jobs."""
        self._file.close()


def _content(path: Path) -> bytes:
    """What is in the results so far. Raises OutputError: another kind of file, such as a FIFO, or over 4 GB."""
    from car_runtime.system.files import read_regular

    try:
        return read_regular(path, RESULTS_BYTES)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise OutputError(f"cannot read {str(path)!r} ({error.strerror}); choose another folder") from error


class Batch:
    """Does jobs on an open plan and writes their results."""

    def __init__(
        self, args: argparse.Namespace, plan: Plan, results: Results, common: Mapping[str, Any], digest: str
    ) -> None:
        self._args, self._plan, self._results, self._common, self._digest = args, plan, results, common, digest

    def run(self, jobs: Sequence[Job]) -> list[Failure]:
        """Do them in turn. Returns those that failed, with the reasons."""
        from car_runtime.cli.progress import Bar

        failed: list[Failure] = []
        bar = Bar(len(jobs), "jobs")
        try:
            for together in self._shared(jobs):
                for failure in self._do(together):
                    failed += [] if failure is None else [failure]
                    bar.advance(failed=failure is not None)
        finally:
            bar.end()
        return failed

    def _shared(self, jobs: Sequence[Job]) -> Iterator[Sequence[Job]]:
        """The jobs in groups that share steps. Where they can't, one by one: what is finished is written at once."""
        size = max(self._plan.shared_batch // self._common["n"], 1)
        for first in range(0, len(jobs), size):
            yield jobs[first : first + size]

    def _do(self, jobs: Sequence[Job]) -> Iterator[Failure | None]:
        """Do some jobs together: their images and lines. Gives for each why it failed, if it did."""
        began, good = perf_counter(), []
        for job, prepared in [(job, self._prepared(job)) for job in jobs]:
            if isinstance(prepared, Failure):
                yield prepared
            else:
                good.append((job, prepared))
        if not good:
            return
        try:
            results = self._plan.generate_many([request for _, request in good])
        except CarError as error:
            if len(good) == 1:
                yield self._failed(good[0][0], error)
                return
            for job, _ in good:  # one of them is to blame
                yield from self._do([job])
            return
        seconds = (perf_counter() - began) / len(good)
        for (job, _), result in zip(good, results, strict=True):
            self._write(job, result, seconds)
            yield None

    def _failed(self, job: Job, error: CarError) -> Failure:
        self._results.add(self._line(job) | {"status": "failed", "error": error_line(error)})
        return Failure(job, error_line(error), isinstance(error, UserError))

    def _line(self, job: Job) -> dict[str, Any]:
        return {"name": job.name, "row": job.row, "digest": job.digest(self._common, self._digest)}

    def _prepared(self, job: Job) -> Request | Failure:
        try:
            return self._request(job)
        except CarError as error:
            return self._failed(job, error)

    def _request(self, job: Job) -> Request:
        from dataclasses import replace

        from car_runtime.config import GenerationConfig
        from car_runtime.photo import control_of_photo
        from car_runtime.request import resolve

        manifest, settings = self._plan.manifest, job.settings(self._common)
        said: tuple[str, ...] = ()
        if job.photo is not None:
            settings["control"], said = control_of_photo(job.photo, manifest, fit=settings["fit"])
        request = resolve(manifest, GenerationConfig(**settings))
        return replace(request, warnings=(*said, *request.warnings))

    def _write(self, job: Job, result: Result, seconds: float) -> None:
        from car_runtime.images import write_files

        manifest, request, out = self._plan.manifest, result.request, self._args.output
        paths = job.paths(out, len(request.seeds))
        write_files(image_files(manifest, paths, result, receipt=not self._args.no_receipt))
        images = [{"path": p.name, "seed": seed} for p, seed in zip(paths, request.seeds, strict=True)]
        about = {**settings_report(manifest, request), "warnings": list(request.warnings), "seconds": seconds}
        self._results.add(self._line(job) | {"status": "done", "images": images, **about})

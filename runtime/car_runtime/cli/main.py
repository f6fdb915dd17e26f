"""`car-run`: a control image and a class in, pictures out.

Results (paths, or one JSON object) go to stdout, everything else to stderr. Exit codes: 0 done; 2 something given
cannot be used, one line says what and how to repair it, nothing is written; 1 failure inside; 130 interrupted. numpy
and the engine are imported only once the arguments are known to be good, so that `--help` and mistakes answer at
once.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NoReturn

from car_runtime import __version__
from car_runtime.errors import OutputError, RequestError, UserError

if TYPE_CHECKING:
    from PIL import Image

    from car_runtime.format.manifest import Manifest
    from car_runtime.plan import Result, ScaleResult
    from car_runtime.request import Request

EXAMPLES = """examples:
  car-run --control edges.png                              the plan that ships with the package, no class
  car-run --photo cat.jpg --class cat -n 4 --grid          control derived from a photo; 4 seeds and a sheet of all
  car-run -e d16.plan --control depth.png --class 207 --seed 7 --cfg 4 --top-k 900 --top-p 0.95 -o dog.png
  car-run -e d16.plan --control depth.png --class "golden retriever" --preview steps/ --tokens dog.npz --json
  car-run -e d16.plan --control depth.png --class 207 --cfg-scales -7       the last scales unguided, at half the cost
  car-run -e d16.plan --list-classes

other commands, each with its own --help:
  car-run doctor [PLAN]     what this machine can run, and how to install what is missing
  car-run verify [PLAN]     does a plan do here what it did when it was exported, and how fast
"""
DOCTOR_EXAMPLES = """examples:
  car-run doctor               the backends of this machine
  car-run doctor d16.plan      also which of the plan's engines it can use, and the command that builds the others

exit code: 0 some backend works, 1 none does, 2 the arguments cannot be used
"""
VERIFY_EXAMPLES = """examples:
  car-run verify                                          the plan that ships with the package
  car-run verify d16.plan --backend rtx -o report.json    the acceptance test of a GPU; docs/acceptance.md explains it
  car-run verify d16.plan --batch 1,4 --runs 20 --json

exit code: 0 everything agrees, 1 something differs or fails, 2 the plan or the arguments cannot be used
"""
SCHEDULE = ("cfg_scales", "control_scales", "control_strength", "stop_after")
"""What `add_schedule_flags` adds, by name."""


class _Parser(argparse.ArgumentParser):
    """argparse, with its errors as exceptions, so that they end in one line like all others."""

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message}; see {self.prog} --help")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line. Raises RequestError on misuse."""
    parser = _Parser(
        prog="car-run",
        description="Generate pictures that follow a control image, from an exported plan.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_input_flags(parser)
    _add_sampling_flags(parser)
    add_schedule_flags(parser)
    _add_output_flags(parser)
    args = parser.parse_args(argv)
    if args.output.suffix.lower() != ".png":
        parser.error(f"the output is {str(args.output)!r}, but pictures are written as PNG; name it *.png")
    if args.tokens is not None and args.tokens.suffix.lower() != ".npz":
        parser.error(f"the token file is {str(args.tokens)!r}, but tokens are written as npz; name it *.npz")
    return args


def _add_input_flags(parser: argparse.ArgumentParser) -> None:
    inputs = parser.add_argument_group("what to run")
    inputs.add_argument("-e", "--engine", metavar="PLAN", help="plan directory (default: the plan in the package)")
    source = inputs.add_mutually_exclusive_group()
    source.add_argument("--control", metavar="IMAGE", help="control image (edges, depth, …); - reads stdin")
    source.add_argument("--photo", metavar="IMAGE", help="photo to derive the control image from; - reads stdin")
    inputs.add_argument("--class", dest="label", metavar="CLASS", help="class index or name (default: no class)")
    inputs.add_argument("--backend", default="auto", help="auto, or an engine such as ort-cpu (default: auto)")
    inputs.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    inputs.add_argument(
        "--no-verify", action="store_true", help="check the sizes of the plan's files, not their hashes"
    )
    inputs.add_argument("--list-classes", action="store_true", help="print the plan's classes and stop")


def _add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    sampling = parser.add_argument_group("sampling (defaults: the plan's own)")
    sampling.add_argument("--seed", type=int, default=0, help="seed of the first picture (default: 0)")
    sampling.add_argument(
        "-n", "--num", type=int, default=1, metavar="N", help="pictures, with seeds SEED … SEED+N-1 (default: 1)"
    )
    sampling.add_argument("--cfg", type=float, metavar="G", help="classifier-free guidance; 0 = off, twice as fast")
    sampling.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest codes; 0 = all")
    sampling.add_argument("--top-p", type=float, metavar="P", help="draw within this share of probability; 0 = all")


def add_schedule_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a schedule, named as the arguments of `Plan.generate` are; the benchmark has them too."""
    schedule = parser.add_argument_group("schedule (default: all scales alike; scales count from 0, the coarsest)")
    for flag, what in (("--cfg-scales", "guidance"), ("--control-scales", "control")):
        schedule.add_argument(flag, metavar="A-B", help=f"{what} at these scales only; A-, -B or one number will do")
    schedule.add_argument(
        "--control-strength", type=float, metavar="S", help="times the control's features, 0…2 (default: 1)"
    )
    schedule.add_argument(
        "--stop-after", type=int, metavar="K", help="draw no scale after this one: a coarser picture"
    )


def _add_output_flags(parser: argparse.ArgumentParser) -> None:
    outputs = parser.add_argument_group("what to write")
    outputs.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("out.png"),
        metavar="PNG",
        help="(default: out.png; N > 1: out-0.png …)",
    )
    outputs.add_argument("--grid", action="store_true", help="also one sheet, control and pictures: out-grid.png")
    outputs.add_argument(
        "--preview", type=Path, metavar="DIR", help="also the picture after each scale, as PNG files"
    )
    outputs.add_argument(
        "--tokens", type=Path, metavar="NPZ", help="also the tokens [N, L] (-1: not drawn) and the scales' sides"
    )
    outputs.add_argument("--json", action="store_true", help="print one JSON object instead of paths")
    outputs.add_argument("--debug", action="store_true", help="show a traceback when the program itself fails")
    outputs.add_argument("--version", action="version", version=f"car-run {__version__}")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Do what the arguments say; returns the report that `--json` prints. All checks come before the engine opens."""
    from car_runtime import plan as plan_module
    from car_runtime.format.manifest import read_manifest
    from car_runtime.images import write_files
    from car_runtime.request import resolve

    began = perf_counter()
    root = Path(args.engine) if args.engine is not None else plan_module.default_plan()
    manifest = read_manifest(root)
    if args.list_classes:
        return {"classes": _list_classes(manifest)}
    settings = {"label": args.label, "seed": args.seed, "n": args.num}
    settings |= {"cfg": args.cfg, "top_k": args.top_k, "top_p": args.top_p}
    settings |= {name: getattr(args, name) for name in SCHEDULE}
    request = resolve(manifest, **settings)
    plan_module.check_control(manifest, args.control is not None or args.photo is not None)
    paths = _output_paths(args)
    control = _read_control(args, manifest)
    timings = {"read": perf_counter() - began}
    with plan_module.open_plan(root, args.backend, threads=args.threads, verify=not args.no_verify) as plan:
        timings["open"] = perf_counter() - began - timings["read"]
        print(f"car-run: {manifest.name} on {plan.backend_name} ({plan.why})", file=sys.stderr)
        progress = _Progress(args, request.schedule.drawn)
        result = plan.generate(control, **settings, on_scale=progress if progress.wanted else None)
        backend = {"name": plan.backend_name, "why": plan.why}
    timings |= {stage: seconds for stage, seconds in result.timings.items() if stage != "total"}
    written = perf_counter()
    write_files(_contents(args, manifest, paths, control, result))
    timings |= {"write": perf_counter() - written, "total": perf_counter() - began}
    return {
        "version": __version__,
        "plan": {"name": manifest.name, "path": str(root)},
        "backend": backend,
        **_settings_report(manifest, result.request),
        "images": [{"path": str(path), "seed": seed} for path, seed in zip(paths, result.request.seeds, strict=True)],
        "grid": str(_grid_path(args)) if args.grid else None,
        "tokens": str(args.tokens) if args.tokens else None,
        "previews": [str(path) for path in progress.written],
        "timings": timings,
    }


def _list_classes(manifest: Manifest) -> list[str]:
    names = manifest.model.class_names
    if names is None:
        last = manifest.model.classes - 1
        raise RequestError(f"the plan {manifest.name!r} has no class names; give an index, 0…{last}")
    return list(names)


def _settings_report(manifest: Manifest, request: Request) -> dict[str, Any]:
    """Class, sampling settings and what isn't exact, such that giving them again makes the same picture."""
    names, index = manifest.model.class_names, request.label
    known = index < manifest.model.classes
    return {
        "class": {"index": index, "name": names[index] if names else None} if known else None,
        "cfg": request.sampling.cfg,
        "top_k": request.sampling.top_k,
        "top_p": request.sampling.top_p,
        "schedule": request.schedule.settings(),
    }


def _output_paths(args: argparse.Namespace) -> list[Path]:
    """Where the pictures go, having seen that everything can be written and that no input would be replaced."""
    from car_runtime.images import check_writable

    output: Path = args.output
    paths = [output] if args.num == 1 else [output.with_name(f"{output.stem}-{i}.png") for i in range(args.num)]
    results = [*paths, *([_grid_path(args)] if args.grid else []), *([args.tokens] if args.tokens else [])]
    source = args.control or args.photo
    for path in results:
        if source not in (None, "-") and path.resolve() == Path(source).resolve():
            raise OutputError(f"the output {str(path)!r} would replace the input; choose another -o")
        if path in (paths[0], args.tokens) or path.is_dir():
            check_writable(path)
    if args.preview is not None:
        _make_preview_directory(args.preview)
    return paths


def _make_preview_directory(directory: Path) -> None:
    from car_runtime.images import check_writable

    if directory.exists() and not directory.is_dir():
        raise OutputError(f"--preview {str(directory)!r} is a file; name a directory")
    check_writable(directory / "preview.png" if directory.exists() else directory)


def _grid_path(args: argparse.Namespace) -> Path:
    output: Path = args.output
    return output.with_name(f"{output.stem}-grid.png")


def _read_control(args: argparse.Namespace, manifest: Manifest) -> Image.Image | None:
    """The control image as given, or derived from the photo; None where neither is given."""
    from car_runtime.images import load_image, open_image

    if args.control is not None:
        return load_image(_stdin() if args.control == "-" else args.control)
    if args.photo is None:
        return None
    from car_runtime.controls import derive

    assert manifest.model.control_type is not None
    photo = open_image(_stdin() if args.photo == "-" else args.photo)
    return load_image(derive(photo, manifest.model.control_type, manifest.model.image_size))


def _stdin() -> io.BytesIO:
    return io.BytesIO(sys.stdin.buffer.read())


class _Progress:
    """What happens after each scale: a line for a person who watches, and the previews asked for."""

    def __init__(self, args: argparse.Namespace, scales: int) -> None:
        self._directory: Path | None = args.preview
        self._n: int = args.num
        self._scales = scales
        self._watched = sys.stderr.isatty()
        self.wanted = self._watched or self._directory is not None
        self.written: list[Path] = []

    def __call__(self, result: ScaleResult) -> None:
        if self._watched:
            S, of = result.tokens.shape[-1], result.pictures
            which = f"picture {of.start}" if len(of) == 1 else f"pictures {of.start}-{of.stop - 1}"
            line = f"{which}: scale {result.index + 1}/{self._scales}, {S}×{S} tokens, {result.seconds:.2f} s"
            print(f"car-run: {line}", file=sys.stderr)
        if self._directory is not None:
            self._write_previews(self._directory, result)

    def _write_previews(self, directory: Path, result: ScaleResult) -> None:
        from car_runtime.images import png_bytes, write_files

        directory.mkdir(exist_ok=True)
        names = [("" if self._n == 1 else f"{i}-") + f"scale-{result.index:02d}.png" for i in result.pictures]
        paths = [directory / name for name in names]
        write_files({path: png_bytes(image) for path, image in zip(paths, result.preview(), strict=True)})
        self.written += paths


def _contents(
    args: argparse.Namespace, manifest: Manifest, paths: Sequence[Path], control: Image.Image | None, result: Result
) -> dict[Path, bytes]:
    """Every file to write, as bytes; they are written together or not at all."""
    import numpy as np

    from car_runtime.images import contact_sheet, png_bytes, square

    settings = _settings_report(manifest, result.request)
    label, schedule = settings.pop("class"), settings.pop("schedule")
    about = {"Software": f"car_runtime {__version__}", "version": __version__, "plan": manifest.name}
    about |= {"class": "none" if label is None else label["name"] or label["index"], **settings, **schedule}
    contents = {
        path: png_bytes(image, {**about, "seed": seed})
        for path, image, seed in zip(paths, result.images, result.request.seeds, strict=True)
    }
    if args.grid:
        first = [] if control is None else [square(control, manifest.model.image_size)]
        contents[_grid_path(args)] = png_bytes(contact_sheet([*first, *result.images]), {**about, "seed": args.seed})
    if args.tokens is not None:
        stream = io.BytesIO()
        np.savez_compressed(
            stream, tokens=result.tokens, sides=np.array([scale.side for scale in manifest.scales], np.int64)
        )
        contents[args.tokens] = stream.getvalue()
    return contents


def _print_report(args: argparse.Namespace, report: dict[str, Any]) -> None:
    if args.json:
        print(json.dumps(report))
    elif "classes" in report:
        print("\n".join(f"{i}\t{name}" for i, name in enumerate(report["classes"])))
    else:
        paths = [image["path"] for image in report["images"]] + report["previews"]
        print("\n".join([*paths, *(report[key] for key in ("grid", "tokens") if report[key])]))
    sys.stdout.flush()


def _subcommand(name: str, description: str, examples: str) -> _Parser:
    parser = _Parser(
        prog=f"car-run {name}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("plan", nargs="?", metavar="PLAN", help="plan directory")
    parser.add_argument("--json", action="store_true", help="print the whole report on stdout, as one JSON object")
    parser.add_argument("--debug", action="store_true", help="show a traceback when the program itself fails")
    return parser


def _doctor(argv: Sequence[str]) -> int:
    """`car-run doctor`: the findings on stdout. Exit code 1 where no backend works."""
    about = "What this machine can run, what is missing, and how to install it."
    args = _subcommand("doctor", about, DOCTOR_EXAMPLES).parse_args(argv)
    from car_runtime import doctor

    report = doctor.examine(args.plan)
    print(json.dumps(report) if args.json else doctor.table(report), flush=True)
    return 0 if report["works"] else 1


def _verify(argv: Sequence[str]) -> int:
    """`car-run verify`: table and progress on stderr, the report as JSON. Exit code 1 where something differs."""
    about = "Compare a plan on this machine with what PyTorch computed when it was exported, and measure it."
    parser = _subcommand("verify", about, VERIFY_EXAMPLES)
    parser.add_argument("--backend", default="auto", help="auto, or an engine such as ort-cpu (default: auto)")
    parser.add_argument(
        "--runs", type=int, metavar="N", help="measured pictures (default: 10 on a CPU, 100 on a GPU)"
    )
    parser.add_argument("--warmup", type=int, metavar="N", help="pictures before (default: 3 on a CPU, 10 on a GPU)")
    parser.add_argument(
        "--batch", type=_integers, default=(1,), metavar="N,…", help="pictures at once to measure (default: 1)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("-o", "--output", type=Path, metavar="JSON", help="write the report there")
    args = parser.parse_args(argv)
    if args.output is not None and args.output.suffix.lower() != ".json":
        parser.error(f"the report is {str(args.output)!r}, but it is written as JSON; name it *.json")
    from car_runtime import verify as acceptance
    from car_runtime.images import check_writable, write_files

    if args.output is not None:
        check_writable(args.output)
    settings = {"threads": args.threads, "warmup": args.warmup, "runs": args.runs, "batches": args.batch}
    report = acceptance.verify(args.plan, args.backend, **settings, log=_log)
    text = json.dumps(report, allow_nan=False, ensure_ascii=False)
    if args.output is not None:
        write_files({args.output: f"{text}\n".encode()})
    print(acceptance.table(report), file=sys.stderr)
    print(text if args.json else args.output or ("passed" if report["passed"] else "failed"), flush=True)
    return 0 if report["passed"] else 1


def _integers(text: str) -> tuple[int, ...]:
    """`1,4` is (1, 4)."""
    return tuple(int(part) for part in text.split(","))


def _log(line: str) -> None:
    print(f"car-run: {line}", file=sys.stderr, flush=True)


_COMMANDS = {"doctor": _doctor, "verify": _verify}


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path or class name that the terminal cannot show
    try:
        with warnings.catch_warnings():
            # Decoders warn about damaged metadata; what matters arrives as an error, and stderr is for one line.
            warnings.simplefilter("ignore")
            if arguments and arguments[0] in _COMMANDS:
                return _COMMANDS[arguments[0]](arguments[1:])
            args = parse_args(arguments)
            _print_report(args, run(args))
        return 0
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)
    except UserError as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        print("car-run: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of stdout went away (| head). Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if "--debug" in arguments:
            raise
        return _fail(f"{type(error).__name__}: {error}; --debug shows where", 1)


def _fail(error: object, code: int) -> int:
    print(f"car-run: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code

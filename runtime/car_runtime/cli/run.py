"""`car-run`: a control image and a class in, images out."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from car_runtime import __version__
from car_runtime.cli.errors import note
from car_runtime.cli.options import (
    GROUPS,
    Parser,
    add_backend_flag,
    add_setting,
    add_settings,
    add_threads_flag,
    add_trust_flags,
    control_sources,
    image_source,
    named_source,
    plan_path,
    settings_of,
)
from car_runtime.cli.outputs import check_distinct
from car_runtime.config import GenerationConfig, flags
from car_runtime.errors import OutputError, RequestError, printable

if TYPE_CHECKING:
    from car_runtime.editing.edit import Edit
    from car_runtime.format.manifest import Manifest
    from car_runtime.plan import Plan, Result, ScaleResult
    from car_runtime.request import Request

ABOUT = "Generate images that follow a control image, from an exported plan."
EXAMPLES = """examples:
  car-run --control edges.png                              the plan that ships with the package, no class
  car-run --photo cat.jpg --class cat -n 4 --grid          control derived from a photo; 4 seeds and a sheet of all
  car-run -e d16.plan --control depth.png --class 207 --seed 7 --cfg 4 --top-k 900 --top-p 0.95 -o dog.png
  car-run -e d16.plan --control depth.png --class "golden retriever" --preview steps/ --tokens dog.npz --json
  car-run -e d16.plan --control depth.png --class 207 --cfg-scales -7       the last scales unguided, at half the cost
  car-run -e d16.plan --list-classes

other commands, each with its own --help:
  car-run paint PHOTO       draw a part of a photo anew
  car-run extend PHOTO      draw what lies beyond its edges
  car-run restyle IMAGE     the same coarse scales, another class
  car-run vary IMAGE        the same composition, new detail
  car-run again PNG         the same image from what its file says, or a variation of it
  car-run blend             images between two classes or two seeds
  car-run batch JOBS        many images in one process, from a table or a folder
  car-run sheet             a labelled sheet: classes × seeds × any setting
  car-run control IMAGE     the control map of a photo alone
  car-run detect IMAGE      does an image have the watermark of a key
  car-run doctor [PLAN]     what this machine can run, and how to install what is missing
  car-run serve [PLAN ...]  the studio in a browser, and an HTTP API
  car-run verify [PLAN]     does a plan do here what it did when it was exported, and how fast
"""


def parse_args(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Raises RequestError on misuse."""
    parser = Parser("car-run", ABOUT, EXAMPLES)
    add_flags(parser)
    parser.add_argument("--list-classes", action="store_true", help="print the plan's classes and stop")
    args = parser.parse_args(arguments)
    check_names(parser, args)
    return args


def add_flags(parser: Parser) -> None:
    """The flags of everything that draws: this command, the edits and `again`."""
    _add_input_flags(parser)
    add_settings(parser, "sampling")
    add_settings(parser, "schedule")
    _add_output_flags(parser)


def check_names(parser: Parser, args: argparse.Namespace) -> None:
    """Raise RequestError for outputs whose names say another kind of file than is written."""
    if args.output.suffix.lower() != ".png":
        parser.error(f"the output is {str(args.output)!r}, but images are written as PNG; name it *.png")
    if args.tokens is not None and args.tokens.suffix.lower() != ".npz":
        parser.error(f"the token file is {str(args.tokens)!r}, but tokens are written as npz; name it *.npz")


def _add_input_flags(parser: argparse.ArgumentParser) -> None:
    inputs = parser.add_argument_group(GROUPS["input"])
    add_plan_flag(inputs)
    add_source_flags(inputs)
    add_setting(inputs, "label")
    add_engine_flags(inputs)


def add_source_flags(inputs: argparse._ArgumentGroup) -> None:
    """The control image, or what it is made of; `control_of_flags` takes what they were given."""
    source = inputs.add_mutually_exclusive_group()
    control = flags()["control"]
    source.add_argument(*control.names, action="append", metavar=control.metavar, help=control.help)
    source.add_argument("--photo", metavar="IMAGE", help="photo to derive the control image from; - reads stdin")
    inputs.add_argument("--annotator", metavar="ONNX", help="network that makes --photo's control (docs/inputs.md)")
    add_setting(inputs, "fit")


def add_plan_flag(inputs: argparse._ActionsContainer) -> None:
    """The plan of everything that draws."""
    inputs.add_argument(
        "-e",
        "--engine",
        metavar="PLAN",
        help="plan directory, or hf:ORG/NAME[@REVISION] (default: the plan in the package)",
    )


def add_engine_flags(inputs: argparse._ActionsContainer) -> None:
    """How everything that draws opens its plan; `opened` takes what they were given."""
    add_backend_flag(inputs)
    add_threads_flag(inputs)
    inputs.add_argument(
        "--no-verify", action="store_true", help="check the sizes of the plan's files, not their hashes"
    )
    add_trust_flags(inputs)


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
    outputs.add_argument(
        "--grid", action="store_true", help="also one sheet, control (or what is edited) and images: out-grid.png"
    )
    outputs.add_argument("--preview", type=Path, metavar="DIR", help="also the image after each scale, as PNG files")
    outputs.add_argument(
        "--tokens", type=Path, metavar="NPZ", help="also the tokens [N, L] (-1: not drawn) and the scales' sides"
    )
    outputs.add_argument(
        "--no-receipt",
        action="store_true",
        help="leave settings and tokens out of the PNG, which `car-run again` reads",
    )
    outputs.add_argument("--json", action="store_true", help="print one JSON object instead of paths")
    outputs.add_argument("--debug", action="store_true", help="show a traceback when the program itself fails")
    outputs.add_argument("--version", action="version", version=f"car-run {__version__}")


def run(arguments: Sequence[str]) -> int:
    """Generate what the arguments say, or list the classes. Returns the exit code."""
    args = parse_args(arguments)
    began = perf_counter()
    root, manifest = plan_of(args)
    if args.list_classes:
        _print_classes(manifest, args.json)
        return 0
    print_report(args, generate(args, root, manifest, began))
    return 0


def generate(
    args: argparse.Namespace,
    root: Path,
    manifest: Manifest,
    began: float,
    changes: Mapping[str, Any] | None = None,
    inputs: Sequence[str] = (),
    first: Callable[[Plan], None] = lambda plan: None,
) -> dict[str, Any]:
    """Draw and write; returns the report that `--json` prints. All checks come before the engine opens.

    began: by `perf_counter`, from where on the time is counted. changes: settings that are no flags, or instead of
    what the flags say. inputs: files that are read besides control and photo. first: what is done with the opened
    plan before it draws.
    """
    from car_runtime.images import write_files
    from car_runtime.request import resolve

    control, said = control_of_flags(args, manifest, (changes or {}).get("edit"))
    settings = settings_of(args) | {"control": control} | dict(changes or {})
    request = resolve(manifest, GenerationConfig(**settings))
    request = replace(request, warnings=(*said, *request.warnings))
    paths = _image_paths(args)
    _check_outputs(args, root, manifest, paths, request.schedule.drawn, inputs)
    timings = {"read": perf_counter() - began}
    with opened(args, root) as plan:
        timings["open"] = perf_counter() - began - timings["read"]
        note_branch(args, manifest)
        for warning in request.warnings:
            note(f"car-run: warning: {printable(warning)}")
        first(plan)
        progress = _Progress(args, request.schedule.drawn)
        result = plan.generate(request, on_scale=progress if progress.wanted else None)
        backend = {"name": plan.backend_name, "why": plan.why}
    timings |= {stage: seconds for stage, seconds in result.timings.items() if stage != "total"}
    written = perf_counter()
    write_files(_contents(args, manifest, paths, result))
    timings |= {"write": perf_counter() - written, "total": perf_counter() - began}
    return {
        "version": __version__,
        "plan": {"name": manifest.name, "path": str(root)},
        "backend": backend,
        **settings_report(manifest, request),
        "images": [{"path": str(path), "seed": seed} for path, seed in zip(paths, request.seeds, strict=True)],
        "grid": str(_grid_path(args)) if args.grid else None,
        "tokens": str(args.tokens) if args.tokens else None,
        "warnings": list(request.warnings),
        "previews": [str(path) for path in progress.written],
        "timings": timings,
    }


def plan_of(args: argparse.Namespace) -> tuple[Path, Manifest]:
    """The plan that the flags name, by default the one in the package, and its manifest."""
    from car_runtime.format.manifest import read_manifest

    root = plan_path(args.engine)
    return root, read_manifest(root, args.require_signature)


@contextmanager
def opened(args: argparse.Namespace, root: Path) -> Iterator[Plan]:
    """The plan, opened as `add_engine_flags` say, with a line on stderr about the backend."""
    from car_runtime.plan import open_plan

    trust = {"require_signature": args.require_signature, "trust_engines": args.trust_engines}
    with open_plan(root, args.backend, threads=args.threads, verify=not args.no_verify, **trust) as plan:
        note(f"car-run: {printable(plan.manifest.name)} on {plan.backend_name} ({plan.why})")
        yield plan


def control_of_flags(
    args: argparse.Namespace, manifest: Manifest, edit: Edit | None = None
) -> tuple[Any, tuple[str, ...]]:
    """The control image as given, or derived from the photo, and warnings; None where neither is given."""
    model = manifest.model
    if args.annotator is not None and args.photo is None:
        raise RequestError("--annotator makes a control of a photo, and none is given; add --photo FILE")
    if args.photo is None:
        return control_sources(args.control or ()), ()
    branch, file, weight = named_source(args.photo)
    if model.control_type is None or (branch is not None and branch not in model.conventions):
        source = image_source(file)
        return (source if branch is None else {branch: source}), ()  # which is refused like a control
    from car_runtime.photo import control_of_photo

    settings: dict[str, Any] = {"fit": args.fit, "annotator": args.annotator, "threads": args.threads}
    made, said = control_of_photo(image_source(file), manifest, branch=branch, edit=edit, **settings)
    return (made if branch is None else {branch: (made, weight)}), said


def note_branch(args: argparse.Namespace, manifest: Manifest) -> None:
    """A line on stderr where a control names no branch and there are several."""
    model, given = manifest.model, args.control or [args.photo]
    unnamed = len(given) == 1 and given[0] is not None and named_source(given[0])[0] is None
    if unnamed and len(model.branches) > 1:
        others = ", ".join(name for name in model.branches if name != model.default_branch)
        note(f"car-run: the control is for the branch {model.default_branch!r}; others: {others}")


def input_files(args: argparse.Namespace) -> list[Path]:
    """The files that `control_of_flags` reads."""
    given = [*(args.control or ()), *([] if args.photo is None else [args.photo])]
    return [Path(file) for _, file, _ in map(named_source, given) if file != "-"]


def _print_classes(manifest: Manifest, as_json: bool) -> None:
    names = manifest.model.names
    if names is None:
        last = manifest.model.classes - 1
        raise RequestError(f"the plan {manifest.name!r} has no class names; give an index, 0…{last}")
    print(json.dumps({"classes": list(names)}) if as_json else "\n".join(_class_lines(names)), flush=True)


def _class_lines(names: Sequence[str]) -> list[str]:
    """One for each class; where all are called STYLE-GROUP, an empty one before each style but the first."""
    styles = [name.partition("-")[0] for name in names] if all("-" in name for name in names) else [""] * len(names)
    lines = []
    for i, name in enumerate(names):
        if i and styles[i] != styles[i - 1]:
            lines.append("")
        lines.append(f"{i}\t{printable(name)}")
    return lines


def settings_report(manifest: Manifest, request: Request) -> dict[str, Any]:
    """Class, sampling settings and what isn't exact, such that giving them again makes the same image."""
    names, index = manifest.model.names, request.label
    known = index < manifest.model.classes
    return {
        "class": {"index": index, "name": names[index] if names else None} if known else None,
        "cfg": request.sampling.cfg,
        "top_k": request.sampling.top_k,
        "top_p": request.sampling.top_p,
        "schedule": request.schedule.settings(),
        **({"more_smooth": True} if request.more_smooth else {}),
        **({"control_cfg": request.control_cfg} if request.control_cfg else {}),
        **({"watermark": True} if request.watermark else {}),
        **({} if request.blend is None else {"blend_share": request.blend.share, "blend_class": request.blend.label}),
    }


def _image_paths(args: argparse.Namespace) -> list[Path]:
    """Where the images go."""
    output: Path = args.output
    return [output] if args.n == 1 else [output.with_name(f"{output.stem}-{i}.png") for i in range(args.n)]


def _preview_path(directory: Path, n: int, i: int, scale: int) -> Path:
    """The file of image i of n after a scale."""
    return directory / (("" if n == 1 else f"{i}-") + f"scale-{scale:02d}.png")


def _check_outputs(
    args: argparse.Namespace, root: Path, manifest: Manifest, paths: Sequence[Path], scales: int, read: Sequence[str]
) -> None:
    """See that everything can be written, each to a file of its own, and that no input would be replaced."""
    from car_runtime.format.manifest import MANIFEST
    from car_runtime.images import check_writable

    results = [("-o", path) for path in paths]
    results += [("--grid", _grid_path(args))] if args.grid else []
    results += [("--tokens", args.tokens)] if args.tokens else []
    previews: list[tuple[str, Path]] = []
    if args.preview is not None:
        if args.preview.exists() and not args.preview.is_dir():
            raise OutputError(f"--preview {str(args.preview)!r} is a file; name a directory")
        previews = [("--preview", args.preview)]
        previews += [
            ("--preview", _preview_path(args.preview, args.n, i, k)) for i in range(args.n) for k in range(scales)
        ]
    inputs = [root / name for name in (MANIFEST, *manifest.files)]
    inputs += [*input_files(args), *map(Path, read)]
    check_distinct([*results, *previews], inputs)
    for _, path in results:
        if path in (paths[0], args.tokens) or path.is_dir():
            check_writable(path)
    if args.preview is not None:
        check_writable(args.preview / "preview.png" if args.preview.exists() else args.preview)


def _grid_path(args: argparse.Namespace) -> Path:
    output: Path = args.output
    return output.with_name(f"{output.stem}-grid.png")


class _Progress:
    """What happens after each scale: a line for a person who watches, and the previews asked for."""

    def __init__(self, args: argparse.Namespace, scales: int) -> None:
        self._directory: Path | None = args.preview
        self._n: int = args.n
        self._scales = scales
        self._watched = sys.stderr.isatty()
        self.wanted = self._watched or self._directory is not None
        self.written: list[Path] = []

    def __call__(self, result: ScaleResult) -> None:
        if self._watched:
            S, of = result.tokens.shape[-1], result.images
            which = f"image {of[0]}" if len(of) == 1 else f"images {of[0]}-{of[-1]}"
            line = f"{which}: scale {result.index + 1}/{self._scales}, {S}×{S} tokens, {result.seconds:.2f} s"
            note(f"car-run: {line}")
        if self._directory is not None:
            self._write_previews(self._directory, result)

    def _write_previews(self, directory: Path, result: ScaleResult) -> None:
        from car_runtime.images import png_bytes, write_files

        directory.mkdir(exist_ok=True)
        paths = [_preview_path(directory, self._n, i, result.index) for i in result.images]
        write_files({path: png_bytes(image) for path, image in zip(paths, result.preview(), strict=True)})
        self.written += paths


def _contents(
    args: argparse.Namespace, manifest: Manifest, paths: Sequence[Path], result: Result
) -> dict[Path, bytes]:
    """Every file to write, as bytes; they are written together or not at all."""
    import numpy as np
    from PIL import Image

    from car_runtime.images import WHITE, contact_sheet, on_ground, png_bytes

    contents = image_files(manifest, paths, result, receipt=not args.no_receipt)
    if args.grid:
        edit, control = result.request.edit, result.request.control
        finished = result.images if result.edited is None else result.edited
        about = about_images(manifest, result.request)
        first = [] if control is None else [np.array(control)]
        first = first if edit is None else [edit.before(manifest.model.image_size)]
        flat = [np.asarray(on_ground(Image.fromarray(image), WHITE)) for image in finished]
        sheet = contact_sheet([*first, *flat])
        contents[_grid_path(args)] = png_bytes(sheet, {**about, "seed": args.seed})
    if args.tokens is not None:
        stream = io.BytesIO()
        np.savez_compressed(
            stream, tokens=result.tokens, sides=np.array([scale.side for scale in manifest.scales], np.int64)
        )
        contents[args.tokens] = stream.getvalue()
    return contents


def about_images(manifest: Manifest, request: Request) -> dict[str, Any]:
    """What the text chunks of a PNG say to people, but for the seed."""
    settings = settings_report(manifest, request)
    label, schedule = settings.pop("class"), settings.pop("schedule")
    about = {"Software": f"car_runtime {__version__}", "version": __version__, "plan": manifest.name}
    return about | {"class": "none" if label is None else label["name"] or label["index"], **settings, **schedule}


def image_files(manifest: Manifest, paths: Sequence[Path], result: Result, *, receipt: bool) -> dict[Path, bytes]:
    """A PNG file per image of a result, with what it was made of in its text chunks."""
    from car_runtime.images import png_bytes
    from car_runtime.receipt import receipts_of

    about = about_images(manifest, result.request)
    finished = result.images if result.edited is None else result.edited
    receipts: list[dict[str, str]] = [{}] * len(paths)
    if receipt:
        receipts = receipts_of(manifest, result.request, result.tokens, dict(enumerate(finished)))
    profile = None if result.request.edit is None else result.request.edit.profile
    return {
        path: png_bytes(image, {**about, "seed": seed, **receipt}, profile)
        for path, image, seed, receipt in zip(paths, finished, result.request.seeds, receipts, strict=True)
    }


def print_report(args: argparse.Namespace, report: dict[str, Any]) -> None:
    if args.json:
        print(json.dumps(report))
    else:
        paths = [image["path"] for image in report["images"]] + report["previews"]
        print("\n".join([*paths, *(report[key] for key in ("grid", "tokens") if report[key])]))
    sys.stdout.flush()

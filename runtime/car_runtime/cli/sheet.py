"""`car-run sheet`: one labelled sheet of classes × seeds × any other settings, on one control."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from car_runtime import __version__
from car_runtime.cli.errors import note
from car_runtime.cli.options import (
    GROUPS,
    Parser,
    add_setting,
    parse_setting,
    settings_of,
    spelled,
    spellings,
)
from car_runtime.cli.outputs import check_distinct
from car_runtime.cli.run import (
    add_engine_flags,
    add_plan_flag,
    add_source_flags,
    control_of_flags,
    input_files,
    note_branch,
    opened,
    plan_of,
    settings_report,
)
from car_runtime.config import GenerationConfig, flags
from car_runtime.errors import RequestError, printable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from car_runtime.format.manifest import Manifest
    from car_runtime.plan import Plan
    from car_runtime.request import Request

ABOUT = "Draw a labelled sheet: every combination of classes, seeds and other settings, on one control image."
EXAMPLES = """examples:
  car-run sheet --control edges.png --class cat,dog,owl --seed 0-3
  car-run sheet --control edges.png --class cat --seed 0-3 --vary cfg=1,2,4 --vary control-strength=0.5,1,1.5
"""
MAX_IMAGES = 1024
"""Of one sheet; they are all held in memory (200 MB at 256×256)."""
VARIED = {
    name: field
    for name, field in spellings().items()
    if field in flags("sampling") | flags("schedule") and field not in ("seed", "n", "watermark")
}
"""What `--vary` names → field."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A setting and the values that the sheet shows."""

    field: str
    values: tuple[Any, ...]
    labels: tuple[str, ...]


def parse_args(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Raises RequestError on misuse."""
    parser = Parser("car-run sheet", ABOUT, EXAMPLES)
    inputs = parser.add_argument_group(GROUPS["input"])
    add_plan_flag(inputs)
    add_source_flags(inputs)
    inputs.add_argument("--class", dest="classes", metavar="A,B,C", help="classes (default: no class)")
    inputs.add_argument("--seed", dest="seeds", metavar="A-B", type=_seeds, default=(0,), help="0-3, or 1,5,7")
    inputs.add_argument(
        "--vary", action="append", default=[], metavar="NAME=V,W", help="values of a setting; may be given again"
    )
    add_engine_flags(inputs)
    for group in ("sampling", "schedule"):
        listed = parser.add_argument_group(GROUPS[group])
        for name in flags(group):
            if name not in ("seed", "n"):
                add_setting(listed, name)
    outputs = parser.add_argument_group("what to write")
    outputs.add_argument(
        "-o", "--output", type=Path, default=Path("sheet.png"), metavar="PNG", help="(default: sheet.png)"
    )
    outputs.add_argument("--json", action="store_true", help="print one JSON object instead of the path")
    outputs.add_argument("--debug", action="store_true", help="show a traceback when the program itself fails")
    args = parser.parse_args(arguments)
    if args.output.suffix.lower() != ".png":
        parser.error(f"the output is {str(args.output)!r}, but sheets are written as PNG; name it *.png")
    return args


def run(arguments: Sequence[str]) -> int:
    """Draw the sheet. Returns the exit code."""
    args = parse_args(arguments)
    from car_runtime.format.manifest import MANIFEST
    from car_runtime.images import check_writable, labelled_sheet, png_bytes, write_files
    from car_runtime.request import resolve

    root, manifest = plan_of(args)
    axes = _axes(args, manifest)
    rows, columns = _halves([axis for axis in axes if len(axis.values) > 1])
    control, said = control_of_flags(args, manifest)
    common = settings_of(args) | {"control": control}
    request = resolve(manifest, GenerationConfig(**common))  # the control is read and checked once
    cells = [dict(chosen) for chosen in itertools.product(*([(axis.field, v) for v in axis.values] for axis in axes))]
    configs = [GenerationConfig(**common | {"control": request.control_setting} | cell) for cell in cells]
    requests = [resolve(manifest, config) for config in configs]
    inputs = [root / name for name in (MANIFEST, *manifest.files)]
    inputs += input_files(args)
    check_distinct([("-o", args.output)], inputs)
    check_writable(args.output)
    for warning in (*said, *request.warnings):
        note(f"car-run: warning: {printable(warning)}")
    with opened(args, root) as plan:
        note_branch(args, manifest)
        images = _drawn(plan, requests)
    down, across = _labels(rows), _labels(columns)
    title = _title(manifest, requests, axes)
    sheet = labelled_sheet(images, down, across, title, request.control)
    about = {"Software": f"car_runtime {__version__}", "version": __version__, "plan": manifest.name, "sheet": title}
    write_files({args.output: png_bytes(sheet, about)})
    report = {"version": __version__, "sheet": str(args.output), "rows": down, "columns": across}
    print(json.dumps(report) if args.json else args.output)
    sys.stdout.flush()
    return 0


def _drawn(plan: Plan, requests: Sequence[Request]) -> list[NDArray[Any]]:
    """The image of each request, a batch at a time."""
    from car_runtime.cli.progress import Bar

    images: list[NDArray[Any]] = []
    bar = Bar(len(requests), "images")
    try:
        for first in range(0, len(requests), plan.shared_batch):
            for result in plan.generate_many(requests[first : first + plan.shared_batch]):
                images.append(result.images[0])
                bar.advance()
    finally:
        bar.end()
    return images


def _axes(args: argparse.Namespace, manifest: Manifest) -> list[Axis]:
    """Classes, what is varied, and seeds."""
    labels = _classes(args.classes, manifest)
    names = manifest.model.names
    shown = [f"class {label}" if label is None or names is None else printable(names[label]) for label in labels]
    axes = [
        Axis(field="label", values=tuple(labels), labels=tuple("no class" if s == "class None" else s for s in shown))
    ]
    for text in args.vary:
        axis = _varied(text)
        if any(axis.field == other.field for other in axes):
            raise RequestError(f"--vary {text[:60]!r} varies {axis.field} once more; give all its values at once")
        axes.append(axis)
    axes.append(Axis(field="seed", values=args.seeds, labels=tuple(f"seed {seed}" for seed in args.seeds)))
    count = 1
    for axis in axes:
        count *= len(axis.values)
    if count > MAX_IMAGES:
        raise RequestError(f"the sheet would have {count} images, over {MAX_IMAGES}; give fewer values")
    return axes


def _classes(text: str | None, manifest: Manifest) -> list[int | None]:
    """Indices of the classes that are named; a name may hold a comma itself, if it is the only one."""
    from car_runtime.request import resolve_label

    if text is None:
        return [None]
    if text in (manifest.model.names or ()):
        return [resolve_label(manifest, text)]
    return [resolve_label(manifest, part) for part in text.split(",")]


def _varied(text: str) -> Axis:
    name, equals, values = text.partition("=")
    field = VARIED.get(spelled(name))
    if not equals or field is None:
        known = ", ".join(dict.fromkeys(flags()[field].names[-1][2:] for field in VARIED.values()))
        raise RequestError(f"--vary {text[:60]!r} names no setting; give NAME=V,W with one of {known}")
    place, parts = f"--vary {spelled(name)}", values.split(",")
    chosen = tuple(parse_setting(place, field, part.strip()) for part in parts)
    return Axis(field=field, values=chosen, labels=tuple(f"{spelled(name)} {part.strip()}" for part in parts))


def _seeds(text: str) -> tuple[int, ...]:
    seeds: list[int] = []
    for part in text.split(","):
        ends = re.fullmatch(r"\s*([0-9]{1,19})(?:-([0-9]{1,19}))?\s*", part)
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (1, 0)
        if not first <= last < first + MAX_IMAGES:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} are no seeds; give 0-3, or 1,5,7, up to {MAX_IMAGES}")
        seeds += range(first, last + 1)
    return tuple(seeds)


def _halves(axes: Sequence[Axis]) -> tuple[Sequence[Axis], Sequence[Axis]]:
    """Axes that go down and those that go across: the later ones, and of one alone that one."""
    down = len(axes) // 2
    return axes[:down], axes[down:]


def _labels(axes: Sequence[Axis]) -> list[str]:
    """The label of each combination of values, a line per axis."""
    return ["\n".join(words) for words in itertools.product(*(axis.labels for axis in axes))]


def _title(manifest: Manifest, requests: Sequence[Request], axes: Sequence[Axis]) -> str:
    """What all images have in common: class and seed if there is one, and settings, but for those that differ."""
    single = [axis.labels[0] for axis in axes if len(axis.values) == 1 and axis.field in ("label", "seed")]
    reports = [settings_report(manifest, request) for request in requests]
    settings = [{**report, **report["schedule"]} for report in reports]
    names = [name for name in dict.fromkeys(itertools.chain(*settings)) if name not in ("class", "schedule")]
    alike = [name for name in names if all(one.get(name) == settings[0].get(name) for one in settings)]
    shared = ", ".join([*single, *(f"{spelled(name)} {settings[0][name]}" for name in alike)])
    return f"{printable(manifest.name)}\n{shared}"

"""`car-run control IMAGE`: the control map of a photo alone, or a map brought to another convention."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from car_runtime.cli.errors import note
from car_runtime.cli.options import Parser, add_setting, add_threads_flag, image_source, plan_path
from car_runtime.conventions import PRESETS, ControlConvention
from car_runtime.errors import OutputError, RequestError

ABOUT = "Write the control map of a photo, as a plan's convention has it, or turn a map into one of that convention."
EXAMPLES = """examples:
  car-run control cat.jpg -o edges.png                             as the plan in the package wants it
  car-run control cat.jpg -e d16.plan -o depth.png --annotator midas.onnx
  car-run control cat.jpg --type canny --size 256 -o edges.png     without a plan, by the name of a convention
  car-run control pass.png --from normal-opengl -e d16.plan -o normals.png
"""


def parse_args(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Raises RequestError on misuse."""
    parser = Parser("car-run control", ABOUT, EXAMPLES)
    add = parser.add_argument
    add("image", metavar="IMAGE", help="photo, or with --from a map; - reads stdin")
    add("-o", "--output", type=Path, required=True, metavar="PNG", help="map to write")
    add(
        "-e",
        "--engine",
        metavar="PLAN",
        help="plan whose convention and size count (default: the shipped one)",
    )
    add("--type", choices=PRESETS, metavar="NAME", help=f"convention instead: {', '.join(PRESETS)}")
    add("--size", type=int, metavar="N", help="side in pixels (default: the plan's)")
    add("--annotator", metavar="ONNX", help="network that makes the map (docs/inputs.md)")
    add("--from", dest="source", choices=PRESETS, metavar="NAME", help="IMAGE is a map of this convention")
    add_setting(parser, "fit")
    add_threads_flag(parser)
    add("--json", action="store_true", help="print one JSON object instead of the path")
    add("--debug", action="store_true", help="show a traceback when the program itself fails")
    args = parser.parse_args(arguments)
    if args.output.suffix.lower() != ".png":
        parser.error(f"the output is {str(args.output)!r}, but maps are written as PNG; name it *.png")
    if args.size is not None and not 8 <= args.size <= 4096:
        parser.error(f"size is {args.size}, but must be in 8…4096")
    if args.source is not None and args.annotator is not None:
        parser.error("--from says that the image is a map, and --annotator makes one; give one of them")
    return args


def run(arguments: Sequence[str]) -> int:
    """The path, or with `--json` path, convention and warnings, goes to stdout; warnings to stderr."""
    args = parse_args(arguments)
    from PIL import Image

    from car_runtime.control_checks import prepare_control
    from car_runtime.images import check_writable, png_bytes, write_files
    from car_runtime.photo import converted_map, map_of_photo

    if args.image != "-" and args.output.resolve() == Path(args.image).resolve():
        raise OutputError(f"the output {str(args.output)!r} would replace the input; choose another -o")
    check_writable(args.output)
    convention, size = _wanted(args)
    source = image_source(args.image)
    if args.source is not None:
        pixels, warnings = converted_map(source, PRESETS[args.source], convention, size, fit=args.fit)
    else:
        settings = {"fit": args.fit, "annotator": args.annotator, "threads": args.threads}
        pixels, warnings = map_of_photo(source, convention, size, **settings)
        warnings += prepare_control(Image.fromarray(pixels), convention, size, None)[1]
    write_files({args.output: png_bytes(pixels)})
    for warning in warnings:
        note(f"car-run: warning: {warning}")
    report = {"path": str(args.output), "convention": convention.name, "size": size, "warnings": list(warnings)}
    print(json.dumps(report) if args.json else args.output, flush=True)
    return 0


def _wanted(args: argparse.Namespace) -> tuple[ControlConvention, int]:
    """The convention and the side: the named ones, else the plan's."""
    from car_runtime.format.manifest import read_manifest

    if args.type is not None and args.size is not None:
        return PRESETS[args.type], args.size
    manifest = read_manifest(plan_path(args.engine))
    convention = PRESETS[args.type] if args.type is not None else manifest.model.convention
    if convention is None:
        raise RequestError(f"the plan {manifest.name!r} has no convention of maps; name one with --type")
    return convention, args.size or manifest.model.image_size

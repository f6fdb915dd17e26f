"""`car-run blend`: images between two classes, two seeds, or both, on one control."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from car_runtime import __version__
from car_runtime.cli.errors import note
from car_runtime.cli.options import GROUPS, Parser, add_setting, settings_of
from car_runtime.cli.outputs import check_distinct
from car_runtime.cli.run import (
    add_engine_flags,
    add_plan_flag,
    add_source_flags,
    control_of_flags,
    image_files,
    input_files,
    note_branch,
    opened,
    plan_of,
)
from car_runtime.config import Blend, GenerationConfig, flags
from car_runtime.errors import printable

ABOUT = "Draw the images between two classes, or two seeds, on one control image."
EXAMPLES = """examples:
  car-run blend --control edges.png --class cat --class dog         blend-0.png is the cat, blend-4.png the dog
  car-run blend --control edges.png --class cat --seed 1 --seed 8 --steps 9 --grid
"""
MAX_STEPS = 64


def parse_args(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Raises RequestError on misuse."""
    parser = Parser("car-run blend", ABOUT, EXAMPLES)
    inputs = parser.add_argument_group(GROUPS["input"])
    add_plan_flag(inputs)
    add_source_flags(inputs)
    add = inputs.add_argument
    add(
        "--class",
        dest="classes",
        action="append",
        default=[],
        metavar="CLASS",
        help="class; twice: from one to the other",
    )
    add("--seed", dest="seeds", action="append", type=int, default=[], metavar="SEED", help="seed; twice likewise")
    add("--steps", type=int, default=5, metavar="N", help="images, with both ends (default: 5)")
    add_engine_flags(inputs)
    for group in ("sampling", "schedule"):
        listed = parser.add_argument_group(GROUPS[group])
        for name in flags(group):
            if name not in ("seed", "n"):
                add_setting(listed, name)
    outputs = parser.add_argument_group("what to write")
    add = outputs.add_argument
    add(
        "-o",
        "--output",
        type=Path,
        default=Path("blend.png"),
        metavar="PNG",
        help="(default: blend.png, for blend-0.png …)",
    )
    add("--grid", action="store_true", help="also one sheet, control and images: blend-grid.png")
    add("--no-receipt", action="store_true", help="leave settings and tokens out of the PNGs")
    add("--json", action="store_true", help="print one JSON object instead of paths")
    add("--debug", action="store_true", help="show a traceback when the program itself fails")
    args = parser.parse_args(arguments)
    _check(parser, args)
    return args


def _check(parser: Parser, args: argparse.Namespace) -> None:
    for flag, given in (("--class", args.classes), ("--seed", args.seeds)):
        if len(given) > 2:
            parser.error(f"{flag} is given {len(given)} times; give it twice, for both ends")
    if len(args.classes) < 2 and len(args.seeds) < 2:
        parser.error("there is one end only; give --class twice, or --seed")
    if not 2 <= args.steps <= MAX_STEPS:
        parser.error(f"--steps is {args.steps}, but must be in 2…{MAX_STEPS}")
    if args.output.suffix.lower() != ".png":
        parser.error(f"the output is {str(args.output)!r}, but images are written as PNG; name it *.png")


def run(arguments: Sequence[str]) -> int:
    """Draw the images. Returns the exit code."""
    args = parse_args(arguments)
    import numpy as np

    from car_runtime.format.manifest import MANIFEST
    from car_runtime.images import check_writable, contact_sheet, png_bytes, write_files
    from car_runtime.request import resolve

    root, manifest = plan_of(args)
    control, said = control_of_flags(args, manifest)
    common: dict[str, Any] = settings_of(args) | {"control": control}
    common |= {"label": args.classes[0] if args.classes else None, "seed": args.seeds[0] if args.seeds else 0}
    other = {"label": args.classes[1] if len(args.classes) == 2 else None}
    other["seed"] = args.seeds[1] if len(args.seeds) == 2 else None
    request = resolve(manifest, GenerationConfig(**common))
    common["control"] = request.control_setting
    shares = [step / (args.steps - 1) for step in range(args.steps)]
    requests = [resolve(manifest, GenerationConfig(**common, blend=Blend(share=share, **other))) for share in shares]
    paths = [args.output.with_name(f"{args.output.stem}-{i}.png") for i in range(args.steps)]
    grid = args.output.with_name(f"{args.output.stem}-grid.png")
    inputs = [root / name for name in (MANIFEST, *manifest.files)]
    inputs += input_files(args)
    check_distinct([*(("-o", path) for path in paths), *([("--grid", grid)] if args.grid else [])], inputs)
    check_writable(paths[0])
    for warning in (*said, *request.warnings):
        note(f"car-run: warning: {printable(warning)}")
    with opened(args, root) as plan:
        note_branch(args, manifest)
        results = plan.generate_many(requests)
    contents: dict[Path, bytes] = {}
    for path, result in zip(paths, results, strict=True):
        contents |= image_files(manifest, [path], result, receipt=not args.no_receipt)
    if args.grid:
        first = [] if request.control is None else [np.array(request.control)]
        contents[grid] = png_bytes(contact_sheet([*first, *(result.images[0] for result in results)]))
    write_files(contents)
    images = [{"path": str(path), "share": share} for path, share in zip(paths, shares, strict=True)]
    report = {"version": __version__, "images": images, "grid": str(grid) if args.grid else None}
    print(json.dumps(report) if args.json else "\n".join(map(str, contents)))
    sys.stdout.flush()
    return 0

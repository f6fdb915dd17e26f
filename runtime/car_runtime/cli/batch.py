"""`car-run batch FILE …`: many images of a plan, one for each line of the files, for an evaluation or a data set."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from car_runtime.cli.errors import note
from car_runtime.cli.options import (
    GROUPS,
    Parser,
    add_backend_flag,
    add_setting,
    add_settings,
    add_threads_flag,
    add_trust_flags,
    settings_of,
)
from car_runtime.config import GenerationConfig
from car_runtime.errors import OutputError, RequestError, printable

if TYPE_CHECKING:
    from car_runtime.format.manifest import Manifest
    from car_runtime.plan import Plan

ABOUT = """Generate one image for each line of FILE.jsonl, into DIR/FILE.npz: `arr_0`, uint8 [N, H, W, 3].

A line is an object: {"control": "edges.png", "class": 4, "seed": 7}, any of which may be absent: no control, no
class, seed 0. Files whose npz is in DIR are passed over: the same command goes on where it was stopped. Without any
FILE: what the plan is."""
EXAMPLES = """examples:
  car-run batch wanted.jsonl -o images/                    images/wanted.npz
  car-run batch -e d16.plan part-*.jsonl -o images/ --preset var-fid --json
  car-run batch -e d16.plan --json                         sizes, classes, control of the plan
"""
MAX_LINES = 4096
"""Images of one file: they are all in memory until it is written (800 MB at 256×256)."""
KEYS = ("control", "class", "seed")


def parse_args(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Raises RequestError on misuse."""
    parser = Parser("car-run batch", ABOUT, EXAMPLES)
    add = parser.add_argument
    add("files", nargs="*", type=Path, metavar="FILE", help="requests, one JSON object a line")
    add("-o", "--output", type=Path, metavar="DIR", help="folder for the images, made if it is absent")
    add("-e", "--engine", metavar="PLAN", help="plan directory (default: the plan in the package)")
    add_backend_flag(parser)
    add_threads_flag(parser)
    add("--no-verify", action="store_true", help="check the sizes of the plan's files, not their hashes")
    add_trust_flags(parser)
    sampling = parser.add_argument_group(GROUPS["sampling"])
    for name in ("cfg", "top_k", "top_p", "preset", "more_smooth"):
        add_setting(sampling, name)
    add_settings(parser, "schedule")
    add("--json", action="store_true", help="one JSON object a line on stdout: the plan, then each file's path")
    add("--debug", action="store_true", help="show a traceback when the program itself fails")
    args = parser.parse_args(arguments)
    if args.files and args.output is None:
        parser.error("the images have no place; name a folder with -o DIR")
    stems = [file.stem for file in args.files]
    for stem in stems:
        if stems.count(stem) > 1:
            parser.error(f"{stems.count(stem)} files are named {stem!r}, and so would be their images; rename one")
    return args


def run(arguments: Sequence[str]) -> int:
    """Each file's npz is written whole; all lines of all files are checked before the engine opens."""
    args = parse_args(arguments)
    from car_runtime.format.manifest import read_manifest
    from car_runtime.plan import default_plan, open_plan

    root = Path(args.engine) if args.engine is not None else default_plan()
    manifest = read_manifest(root, args.require_signature)
    about = _about(manifest)
    if not args.files:
        print(json.dumps({"plan": about}) if args.json else _lines(about), flush=True)
        return 0
    left = {target: _requests(manifest, args, file) for file, target in _targets(args) if not target.exists()}
    if args.json:
        print(json.dumps({"plan": about}), flush=True)
    trust = {"require_signature": args.require_signature, "trust_engines": args.trust_engines}
    with open_plan(root, args.backend, threads=args.threads, verify=not args.no_verify, **trust) as plan:
        note(f"car-run: {printable(manifest.name)} on {plan.backend_name} ({plan.why})")
        for _, target in _targets(args):
            if target in left:
                _write(target, plan, left.pop(target))
            print(json.dumps({"path": str(target)}) if args.json else target, flush=True)
    return 0


def _targets(args: argparse.Namespace) -> list[tuple[Path, Path]]:
    """(file of requests, file of images) each. Raises OutputError where the folder can't be made."""
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make {str(args.output)!r} ({error.strerror}); choose another folder") from error
    return [(file, args.output / f"{file.stem}.npz") for file in args.files]


def _about(manifest: Manifest) -> dict[str, Any]:
    model = manifest.model
    convention = None if model.control_type is None else model.convention
    return {
        "name": manifest.name,
        "image_size": model.image_size,
        "tokens": manifest.tokens,
        "vocab": model.vocab,
        "classes": model.classes,
        "class_names": None if model.names is None else list(model.names),
        "control_type": model.control_type,
        "control_convention": None if convention is None else asdict(convention),
        "sampling": asdict(manifest.sampling),
        "files": {name: list(file.sha256) for name, file in sorted(manifest.files.items())},
    }


def _lines(about: dict[str, Any]) -> str:
    shown = {name: value for name, value in about.items() if name not in ("class_names", "files", "sampling")}
    shown["control_convention"] = (about["control_convention"] or {}).get("name")
    return "\n".join(f"{name}\t{printable(str(value))}" for name, value in shown.items())


def _requests(manifest: Manifest, args: argparse.Namespace, file: Path) -> list[GenerationConfig]:
    """A file's lines as configs, each checked against the plan; its control is read again when it is drawn."""
    from car_runtime.request import resolve

    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no UTF-8"
        raise RequestError(f"cannot read {str(file)!r} ({why}); give a file of JSON lines") from error
    if not 1 <= len(lines) <= MAX_LINES:
        raise RequestError(f"{str(file)!r} has {len(lines)} lines; give 1 to {MAX_LINES}, the others in another file")
    configs = []
    for number, line in enumerate(lines, 1):
        where = f"{str(file)!r}, line {number}"
        config = replace(GenerationConfig(**settings_of(args)), **_settings(line, where))
        try:
            resolve(manifest, config)
        except Exception as error:
            if isinstance(error, RequestError):
                raise RequestError(f"{where}: {error}") from error
            raise
        configs.append(config)
    return configs


def _settings(line: str, where: str) -> dict[str, Any]:
    """The settings that a line gives. Raises RequestError."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f'{where} is no JSON; write e.g. {{"class": 4, "seed": 7}}') from error
    if not isinstance(found, dict) or found.keys() - set(KEYS):
        raise RequestError(f"{where} is {line[:60]!r}; give an object with no keys but {', '.join(KEYS)}")
    control, label, seed = (found.get(key) for key in KEYS)
    if control is not None and not isinstance(control, str):
        raise RequestError(f"{where}: control is {control!r}; give the path of an image")
    if isinstance(label, bool) or not isinstance(label, int | str | None):
        raise RequestError(f"{where}: class is {label!r}; give an index or a name")
    return {"control": control, "label": label, "seed": 0 if seed is None else seed}


def _write(target: Path, plan: Plan, configs: Sequence[GenerationConfig]) -> None:
    import io

    import numpy as np

    from car_runtime.images import write_files

    images = np.concatenate([plan.generate(config).images for config in _runs(configs)])
    stream = io.BytesIO()
    np.savez(stream, arr_0=images)
    write_files({target: stream.getvalue()})


def _runs(configs: Sequence[GenerationConfig]) -> Iterator[GenerationConfig]:
    """Neighbours that differ in nothing but consecutive seeds, as one request of n images: engines have batches."""

    def same(numbered: tuple[int, GenerationConfig]) -> Any:
        place, config = numbered
        return config.control, config.label, config.seed - place

    for _, group in groupby(enumerate(configs), key=same):
        found = [config for _, config in group]
        yield replace(found[0], n=len(found))

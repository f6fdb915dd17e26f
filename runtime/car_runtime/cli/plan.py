"""`car-run plan info|add-branch|remove-branch|web`: what a plan is, the control branches in it, and its static site.

Branches are changed by the exporter, `car_export`, which the extra `export` makes run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from car_runtime.cli.options import Parser
from car_runtime.errors import RequestError, printable_lines

ABOUT = "What a plan is, the control branches in it, and the plan as a static site that runs in a browser."
EXAMPLES = """examples:
  car-run plan info d16.plan                          format, base, branches, precision, sizes, classes
  car-run plan add-branch d16.plan runs/depth         the branch of a checkpoint on the plan's base
  car-run plan remove-branch d16.plan canny -o depth.plan
  car-run plan web d16.plan -o site/                  the studio without a server, for any static host

info and web need the runtime alone, the others the exporter: pip install 'car-deploy[cpu,export]'
"""
WANTED = {"info": None, "add-branch": "a checkpoint", "remove-branch": "the name of a branch", "web": None}
"""Action → what it needs after the plan."""
NAMES = 12
"""Class names that are shown to people."""


def parse_args(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Raises RequestError on misuse."""
    parser = Parser("car-run plan", ABOUT, EXAMPLES)
    add = parser.add_argument
    add("action", choices=tuple(WANTED), metavar="ACTION", help=", ".join(WANTED))
    add("plan", metavar="PLAN", help="plan directory")
    add("given", nargs="?", metavar="WHAT", help="checkpoint or run to add, or name of the branch to remove")
    add("--name", metavar="NAME", help="of the branch to add (default: its control type)")
    add("--default", metavar="NAME", help="branch of a control that names none, from now on")
    add("-o", "--output", type=Path, metavar="PLAN", help="plan or site to write (default: plans in place)")
    add("--onnxruntime", type=Path, metavar="TGZ", help="for web: the npm package onnxruntime-web (see make web)")
    add("--json", action="store_true", help="print one JSON object")
    add("--debug", action="store_true", help="show a traceback when the program itself fails")
    args = parser.parse_args(arguments)
    wanted = WANTED[args.action]
    if wanted is not None and args.given is None:
        parser.error(f"{args.action} needs {wanted} after the plan")
    if args.action == "info" and (args.given or args.output or args.default):
        parser.error("info only reads: give nothing but the plan")
    if args.action == "web" and (args.given or args.default or args.output is None):
        parser.error("web needs -o SITE, and nothing but the plan before it")
    if args.onnxruntime is not None and args.action != "web":
        parser.error("--onnxruntime is for web; leave it out")
    if args.name is not None and args.action != "add-branch":
        parser.error(f"--name {args.name} names a branch that is added; leave it out")
    return args


def run(arguments: Sequence[str]) -> int:
    """Facts, or the changed plan's path or facts, go to stdout; progress to stderr. Returns the exit code."""
    args = parse_args(arguments)
    if args.action == "web":
        return _web(args)
    if args.action != "info":
        return _change(args)
    _print(args)
    return 0


def _change(args: argparse.Namespace) -> int:
    """Add or remove a branch. Returns the exit code."""
    try:
        exporter = import_module("car_export.branches")
    except ModuleNotFoundError as error:
        raise RequestError(
            f"{args.action} needs {error.name!r}, which is not installed; pip install 'car-deploy[cpu,export]'"
        ) from error
    target = {"default": args.default, "output": args.output}

    def change(log: Any) -> int:
        plan = Path(args.plan)
        if args.action == "add-branch":
            args.plan = exporter.add_branch(plan, Path(args.given), name=args.name, **target, log=log)
        else:
            args.plan = exporter.remove_branch(plan, args.given, **target, log=log)
        if args.json:
            _print(args)
        else:
            print(args.plan, flush=True)
        return 0

    code: int = exporter.run_command("car-run", change)
    return code


def _web(args: argparse.Namespace) -> int:
    """Write a static site. Its path, or with --json facts, go to stdout. Returns the exit code."""
    site = import_module("car_serve.site")
    size = site.write_site(Path(args.plan), args.output, args.onnxruntime)
    if size > site.LARGE:
        print(f"car-run: the site has {_megabytes(size)}, which takes long to load", file=sys.stderr, flush=True)
    print(json.dumps({"site": str(args.output), "bytes": size}) if args.json else args.output, flush=True)
    return 0


def _print(args: argparse.Namespace) -> None:
    from car_runtime.format.facts import plan_facts

    facts = plan_facts(args.plan)
    print(json.dumps(facts, allow_nan=False) if args.json else printable_lines(_text(facts)), flush=True)


def _text(facts: dict[str, Any]) -> str:
    """The facts for people."""
    model, precision = facts["model"], facts["precision"]
    lines = [
        f"{facts['name']}: format {facts['format']}, {_megabytes(facts['bytes'])}",
        f"base: depth {model['depth']}, width {model['width']}, {model['vocab']} codes, "
        f"{model['image_size']}×{model['image_size']} pixels in {facts['scales']} scales, {facts['tokens']} tokens"
        + _bytes(facts["base_bytes"]),
    ]
    for name, branch in facts["branches"].items():
        kind = "" if branch["control_type"] == name else f"{branch['control_type']}, "
        mark = ", default" if name == facts["default_branch"] else ""
        made = f"maps {branch['convention'] or 'of no known convention'}"
        lines.append(f"branch {name}: {kind}{made}{_bytes(branch['bytes'])}{mark}")
    if not facts["branches"]:
        lines.append("no control branch")
    sampling, names = facts["sampling"], facts["class_names"] or []
    lines += [
        f"computes in {precision['compute']}, weights in {precision['weights']}",
        f"defaults: cfg {sampling['cfg']:g}, top-k {sampling['top_k']}, top-p {sampling['top_p']:g}",
        f"static batches: {', '.join(map(str, facts['batches'])) or 'none'}; engines: {facts['engines']}",
        f"{facts['classes']} classes"
        + (f": {', '.join(names[:NAMES])}{', …' if len(names) > NAMES else ''}" if names else " without names"),
    ]
    return "\n".join(lines)


def _bytes(count: int | None) -> str:
    return "" if count is None else f", {_megabytes(count)}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"

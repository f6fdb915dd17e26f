"""`car-run plan ACTION`: what a plan is, the control branches in it, plans on the hub, and its static site.

Branches are changed by the exporter, `car_export`, which the extra `export` makes run; `pull` and `push` need the
extra `hub`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from car_runtime.cli.errors import note
from car_runtime.cli.options import Parser, hide_bars, plan_path
from car_runtime.errors import OutputError, RequestError, printable_lines

ABOUT = "What a plan is, the control branches in it, plans on the hub, and the plan as a site that runs in a browser."
EXAMPLES = """examples:
  car-run plan info d16.plan                          format, base, branches, precision, sizes, classes
  car-run plan add-branch d16.plan runs/depth         the branch of a checkpoint on the plan's base
  car-run plan remove-branch d16.plan canny -o depth.plan
  car-run plan card d16.plan --license mit            README.md and card.png of the plan, into it
  car-run plan push d16.plan hf:ORG/NAME              the plan and its card to the hub
  car-run plan pull hf:ORG/NAME@v1 -o d16.plan        and from there; without -o into the cache
  car-run plan web d16.plan -o site/                  the studio without a server, for any static host
  car-run plan web d16.plan -o site/ --branches canny,sketch

info, card and web need the runtime alone, pull and push pip install 'car-deploy[cpu,hub]', the others the exporter:
pip install 'car-deploy[cpu,export]'
"""
ACTIONS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "info": (None, ()),
    "add-branch": ("a checkpoint", ("name", "default", "output")),
    "remove-branch": ("the name of a branch", ("default", "output")),
    "card": (None, ("licence", "backend", "output")),
    "pull": (None, ("output",)),
    "push": ("hf:ORG/NAME", ("private",)),
    "web": (None, ("onnxruntime", "branches", "output")),
}
"""Action → what stands after the plan, and the flags that are for it."""
NAMES = 12
"""Class names that are shown to people."""


def parse_args(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Raises RequestError on misuse."""
    parser = Parser("car-run plan", ABOUT, EXAMPLES)
    add = parser.add_argument
    add("action", choices=tuple(ACTIONS), metavar="ACTION", help=", ".join(ACTIONS))
    add("plan", metavar="PLAN", help="plan directory, or hf:ORG/NAME[@REVISION]")
    add("given", nargs="?", metavar="WHAT", help="checkpoint or run to add, branch to remove, hf:ORG/NAME to push to")
    add("--name", metavar="NAME", help="of the branch to add (default: its control type)")
    add("--default", metavar="NAME", help="branch of a control that names none, from now on")
    add("--license", dest="licence", metavar="ID", help="of the weights, for the card: mit, cc-by-4.0, other …")
    add("--backend", default=None, help="that compares the plan with its goldens, for the card (default: auto)")
    add("--private", action="store_true", help="a repository that push makes is private; a public one is refused")
    add("-o", "--output", type=Path, metavar="PLAN", help="plan (default: in place), site or card's folder to write")
    add("--branches", metavar="A,B", help="for web: those of the plan's branches that the page has (default: all)")
    add("--onnxruntime", type=Path, metavar="TGZ", help="for web: the npm package onnxruntime-web (see make web)")
    add("--json", action="store_true", help="print one JSON object")
    add("--debug", action="store_true", help="show a traceback when the program itself fails")
    args = parser.parse_args(arguments)
    wanted, flags = ACTIONS[args.action]
    if wanted is not None and args.given is None:
        parser.error(f"{args.action} needs {wanted} after the plan")
    if wanted is None and args.given is not None:
        parser.error(f"{args.action} takes nothing but the plan; leave out {args.given!r}")
    for name in ("name", "default", "licence", "backend", "private", "onnxruntime", "branches", "output"):
        if getattr(args, name) and name not in flags:
            flag = {"output": "-o", "licence": "--license"}.get(name, f"--{name}")
            parser.error(f"{flag} is not for {args.action}; leave it out")
    if args.action == "web" and args.output is None:
        parser.error("web needs -o SITE")
    return args


def run(arguments: Sequence[str]) -> int:
    """Facts, paths or the hub's name go to stdout; progress to stderr. Returns the exit code."""
    args = parse_args(arguments)
    actions = {"info": _info, "card": _card, "pull": _pull, "push": _push, "web": _web}
    code: int = actions.get(args.action, _change)(args)
    return code


def _info(args: argparse.Namespace) -> int:
    args.plan = plan_path(args.plan)
    _print(args)
    return 0


def _card(args: argparse.Namespace) -> int:
    """Write the card into the plan, or another folder."""
    from car_runtime.card import card
    from car_runtime.images import write_files

    root = plan_path(args.plan)
    folder = root if args.output is None else args.output
    made = card(root, licence=args.licence, backend=args.backend or "auto")
    paths = {folder / name: text for name, text in made.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_files(paths)
    _print_paths(args, *paths)
    return 0


def _pull(args: argparse.Namespace) -> int:
    """Fetch a plan into the cache, or from there into a directory of its own."""
    from car_runtime.hub import PREFIX, copy_plan

    if not args.plan.startswith(PREFIX):
        raise RequestError(f"{args.plan[:120]!r} is not on the hub; write hf:ORG/NAME or hf:ORG/NAME@REVISION")
    if args.output is not None and args.output.exists():
        raise OutputError(f"{str(args.output)!r} is there already; remove it, or choose another -o")
    root = plan_path(args.plan)
    if args.output is not None:
        copy_plan(root, args.output)
    _print_paths(args, args.output or root)
    return 0


def _push(args: argparse.Namespace) -> int:
    """Send a plan to the hub."""
    from car_runtime.hub import parse_name, push

    hide_bars()
    made = push(args.plan, parse_name(args.given), private=args.private, log=lambda line: note(f"car-run: {line}"))
    print(json.dumps({"name": made}) if args.json else made, flush=True)
    return 0


def _print_paths(args: argparse.Namespace, *paths: Path) -> None:
    names = [str(path) for path in paths]
    print(json.dumps({"paths": names}) if args.json else "\n".join(names), flush=True)


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
    branches = None if args.branches is None else [name.strip() for name in args.branches.split(",")]
    size = site.write_site(plan_path(args.plan), args.output, args.onnxruntime, branches)
    if size > site.LARGE:
        note(f"car-run: the site has {_megabytes(size)}, which takes long to load")
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

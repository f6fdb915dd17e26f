"""What the commands' parsers share, and the flags that are made of `GenerationConfig`."""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from car_runtime.cli.errors import note
from car_runtime.config import GenerationConfig, flags
from car_runtime.errors import RequestError, printable

GROUPS = {
    "input": "what to run",
    "sampling": "sampling (defaults: the plan's own)",
    "schedule": "schedule (default: all scales alike; scales count from 0, the coarsest)",
}
"""Group of a setting → its heading in `--help`."""


TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class Parser(argparse.ArgumentParser):
    """argparse, with its errors as exceptions, so that they end in one line like all others."""

    def __init__(self, prog: str, description: str, examples: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._negative_number_matcher = re.compile(r"-[0-9].*")  # or "--box -1,0,9,9" lacks its argument

    def error(self, message: str) -> NoReturn:
        """Raise RequestError."""
        raise RequestError(f"{message}; see {self.prog} --help")


def subcommand(name: str, description: str, examples: str) -> Parser:
    """The parser of `car-run NAME [PLAN]`, with the flags that all have."""
    parser = Parser(f"car-run {name}", description, examples)
    parser.add_argument("plan", nargs="?", metavar="PLAN", help="plan directory, or hf:ORG/NAME")
    parser.add_argument("--json", action="store_true", help="print the whole report on stdout, as one JSON object")
    parser.add_argument("--debug", action="store_true", help="show a traceback when the program itself fails")
    return parser


def plan_path(given: str | None) -> Path:
    """The directory of the plan that was named: a directory, or hf:ORG/NAME; None for the one in the package."""
    from car_runtime.plan import default_plan

    if given is None:
        return default_plan()
    from car_runtime.hub import located

    hide_bars()
    return located(given, lambda line: note(f"car-run: {printable(line)}"))


def hide_bars() -> None:
    """The hub's client shows its progress bars on terminals alone. It must not have been imported yet."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def image_source(given: str) -> str | io.BytesIO:
    """What an image is read from: the path, or for "-" all of stdin.

    Raises RequestError where that is closed, or has more bytes than an image may.
    """
    if given != "-":
        return given
    if sys.stdin is None:
        raise RequestError("the image is to come from stdin, which is closed; pipe it in, or name a file")
    from car_runtime.images import MAX_BYTES

    data = sys.stdin.buffer.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise RequestError(f"the image on stdin has over {MAX_BYTES} bytes; make it smaller first")
    return io.BytesIO(data)


def named_source(given: str) -> tuple[str | None, str, float]:
    """BRANCH=IMAGE[:WEIGHT] → branch, file, weight; None and 1 where they aren't there. A file's whole name wins."""
    if given == "-" or os.path.exists(given):
        return None, given, 1.0
    parts = re.fullmatch(r"([a-z0-9_-]{1,32})=(.*)", given)
    if parts is None:
        return None, given, 1.0
    return parts[1], *weighted_source(parts[2])


def weighted_source(given: str) -> tuple[str, float]:
    """IMAGE[:WEIGHT] → file, weight; 1 where there is none. A file's whole name wins."""
    parts = re.fullmatch(r"(.+?):([-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))", given)
    if parts is None or os.path.exists(given):
        return given, 1.0
    return parts[1], float(parts[2])


def control_sources(given: Sequence[str]) -> Any:
    """What --control was given, once or several times, as `GenerationConfig.control` has it. Raises RequestError."""
    if not given:
        return None
    parts = [named_source(one) for one in given]
    if len(parts) == 1 and parts[0][0] is None:
        return image_source(parts[0][1])
    if [file for _, file, _ in parts].count("-") > 1:
        raise RequestError("--control - is stdin, which can be read once; name files")
    found: dict[str, Any] = {}
    for one, (branch, file, weight) in zip(given, parts, strict=True):
        if branch is None:
            raise RequestError(f"--control {one!r} names no branch; with several of them give BRANCH=IMAGE")
        if not file:
            raise RequestError(f"--control {one!r} names no image; give BRANCH=IMAGE or BRANCH=IMAGE:WEIGHT")
        if branch in found:
            raise RequestError(f"--control names the branch {branch!r} twice; give each branch once")
        found[branch] = (image_source(file), weight)
    return found


def add_backend_flag(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--backend", default="auto", help="auto, or an engine such as ort-cpu (default: auto)")


def add_threads_flag(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")


def add_trust_flags(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--require-signature", metavar="PUB", help="refuse a plan that this public key (Ed25519, PEM) didn't sign"
    )
    parser.add_argument(
        "--trust-engines", action="store_true", help="load compiled engines that were not built here; they are code"
    )


def add_setting(parser: argparse._ActionsContainer, name: str) -> None:
    """The flag of one field of `GenerationConfig`; what it is given goes to the attribute of the field's name."""
    flag = flags()[name]
    default = next(field.default for field in fields(GenerationConfig) if field.name == name)
    if flag.type is bool:
        parser.add_argument(*flag.names, dest=name, action="store_true", help=flag.help)
        return
    parser.add_argument(*flag.names, dest=name, type=flag.type, default=default, metavar=flag.metavar, help=flag.help)


def add_settings(parser: argparse.ArgumentParser, group: str) -> None:
    """A group of flags, "sampling" or "schedule"; the benchmarks have them too."""
    listed = parser.add_argument_group(GROUPS[group])
    for name in flags(group):
        add_setting(listed, name)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Those of the parsed arguments that are settings, by the fields' names."""
    return {name: getattr(args, name) for name in flags() if hasattr(args, name)}


def spellings() -> dict[str, str]:
    """How settings are named in tables and in `--vary`, by `spelled` → the field: the flag's name or the field's."""
    return {spelled(name.lstrip("-")): field for field, flag in flags().items() for name in (*flag.names, field)}


def spelled(name: str) -> str:
    """A setting's name in lower case and with hyphens."""
    return name.strip().lower().replace("_", "-")


def parse_setting(place: str, field: str, text: str) -> Any:
    """A setting's value from text. Its range is checked later. Raises RequestError, which begins with `place`."""
    kind = flags()[field].type
    if kind is bool:
        if text.lower() not in TRUTH:
            raise RequestError(f"{place}: {text[:60]!r} is neither true nor false; give one of these")
        return TRUTH[text.lower()]
    try:
        return kind(text)
    except ValueError as error:
        what = "whole number" if kind is int else "number"
        raise RequestError(f"{place}: {text[:60]!r} is no {what}; give one, or leave it out") from error

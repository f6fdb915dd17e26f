"""Command-line flags made from dataclasses: an option's type, default, choices and help have one home, its field.

@dataclass(frozen=True, kw_only=True)
class Options:
    steps: int = option(5000, "optimizer steps")

add_flags(parser, Options())            # --steps STEPS   optimizer steps (default: 5000)
Options(**given(args, Options))
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Container = argparse.ArgumentParser | argparse._ArgumentGroup
"""Whatever arguments can be added to."""


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    flag: str | None = None,
    dest: str | None = None,
    aliases: Sequence[str] = (),
    choices: Sequence[str] | None = None,
    metavar: str | None = None,
    type: Callable[[str], Any] | None = None,
) -> Any:
    """A dataclass field that `add_flags` makes a flag of.

    default: of the field; without one the flag is required.
    help:    what the option means; the default is added, unless the text names one.
    flag:    its name, where it isn't the field's; several, separated by spaces.
    dest:    its name among the parsed arguments, where another flag has the field's.
    aliases: older names, which work and which no help text shows.
    type:    reads the text, where the field's type alone doesn't say how.
    """
    about = {"help": help, "flag": flag, "dest": dest, "aliases": aliases, "choices": choices, "metavar": metavar}
    return dataclasses.field(default=default, metadata={**about, "type": type})


def add_flags(parser: Container, defaults: Any, *names: str, **instead: Any) -> None:
    """Add the flags of a dataclass's options.

    defaults: an instance, whose values are the flags' defaults; or the class.
    names:    the fields to add, in this order; without any, all options.
    instead:  defaults for this command that are no field's value, such as None for "worked out later".
    """
    cls = defaults if isinstance(defaults, type) else type(defaults)
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if "help" in f.metadata}
    for name in names or fields:
        field = fields[name]
        default = instead[name] if name in instead else getattr(defaults, name, field.default)
        _add_flag(parser, field, hints[name], default)


def given(args: argparse.Namespace, cls: Any) -> dict[str, Any]:
    """The parsed values of a dataclass's options, by field name; without those that the command has no flag for."""
    dests = {f.name: f.metadata["dest"] or f.name for f in dataclasses.fields(cls) if "dest" in f.metadata}
    return {name: getattr(args, dest) for name, dest in dests.items() if hasattr(args, dest)}


def _add_flag(parser: Container, field: dataclasses.Field[Any], hint: Any, default: Any) -> None:
    about, dest = field.metadata, field.metadata["dest"] or field.name
    required = default is dataclasses.MISSING
    text = about["help"]
    if hint is bool:
        name = about["flag"] or f"--{'no-' if default else ''}{field.name.replace('_', '-')}"
        settings: dict[str, Any] = {"action": "store_false" if default else "store_true"}
    else:
        name = about["flag"] or f"--{field.name.replace('_', '-')}"
        settings = {"type": about["type"] or _reader(hint), "metavar": about["metavar"]}
        settings |= {"choices": about["choices"]} if about["choices"] else {}
        if not required and default is not None and "(default" not in text:
            text = f"{text} (default: {_show(default)})".strip()
    if required:
        parser.add_argument(*name.split(), dest=dest, help=text, required=True, **settings)
    else:
        parser.add_argument(*name.split(), dest=dest, help=text, default=default, **settings)
    for alias in about["aliases"]:
        parser.add_argument(alias, dest=dest, help=argparse.SUPPRESS, default=argparse.SUPPRESS, **settings)


def _reader(hint: Any) -> Callable[[str], Any]:
    """What reads a value of this type: int, float, str, Path, one of these or None, or whole numbers with commas."""
    if isinstance(hint, types.UnionType):
        (hint,) = (t for t in typing.get_args(hint) if t is not type(None))
    if hint == tuple[int, ...]:
        return integers
    assert hint in (int, float, str, Path), hint
    return hint


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_show, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def integers(text: str) -> tuple[int, ...]:
    """ "1,2,3" → (1, 2, 3)."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 1,2,3,4") from None


def numbers(count: int) -> Callable[[str], tuple[float, ...]]:
    """A reader of so many numbers: "0.5,0.5,0.5" → (0.5, 0.5, 0.5)."""

    def read(text: str) -> tuple[float, ...]:
        try:
            values = tuple(float(part) for part in text.split(","))
        except ValueError:
            values = ()
        if len(values) != count:
            raise argparse.ArgumentTypeError(f"{text!r} is not {count} numbers such as 0.485,0.456,0.406")
        return values

    return read

"""Flags made from dataclasses, and the older names that still work."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

import car_train
from car_train.cli import parse_args
from car_train.config import CARConfig, VARConfig, VQVAEConfig
from car_train.flags import add_flags, given, option
from car_train.training.command import TOKENIZER, TRANSFORMER
from car_train.training.options import TokenizerLossOptions, TrainOptions


@dataclass(frozen=True, kw_only=True)
class Options:
    data: Path = option(help="a folder")
    steps: int = option(10, "how long")
    rate: float = option(0.5)
    sides: tuple[int, ...] = option((1, 2), flag="--patch-nums", aliases=("--sides",), metavar="PATCH_NUMS")
    kind: str | None = option(None, choices=("a", "b"))
    fast: bool = option(False)
    safe: bool = option(True, "take risks")
    unlisted: int = 3


def parse(*argv: str) -> Options:
    parser = argparse.ArgumentParser()
    add_flags(parser, Options)
    return Options(**given(parser.parse_args(argv), Options))


def test_a_flag_has_its_fields_type_default_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse("--data", "x") == Options(data=Path("x"))
    flags = "--data x --steps 3 --rate 2 --patch-nums 1,4 --kind b --fast --no-safe".split()
    assert parse(*flags) == Options(data=Path("x"), steps=3, rate=2.0, sides=(1, 4), kind="b", fast=True, safe=False)
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "--steps STEPS how long (default: 10)" in text
    assert "--patch-nums PATCH_NUMS (default: 1,2)" in text
    assert "--no-safe take risks" in text
    for hidden in ("--sides", "unlisted"):
        assert hidden not in text


@pytest.mark.parametrize("argv", ["", "--data x --steps a", "--data x --kind c", "--data x --patch-nums 1,b"])
def test_misuse_of_a_flag_ends_with_code_2(argv: str) -> None:
    with pytest.raises(SystemExit) as error:
        parse(*argv.split())
    assert error.value.code == 2


def test_defaults_can_be_those_of_an_instance_or_of_the_command() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, dataclasses.replace(Options(data=Path("x")), steps=7), "steps", "rate", rate=None)
    assert given(parser.parse_args([]), Options) == {"steps": 7, "rate": None}


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("--accumulate 4", "--grad-accum 4", "grad_accum"),
        ("--clip 0.5", "--grad-clip 0.5", "grad_clip"),
        ("--recompute", "--activation-checkpointing", "activation_checkpointing"),
        ("--sides 1,2,5", "--patch-nums 1,2,5", "sides"),
    ],
)
def test_a_renamed_flag_works_by_its_old_name_too(old: str, new: str, field: str) -> None:
    command = ["vqvae", "--data", "x", "-o", "y"]
    before, after, plain = (parse_args([*command, *flags.split()]) for flags in (old, new, ""))
    assert before == after
    assert getattr(after, field) != getattr(plain, field)


def test_the_import_of_official_files_takes_sides_by_both_names() -> None:
    command = ["import", "--vae", "v.pth", "-o", "y"]
    assert parse_args([*command, "--sides", "1,2"]) == parse_args([*command, "--patch-nums", "1,2"])
    assert parse_args(command).sides is None


def test_what_a_command_is_not_given_is_as_its_options_say() -> None:
    paths = {"data": Path("x"), "output": Path("y")}
    common = ["--data", "x", "-o", "y"]
    vqvae, var, car = (
        parse_args([stage, *common, *more])
        for stage, more in (("vqvae", ()), ("var", ("--vqvae", "v")), ("car", ("--base", "b")))
    )
    for args in (vqvae, var, car):
        assert TrainOptions(**given(args, TrainOptions)) == TrainOptions(**paths)
    assert VQVAEConfig(**given(vqvae, VQVAEConfig)) == TOKENIZER
    assert TokenizerLossOptions(**given(vqvae, TokenizerLossOptions)) == TokenizerLossOptions()
    assert VARConfig(**given(var, VARConfig)) == TRANSFORMER
    assert given(car, CARConfig)["encoder_widths"] is None  # the base's tokenizer decides


FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
NOT_OURS = {"--max-restarts", "--nproc-per-node", "--hash", "--require-hashes"}
"""Flags of torchrun and pip."""


def parsers() -> list[argparse.ArgumentParser]:
    """Those of all commands."""
    found: list[argparse.ArgumentParser] = []
    with mock.patch.object(argparse.ArgumentParser, "parse_args", lambda self, *_: found.append(self)):
        parse_args([])
    (commands,) = (action for action in found[0]._actions if isinstance(action, argparse._SubParsersAction))
    return list(commands.choices.values())


def texts(path: Path) -> Iterator[str]:
    """The strings in a module, whole sentences where they are put together."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_advice_names_flags_that_exist() -> None:
    known = {flag for parser in parsers() for action in parser._actions for flag in action.option_strings}
    root = Path(car_train.__file__).parent
    sentences = {(path.name, t) for path in root.rglob("*.py") for t in texts(path) if " " in t}
    named = {(name, flag) for name, t in sentences for flag in FLAG.findall(t)}
    assert len(named) > 30
    assert not {(name, flag) for name, flag in named if flag not in known | NOT_OURS}


def test_advice_gives_flags_and_no_python() -> None:
    """What ends a message is to be typed in a shell."""
    root = Path(car_train.__file__).parent
    python = re.compile(r"; [^;]*\b(give|use|add|set|with) [a-z]+_[a-z_]+\b(?!\.)|[a-z_]+=\'")
    found = {(path.name, t) for path in root.rglob("*.py") for t in texts(path) if "\n" not in t and python.search(t)}
    assert not found

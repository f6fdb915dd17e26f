"""README and docs: their commands and code run, their flags, paths and links exist, and the README stays short.

Commands stand in fenced `sh` blocks, Python in fenced `python` blocks. Both run in a copy of the checkout, in the
order in which they stand in their document, unless a mark stands right before the block: then its commands are
parsed, each by its own program's parser.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
GENERATED = ROOT / "docs/performance.md"
"""Written by `benchmarks.report`; its links are checked, its form is not."""
DOCUMENTS = sorted(
    [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")]
    + [path for path in (ROOT / "docs").rglob("*.md") if path != GENERATED]
)
LANGUAGES = {"sh", "python", "text"}
REASONS = {"GPU", "AMX", "hours", "installs", "published weights", "a key pair"}
"""Why a block isn't run: it needs hardware, hours, an environment of its own, or files that we may not include."""
SLOW = "slow"
CHECKOUT = ("benchmarks", "car_train", "export", "integrations", "runtime", "tests", "Makefile", "pyproject.toml")
NOT_OURS = {"--extra-index-url", "--fix", "--max-restarts", "--nproc-per-node", "engines/"}
"""Flags of pip, ruff and torchrun that documents name, and a folder inside a plan."""
OLD_WORDS = r"(?<![a-z.])(?:pictures?|beside|tells?|told|made[-_ ]up|likeliest|eight[- ]bits?)(?![a-z])"
"""CONTRIBUTING.md, "Words"."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    document: Path
    line: int
    language: str
    mark: str | None
    text: str

    def __str__(self) -> str:
        return f"{name_of(self.document)}:{self.line}"


def name_of(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


@cache
def lines_of(document: Path) -> tuple[str, ...]:
    return tuple(document.read_text(encoding="utf-8").splitlines())


@cache
def blocks_of(document: Path) -> tuple[Block, ...]:
    lines, found, at = lines_of(document), [], 0
    while at < len(lines):
        if lines[at].startswith("```"):
            end = lines.index("```", at + 1)
            mark = re.fullmatch(r"<!-- (.*) -->", lines[at - 1]) if at else None
            text = "\n".join(lines[at + 1 : end])
            found.append(Block(document, at + 1, lines[at][3:], mark[1] if mark else None, text))
            at = end
        at += 1
    return tuple(found)


@cache
def prose_of(document: Path) -> tuple[str, ...]:
    """The lines outside of fenced blocks, those inside as empty ones."""
    lines, inside, found = lines_of(document), False, []
    for line in lines:
        fence = line.startswith("```")
        found.append("" if fence or inside else line)
        inside ^= fence
    return tuple(found)


def spans_of(document: Path) -> list[str]:
    """What stands in backticks outside of fenced blocks."""
    return re.findall(r"`([^`]+)`", " ".join(prose_of(document)))


def marked(blocks: Iterator[Block] | list[Block]) -> list[Block]:
    return [block for block in blocks if block.language == "sh" and (block.mark or "").startswith("not run")]


ALL_BLOCKS = [block for document in DOCUMENTS for block in blocks_of(document)]


# -- form ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_code_stands_in_fences_of_a_known_language(document: Path) -> None:
    assert {block.language for block in blocks_of(document)} <= LANGUAGES
    prose = prose_of(document)
    indented = [i + 1 for i, line in enumerate(prose) if line.startswith("    ") and i and not prose[i - 1].strip()]
    assert not indented, "indented code is never run; put it into a fenced block"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_marks_stand_before_a_block_and_give_one_of_the_known_reasons(document: Path) -> None:
    known = {SLOW, *(f"not run: {reason}" for reason in REASONS)}
    marks = [line for line in prose_of(document) if line.startswith("<!--")]
    assert [f"<!-- {block.mark} -->" for block in blocks_of(document) if block.mark] == marks
    assert {block.mark for block in blocks_of(document)} - {None} <= known


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_a_table_row_is_no_longer_than_phrases_can_be(document: Path) -> None:
    assert not [i for i, line in enumerate(lines_of(document), 1) if line.startswith("|") and len(line) > 200]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_documents_use_the_glossarys_words(document: Path) -> None:
    text = "\n".join(prose_of(document))
    if document.name == "CONTRIBUTING.md":
        text = text[: text.index("\n## Words\n")] + text[text.index("\n## Code\n") :]
    words = re.findall(OLD_WORDS, re.sub(r"`[^`]*`", "", text), re.IGNORECASE)
    assert not words, "the glossary is in CONTRIBUTING.md"


def test_code_uses_the_glossarys_words() -> None:
    """Names too, all but the keys of reports and logs that earlier versions wrote."""
    names = ("benchmarks", "car_train", "examples", "export", "integrations", "runtime", "tests")
    folders = [ROOT / name for name in names]
    found = []
    for path in [ROOT / "Makefile", ROOT / "pyproject.toml", *(p for f in folders for p in f.rglob("*.py"))]:
        text = re.sub(
            r"['\"](pictures?|made_up_weights)['\"]|/pictures\b|event: picture\b",  # and a route and its event
            "",
            path.read_text(encoding="utf-8"),
        )
        if path != Path(__file__) and (words := re.findall(OLD_WORDS, text, re.IGNORECASE)):
            found.append(f"{name_of(path)}: {', '.join(words)}")
    assert not found, "the glossary is in CONTRIBUTING.md"


def test_the_readme_is_read_at_a_glance() -> None:
    readme = ROOT / "README.md"
    assert len(lines_of(readme)) <= 160
    assert readme.stat().st_size <= 8192
    first_image = next(i for i, line in enumerate(lines_of(readme)) if line.startswith("!["))
    assert first_image < next(i for i, line in enumerate(lines_of(readme)) if line.startswith("## "))


def test_the_readme_starts_with_an_animation_of_every_scale() -> None:
    from car_runtime.format.manifest import read_manifest

    shown = re.search(r"!\[[^\]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert shown is not None
    animation = ROOT / shown[1]
    assert animation.stat().st_size <= 2**20
    scales = read_manifest(ROOT / "runtime/car_runtime/plans/emoji.plan").scales
    with Image.open(animation) as image:
        frames = image.n_frames  # type: ignore[attr-defined]
    assert frames % len(scales) == 0
    assert frames > len(scales)


def test_the_readmes_table_of_backends_is_the_registrys() -> None:
    from car_runtime.backends import registry

    assert registry.markdown_table() in (ROOT / "README.md").read_text(encoding="utf-8")


# -- what runs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What a command finds in a checkout: the code as links, the examples as a copy, and an empty home folder."""
    folder = tmp_path / "car-deploy"
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    for name in CHECKOUT:
        (folder / name).symlink_to(ROOT / name)
    (tmp_path / "home").mkdir()
    return folder


def run(block: Block, checkout: Path, text: str | None = None) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    packages = os.pathsep.join(str(ROOT / name) for name in (".", "export", "runtime"))
    environment = {**os.environ, "PATH": path, "PYTHONPATH": packages, "HOME": str(checkout.parent / "home")}
    program = {"sh": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}[block.language]
    done = subprocess.run(
        [*program, block.text if text is None else text],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, f"{block} exits with {done.returncode}:\n{done.stdout}\n{done.stderr}"


def runnable(mark: str | None) -> list[Path]:
    found = [block.document for block in ALL_BLOCKS if block.language in ("sh", "python") and block.mark == mark]
    return sorted(set(found))


@pytest.mark.parametrize("document", runnable(None), ids=name_of)
def test_what_a_document_shows_runs(document: Path, checkout: Path) -> None:
    for block in blocks_of(document):
        if block.language in ("sh", "python") and block.mark is None:
            run(block, checkout)
    if document.name == "usage.md":
        check_figures(checkout)


FIGURES = {
    "edit-paint": "painted-grid.png",
    "edit-extend": "extended-grid.png",
    "edit-restyle": "restyled-grid.png",
    "edit-vary": "varied-grid.png",
    "sheet": "styles.png",
}
"""Figure in docs/images → what its command in docs/usage.md writes."""


def check_figures(checkout: Path) -> None:
    """Fail unless figures are what the commands wrote, but for what WebP loses: a grey level in the mean."""

    def pixels(path: Path) -> np.ndarray:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"), np.int16)

    shown = {name: pixels(ROOT / "docs" / "images" / f"{name}.webp") for name in FIGURES}
    for name, file in FIGURES.items():
        assert shown[name].shape == pixels(checkout / file).shape
        assert np.abs(shown[name] - pixels(checkout / file)).mean() < 1.5, name
    readme = pixels(ROOT / "docs" / "images" / "edits.webp")
    for row, name in enumerate(("edit-paint", "edit-extend", "edit-restyle")):
        top, height = row * (len(shown[name]) + 8), len(shown[name])
        assert np.abs(shown[name] - readme[top : top + height]).mean() < 1.5, name


@pytest.mark.slow
@pytest.mark.parametrize("document", runnable(SLOW), ids=name_of)
def test_what_a_document_shows_runs_in_minutes(document: Path, checkout: Path) -> None:
    for block in blocks_of(document):
        if block.mark == SLOW:
            run(block, checkout)


SMALL = "--steps 2 --batch 4 --warmup 1 --validate-every 2 --save-every 2"
SMALLER = {
    " vqvae ": f"{SMALL} --channels 8 --vocab 64",
    " var ": f"{SMALL} --depth 2 --width 32 --heads 2 --views 1",
    " car ": f"{SMALL} --views 1 --encoder-widths 8,16,16,32",
}
"""Stage → what makes its command a matter of seconds."""


@pytest.mark.slow
def test_the_readmes_six_commands_lead_from_images_to_an_image(checkout: Path) -> None:
    """In their order, on a few generated images and with small models; the fetching of the data set is left out."""
    (block,) = [b for b in blocks_of(ROOT / "README.md") if "car_train car" in b.text]
    fetch, *commands = block.text.splitlines()
    assert "data emoji" in fetch
    for name in ("fluent-objects", "fluent-travel-places"):
        folder = checkout.parent / "home/.cache/car/data/emoji" / name
        folder.mkdir(parents=True)
        for i in range(40):
            noise = np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)
            Image.fromarray(noise).save(folder / f"{i}.png")
    for i, command in enumerate(commands):
        small = [flags for stage, flags in SMALLER.items() if f"car_train{stage}" in command]
        commands[i] = " ".join([command, *small])
    run(block, checkout, "\n".join(commands))
    with Image.open(checkout / "umbrella.png") as image:
        assert image.size == (64, 64)


# -- what is parsed ------------------------------------------------------------------------------------------------


class Parsed(BaseException):
    """A program has parsed its command line; nothing of it is to run."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def parse(program: str, arguments: list[str]) -> argparse.ArgumentParser:
    """Start a program (a module, or a script of the checkout) and stop it once its arguments are parsed.

    Returns its parser. Fails with the program's own message where it refuses them.
    """
    real, depth = argparse.ArgumentParser.parse_args, 0

    def parse_and_stop(self: argparse.ArgumentParser, *given: Any, **named: Any) -> argparse.Namespace:
        nonlocal depth
        depth += 1
        try:
            result = real(self, *given, **named)
        finally:
            depth -= 1
        if depth:  # a parser that parses an argument of the command
            return result
        raise Parsed(self)

    with (
        patch.object(argparse.ArgumentParser, "parse_args", parse_and_stop),
        patch.object(sys, "argv", [program, *arguments]),
    ):
        try:
            if program.endswith(".py"):
                runpy.run_path(str(ROOT / program), run_name="__main__")
            else:
                runpy.run_module(program, run_name="__main__", alter_sys=True)
        except Parsed as parsed:
            return parsed.parser
        except SystemExit:
            pass
    pytest.fail(f"{program} refuses {shlex.join(arguments)}")


def commands_of(block: Block) -> list[list[str]]:
    """The commands of a block, split into words, with the block's own variables filled in."""
    variables, commands = {"HOME": "/home"}, []
    for line in block.text.replace("\\\n", " ").splitlines():
        for name, value in variables.items():
            line = re.sub(rf"\${name}\b", value, line)
        words = shlex.split(line, comments=True)
        if len(words) == 1 and (assignment := re.fullmatch(r"(\w+)=(.*)", words[0], re.DOTALL)):
            variables[assignment[1]] = assignment[2]
        elif words:
            commands.append(words)
    return commands


def check(words: list[str]) -> None:
    """Fail unless a program takes these words."""
    match words:
        case ["car-run", *rest]:
            parse("car_runtime", rest)
        case ["python", "-m", module, *rest]:
            parse(module, rest)
        case ["python", script, *rest]:
            parse(script, rest)
        case ["torchrun", *rest]:
            from torch.distributed.run import get_args_parser

            launch = get_args_parser().parse_args(rest)
            assert launch.module
            parse(launch.training_script, launch.training_script_args)
        case ["pip", "install", *rest]:
            check_extras(rest)
        case ["pip", "uninstall", *names]:
            assert names
        case ["make", *rest]:
            check_make(rest)
        case ["cp", *sources, _]:  # the last one is on the reader's machine
            assert all((ROOT / source).exists() for source in sources if source != "-r")
        case ["openssl", command, *rest]:
            usage = subprocess.run(["openssl", command, "-help"], capture_output=True, text=True, check=True)
            assert {word for word in rest if word.startswith("-")} <= set((usage.stdout + usage.stderr).split())
        case ["locust", "-f", file, *rest]:  # in a process of its own: it patches sockets
            helped = [sys.executable, "-m", "locust", "-f", str(ROOT / file), "--host", "http://127.0.0.1", "--help"]
            usage = subprocess.run(helped, capture_output=True, text=True, check=True).stdout
            assert {word for word in rest if word.startswith("-")} <= set(re.findall(r"(?<!\S)--?[\w-]+", usage))
        case ["serve", "run", target]:  # Ray's
            module, _, name = target.partition(":")
            assert re.search(rf"^{name} = ", (ROOT / "runtime" / f"{module.replace('.', '/')}.py").read_text(), re.M)
        case _:
            pytest.fail(f"nothing is known about {words[0]!r}; add to this test how it is checked")


def check_extras(words: list[str]) -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for wanted in re.findall(r"^\.\[(.+)\]$", "\n".join(words), re.MULTILINE):
        for extra in wanted.split(","):
            assert re.search(rf"^{extra} = \[", text, re.MULTILINE), f"pyproject.toml has no extra {extra!r}"


def check_make(words: list[str]) -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        variable, equals, value = word.partition("=")
        if equals:
            assert re.search(rf"^{variable} \?=", text, re.MULTILINE), f"the Makefile has no variable {variable!r}"
            for path in re.findall(r"tests/\S+", value):
                assert (ROOT / path).is_file(), path
        else:
            assert re.search(rf"^{word}:", text, re.MULTILINE), f"the Makefile has no target {word!r}"


@pytest.mark.parametrize("block", marked(ALL_BLOCKS), ids=str)
def test_commands_that_are_not_run_are_ones_that_their_programs_take(block: Block) -> None:
    pytest.importorskip("torch")
    for words in commands_of(block):
        check(words)


def test_a_wrong_flag_in_a_block_is_found() -> None:
    with pytest.raises(pytest.fail.Exception, match="refuses --no-such-flag"):
        parse("car_runtime", ["--no-such-flag"])
    with pytest.raises(pytest.fail.Exception, match="refuses"):
        check(shlex.split("python -m car_train var --data x --vqvae y -o z --no-such-flag"))
    with pytest.raises(AssertionError, match="no extra 'no-such-extra'"):
        check(shlex.split("pip install '.[cpu,no-such-extra]'"))


# -- what prose names ----------------------------------------------------------------------------------------------


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {flag for sub in action.choices.values() for flag in flags_of(sub)}
    return found


EDITS = {
    "paint": ["--box", "0,0,1,1"],
    "extend": ["--left", "1"],
    "restyle": ["--class", "1"],
    "vary": [],
    "again": [],
}
"""Editing command → what it asks for besides the image."""


@cache
def known_flags() -> set[str]:
    """The flags of all programs that documents name."""
    plan = ["x.plan"]
    programs = [
        ("car_runtime", []),
        ("car_runtime", ["control", "x.jpg", "-o", "y.png"]),
        *[("car_runtime", [word, "x.png", *more]) for word, more in EDITS.items()],
        ("car_runtime", ["batch", "x.csv", "-o", "out"]),
        ("car_runtime", ["sheet"]),
        ("car_runtime", ["blend", "--seed", "0", "--seed", "1"]),
        ("car_runtime", ["doctor"]),
        ("car_runtime", ["plan", "info", "x.plan"]),
        ("car_runtime", ["verify"]),
        ("car_runtime", ["serve"]),
    ]
    programs += [("car_train", ["data", "emoji"]), ("export/build_engines.py", plan), ("export/numerics.py", plan)]
    for words in (words for block in ALL_BLOCKS if block.language == "sh" for words in commands_of(block)):
        if words[:2] == ["python", "-m"] and words[2].startswith("benchmarks."):
            programs.append((words[2], words[3:]))
    return {flag for program, arguments in programs for flag in flags_of(parse(program, arguments))}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_flags_that_prose_names_exist(document: Path) -> None:
    pytest.importorskip("torch")
    text = " ".join(spans_of(document))
    if document.name == "CHANGELOG.md":  # it names what flags were called before
        text = re.sub(r"\(.*?\)", "", text)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text))
    assert named <= known_flags() | NOT_OURS


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_paths_and_modules_that_prose_names_exist(document: Path) -> None:
    bases = (ROOT, ROOT / "runtime/car_runtime", ROOT / "export", document.parent)
    for span in spans_of(document):
        if re.fullmatch(r"[a-z_][\w.-]*(/[\w.-]+)*(\.(py|c|h|md|toml)|/)", span) and span not in NOT_OURS:
            assert any((base / span).exists() for base in bases), f"there is no {span}"
        module = re.fullmatch(r"python -m ([\w.]+).*", span)
        if module:
            assert importlib.util.find_spec(module[1]) is not None, span


def test_names_on_the_newcomers_page_are_the_codes() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text[text.index("\n## Finding your way\n") : text.index("\n## Words\n")]
    names = re.findall(r"`((?:[A-Z]\w+\.)?[A-Za-z]\w*)`", section)
    folders = [ROOT / name for name in ("car_train", "export", "runtime")]
    code = " ".join(path.read_text(encoding="utf-8") for folder in folders for path in folder.rglob("*.py"))
    known = set(re.findall(r"\w+", code))
    assert len(names) > 20
    assert not [name for name in names if not known.issuperset(name.split("."))]


def test_pages_that_code_names_exist() -> None:
    for folder in ("benchmarks", "car_train", "export", "runtime"):
        for path in (ROOT / folder).rglob("*.py"):
            for page in re.findall(r"docs/[\w/.-]+\.md", path.read_text(encoding="utf-8")):
                assert (ROOT / page).is_file(), f"{name_of(path)} names {page}"


# -- links ---------------------------------------------------------------------------------------------------------


@cache
def anchors_of(document: Path) -> frozenset[str]:
    """The anchors that GitHub gives a document's headings."""
    found: list[str] = []
    for line in prose_of(document):
        if heading := re.fullmatch(r"#+ (.*)", line):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).lower()
            slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
            found.append(slug)
    repeated = [f"{slug}-{found[:i].count(slug)}" for i, slug in enumerate(found) if slug in found[:i]]
    return frozenset(found + repeated)


@pytest.mark.parametrize("document", [*DOCUMENTS, GENERATED], ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    text = "\n".join(prose_of(document))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), f"{name_of(document)} links to {target}"
        if anchor:
            assert anchor in anchors_of(file), f"{name_of(document)} links to {target}"


def test_every_page_is_reached_from_the_readme() -> None:
    seen, left = set(), [ROOT / "README.md"]
    while left:
        document = left.pop()
        if document in seen or document.suffix != ".md":
            continue
        seen.add(document)
        targets = re.findall(r"\]\(([^)\s#]+)", document.read_text(encoding="utf-8"))
        left += [(document.parent / target).resolve() for target in targets if ":" not in target]
    assert {path for path in DOCUMENTS if path.is_relative_to(ROOT / "docs")} <= seen

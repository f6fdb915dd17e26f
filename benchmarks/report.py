"""One document, with diagrams, of what the benchmarks measured.

    python -m benchmarks.report benchmarks/results/*.jsonl benchmarks/results/*.md \\
        -o docs/performance.md --images docs/images
    python -m benchmarks.report cpu.jsonl gpu.jsonl -o speed.md --images images

Files hold results as the benchmarks append them with `-o`, one JSON object a line (`benchmarks.harness.records`). Of
results of one benchmark, machine, device and subject (plan, model or preset) the newest counts; each of these is a
section of its own. Several of `benchmarks.controlnet` are joined: of every comparison the newest counts. A line may
be given a "note" by hand, text that stands above its figures. Files that end with .md are notes of what was measured
once: each is a section as it is.

The document says of every section on which machine, with which versions, from which commit and by which commands it
was measured. The same input gives the same document and the same diagrams.

Diagrams are named after the document: `performance-….png`. Ones of an earlier report by that name that are no longer
shown are removed. Everything is written aside and renamed.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

from benchmarks.analysis.results import Result, checked, read
from benchmarks.analysis.sections import SECTIONS, Figures, in_short
from benchmarks.harness.cli import guarded, make_parser
from benchmarks.harness.machine import PACKAGES
from benchmarks.harness.tables import plural
from car_train.files import written_aside

LAST = "What isn't measured"


def document(results: Sequence[Result], notes: Sequence[str], figures: Figures, title: str) -> str:
    """All of it as Markdown. notes: texts, each with a heading of the second level first."""
    lines = [f"# {title}", "", introduction(), "", "## In short", "", *in_short(results)]
    sections = list(numbered(results))
    lines += ["## Contents", "", *contents(sections, notes), ""]
    for heading, members in sections:
        lines += [f"## {heading}", ""]
        for number, result in members:
            lines += [f"### {subheading(result)}", "", *notes_of(result)]
            lines += checked(result, partial(body_of, number=number, figures=figures))
            lines += ["", *provenance(result), ""]
    lines += [line for note in notes for line in (note.strip(), "")]
    lines += [f"## {LAST}", "", *unmeasured(results), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def body_of(result: Result, number: int, figures: Figures) -> list[str]:
    """A result's text, by its benchmark; its diagrams go to `figures`."""
    _, section = SECTIONS[result.benchmark]
    return list(section(result, number, figures))


def introduction() -> str:
    return (
        "How long an image takes, what it costs, and what that is compared with. Written by `python -m "
        "benchmarks.report` from the results of the benchmarks; under each section stand the machine, the versions, "
        "the commit and the command. p50 is the median and p95 the time that 95 % stay below; ratios are medians of "
        "the ratios within one round, in which all took turns on the same machine. 1 GFLOP is 10⁹ multiplications or "
        "additions, 1 MB is 10⁶ bytes."
    )


def notes_of(result: Result) -> list[str]:
    """Each note that is there, a paragraph."""
    texts = dict.fromkeys(r.note for r in (*result.parts, result) if r.note)
    return [line for text in texts for line in (f"**Note:** {text}", "")]


def numbered(results: Sequence[Result]) -> Iterator[tuple[str, list[tuple[int, Result]]]]:
    """Sections with their results, which are numbered within each."""
    for benchmark, (heading, _) in SECTIONS.items():
        members = [r for r in results if r.benchmark == benchmark]
        if members:
            yield heading, list(enumerate(members, 1))


def subheading(result: Result) -> str:
    return f"{result.subject} — {result.short_place}"


def contents(sections: Sequence[tuple[str, list[tuple[int, Result]]]], notes: Sequence[str]) -> Iterator[str]:
    seen: dict[str, int] = {}

    def link(heading: str) -> str:
        """A link to a heading by the anchor that GitHub gives it: equal ones are numbered."""
        base = anchor(heading)
        seen[base] = seen.get(base, -1) + 1
        return f"[{heading}](#{base}{f'-{seen[base]}' if seen[base] else ''})"

    for heading, members in sections:
        yield f"- {link(heading)}"
        yield from (f"    - {link(subheading(result))}" for _, result in members)
    for note in notes:
        headings = re.findall(r"^#{2,} (.*)$", note, re.MULTILINE)
        yield from (f"{'    ' if i else ''}- {link(heading)}" for i, heading in enumerate(headings))
    yield f"- {link(LAST)}"


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading: lower case, spaces to hyphens, punctuation dropped."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def provenance(result: Result) -> list[str]:
    """Machine, versions, commit and command of each run under a section."""
    runs = sorted((*result.parts, result), key=lambda r: r.time)
    blocks = [provenance_of(r) for r in runs]
    lines = blocks[0]
    for before, block in pairwise(blocks):
        # What a run shares with the one before isn't repeated.
        lines += [">", *(block if block[:1] != before[:1] else block[1:])]
    return lines


def provenance_of(result: Result) -> list[str]:
    m = result.machine
    parts = [
        str(m.get("cpu") or "unknown processor"),
        plural(m.get("cores"), "core"),
        f"{m['ram'] / 1e9:.0f} GB" if m.get("ram") else None,
        m.get("gpu"),
        m.get("os"),
    ]
    versions = [f"{name} {m[name]}" for name in ("python", *PACKAGES) if m.get(name)]
    when = f"{result.time:%Y-%m-%d %H:%M} UTC"
    return [
        f"> {'; '.join(part for part in parts if part)}.  ",
        f"> {', '.join(versions)}; commit {m.get('commit') or 'unknown'}; {when}.  ",
        f"> `{m.get('command') or 'unknown command'}`",
    ]


def unmeasured(results: Sequence[Result]) -> Iterator[str]:
    """What a reader may miss here."""
    there = {r.benchmark for r in results}
    for benchmark, (heading, _) in SECTIONS.items():
        if benchmark not in there:
            yield f"- {heading}: no result was given (`python -m benchmarks.{benchmark} --help`)."
    if all(r.device == "cpu" for r in results):
        yield "- Any GPU."
    if {"latency", "controlnet"} & there:
        yield "- Quality. Where weights are random, times hold and images say nothing."
    if any(row["scaled"] for r in results for row in r.of("ratio")):
        yield "- All steps of the slower methods: rows with *scaled* were multiplied from fewer."
    yield "- Power, and several users at once on one machine."


def write(output: Path, images: Path, text: str, figures: Figures) -> None:
    """Diagrams, then the document, each aside and renamed; then earlier diagrams of its name are removed."""
    output.parent.mkdir(parents=True, exist_ok=True)
    images.mkdir(parents=True, exist_ok=True)
    contents_of = {images / name: content for name, content in figures.files.items()}
    for path, content in {**contents_of, output: text.encode("utf-8")}.items():
        with written_aside(path) as file:
            file.write_bytes(content)
    for old in images.glob(f"{figures.stem}-*.png"):
        if old.name not in figures.files:
            old.unlink()


def run(args: argparse.Namespace) -> None:
    notes = [path for path in args.results if path.suffix == ".md"]
    results = read([path for path in args.results if path not in notes])
    link = Path(os.path.relpath(args.images, args.output.parent)).as_posix()
    figures = Figures(args.output.stem, "" if link == "." else f"{link}/")
    texts = [path.read_text(encoding="utf-8") for path in notes]
    write(args.output, args.images, document(results, texts, figures, args.title), figures)
    print(args.output)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("report", __doc__)
    parser.add_argument("results", type=Path, nargs="+", help="results, one JSON object a line, and notes (.md)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the document, .md")
    parser.add_argument("--images", type=Path, required=True, help="folder of its diagrams")
    parser.add_argument("--title", default="Performance", help="(default: Performance)")
    args = parser.parse_args(argv)
    if args.output.suffix != ".md":
        parser.error(f"-o {args.output}: give a file that ends with .md")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return guarded("benchmarks.report", lambda log: run(args))


if __name__ == "__main__":
    sys.exit(main())

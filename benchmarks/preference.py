"""A blind comparison of two sets of images by people (CAR, table 2): a page that asks, and what the answers come to.

    python -m benchmarks.preference sheet ours.npz theirs.npz -o study --controls controls.npz
    python -m benchmarks.preference count study/key.json answers-*.csv

`sheet` takes two archives of `eval --samples` whose images answer each other (arr_0, uint8 [N, H, W, 3]), draws pairs
at random and writes `index.html`, one file that needs no server and asks of every pair each question, and `key.json`,
which alone knows what is on which side: keep it away from who answers. The second question needs `--controls`, an
archive of `eval --controls`. Keys: ← left, → right, ↓ or space neither, Backspace one back. At the end the page gives
the answers as CSV: pair,question,answer.

`count` adds up the answers of one or more people: for each question how often either set was preferred, and of the
decided ones the share of the first with its exact 95 % interval (Clopper and Pearson 1934) and the two-sided
binomial test against one half. Answers of several people are pooled as if each were independent of all others: the
interval is exact for that, and too narrow where people agree on single pairs.
"""

from __future__ import annotations

import argparse
import base64
import csv
import html
import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.harness.cli import Log, guarded, make_parser
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.records import emit, record
from benchmarks.harness.tables import markdown_table
from car_train.errors import UserError
from car_train.evaluation.reference import read_reference
from car_train.files import folder_aside

QUESTIONS = ("Which image is of better quality?", "Which image follows the control better?")
ANSWERS = ("left", "right", "neither")
FIELDS = ["pair", "question", "answer"]
COLUMNS = ("question", "neither", "share", "low", "high", "p")
"""Of the counts, besides one for each set, which is called as its archive is."""
PAGE = Path(__file__).parent / "analysis" / "preference.html"

Pixels = NDArray[np.uint8]


def read_images(file: Path) -> Pixels:
    """An archive's images, uint8 [N, H, W, 3]. Raises BenchmarkError."""
    try:
        images = read_reference(file).images
    except UserError as error:
        raise BenchmarkError(str(error)) from error
    if images is None:
        raise BenchmarkError(f"{file}: has statistics and no images; give a .npz with arr_0")
    return images


def make_pairs(count: int, pairs: int, seed: int) -> list[dict[str, Any]]:
    """`pairs` images at random of `count`, and for each whether the first set is on the left: in half of them."""
    draw = np.random.default_rng(seed)
    chosen = draw.permutation(count)[:pairs]
    first_left = draw.permutation(np.arange(len(chosen)) % 2 == 0)
    return [
        {"image": int(image), "left": "first" if left else "second"}
        for image, left in zip(chosen, first_left, strict=True)
    ]


def data_uri(image_HW3: Pixels) -> str:
    stream = io.BytesIO()
    Image.fromarray(image_HW3).save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def page(
    sets: tuple[Pixels, Pixels],
    controls: Pixels | None,
    pairs: Sequence[dict[str, Any]],
    questions: Sequence[str],
    title: str,
) -> str:
    """The page of the pairs, without a word on which set is which."""
    shown = []
    for pair in pairs:
        first, second = (data_uri(images[pair["image"]]) for images in sets)
        left, right = (first, second) if pair["left"] == "first" else (second, first)
        control = None if controls is None else data_uri(controls[pair["image"]])
        shown.append({"left": left, "right": right, "control": control})
    parts = {"title": html.escape(title), "pairs": _script_text(shown), "questions": _script_text(questions)}
    # In one pass: what stands in a part is never taken for the place of another one.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], PAGE.read_text(encoding="utf-8"))


def write_sheet(args: argparse.Namespace, log: Log) -> None:
    sets = (read_images(args.first), read_images(args.second))
    controls = None if args.controls is None else read_images(args.controls)
    lengths = {len(images) for images in (*sets, *([] if controls is None else [controls]))}
    if len(lengths) != 1:
        raise BenchmarkError(
            f"the archives have {', '.join(map(str, sorted(lengths)))} images; give sets that answer each other"
        )
    if sets[0].shape != sets[1].shape:
        sizes = " and ".join(f"{images.shape[2]}×{images.shape[1]}" for images in sets)
        raise BenchmarkError(f"the images are {sizes}, by which the sets are known; give sets of one size")
    if args.output.exists():
        raise BenchmarkError(f"{args.output} is there; answers may belong to it, so choose another folder")
    names = [file.name if args.first.name != args.second.name else str(file) for file in (args.first, args.second)]
    if names[0] == names[1] or args.first.samefile(args.second):
        raise BenchmarkError(f"{args.first} would be compared with itself; give two sets")
    if np.array_equal(*sets):
        raise BenchmarkError(f"{args.first} and {args.second} hold the same images; give two sets")
    if args.pairs < 1:
        raise BenchmarkError(f"pairs is {args.pairs}; ask about at least one")
    if args.seed < 0:
        raise BenchmarkError(f"seed is {args.seed}; give 0 or more")
    questions = args.question or list(QUESTIONS if controls is not None else QUESTIONS[:1])
    if not all(question.strip() for question in questions):
        raise BenchmarkError("a question is empty; leave --question out for those of the paper")
    if len(set(questions)) < len(questions):
        raise BenchmarkError(f"a question is asked twice: {', '.join(questions)}; put every one differently")
    pairs = make_pairs(len(sets[0]), args.pairs, args.seed)
    text = page(sets, controls, pairs, questions, args.title)
    key = {"first": names[0], "second": names[1], "questions": questions, "pairs": pairs}
    with folder_aside(args.output) as folder:
        (folder / "index.html").write_text(text, encoding="utf-8")
        (folder / "key.json").write_text(json.dumps(key, indent=1) + "\n", encoding="utf-8")
    all_there_are = ", all there are" if len(pairs) < args.pairs else ""
    log(f"{len(pairs)} pairs{all_there_are}, {len(questions)} questions")
    print(args.output / "index.html")


def _script_text(value: Any) -> str:
    """JSON that may stand in a script: "</script>" in a question would end it."""
    return json.dumps(value).replace("<", "\\u003c")


def read_answers(file: Path, key: dict[str, Any]) -> list[tuple[str, str]]:
    """(question, "first", "second" or "neither") of every answer of a file. Raises BenchmarkError with its line."""
    found: list[tuple[str, str]] = []
    seen: set[tuple[int, int]] = set()
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, strict=True)
            if reader.fieldnames != FIELDS:
                raise BenchmarkError(f"{file}: its columns are {reader.fieldnames}; give the CSV that the page made")
            for row in reader:
                where = f"{file}, line {reader.line_num}"
                if None in row:
                    raise BenchmarkError(
                        f"{where}: has more than {len(FIELDS)} columns; give the CSV that the page made"
                    )
                pair, question, answer = _answer(row, key, where)
                if (pair, question) in seen:
                    raise BenchmarkError(f"{where}: pair {pair}, question {question} is answered twice; drop one")
                seen.add((pair, question))
                found.append((key["questions"][question], answer))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BenchmarkError(f"{file}: can't be read ({error}); give the CSV that the page made") from error
    return found


def _answer(row: dict[str, Any], key: dict[str, Any], where: str) -> tuple[int, int, str]:
    """(pair, question, "first", "second" or "neither")."""
    pair, question, answer = (row.get(field) or "" for field in FIELDS)
    numbers = [_below(text, len(key[name])) for text, name in ((pair, "pairs"), (question, "questions"))]
    if numbers[0] is None or numbers[1] is None:
        raise BenchmarkError(
            f"{where}: there is no pair {pair[:40]!r} with question {question[:40]!r}; is the key another's?"
        )
    if answer not in ANSWERS:
        raise BenchmarkError(f"{where}: the answer is {answer[:40]!r}; it is one of {', '.join(ANSWERS)}")
    left = key["pairs"][numbers[0]]["left"]
    right = "second" if left == "first" else "first"
    return numbers[0], numbers[1], {"left": left, "right": right, "neither": "neither"}[answer]


def _below(text: str, count: int) -> int | None:
    """The number that a text is if it is one of 0…count−1."""
    return (
        int(text)
        if text.isascii() and text.isdecimal() and len(text) <= len(str(count)) and int(text) < count
        else None
    )


def share(first: int, decided: int) -> dict[str, float | None]:
    """The first's share of the decided answers with its exact 95 % interval, and the test against one half."""
    if decided == 0:
        return {"share": None, "low": None, "high": None, "p": None}
    try:
        from scipy.stats import binomtest
    except ImportError as error:
        raise BenchmarkError(f"intervals need {error.name}; pip install 'car-deploy[lab]'") from error
    test = binomtest(first, decided, 0.5)
    interval = test.proportion_ci(0.95, method="exact")
    return {
        "share": first / decided,
        "low": float(interval.low),
        "high": float(interval.high),
        "p": float(test.pvalue),
    }


def read_key(file: Path) -> dict[str, Any]:
    """A sheet's key. Raises BenchmarkError."""
    try:
        key = json.loads(file.read_text(encoding="utf-8"))
        names, questions, pairs = [key["first"], key["second"]], key["questions"], key["pairs"]
        assert all(isinstance(name, str) and name not in COLUMNS for name in names)
        assert names[0] != names[1]
        for found in (questions, pairs):
            assert isinstance(found, list)
            assert found
        assert all(isinstance(question, str) for question in questions)
        assert len(set(questions)) == len(questions)
        assert all(pair["left"] in ("first", "second") for pair in pairs)
    except (OSError, ValueError, KeyError, TypeError, AssertionError, RecursionError) as error:
        raise BenchmarkError(f"{file}: is no key of a sheet ({error!r:.100}); give its key.json") from error
    return {"first": names[0], "second": names[1], "questions": questions, "pairs": pairs}


def count(args: argparse.Namespace, log: Log) -> None:
    key = read_key(args.key)
    names = {"first": key["first"], "second": key["second"]}
    if len({file.resolve() for file in args.answers}) < len(args.answers):
        raise BenchmarkError(f"a file is given twice: {', '.join(map(str, args.answers))}; give each once")
    each = {file: read_answers(file, key) for file in args.answers}
    wanted = len(key["pairs"]) * len(key["questions"])
    before: dict[tuple[tuple[str, str], ...], Path] = {}
    for file, found in each.items():
        if len(found) < wanted:
            log(f"{file}: {len(found)} of {wanted} answers")
        if (same := before.setdefault(tuple(found), file)) != file:
            log(f"warning: {file} and {same} hold the same answers; leave one out if they are one person's")
    answers = [answer for found in each.values() for answer in found]
    rows = []
    for question in key["questions"]:
        of = [answer for asked, answer in answers if asked == question]
        first, second = of.count("first"), of.count("second")
        row = {"question": question, names["first"]: first, names["second"]: second, "neither": of.count("neither")}
        rows.append(row | share(first, first + second))
    log(f"{len(answers)} answers in {len(args.answers)} files")
    print(markdown_table(rows))
    emit(record("preference", {**names, "files": len(args.answers)}, rows))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("preference", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    sheet = commands.add_parser("sheet", help="write the page and its key", allow_abbrev=False)
    sheet.add_argument("first", type=Path, help="archive of images, .npz")
    sheet.add_argument("second", type=Path, help="archive with the same images by another model")
    sheet.add_argument("-o", "--output", type=Path, required=True, help="folder for index.html and key.json")
    sheet.add_argument("--controls", type=Path, help="archive of their controls, shown between them")
    sheet.add_argument("--pairs", type=int, default=50, help="pairs to ask about (default: 50)")
    sheet.add_argument("--question", action="append", help="instead of the two of the paper; repeatable")
    sheet.add_argument("--title", default="Which one?", help="(default: Which one?)")
    sheet.add_argument("--seed", type=int, default=0, help="chooses pairs and sides (default: 0)")
    counted = commands.add_parser("count", help="add up answers", allow_abbrev=False)
    counted.add_argument("key", type=Path, help="key.json of the sheet")
    counted.add_argument("answers", type=Path, nargs="+", help="CSV files that the page gave")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    command = write_sheet if args.command == "sheet" else count
    return guarded("benchmarks.preference", lambda log: command(args, log))


if __name__ == "__main__":
    sys.exit(main())

"""The blind sheet: sides are balanced and hidden, and answers come to counts with exact intervals."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks.preference import data_uri, main, make_pairs, share


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("preference")
    for name, level in (("ours", 200), ("theirs", 50)):
        images = np.full((9, 8, 8, 3), level, np.uint8) + np.arange(9, dtype=np.uint8)[:, None, None, None]
        np.savez(root / f"{name}.npz", arr_0=images)
    argv = ["sheet", root / "ours.npz", root / "theirs.npz", "-o", root / "study", "--pairs", "6", "--seed", "3"]
    assert main([str(a) for a in [*argv, "--question", "Better?", "--question", "</script>nicer?"]]) == 0
    return root


def test_every_pair_is_shown_on_the_sides_of_the_key_and_the_page_does_not_say(study: Path) -> None:
    text, key = (study / "study" / "index.html").read_text(), json.loads((study / "study" / "key.json").read_text())
    assert Counter(pair["left"] for pair in key["pairs"]) == {"first": 3, "second": 3}
    assert len({pair["image"] for pair in key["pairs"]}) == 6
    shown = json.loads(re.search(r"const pairs = (.*), questions", text)[1])  # type: ignore[index]
    for pair, sides in zip(key["pairs"], shown, strict=True):
        first, second = (data_uri(np.full((8, 8, 3), level + pair["image"], np.uint8)) for level in (200, 50))
        assert (sides["left"], sides["right"]) == ((first, second) if pair["left"] == "first" else (second, first))
    assert not re.search("ours|theirs|first|second", text)
    assert text.count("</script>") == 1
    assert "http:" not in text
    assert "https:" not in text


def test_answers_are_added_up_over_people(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = json.loads((study / "study" / "key.json").read_text())
    sides = [pair["left"] for pair in key["pairs"]]
    for person in range(2):
        lines = ["pair,question,answer"]
        for pair, left in enumerate(sides):
            ours = "left" if left == "first" else "right"
            lines += [f"{pair},0,{ours}", f"{pair},1,{'neither' if person else 'left'}"]
        (tmp_path / f"{person}.csv").write_text("\r\n".join(lines) + "\r\n")
    files = [str(tmp_path / f"{person}.csv") for person in range(2)]
    assert main(["count", str(study / "study" / "key.json"), *files]) == 0
    better, nicer = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert (better["ours.npz"], better["theirs.npz"], better["neither"]) == (12, 0, 0)
    assert (nicer["ours.npz"], nicer["theirs.npz"], nicer["neither"]) == (3, 3, 6)
    assert nicer["share"] == 0.5
    assert nicer["p"] == pytest.approx(1)


def test_intervals_have_their_closed_forms_at_the_ends() -> None:
    found = share(12, 12)
    assert found["low"] == pytest.approx(0.025 ** (1 / 12))
    assert found["high"] == 1
    assert found["p"] == pytest.approx(2 * 0.5**12)
    none = share(0, 7)
    assert none["high"] == pytest.approx(1 - 0.025 ** (1 / 7))
    assert share(0, 0) == {"share": None, "low": None, "high": None, "p": None}


def test_pairs_follow_their_seed() -> None:
    assert make_pairs(50, 10, 1) == make_pairs(50, 10, 1) != make_pairs(50, 10, 2)
    assert len(make_pairs(5, 10, 0)) == 5


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("pair,answer\n0,left\n", "its columns are"),
        ("pair,question,answer\n0,0,ours\n", "line 2: the answer is 'ours'"),
        ("pair,question,answer\n6,0,left\n", "there is no pair '6'"),
        ("pair,question,answer\n0,0,left\n-1,0,left\n", "line 3: there is no pair '-1'"),
        ("pair,question,answer\n" + 5000 * "9" + ",0,left\n", "line 2: there is no pair '999"),
        ("pair,question,answer\n0,0,left\n0,0,left\n", "line 3: pair 0, question 0 is answered twice"),
        ("pair,question,answer\n0,0,left,right\n", "line 2: has more than 3 columns"),
        ("pair,question,answer\n٣,0,left\n", "line 2: there is no pair '٣'"),
    ],
)
def test_other_answers_are_refused_by_line(
    study: Path, tmp_path: Path, lines: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.csv").write_text(lines)
    assert main(["count", str(study / "study" / "key.json"), str(tmp_path / "a.csv")]) == 2
    assert words in capsys.readouterr().err


def test_sets_of_one_name_are_counted_apart(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
        files.append(shutil.copy(study / f"{name}.npz", tmp_path / name / "samples.npz"))
    assert main(["sheet", *map(str, files), "-o", str(tmp_path / "s"), "--pairs", "2"]) == 0
    left = [pair["left"] for pair in json.loads((tmp_path / "s" / "key.json").read_text())["pairs"]]
    answers = tmp_path / "a.csv"
    answers.write_text("pair,question,answer\n" + "".join(f"{k},0,left\n" for k in range(2)))
    capsys.readouterr()
    assert main(["count", str(tmp_path / "s" / "key.json"), str(answers)]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])["results"][0]
    assert [row[str(file)] for file in files] == [left.count("first"), left.count("second")] == [1, 1]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["sheet", "ours.npz", "ours.npz", "-o", "s"], "compared with itself"),
        (["sheet", "ours.npz", "theirs.npz", "-o", "s", *(2 * ["--question", "A?"])], "asked twice"),
        (["sheet", "ours.npz", "copy.npz", "-o", "s"], "hold the same images"),
        (["count", "study/key.json", "a.csv", "a.csv"], "given twice"),
    ],
)
def test_what_would_count_twice_is_refused(
    argv: list[str], words: str, study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(study)
    shutil.copy("ours.npz", "copy.npz")
    assert main(argv) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"questions": "ab"},
        {"questions": ["q", "q"]},
        {"questions": []},
        {"first": "neither"},
        {"first": "theirs.npz"},
        {"pairs": {}},
        {"pairs": [{"left": "ours.npz"}]},
        None,
    ],
)
def test_what_is_no_key_is_refused(
    change: dict[str, object] | None, study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, answers = json.loads((study / "study" / "key.json").read_text()), tmp_path / "a.csv"
    answers.write_text("pair,question,answer\n")
    file = tmp_path / "key.json"
    file.write_text("[" * 100_000 if change is None else json.dumps(key | change))
    assert main(["count", str(file), str(answers)]) == 2
    assert "is no key of a sheet" in capsys.readouterr().err


def test_missing_answers_and_the_same_ones_twice_are_remarked(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("pair,question,answer\n0,0,left\n")
    files = [str(tmp_path / name) for name in ("a.csv", "b.csv")]
    assert main(["count", str(study / "study" / "key.json"), *files]) == 0
    said = capsys.readouterr().err
    assert "a.csv: 1 of 12 answers" in said
    assert re.search("b.csv and .*a.csv hold the same answers", said)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seed", "-1"], "seed is -1"),
        (["--question", " "], "a question is empty"),
        (["--pairs", "0"], "pairs is 0"),
    ],
)
def test_a_sheet_that_asks_nothing_is_refused(
    flags: list[str], words: str, study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [str(study / f"{name}.npz") for name in ("ours", "theirs")]
    assert main(["sheet", *sets, "-o", str(tmp_path / "s"), *flags]) == 2
    assert words in capsys.readouterr().err


def test_sets_of_two_sizes_are_refused_and_a_title_is_only_a_title(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((9, 16, 16, 3), np.uint8))
    ours, theirs = (str(study / f"{name}.npz") for name in ("ours", "theirs"))
    assert main(["sheet", ours, str(tmp_path / "large.npz"), "-o", str(tmp_path / "s")]) == 2
    assert "8×8 and 16×16" in capsys.readouterr().err
    assert main(["sheet", ours, theirs, "-o", str(tmp_path / "s"), "--title", "{{pairs}}"]) == 0
    assert "<title>{{pairs}}</title>" in (tmp_path / "s" / "index.html").read_text()


def test_a_sheet_is_not_replaced_and_sets_answer_each_other(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = str(study / "ours.npz")
    assert main(["sheet", ours, ours, "-o", str(study / "study")]) == 2
    assert "choose another folder" in capsys.readouterr().err
    np.savez(tmp_path / "few.npz", arr_0=np.zeros((3, 8, 8, 3), np.uint8))
    assert main(["sheet", ours, str(tmp_path / "few.npz"), "-o", str(tmp_path / "s")]) == 2
    assert "3, 9 images" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_keys_answer_a_reload_goes_on_and_the_page_gives_the_csv(study: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        page.goto((study / "study" / "index.html").as_uri())
        for key in ("ArrowLeft", "ArrowRight", "Backspace", "ArrowRight"):
            page.keyboard.press(key)
        page.reload()
        for key in ("ArrowDown", *["ArrowRight", "ArrowDown"] * 4, "ArrowLeft"):
            page.keyboard.press(key)
        assert page.locator("#done").is_visible()
        link = page.locator("#csv").get_attribute("href")
        browser.close()
    from urllib.parse import unquote

    lines = unquote(str(link).partition(",")[2]).split()
    assert lines[:4] == ["pair,question,answer", "0,0,left", "0,1,right", "1,0,neither"]
    assert lines[-1] == "5,1,left"
    assert len(lines) == 13

"""`car-run batch` on a plan with several branches: rows that follow one, several or none of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from car_runtime.cli.main import main
from fixtures.two_branches import two_branches


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flags; the working directory has two control images, one with a number at its name's end."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("a.png", "b.png:1")):
        image = Image.new("RGB", (8, 8))
        ImageDraw.Draw(image).rectangle((1 + number, 2, 5, 6), outline="white")
        image.save(name, "PNG")
    return ["-e", str(two_branches()), "--backend", "ort-cpu", "--threads", "1", "--no-receipt"]


def test_each_row_follows_its_own_branches(plan: list[str]) -> None:
    Path("jobs.csv").write_text(
        "name,class,Control:sketch,control:other,control,control-cfg\n"
        "one,1,a.png,,,\nboth,2,a.png:0.6,b.png:1:0.5,,0.5\nother,1,,b.png:1,,\nnone,3,,,,\ndefault,1,,,a.png,\n"
    )
    Path("jobs.jsonl").write_text(
        '{"name": "both", "class": 2, "control:sketch": "a.png:0.6", "control:other": "b.png:1:0.5", '
        '"control-cfg": 0.5}'
    )
    assert main(["batch", "jobs.csv", *plan, "-o", "out"]) == 0
    assert main(["batch", "jobs.jsonl", *plan, "-o", "json"]) == 0
    alone = {
        "one": ["--class", "1", "--control", "sketch=a.png"],
        "both": [
            *("--class", "2", "--control", "sketch=a.png:0.6", "--control", "other=b.png:1:0.5"),
            *("--control-cfg", "0.5"),
        ],
        "other": ["--class", "1", "--control", "other=b.png:1"],
        "none": ["--class", "3"],
        "default": ["--class", "1", "--control", "a.png"],
    }
    for name, flags in alone.items():
        steered = ["--control-cfg", "0.5"] if name == "both" else []
        assert main([*flags, *steered, *plan, "-o", "x.png"]) == 0
        assert Path("out", f"{name}.png").read_bytes() == Path("x.png").read_bytes(), name
    (report,) = map(json.loads, Path("json/results.jsonl").read_text().splitlines())
    assert report["control_cfg"] == 0.5
    assert Path("json/both.png").read_bytes() == Path("out/both.png").read_bytes()
    assert (
        Path("out/one.png").read_bytes() == Path("out/default.png").read_bytes() != Path("out/other.png").read_bytes()
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("control:depth\na.png\n", "row 2, column 'control:depth': there is no branch 'depth' in the plan"),
        ("control:sketch\na.png:3\n", "row 2, column 'control:sketch': the weight of sketch is 3.0"),
        ("control:sketch,control\na.png,a.png\n", "row 2: control and control:sketch are both given; leave one"),
        ("control:sketch,photo\na.png,a.png\n", "row 2: photo and control:sketch are both given; leave one"),
        (
            "control:sketch,Control: sketch\na.png,a.png\n",
            "row 1: the columns 'control:sketch' and 'Control: sketch'",
        ),
        ("controls\na.png\n", "row 1: there is no column 'controls'; the columns are name, photo, control"),
    ],
)
def test_a_bad_control_is_named_with_its_column(
    text: str, said: str, plan: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("jobs.csv").write_text(text)
    assert main(["batch", "jobs.csv", *plan, "-o", "out"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
    assert not Path("out").exists()


def test_a_control_that_is_given_by_branch_is_not_replaced(
    plan: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("out").mkdir()
    Path("a.png").rename("out/a.png")
    Path("jobs.csv").write_text("name,control:sketch\na,out/a.png\n")
    assert main(["batch", "jobs.csv", *plan, "-o", "out"]) == 2
    assert "would replace the input" in capsys.readouterr().err

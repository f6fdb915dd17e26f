"""`car-run batch`: an image for each line, in files that are whole or not there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from car_runtime import open_plan
from car_runtime.cli.main import main
from fixtures.runtime_plan import NAMES, SIZE, build_plan


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("batch")
    build_plan(folder / "car.plan")
    edges = Image.new("L", (40, 40))
    ImageDraw.Draw(edges).rectangle((8, 12, 30, 28), outline=255, width=3)
    edges.save(folder / "edges.png")
    return folder


def write(file: Path, *lines: object) -> Path:
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


def batch(built: Path, *argv: object) -> int:
    return main(["batch", "-e", str(built / "car.plan"), "--threads", "1", *map(str, argv)])


def test_each_line_is_the_image_of_a_request_of_its_own(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edges = str(built / "edges.png")
    lines = [{"control": edges, "class": "cat", "seed": s} for s in (4, 5, 6, 2)] + [{"control": edges}]
    file = write(tmp_path / "a.jsonl", *lines)
    assert batch(built, file, "-o", tmp_path / "out", "--cfg", "2") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'a.npz'}\n"
    with np.load(tmp_path / "out" / "a.npz", allow_pickle=False) as arrays:
        found = arrays["arr_0"]
    assert found.shape == (5, SIZE, SIZE, 3)
    with open_plan(built / "car.plan", threads=1) as plan:
        for image, line in zip(found, lines, strict=True):
            (alone,) = plan.generate(edges, line.get("class"), int(line.get("seed", 0)), cfg=2.0).images
            np.testing.assert_array_equal(image, alone)


def test_what_is_there_is_passed_over(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [write(tmp_path / f"{n}.jsonl", {"control": str(built / "edges.png"), "seed": n}) for n in (1, 2)]
    (tmp_path / "1.npz").write_bytes(b"mine")
    assert batch(built, *files, "-o", tmp_path, "--json") == 0
    about, *paths = map(json.loads, capsys.readouterr().out.splitlines())
    assert paths == [{"path": str(tmp_path / "1.npz")}, {"path": str(tmp_path / "2.npz")}]
    assert about["plan"]["class_names"] == list(NAMES)
    assert (tmp_path / "1.npz").read_bytes() == b"mine"
    assert (tmp_path / "2.npz").stat().st_size > 4


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (['{"seed": 1'], "line 1 is no JSON"),
        ([{"seed": 1}, {"lable": 3}], "line 2 is .* no keys but control, class, seed"),
        ([{"control": 3}], "control is 3"),
        ([{"class": True}], "class is True"),
        ([{"seed": -1}], "line 1: .*seed"),
        ([{"class": "unicorn"}], "line 1: .*unicorn"),
        ([], "has 0 lines"),
    ],
)
def test_a_line_that_cannot_be_drawn_is_named_before_anything_is_written(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: list[object], words: str
) -> None:
    good = write(tmp_path / "a.jsonl", {"control": str(built / "edges.png")})
    asked = [{"control": str(built / "edges.png"), **line} if isinstance(line, dict) else line for line in lines]
    assert batch(built, good, write(tmp_path / "b.jsonl", *asked), "-o", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(words, line)
    assert list((tmp_path / "out").iterdir()) == []


def test_images_need_a_place_and_names_of_their_own(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "a.jsonl", {})
    assert batch(built, file) == 2
    assert "name a folder with -o" in capsys.readouterr().err
    (tmp_path / "d").mkdir()
    assert batch(built, file, write(tmp_path / "d" / "a.jsonl", {}), "-o", tmp_path) == 2
    assert "2 files are named 'a'" in capsys.readouterr().err

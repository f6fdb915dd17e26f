"""`car-run sheet`: each cell is the image of its row and column, and what can't be shown is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from car_runtime import OutputError, open_plan
from car_runtime.cli.main import main
from car_runtime.images import MAX_PIXELS, labelled_sheet
from fixtures.runtime_plan import SIZE, build_plan


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sheet")
    build_plan(folder / "car.plan")
    edges = Image.new("L", (40, 40))
    ImageDraw.Draw(edges).rectangle((8, 8, 30, 28), outline=255, width=3)
    edges.save(folder / "edges.png")
    return folder


@pytest.fixture
def here(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "in").symlink_to(built)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "cwd"


PLAN = ["-e", "../in/car.plan", "--threads", "1"]
CONTROL = ["--control", "../in/edges.png"]


def test_each_cell_is_the_image_of_its_row_and_column(
    here: Path, built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [
        "--class",
        "cat,2",
        "--seed",
        "0-1,7",
        "--vary",
        "Control_Strength=0.5,2",
        "--vary",
        "cfg=0,3",
        "--top-k",
        "3",
    ]
    assert main(["sheet", *PLAN, *CONTROL, *args, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rows"] == [f"{c}\ncontrol-strength {s}" for c in ("cat", "lion") for s in ("0.5", "2")]
    assert report["columns"] == [f"cfg {g}\nseed {s}" for g in (0, 3) for s in (0, 1, 7)]
    with Image.open("sheet.png") as image:
        sheet = np.array(image)
        assert "top-k 3" in image.text["sheet"]  # type: ignore[attr-defined]
    step = 128 + 4
    top, left = sheet.shape[0] - 4 * step, sheet.shape[1] - 6 * step
    with open_plan(built / "car.plan", threads=1) as plan:
        for row, (label, strength) in enumerate([(0, 0.5), (0, 2.0), (2, 0.5), (2, 2.0)]):
            for column, (cfg, seed) in enumerate([(g, s) for g in (0, 3) for s in (0, 1, 7)]):
                wanted = plan.generate(
                    built / "edges.png", label, seed, cfg=cfg, control_strength=strength, top_k=3
                ).images[0]
                large = Image.fromarray(wanted).resize((128, 128), Image.Resampling.LANCZOS)
                y, x = top + row * step, left + column * step
                assert (sheet[y : y + 128, x : x + 128] == np.asarray(large)).all()
    assert SIZE * 4 == 128


def test_the_title_says_what_all_images_share_and_nothing_else(here: Path) -> None:
    args = ["--class", "cat", "--control-strength", "0.5", "--vary", "cfg=3", "--vary", "preset=car,var-fid"]
    assert main(["sheet", *PLAN, *CONTROL, *args]) == 0
    with Image.open("sheet.png") as image:
        assert image.text["sheet"].endswith("\ncat, seed 0, cfg 3.0, top-k 16, control-strength 0.5")  # type: ignore[attr-defined]


def test_labels_stand_next_to_their_images_and_are_cut_to_their_room() -> None:
    red, blue = (np.full((128, 128, 3), c, np.uint8) for c in ((255, 0, 0), (0, 0, 255)))
    plain = labelled_sheet([red, blue], ["row"], ["one", "two"], "title")
    long = labelled_sheet([red, blue], ["row"], ["one" * 99, "two"], "title")
    assert plain.shape == long.shape
    dark = (plain.max(-1) < 128).nonzero()
    assert dark[0].min() < 20, "the title"
    assert dark[1].max() < plain.shape[1] - 64, "no label beyond its column"
    assert (plain != long).any()


def test_a_sheet_that_no_viewer_could_open_is_refused() -> None:
    image = np.zeros((256, 256, 3), np.uint8)
    side = int(MAX_PIXELS**0.5) // 256 + 1
    with pytest.raises(OutputError, match="show fewer images"):
        labelled_sheet([image] * side * side, ["r"] * side, ["c"] * side, "t")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--seed", "3-1"], "'3-1' are no seeds; give 0-3, or 1,5,7"),
        (["--seed", "0-5000"], "are no seeds"),
        (["--seed", "0-1023", "--class", "cat,lion"], "would have 2048 images, over 1024"),
        (["--class", "cat,dog"], "there is no class 'dog'"),
        (["--vary", "colour=red"], "names no setting; give NAME=V,W with one of cfg, top-k"),
        (["--vary", "cfg"], "names no setting"),
        (["--vary", "seed=1,2"], "names no setting"),
        (["--vary", "cfg=1,x"], "--vary cfg: 'x' is no number"),
        (["--vary", "cfg=1,-2"], "cfg is -2.0, but must be"),
        (["--vary", "cfg=1", "--vary", "CFG=2"], "varies cfg once more"),
        (["--vary", "more-smooth=perhaps"], "neither true nor false"),
        (["-o", "sheet.jpg"], "sheets are written as PNG"),
        (["-o", "no/sheet.png"], "does not exist"),
        (["-o", "../in/edges.png"], "would replace the input"),
    ],
)
def test_misuse_is_one_line_and_writes_nothing(
    args: list[str], said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sheet", *PLAN, *CONTROL, *args]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
    assert not list(here.iterdir())


def test_a_control_is_asked_for(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sheet", *PLAN]) == 2
    assert "follows a control image" in capsys.readouterr().err

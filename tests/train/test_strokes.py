"""Unfinished drawings: what is dropped, how much, from which images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from car_train.cli import main
from car_train.config import ConfigError
from car_train.data.dataset import ControlledImages
from car_train.data.folder import DataError
from car_train.data.strokes import drop_strokes
from car_train.training.options import TrainOptions
from car_train.training.trainer import Trainer
from fixtures.random_images import drawing


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for c, name in enumerate(("ant", "cat")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(30):
            drawing(100 * c + i).save(tmp_path / "images" / name / f"thing-{i}.png")
    return tmp_path / "images"


def ring(ground: int = 0) -> np.ndarray:
    y, x = np.indices((64, 64)) - 31.5
    lines = np.abs(np.hypot(x, y) - 20) < 1.5
    grey = np.where(lines, 200 if ground == 0 else 60, ground).astype(np.uint8)
    return np.repeat(grey[..., None], 3, 2)


@pytest.mark.parametrize(("polarity", "ground"), [("light-on-dark", 0), ("dark-on-light", 255)])
def test_strokes_are_left_out_whole_and_the_rest_stays(polarity: str, ground: int) -> None:
    whole = ring(ground)
    kept = []
    for seed in range(60):
        before = whole.copy()
        some = drop_strokes(whole, polarity, np.random.default_rng(seed))
        np.testing.assert_array_equal(whole, before)
        assert ((some == whole) | (some == ground)).all()
        kept.append((some != ground).sum() / (whole != ground).sum())
    assert 0.35 < np.mean(kept) < 0.65
    assert min(kept) < 0.1
    assert max(kept) > 0.9
    assert sum(0.05 < share < 0.95 for share in kept) > 40  # one connected outline is several strokes


def test_an_empty_map_stays_empty() -> None:
    empty = np.zeros((16, 16, 3), np.uint8)
    assert not drop_strokes(empty, "light-on-dark", np.random.default_rng(0)).any()


def test_images_are_what_they_were_and_so_are_the_other_controls(folder: Path) -> None:
    plain = ControlledImages(folder, 32, control_type="sketch", augment=True)
    half = ControlledImages(folder, 32, control_type="sketch", augment=True, drop_strokes=0.5)
    pairs = [(plain[i], half[i]) for i in range(len(plain))]
    assert all((a["image"] == b["image"]).all() for a, b in pairs)
    changed = np.mean([bool((a["control"] != b["control"]).any()) for a, b in pairs])
    assert 0.25 < changed < 0.65  # some draws leave all strokes
    assert all((b["control"] == half[i]["control"]).all() for i, (_, b) in enumerate(pairs))


def test_maps_without_lines_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="depth has no lines to drop"):
        ControlledImages(folder, 32, control_type="depth", drop_strokes=0.5)
    with pytest.raises(ConfigError, match="drop_strokes is 2"):
        TrainOptions(data=folder, output=folder, drop_strokes=2)


def test_training_sees_unfinished_drawings_and_validation_whole_ones(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = f"--data {folder} --batch 4 --workers 0 --threads 1 --steps 1 --warmup 0"
    tokenizer = "--patch-nums 1,2,4 --vocab 32 --latent-channels 8 --channels 8 --multipliers 1,2,2"
    assert main(["vqvae", *f"{quick} {tokenizer} -o {tmp_path / 'vqvae'}".split()]) == 0
    small = f"--depth 2 --width 32 --heads 2 --views 1 --token-root {tmp_path / 'tokens'}"
    assert main(["var", *f"{quick} {small} --vqvae {tmp_path / 'vqvae'} -o {tmp_path / 'var'}".split()]) == 0
    seen: list[tuple[float, float]] = []

    def run(self: Trainer) -> Path:
        seen.append((self.images.drop_strokes, self.val_images.drop_strokes))
        return self.options.output

    monkeypatch.setattr(Trainer, "run", run)
    flags = f"--views 1 --token-root {tmp_path / 'tokens'} --base {tmp_path / 'var'} --control sketch"
    assert main(["car", *f"{quick} {flags} --drop-strokes 0.5 -o {tmp_path / 'car'}".split()]) == 0
    assert seen == [(0.5, 0.0)]

"""Ablation runs: each alternative is trained once on the same base; classes that were not seen are measured apart."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import ablations
from benchmarks.ablations import BRANCHES, TRANSFORMERS, check_flags, drawn, main
from benchmarks.harness.errors import BenchmarkError
from car_train import checkpoint
from car_train.config import ModelConfig
from car_train.model import Model
from fixtures.small import SIDES, small_config, small_model

FLAGS = "--steps 2 --batch 4 --warmup 1 --threads 1 --workers 0 --views 1 --validate-every 2 --save-every 2".split()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ablations")
    draw = np.random.default_rng(0)
    for name in ("ant", "bee", "cat", "dog", "eel"):
        (folder / "data" / name).mkdir(parents=True)
        for i in range(40):
            noise = Image.fromarray(draw.integers(0, 255, (4, 4, 3), np.uint8))
            noise.resize((20, 20)).save(folder / "data" / name / f"{name}{i}.png")
    config = small_config(control=False)
    # With 8 channels the tokenizer's encoder could not be a branch's: its norms would be of single channels.
    config = dataclasses.replace(config, vqvae=dataclasses.replace(config.vqvae, channels=24))
    torch.manual_seed(0)
    checkpoint.save(Model(config), folder / "base")
    return folder


def series(root: Path, name: str, *flags: str) -> int:
    common = ["--data", str(root / "data"), "--runs", str(root / "runs"), "-o", str(root / f"{name}.json")]
    return main([name, *common, *flags, "--", *FLAGS, "--token-root", str(root / "tokens")])


def test_every_alternative_is_trained_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert series(root, "branch", "--base", str(root / "base")) == 0
    found = json.loads((root / "branch.json").read_text())["results"]
    assert [row["model"] for row in found] == list(BRANCHES)
    assert all(row["steps"] == 2 and row["loss"] > 0 and 0 <= row["f1"] <= 1 for row in found)
    configs = [checkpoint.load(root / "runs" / f"branch-{i}").config.car for i in range(5)]
    kinds = [(c.encoder, c.transformer, c.fusion) for c in configs if c is not None]
    assert kinds == [
        ("conv", "blocks", "concat"),
        ("vqvae", "blocks", "concat"),
        ("conv", "conv", "concat"),
        ("conv", "blocks", "zero"),
        ("conv", "blocks", "cross_norm"),
    ]
    monkeypatch.setattr(ablations.cli, "main", lambda argv: pytest.fail(f"trained again: {argv}"))
    assert series(root, "branch", "--base", str(root / "base")) == 0
    assert json.loads((root / "branch.json").read_text())["results"] == found


def test_a_run_of_other_flags_is_not_taken_for_this_one(tmp_path: Path) -> None:
    folder = tmp_path / "branch-0"
    command = ["car", "-o", str(folder), "--data", "d", "--base", "b", "--control", "canny"]
    check_flags(folder, [*command, "--steps", "3"])
    check_flags(folder, [*command, "--steps", "2"])  # nothing was trained with the others
    checkpoint.save(small_model(), folder / "step-0000002")
    check_flags(folder, [*command, "--steps", "2", "--threads", "3", "--token-root", "t"])
    with pytest.raises(BenchmarkError, match="was trained with steps 2 → 4; give these, or another --runs"):
        check_flags(folder, [*command, "--steps", "4"])


def test_what_cannot_be_written_is_said_before_a_run_is_trained(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ablations, "train", lambda *_: pytest.fail("trained"))
    branch = ["branch", "--data", "d", "--base", "b", "-o", str(root / "nowhere" / "branch.json")]
    assert main(branch) == 2
    assert "nowhere/branch.json: No such file or directory; give a .json" in capsys.readouterr().err
    flags = ["--vqvae", "b", "--plot", str(root / "p.jpg")]
    assert main(["depth", "--data", "d", "-o", str(root / "d.json"), *flags]) == 2
    assert "p.jpg: it does not end with .png" in capsys.readouterr().err


def test_classes_that_were_not_seen_are_measured_apart(root: Path) -> None:
    assert series(root, "classes", "--base", str(root / "base"), "--seen", "!2-4") == 0
    seen, others = json.loads((root / "classes.json").read_text())["results"]
    assert (seen["classes"], others["classes"]) == ("seen (!2-4)", "not seen (2-4)")
    assert seen["images"] > 0
    assert others["images"] > 0
    assert seen["loss"] != others["loss"]
    assert json.loads((root / "runs" / "classes" / "run.json").read_text())["options"]["classes"] == "!2-4"


def test_depths_are_trained_measured_and_drawn(root: Path, tmp_path: Path) -> None:
    given = ["--vqvae", str(root / "base"), "--depths", "2,3", "--width-per-depth", "8"]
    assert series(root, "depth", *given, "--plot", str(tmp_path / "depth.png")) == 0
    found = json.loads((root / "depth.json").read_text())["results"]
    assert [row["model"] for row in found] == ["base d2", "CAR d2", "base d3", "CAR d3"]
    assert ["f1" in row for row in found] == [False, True, False, True]
    config = checkpoint.load(root / "runs" / "car-d3").config
    assert config.var is not None
    assert (config.var.depth, config.var.C, config.var.H) == (3, 24, 3)
    assert Image.open(tmp_path / "depth.png").width > 1000


def test_a_failed_run_stops_the_series(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data", str(root / "data"), "--base", str(tmp_path), "-o", str(tmp_path / "r.json")]
    assert main(["branch", *flags, "--runs", str(tmp_path / "runs"), "--", *FLAGS]) == 2
    assert "branch-0: training failed" in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()


def test_each_transformer_is_trained_as_its_row_says(root: Path, tmp_path: Path) -> None:
    model = checkpoint.load(root / "base")
    two_scales = dataclasses.replace(model.config.vqvae, sides=(1, 5))
    torch.manual_seed(1)
    checkpoint.save(Model(ModelConfig(vqvae=two_scales)), tmp_path / "raster")
    given = ["--vqvae", str(root / "base"), "--raster-vqvae", str(tmp_path / "raster"), "--features", "none"]
    size = "--depth 1 --width 16 --heads 2".split()
    common = ["--data", str(root / "data"), "--runs", str(root / "runs"), "-o", str(tmp_path / "t.json")]
    assert main(["transformer", *common, *given, "--", *FLAGS, *size, "--token-root", str(root / "tokens")]) == 0
    found = json.loads((tmp_path / "t.json").read_text())["results"]
    assert [row["model"] for row in found] == [row[0] for row in TRANSFORMERS]
    configs = {run: checkpoint.load(root / "runs" / f"transformer-{run}").config for _, run, *_ in TRANSFORMERS}
    kinds = {run: (c.vqvae.sides, c.var.adaln, c.var.attn_norm) for run, c in configs.items() if c.var is not None}
    assert kinds == {
        "raster": ((1, 5), False, False),
        "plain": (SIDES, False, False),
        "adaln": (SIDES, True, False),
        "published": (SIDES, True, True),
    }
    assert found[0]["loss"] != found[1]["loss"]
    assert found[2]["loss"] == found[3]["loss"] == found[4]["loss"]  # one run, sampled in three ways
    labels = torch.tensor([0, 1, 4])
    images = {run: drawn(root / "runs" / f"transformer-{run}", run == "raster", labels, 5, 2.0) for run in kinds}
    assert all(made.shape == (3, 20, 20, 3) for made in images.values())
    assert not np.array_equal(images["raster"], images["plain"])

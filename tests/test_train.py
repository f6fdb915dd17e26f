"""The three stages on a small folder of drawn pictures: they learn, log, save, resume exactly, refuse clearly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from car_train import checkpoint
from car_train.cli import main
from car_train.train import Trainer

TOKENIZER = [
    "--sides",
    "1,2,4",
    "--vocab",
    "32",
    "--latent-channels",
    "8",
    "--channels",
    "8",
    "--multipliers",
    "1,2,2",
]
QUICK = [
    "--batch",
    "8",
    "--warmup",
    "2",
    "--workers",
    "0",
    "--validate-every",
    "100",
    "--save-every",
    "100",
    "--threads",
    "2",
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Discs and bars of random colours on transparent ground: 2 classes, 40 pictures each."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name in ("bar", "disc"):
        (root / name).mkdir()
        for i in range(40):
            image = Image.new("RGBA", (32, 32))
            colour = (*rng.integers(0, 255, 3).tolist(), 255)
            x, y = rng.integers(2, 14, 2).tolist()
            draw = ImageDraw.Draw(image)
            (draw.ellipse if name == "disc" else draw.rectangle)(
                (x, y, x + 14, y + (14 if name == "disc" else 6)), fill=colour
            )
            image.save(root / name / f"{name}{i}.png")
    return root


class StopTrainingError(Exception):
    """Stands for a machine that went down."""


def train(stage: str, pictures: Path, output: Path, *flags: str) -> int:
    return main([stage, "--data", str(pictures), "-o", str(output), *QUICK, *flags])


@pytest.fixture(scope="module")
def runs(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three stages, a few dozen steps each."""
    root = tmp_path_factory.mktemp("runs")
    small = ["--depth", "2", "--width", "32", "--heads", "2"]
    assert train("vqvae", pictures, root / "vqvae", "--steps", "60", "--lr", "2e-3", *TOKENIZER) == 0
    assert (
        train("var", pictures, root / "var", "--steps", "40", "--lr", "2e-3", "--vqvae", str(root / "vqvae"), *small)
        == 0
    )
    flags = ["--base", str(root / "var"), "--control", "canny", "--encoder-widths", "8,8,16"]
    assert train("car", pictures, root / "car", "--steps", "150", "--lr", "4e-3", *flags) == 0
    return root


def records(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", ["vqvae", "var", "car"])
def test_a_stage_learns_and_leaves_a_log_a_sheet_and_a_checkpoint(runs: Path, stage: str) -> None:
    log = records(runs / stage)
    losses = [r["loss"] for r in log]
    assert np.mean(losses[-15:]) < np.mean(losses[:15])
    assert "val_loss" in log[-1]
    assert list((runs / stage).glob("samples-*.png"))
    assert checkpoint.load(runs / stage).config.vqvae.sides == (1, 2, 4)


def test_a_checkpoint_is_whole_and_a_branch_leaves_its_base_alone(runs: Path) -> None:
    tokenizer, base, steered = (checkpoint.load(runs / stage) for stage in ("vqvae", "var", "car"))
    for name, p in tokenizer.vqvae.named_parameters():
        assert torch.equal(p, steered.vqvae.get_parameter(name)), name
    assert base.car is not None
    assert steered.car is not None
    assert steered.car.branch is not None
    for name, p in base.car.base.named_parameters():
        assert torch.equal(p, steered.car.base.get_parameter(name)), name
    assert steered.config.class_names == ("bar", "disc")
    assert not torch.equal(steered.car.branch.blocks[0].attn.qkv_weight, base.car.base.blocks[0].attn.qkv_weight)


@pytest.mark.parametrize("stage", ["vqvae", "var", "car"])
def test_stopped_and_resumed_equals_never_stopped_bit_for_bit(
    runs: Path, pictures: Path, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Three epochs of nine batches; the tokenizer's codes are revived between the stop and the end.
    monkeypatch.setattr("car_train.train.REVIVE_EVERY", 6)
    flags = {
        "vqvae": TOKENIZER,
        "var": ["--vqvae", str(runs / "vqvae"), "--depth", "2", "--width", "32", "--heads", "2"],
        "car": ["--base", str(runs / "var"), "--control", "sketch", "--encoder-widths", "8,8,16"],
    }[stage]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(stage, pictures, whole, "--steps", "20", *flags, "--save-every", "10", "--validate-every", "5") == 0

    step = Trainer._train_step

    def stop_after_13(self: Trainer, batch: dict[str, torch.Tensor]) -> dict[str, float]:
        if self.step == 13:
            raise StopTrainingError
        return step(self, batch)

    patch = pytest.MonkeyPatch()
    patch.setattr(Trainer, "_train_step", stop_after_13)
    with pytest.raises(StopTrainingError):
        train(stage, pictures, parts, "--steps", "20", *flags, "--save-every", "10", "--validate-every", "5")
    patch.undo()
    torch.rand(7)  # whatever else used the random state in between
    assert train(stage, pictures, parts, "--steps", "20", *flags, "--save-every", "10", "--resume") == 0
    expected, found = (dict(checkpoint.load(path).named_parameters()) for path in (whole, parts))
    for name, p in expected.items():
        assert torch.equal(p, found[name]), name


def test_sample_draws_from_a_checkpoint(runs: Path, tmp_path: Path, pictures: Path) -> None:
    output = tmp_path / "s.png"
    control = tmp_path / "c.png"
    Image.new("L", (40, 30)).save(control)
    assert main(["sample", str(runs / "car"), "--control", str(control), "--class", "1", "-o", str(output)]) == 0
    assert Image.open(output).size == (16, 16)


def test_bfloat16_trains_too(pictures: Path, tmp_path: Path) -> None:
    assert train("vqvae", pictures, tmp_path / "run", "--steps", "3", "--bf16", *TOKENIZER) == 0
    assert all(np.isfinite(r["loss"]) for r in records(tmp_path / "run"))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["vqvae", "--data", "nowhere", "-o", "x"], "is not a folder"),
        (["vqvae", "--data", "PICTURES", "-o", "x", "--sides", "2,1"], "start at 1 and grow"),
        (["vqvae", "--data", "PICTURES", "-o", "x", "--batch", "1000"], "make it smaller"),
        (["vqvae", "--data", "PICTURES", "-o", "x", "--lr", "0"], "must be positive"),
        (["vqvae", "--data", "PICTURES", "-o", "RUNS/vqvae"], "add --resume"),
        (["vqvae", "--data", "PICTURES", "-o", "RUNS/vqvae", "--resume", "--sides", "1,2"], "another config"),
        (["vqvae", "--data", "PICTURES", "-o", "x", "--resume"], "no checkpoint there"),
        (["var", "--data", "PICTURES", "-o", "x", "--vqvae", "nowhere"], "no checkpoint there"),
        (
            ["var", "--data", "PICTURES", "-o", "x", "--vqvae", "RUNS/vqvae", "--width", "33", "--heads", "2"],
            "not a multiple of heads",
        ),
        (["car", "--data", "PICTURES", "-o", "x", "--base", "RUNS/vqvae"], "tokenizer only"),
        (
            ["car", "--data", "PICTURES", "-o", "x", "--base", "RUNS/var", "--control-root", "nowhere"],
            "is not a folder",
        ),
        (["car", "--data", "three", "-o", "x", "--base", "RUNS/var"], "has 3 classes, the model 2"),
        (["sample", "RUNS/car"], "needs control"),
        (["sample", "RUNS/car", "--class", "9"], "out of range"),
        (["sample", "RUNS/car", "--class", "1", "--control", "RUNS/car/log.jsonl"], "not a readable image"),
        (["sample", "RUNS/var", "--top-k", "33"], "top-k in 0…32"),
        (["sample", "RUNS/var", "-o", "picture.xyz"], "a .png in a folder that exists"),
        (["vqvae", "--data", "PICTURES", "-o", "x", "--device", "abacus"], "can't be used"),
        (["vqvae", "--data", "PICTURES", "-o", "x", "--workers", "-1"], "at least 0"),
        (["vqvae", "--data", "PICTURES", "-o", "RUNS/car/log.jsonl"], "log.jsonl"),
        (["var", "--data", "PICTURES", "-o", "x", "--vqvae", "RUNS/vqvae", "--heads", "0"], "at least 1"),
    ],
)
def test_bad_requests_are_one_line_with_a_remedy(
    argv: list[str],
    words: str,
    runs: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pictures, "three")
    shutil.copytree(pictures / "bar", "three/third")
    argv = [a.replace("PICTURES", str(pictures)).replace("RUNS", str(runs)) for a in argv]
    assert main(argv) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("car_train: error:")]
    assert len(error) == 1
    assert words in error[0]


def test_a_damaged_trainer_state_is_an_error_not_a_traceback(
    runs: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(runs / "vqvae", tmp_path / "run")
    newest = sorted(run.glob("step-*"))[-1]
    (newest / "trainer.pt").write_bytes(b"nothing")
    assert train("vqvae", pictures, run, "--steps", "70", "--resume", *TOKENIZER) == 2
    assert "trainer.pt" in capsys.readouterr().err

"""The scaling benchmark: every size sees the same batches, none is trained twice, and the fit is exact."""

from __future__ import annotations

import argparse
import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import scaling
from car_train import checkpoint
from car_train.config import ModelConfig, VQVAEConfig
from car_train.model import Model
from car_train.training.stages import TransformerStage


@pytest.fixture(scope="module")
def tokenizer_and_data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An untrained tokenizer of 16 pixels, and two classes of noise for it."""
    root = tmp_path_factory.mktemp("scaling")
    rng = np.random.default_rng(0)
    for name in ("bee", "cat"):
        (root / "data" / name).mkdir(parents=True)
        for i in range(30):
            noise = rng.integers(0, 255, (4, 4, 3), np.uint8)
            Image.fromarray(noise).resize((16, 16)).save(root / "data" / name / f"{name}{i}.png")
    torch.manual_seed(0)
    config = VQVAEConfig(
        sides=(1, 2, 4), vocab=32, latent_channels=8, channels=8, multipliers=(1, 2, 2), res_blocks=1
    )
    return checkpoint.save(Model(ModelConfig(vqvae=config)), root / "vqvae"), root / "data"


@pytest.fixture
def scale(tokenizer_and_data: tuple[Path, Path], tmp_path: Path) -> Callable[..., int]:
    """The command on three sizes, three steps of 8 images each."""
    vqvae, data = tokenizer_and_data
    common = ["--data", data, "--vqvae", vqvae, "--runs", tmp_path / "runs", "--token-root", tmp_path / "tokens"]
    sizes = ["--depths", "1,2,4", "--width-per-depth", "16", "--tokens", 3 * 8 * 21, "--batch", "8"]
    quick = ["--warmup", "1", "--threads", "1"]

    def command(*flags: object) -> int:
        return scaling.main([str(a) for a in [*common, *sizes, *quick, "-o", tmp_path / "scaling.json", *flags]])

    return command


def test_scaling_trains_every_size_on_the_same_batches_and_fits_lines(
    scale: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[int, list[object]] = {}
    loss = TransformerStage.loss

    def spy(self: TransformerStage, batch: dict[str, torch.Tensor]) -> object:
        if self.trainable.training:
            seen.setdefault(self.car.base.config.depth, []).append((batch["tokens"].tolist(), batch["drop"].tolist()))
        return loss(self, batch)

    monkeypatch.setattr(TransformerStage, "loss", spy)
    assert scale("--plot", tmp_path / "scaling.png") == 0
    assert set(seen) == {1, 2, 4}
    assert len(seen[1]) == 3
    assert seen[1] == seen[2] == seen[4]

    found = json.loads((tmp_path / "scaling.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    rows = found["results"]
    assert [(r["depth"], r["width"]) for r in rows] == [(1, 16), (2, 32), (4, 64)]
    for row in rows:
        # 18·d·w² of matrices; biases: 6w AdaLN, 2w q and v, w proj, 5w MLP; d temperatures.
        depth, width = row["depth"], row["width"]
        assert row["block_parameters"] == depth * (18 * width**2 + 14 * width + depth)
        assert row["lr"] == pytest.approx(1e-3 * math.sqrt(192 / width))
        assert 0 < row["error_last"] <= 1
        assert row["loss"] == pytest.approx(math.log(32), rel=0.5)  # hardly trained: near chance
    assert set(found["fits"]) == {"loss", "loss_last", "error", "error_last"}
    for row in rows:  # three steps, each validated
        assert [p["compute"] for p in row["curve"]] == [6 * row["block_parameters"] * 8 * 21 * s for s in (1, 2, 3)]
        assert row["curve"][-1]["loss"] == row["loss"]
    assert "loss" in found["fits_compute"]
    assert found["settings"]["tokens"] == 3 * 8 * 21
    assert Image.open(tmp_path / "scaling.png").width > 1000


def test_scaling_does_not_train_a_size_twice(
    scale: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained: list[int] = []
    train = scaling.train

    def stop_at_the_last(args: argparse.Namespace, size: scaling.Size, folder: Path) -> None:
        trained.append(size.depth)
        if size.depth == 4:
            raise KeyboardInterrupt
        train(args, size, folder)

    monkeypatch.setattr(scaling, "train", stop_at_the_last)
    assert scale() == 130
    assert json.loads((tmp_path / "scaling.json").read_text())["fits"] == {}
    (tmp_path / "scaling.json").unlink()  # the runs are still there
    assert scale() == 130
    assert scale() == 130
    assert trained == [1, 2, 4, 4, 4]
    assert scale("--lr", "1e-2") == 2
    assert "other settings (lr 0.001 → 0.01)" in capsys.readouterr().err


def test_the_pareto_front_leaves_out_what_costs_more_and_is_no_better() -> None:
    points = [(1.0, 9.0), (2.0, 9.5), (2.0, 8.0), (4.0, 8.0), (3.0, 7.0), (9.0, 1.0)]
    assert scaling.pareto(points) == [(1.0, 9.0), (2.0, 8.0), (3.0, 7.0), (9.0, 1.0)]
    # Two sizes on one law in compute, and worse points of each: the law is found through the front alone.
    law = [{"compute": c, "loss": (1e-3 * c) ** -0.1} for c in (10.0, 40.0, 160.0, 640.0)]
    worse = [{"compute": c, "loss": 2.0} for c in (20.0, 80.0)]
    found = scaling.compute_law([{"curve": law[::2] + worse}, {"curve": law[1::2]}], "loss")
    assert found == pytest.approx({"alpha": -0.1, "beta": 1e-3, "pearson": -1.0, "points": 4})
    assert scaling.compute_law([{"curve": law[:2]}], "loss") is None
    assert scaling.compute_law([{"curve": []}], "loss") is None


def test_a_power_law_is_found_exactly() -> None:
    sizes = [1e5, 3e5, 1e6, 7e6]
    fit = scaling.power_law(sizes, [(2e-8 * n) ** -0.2 for n in sizes])
    assert fit == pytest.approx({"alpha": -0.2, "beta": 2e-8, "pearson": -1.0})
    assert scaling.power_law(sizes[:2], [2.0, 1.0]) is None
    assert scaling.power_law(sizes, [2.0, 2.0, 2.0, 2.0]) is None


def test_an_error_rate_of_0_has_no_power_law_and_is_drawn_without_one() -> None:
    errors = [0.2, 0.1, 0.0]
    rows = [
        {"depth": d, "block_parameters": 1000 * d, "loss": 1 / d, "loss_last": 1 / d, "error": e, "error_last": e}
        | {
            "curve": [
                {"compute": 1e6 * d * i, "loss": 1 / d / i, "loss_last": 1 / d / i, "error": e, "error_last": e}
                for i in (1, 2, 3)
            ]
        }
        for d, e in zip((1, 2, 3), errors, strict=True)
    ]
    found = scaling.result({}, rows)
    assert set(found["fits"]) == set(found["fits_compute"]) == {"loss", "loss_last"}
    assert Image.open(io.BytesIO(scaling.plot(found))).format == "PNG"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tokens", "100"], "at least one step's, 168"),
        (["--plot", "x.gif"], "ends with .png"),
        (["--vqvae", "nowhere"], "no checkpoint there"),
        (["--data", "nowhere"], "is not a folder"),
        (["--width-per-depth", "0"], "at least 1"),
    ],
)
def test_scaling_refuses_what_it_cannot_do_in_one_line(
    scale: Callable[..., int], flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scale(*flags) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("benchmarks.scaling: error:")]
    assert words in line

"""Settings of sampling by name: the same in training, export and runtime, and the same image of them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from car_export.config import ExportOptions
from car_runtime import config as runtime
from car_runtime.cli.main import main as car_run
from car_runtime.format.manifest import read_manifest
from car_train import checkpoint, sampling
from car_train.cli import main as car_train
from car_train.evaluation.options import EvalOptions
from fixtures.small import small_model
from fixtures.small_plans import small_plan


def test_both_sides_mean_the_same_by_a_name() -> None:
    assert runtime.PRESETS.keys() == sampling.PRESETS.keys()
    assert {name: asdict(sampling.PRESETS[name]) for name in sampling.NAMED} == {
        name: settings for name, settings in runtime.PRESETS.items() if name != "plan"
    }
    assert runtime.PRESETS["plan"] == {}


def test_an_export_a_sample_and_an_evaluation_begin_with_the_same_settings() -> None:
    plan = ExportOptions(output=Path("x.plan"), name="x").sampling(4096)
    assert plan == sampling.settings_of("plan", None, None, None, 4096)
    assert plan == EvalOptions(checkpoint=Path("x"), data=Path("x")).sampling(4096)
    assert asdict(ExportOptions(output=Path("x.plan"), name="x", preset="var-fid", top_k=7).sampling(4096)) == {
        "cfg": 1.5,
        "top_k": 7,
        "top_p": 0.96,
    }


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("presets")
    checkpoint.save(small_model(depth=2, sides=(1, 2, 4)), folder / "checkpoint")
    control = Image.new("L", (16, 16))
    ImageDraw.Draw(control).ellipse([3, 3, 12, 12], outline=255)
    control.save(folder / "control.png")
    return folder


@pytest.mark.parametrize(
    "flags",
    ["", "--preset car", "--preset var-fid", "--cfg 2 --top-k 9 --top-p 0.8", "--preset var-fid --cfg 3"],
)
@pytest.mark.parametrize("label", ["--class 1", ""])
def test_pytorch_and_the_runtime_draw_the_same_image_from_the_same_flags(here: Path, flags: str, label: str) -> None:
    plan = small_plan("steered")
    assert read_manifest(plan).sampling.cfg == sampling.CAR.cfg
    common = ["--control", str(here / "control.png"), *label.split(), "--seed", "3", *flags.split()]
    assert car_train(["sample", str(here / "checkpoint"), *common, "-o", str(here / "a.png")]) == 0
    assert car_run(["-e", str(plan), "--backend", "ort-cpu", *common, "-o", str(here / "b.png")]) == 0
    a, b = (np.asarray(Image.open(here / name).convert("RGB")).astype(int) for name in ("a.png", "b.png"))
    # Both decode in float32, with sums in another order: a value may fall on the other side of a rounding border.
    assert np.abs(a - b).max() <= 1


def test_a_sample_never_replaces_its_control(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    control = str(here / "control.png")
    assert car_train(["sample", str(here / "checkpoint"), "--control", control, "-o", control]) == 2
    assert "would replace the control image; choose another -o" in capsys.readouterr().err

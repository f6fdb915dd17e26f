"""The benchmark of watermarks: its rows, found again by the runtime alone, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from benchmarks import watermark
from car_runtime import open_plan
from car_runtime.format.manifest import read_manifest
from car_runtime.plan import default_plan
from car_train.conventions import PRESETS
from car_train.data.dataset import ControlledImages
from fixtures.thumbnail import Thumbnail

IMAGES = 3


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "drawn"
    for i, name in enumerate(read_manifest(default_plan()).model.class_names or ()):
        (root / name).mkdir(parents=True)
        image = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(image).ellipse((4 + i % 9, 8, 50, 40 + i % 7), fill=(7 * i, 120, 250 - 7 * i))
        image.save(root / name / "a.png")
    return root


def test_rows_are_what_the_runtime_finds(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watermark, "features", lambda args: Thumbnail())
    flags = f"--data {images} --split all --limit {IMAGES} --backend ort-cpu --threads 1 --seed 3 --keys 2"
    assert watermark.main([*flags.split(), "-o", str(tmp_path / "r.jsonl")]) == 0
    rows: list[dict[str, Any]] = json.loads((tmp_path / "r.jsonl").read_text())["results"]
    plain, marked = (row for row in rows if row["question"] == "cost")
    assert (plain["drawn"], plain["f1_change"], plain["images"]) == ("plain", None, IMAGES)
    assert marked["f1_change"] == pytest.approx(marked["f1"] - plain["f1"])
    found = {row["change"]: row for row in rows if row["question"] == "found"}
    assert list(found) == list(watermark.CHANGES)
    data = ControlledImages(
        images, 128, split="all", control_type="canny", convention=PRESETS["canny"], preload=False
    )
    order = np.random.default_rng(3).permutation(len(data))[:IMAGES].tolist()
    own, cropped = [], []
    with open_plan(backend="ort-cpu", threads=1) as plan:
        for i in order:
            item, key = data[i], f"key of {i}"
            image = plan.generate(item["control"].numpy(), item["label"], 3 + i, watermark=key).images[0]
            own.append(plan.detect(image, key).p)
            cropped.append(plan.detect(image[6:-6, 6:-6].copy(), key).p)
    for name, p in (("as the PNG", own), ("cropped by 10 %", cropped)):
        assert found[name]["p50"] == pytest.approx(np.median(p))
        assert found[name]["found_1"] == np.mean(np.array(p) < 0.01)
        assert (found[name]["images"], found[name]["others"]) == (IMAGES, 2 * IMAGES)


def test_a_folder_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        watermark.main(["--data", "gone"])
    assert stopped.value.code == 2
    assert "there is no folder gone; fetch one" in capsys.readouterr().err

"""A plan of format 1, as version 0.1.0 exported it, is read and drawn as it was: tests/data/v0.1.0/README.md."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from car_runtime import GenerationConfig, RequestError, open_plan
from car_runtime.cli.main import main as car_run
from car_runtime.format.manifest import read_manifest
from car_runtime.plan import default_plan
from car_runtime.verify import verify

PLAN = Path(__file__).parents[1] / "data" / "v0.1.0" / "small.plan"
CONTROL = np.zeros((12, 12, 3), np.uint8)
CONTROL[3:9, 4:7] = 255
TOKENS = [
    [27, 30, 35, 44, 13, 30, 24, 41, 13, 4, 41, 15, 13, 41],
    [37, 13, 19, 13, 30, 41, 39, 41, 4, 41, 41, 41, 41, 19],
]
"""Of the seeds 1 and 2, as the export drew them."""


def test_it_draws_the_tokens_that_it_drew() -> None:
    with open_plan(PLAN, "ort-cpu", threads=1) as plan:
        assert plan.manifest.format == 1
        config = GenerationConfig(control=CONTROL, label=1, seed=1, n=2, top_k=7, top_p=0.8)
        assert plan.generate(config).tokens.tolist() == TOKENS
        assert [result.tokens.tolist() for result in plan.generate_many([config, config])] == [TOKENS, TOKENS]
        with pytest.raises(RequestError, match="is of format 1, which mixes nothing; leave it out, or upgrade"):
            plan.generate({"sketch": (CONTROL, 0.5)})


def test_its_goldens_pass_and_it_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    report = verify(PLAN, "ort-cpu", threads=1, warmup=0, runs=1)
    assert report["passed"], report["checks"]
    assert car_run(["plan", "info", str(PLAN)]) == 0
    assert capsys.readouterr().out.startswith("small: format 1, ")


def test_its_images_are_drawn_again_and_by_no_other_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    control, old, new = (tmp_path / name for name in ("control.png", "old.png", "again.png"))
    Image.fromarray(CONTROL).save(control)
    drawn = ["-e", str(PLAN), "--backend", "ort-cpu", "--seed", "1"]
    assert car_run([*drawn, "--control", str(control), "--class", "1", "-o", str(old)]) == 0
    assert car_run(["again", str(old), "-e", str(PLAN), "--backend", "ort-cpu", "-o", str(new)]) == 0
    assert np.array_equal(np.asarray(Image.open(new)), np.asarray(Image.open(old)))
    capsys.readouterr()
    assert car_run(["again", str(old), "-o", str(tmp_path / "x.png")]) == 2
    said, shipped = capsys.readouterr().err, read_manifest(default_plan()).name
    assert f"the image was made by another plan, 'small', and this one is '{shipped}'; name that plan" in said

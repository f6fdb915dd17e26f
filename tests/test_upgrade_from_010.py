"""Plans and scripts of 0.1.0 do now what they did then: docs/upgrading.md.

`tests/data/v0.1.0` holds what that version exported and drew: a CAR plan, a VAR plan with weights in half the space,
and for each the tokens and images of two seeds on ort-cpu.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

import car_runtime
from car_runtime.format.manifest import read_manifest

OLD = Path(__file__).parent / "data/v0.1.0"
PLANS = ("car", "var-fp16")


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_of_010_draws_what_it_drew(name: str) -> None:
    assert read_manifest(OLD / f"{name}.plan").format == 1
    with (
        np.load(OLD / f"{name}.npz") as then,
        car_runtime.open_plan(OLD / f"{name}.plan", "ort-cpu", threads=1) as plan,
    ):
        result = plan.generate(then.get("control"), label=1, seed=5, n=2)
        assert np.array_equal(result.tokens, then["tokens"])
        off = np.abs(result.images.astype(int) - then["images"])
        assert off.max() <= 1, "an engine of another version may round a pixel the other way"


def test_its_control_keeps_the_convention_that_it_was_trained_on() -> None:
    convention = read_manifest(OLD / "car.plan").model.convention
    assert convention is not None
    assert convention.name == "sketch-dark"


def test_a_script_of_010_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The programming interface as the README of 0.1.0 showed it."""
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path(str(OLD / "script.py"), init_globals={"PLAN": OLD / "car.plan", "OLD": OLD})
    assert found["shapes"] == [(4, 8, 8, 3), (2, 8, 8, 3), (1, 5)]
    assert found["scales"] == [0, 1]

"""A plan and a script of 0.1.0 do now what they did then: docs/upgrading.md.

The plan is the one that 0.1.0 shipped: its manifest is kept in `tests/data/v0.1.0`, all other files are those of the
plan that ships now, and the tokens are what 0.1.0 drew with it on ort-cpu.
"""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest

import car_runtime
from car_runtime.format.manifest import MANIFEST, read_manifest

OLD = Path(__file__).parent / "data/v0.1.0"
EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def old_plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("0.1.0") / "emoji-canny.plan"
    shutil.copytree(car_runtime.default_plan(), root)
    shutil.copy(OLD / MANIFEST, root)
    return root


def test_a_plan_of_010_draws_what_it_drew(old_plan: Path) -> None:
    then = json.loads((OLD / "tokens.json").read_text())
    with car_runtime.open_plan(old_plan, "ort-cpu", threads=1) as plan:
        result = plan.generate(EXAMPLES / "umbrella.png", label="fluent-travel-places", seed=3, n=2)
    assert np.array_equal(result.tokens, then)


def test_its_control_keeps_the_convention_that_it_was_trained_on(old_plan: Path) -> None:
    assert "control_convention" not in json.loads((OLD / MANIFEST).read_text())["model"]
    convention = read_manifest(old_plan).model.convention
    assert convention is not None
    assert convention.name == "canny-grey"


def test_a_script_of_010_runs(old_plan: Path) -> None:
    """The programming interface as the README of 0.1.0 showed it."""
    found = runpy.run_path(
        str(OLD / "script.py"), init_globals={"PLAN": old_plan, "CONTROL": EXAMPLES / "umbrella.png"}
    )
    assert found["shapes"] == [(4, 64, 64, 3), (1, 64, 64, 3), (1, 130)]
    assert found["scales"] == [0, 1, 2, 3, 4, 5]

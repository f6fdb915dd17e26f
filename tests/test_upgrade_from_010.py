"""A plan and a script of 0.1.0 do now what they did then: docs/upgrading.md.

The plan is one that 0.1.0 exported; tests/runtime/test_format1.py has the tokens that it drew.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path

from car_runtime.format.manifest import MANIFEST, read_manifest

OLD = Path(__file__).parent / "data/v0.1.0"
PLAN = OLD / "small.plan"
EXAMPLES = Path(__file__).parents[1] / "examples"


def test_its_control_keeps_the_convention_that_it_was_trained_on() -> None:
    assert "control_convention" not in json.loads((PLAN / MANIFEST).read_text())["model"]
    convention = read_manifest(PLAN).model.convention
    assert convention is not None
    assert convention.name == "sketch-dark"


def test_a_script_of_010_runs() -> None:
    """The programming interface as the README of 0.1.0 showed it."""
    found = runpy.run_path(str(OLD / "script.py"), init_globals={"PLAN": PLAN, "CONTROL": EXAMPLES / "umbrella.png"})
    assert found["shapes"] == [(4, 12, 12, 3), (1, 12, 12, 3), (1, 14)]
    assert found["scales"] == [0, 1, 2]

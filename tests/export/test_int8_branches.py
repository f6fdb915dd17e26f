"""Int8 plans of format 2: branches are rounded as the base is, and each is held to its own goldens."""

from __future__ import annotations

from pathlib import Path

import pytest

from car_export.config import ExportOptions, Int8Options
from car_export.plan2 import build_plan_of_2
from car_export.quantize.int8 import to_int8
from car_runtime import verify as acceptance
from car_runtime.cli.main import main as car_run
from car_runtime.format.manifest import read_manifest, verify_files
from fixtures.small import sibling, small_model


def test_base_and_branches_are_rounded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small_model(depth=2, sides=(1, 2, 4), spread=0.5)  # not too coarse in INT8
    options = ExportOptions(output=tmp_path / "two.plan", name="two")
    source = build_plan_of_2({"sketch": model, "other": sibling(model)}, options)
    said: list[str] = []
    plan = to_int8(Int8Options(source=source, output=tmp_path / "two-int8.plan"), said.append)
    manifest = read_manifest(plan)
    verify_files(plan, manifest)
    assert list(manifest.model.branches) == ["sketch", "other"]
    assert not [name for name in manifest.graphs if name.endswith(".b1")]
    for graph in ("step", "condition", "branch.sketch", "branch.other"):
        assert any(line.startswith(f"{graph}: ") and "products in INT8" in line for line in said), said
    assert {name.split(".")[2] for name in manifest.parameters} == {"fusions"}
    report = acceptance.verify(plan, "ort-cpu", threads=1, warmup=0, runs=1)
    assert report["passed"], report["checks"]
    assert list(report["others"]) == ["other", ""]
    assert car_run(["plan", "remove-branch", str(plan), "other"]) == 2
    assert "stores int8; change the float32 plan" in capsys.readouterr().err

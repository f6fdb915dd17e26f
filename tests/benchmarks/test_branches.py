"""What branches cost: the whole command on a toy with two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.branches import main
from benchmarks.harness.records import rows_of
from fixtures.small_plans import small_plan
from fixtures.two_branches import two_branches


def test_two_branches_are_measured_against_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "found.jsonl"
    argv = [str(two_branches()), "--batch", "2", "--runs", "1", "--warmup", "0", "--threads", "1", "-o", str(file)]
    assert main(argv) == 0, capsys.readouterr().err
    found = json.loads(file.read_text(encoding="utf-8"))
    one, two = rows_of(found, "size")
    assert (one["branches"], two["branches"]) == (1, 2)
    assert one["base"] == two["base"]
    assert two["branch_parameters"] == 2 * one["branch_parameters"]
    assert two["plan"] - one["plan"] > one["branch_parameters"]
    opened = {row["plan"]: row for row in rows_of(found, "open")}
    for key in ("open_s", "first_image_s", "peak_rss"):
        assert opened["ratio"][key] == pytest.approx(opened["all branches"][key] / opened["one branch"][key])
    assert [row["branch"] for row in rows_of(found, "next")] == ["sketch", "other"]
    many = {row["requests"]: row for row in rows_of(found, "many")}
    assert list(many) == ["seeds", "controls", "two branches"]
    assert all(row["ratio"] > 0 for row in many.values())


def test_a_plan_without_two_branches_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(small_plan("steered"))]) == 2
    assert "branches; give one with at least two" in capsys.readouterr().err

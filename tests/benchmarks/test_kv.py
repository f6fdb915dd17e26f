"""K/V memory: what is counted from sizes is what the runtime allocates and writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kv import counted, kv_bytes, main, measured, published_rows
from car_runtime.format.manifest import read_manifest
from fixtures.small_plans import small_plan

ROOT = Path(__file__).parents[2]


def test_the_shipped_plans_cache_is_what_its_sizes_say_and_what_is_allocated() -> None:
    # A process of its own: freed memory that is used again would count as none.
    command = [sys.executable, "-m", "benchmarks.kv", "--batch", "8,1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    rows = json.loads(done.stdout.splitlines()[-1])["results"]
    for row, batch in zip(rows, (8, 1), strict=True):
        # 6 base and 3 branch layers, 422 tokens, width 192, float32; the plan is unguided by default: a row an image.
        assert row["counted"] == 2 * 9 * 422 * batch * 192 * 4
        assert row["buffers"] == row["counted"]
    assert rows[0]["resident"] == pytest.approx(rows[0]["counted"], rel=0.1)


def test_half_precision_takes_half() -> None:
    path = small_plan("fp16")
    manifest = read_manifest(path)
    layers, width = 3, manifest.model.width  # two of the base, one of the branch
    assert manifest.sampling.cfg > 0  # guided: two rows an image
    assert counted(manifest, 3) == kv_bytes(layers, manifest.tokens, 6, width, 2)
    assert measured(path, manifest, 3, "ort-cpu")[0] == counted(manifest, 3)


def test_published_sizes_are_the_papers() -> None:
    rows = {row["model"]: row for row in published_rows()}
    assert rows["d16"]["tokens"] == 680
    assert rows["d36"]["tokens"] == 2240
    assert rows["d36"]["pixels"] == 512
    assert rows["d30"]["VAR, MB an image"] == pytest.approx(2 * 30 * 680 * 2 * 1920 * 2 / 1e6)
    assert rows["d30"]["CAR, MB an image"] == pytest.approx(1.5 * rows["d30"]["VAR, MB an image"])


def test_what_is_no_plan_is_named(tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "manifest.json" in capsys.readouterr().err

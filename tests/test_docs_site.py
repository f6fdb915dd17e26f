"""The docs site builds strictly from the same Markdown, and its API reference has what the package offers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import car_runtime

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings")
ROOT = Path(__file__).parents[1]


def test_the_site_builds_and_has_every_page_and_every_name(tmp_path: Path) -> None:
    """Strict: a dead link, a missing anchor, a page that nothing lists or a name without code ends the build."""
    build = [sys.executable, str(ROOT / "docs/site/build.py"), "-o", str(tmp_path / "site")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "runtime"), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT).with_suffix("")
        assert (site / (name.parent if name.name == "README" else name) / "index.html").is_file(), page
    reference = (site / "docs/reference/api/index.html").read_text(encoding="utf-8")
    anchors = set(re.findall(r'id="car_runtime\.([\w.]+)"', reference))
    last = {anchor.rsplit(".", 1)[-1] for anchor in anchors}
    assert {name for name in car_runtime.__all__ if name != "__version__"} <= last
    assert (site / "docs/images/scales.webp").is_file()

"""The examples of clients draw the image that the runtime draws."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from car_runtime import open_plan
from fixtures.serving import ROOT, SHIPPED

CLIENTS = {
    "draw.sh": ("sh", "curl"),
    "draw_openai.py": (sys.executable, "openai"),
    "draw_httpx.py": (sys.executable, "httpx"),
    "draw.mjs": ("node", "node"),
}


@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_draws_what_the_runtime_draws(name: str, url: str, tmp_path: Path) -> None:
    program, needed = CLIENTS[name]
    if shutil.which(needed) is None and find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    control, output = ROOT / "examples/heart.png", tmp_path / "out.png"
    arguments = [program, str(ROOT / "examples/clients" / name), str(control), "fluent-symbols", str(output), url]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(output)
    with open_plan(SHIPPED, threads=1) as plan:
        expected = plan.generate(control, "fluent-symbols", 7).images[0]
    assert np.array_equal(np.asarray(Image.open(output)), expected)
    if name == "draw_openai.py":
        assert len(list(tmp_path.glob("out.*.png"))) == 3


def test_every_client_is_run() -> None:
    assert {path.name for path in (ROOT / "examples/clients").iterdir() if path.is_file()} == set(CLIENTS)

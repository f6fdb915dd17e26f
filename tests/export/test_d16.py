"""The published size, d16 at 256×256, with random weights: exported, verified, run. Minutes, 8 GB, 5 GB of disk."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from car_runtime import BackendError
from car_runtime.backends.amx import build
from car_runtime.backends.openvino.core import has_bfloat16
from fixtures.golden import OFFICIAL_D16, OFFICIAL_VAE, REFERENCE, _filled, save_official
from fixtures.processes import ROOT, run

pytestmark = pytest.mark.slow


def test_d16_exports_and_runs_within_its_limits(tmp_path: Path) -> None:
    car = {k: s for k, s in OFFICIAL_D16.items() if k.startswith("car_")}
    var = {k: s for k, s in OFFICIAL_D16.items() if not k.startswith("car_")}
    files = save_official({"vae": _filled(OFFICIAL_VAE), "var": _filled(var), "car": _filled(car)}, tmp_path)
    parameters = sum(path.stat().st_size for path in files.values()) - 4 * (
        680 * 680 + 24 * 1024 + 10 * 4096
    )  # less the buffers
    plan = tmp_path / "d16.plan"
    argv = [
        "--vae",
        files["vae"],
        "--var",
        files["var"],
        "--car",
        files["car"],
        "--control-type",
        "depth",
        "-o",
        plan,
    ]
    _, log, seconds, peak = run(ROOT / "export" / "build_engines.py", *argv)
    weights = (plan / "weights.bin").stat().st_size
    share = weights / parameters
    print(f"export: {seconds:.0f} s, peak {peak / 1e9:.2f} GB, weights.bin {weights / 1e9:.3f} GB, ×{share:.4f}")
    assert "whole greedy run" in log
    assert seconds <= 180
    assert peak <= 8e9
    assert weights <= 1.05 * parameters

    Image.fromarray(np.load(REFERENCE / "ten.npz")["control_png"]).save(tmp_path / "control.png")
    flags = ["--engine", plan, "--control", tmp_path / "control.png", "--class", 207, "-o", tmp_path / "out.png"]
    # OpenVINO holds one copy in bfloat16, half of the weights, where the CPU multiplies that.
    compact = 2.2e9 if has_bfloat16() else weights + 1.0e9
    limits, peaks = {"ort-cpu": weights + 1.0e9, "openvino": compact}, {}
    with suppress(BackendError):  # no AMX here
        build.check_cpu()
        limits |= {"amx": 2.2e9, "amx-fp32": weights + 1.0e9}
    for backend, limit in limits.items():
        out, _, _, peak = run("-m", "car_runtime", *flags, "--backend", backend, "--json")
        peaks[backend] = peak
        print(f"car-run, {backend}: {json.loads(out)['timings']['total']:.1f} s, peak {peak / 1e9:.2f} GB")
        assert peak <= limit
        assert Image.open(tmp_path / "out.png").size == (256, 256)

    image, common = str(tmp_path / "out.png"), ["--engine", plan, "--backend", "ort-cpu", "--class", 207]
    common += ["--control", tmp_path / "control.png", "-o", tmp_path / "edited.png"]
    jobs = tmp_path / "jobs.csv"
    jobs.write_text("control,class\ncontrol.png,207\ncontrol.png,3\n")
    edits = {
        "paint": ["paint", image, "--box", "64,64,192,192", *common],
        "extend": ["extend", image, "--left", "25%", *common],
        "restyle": ["restyle", image, *common],
        "vary": ["vary", image, "--from-scale", "3", *common],
        "again": ["again", image, *common[:4], *common[-2:]],
        "blend": ["blend", *common, "--class", 3, "--steps", "3"],
        "batch": ["batch", jobs, *common[:4], "-o", tmp_path / "batch"],
        "sheet": ["sheet", *common[:4], *common[6:], "--class", "207,3"],
        "watermark": [*common, "--watermark", "key"],
        "detect": ["detect", image, "--key", "key", *common[:4]],
    }
    for name, arguments in edits.items():
        _, _, seconds, peak = run("-m", "car_runtime", *arguments)
        ratio = peak / peaks["ort-cpu"]
        print(f"{name}: {seconds:.1f} s, peak {peak / 1e9:.2f} GB, {ratio:.2f} of one plain image")
        assert ratio <= 1.1

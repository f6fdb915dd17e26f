"""Engines of the published size, d16 at 256×256, with random weights. Minutes, 8 GB, 7 GB of disk."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from car_runtime.format import manifest as schema
from fixtures.golden import OFFICIAL_D16, OFFICIAL_VAE, _filled, save_official
from fixtures.processes import ROOT, run

pytestmark = pytest.mark.slow

if importlib.util.find_spec("tensorrt_rtx") is None:
    pytest.skip("tensorrt_rtx is not installed: pip install 'car-deploy[rtx]'", allow_module_level=True)


def test_d16_engines_compile_within_their_limits(tmp_path: Path) -> None:
    car = {k: s for k, s in OFFICIAL_D16.items() if k.startswith("car_")}
    var = {k: s for k, s in OFFICIAL_D16.items() if not k.startswith("car_")}
    files = save_official({"vae": _filled(OFFICIAL_VAE), "var": _filled(var), "car": _filled(car)}, tmp_path)
    # Of float16; less the buffers.
    parameters = (sum(path.stat().st_size for path in files.values()) - 4 * (680 * 680 + 24 * 1024 + 10 * 4096)) / 2
    script, plan = ROOT / "export" / "build_engines.py", tmp_path / "d16.plan"
    parts = [flag for part, path in files.items() for flag in (f"--{part}", path)]
    run(script, *parts, "--control-type", "depth", "--precision", "fp16", "-o", plan)
    _, log, seconds, peak = run(script, plan, "--target", "rtx", "--sm", "89")
    manifest = schema.read_manifest(plan)
    schema.verify_files(plan, manifest)
    size = sum(manifest.files[engine.file].bytes for engine in manifest.engines)
    print(f"{log}\nengines: {seconds:.0f} s, peak {peak / 1e9:.2f} GB, {size / 1e9:.3f} GB, ×{size / parameters:.3f}")
    assert seconds <= 180
    assert peak <= 8e9
    assert size <= 1.25 * parameters
    (step,) = [engine for engine in manifest.engines if engine.details["graph"] == "step"]
    facts = json.loads((plan / step.details["sidecar"]).read_text())
    for profile in facts["profiles"]:
        print(f"{profile['name']}: activations {profile['activation_bytes'] / 1e6:.1f} MB")
    assert len(facts["profiles"]) == 10
    assert facts["weight_bytes"] < manifest.files[schema.WEIGHTS].bytes  # one copy for ten profiles

    _, log, seconds, _ = run(script, plan, "--target", "rtx", "--sm", "89")
    print(f"again: {seconds:.1f} s")
    assert log.count("up to date") == 5
    assert seconds <= 30

"""What must not change while code is moved and renamed: an export's bytes, tokens, help texts, checkpoint keys.

`python tests/test_frozen.py` prints the values of this checkout as JSON. tests/data/frozen.json has them as they were
before the moves; a value there is replaced only together with a reason, in a commit of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from safetensors import safe_open

import car_runtime
from car_runtime.backends.openvino.core import has_bfloat16
from car_runtime.format.goldens import golden_file
from car_train import checkpoint
from fixtures.golden import Golden
from fixtures.small import small_model

HERE = Path(__file__).resolve().parent
FROZEN = HERE / "data" / "frozen.json"
EXAMPLE = HERE.parent / "examples" / "umbrella.png"
TOOLS = ("torch", "onnx", "onnxscript")
"""What else decides the bytes of a graph."""
BACKENDS = ("ort-cpu", "openvino", "amx", "amx-fp32")
COMMANDS: dict[str, tuple[str, list[list[str]]]] = {
    "car-run": (
        "car_runtime.cli.main",
        [
            [],
            *([c] for c in "paint extend restyle vary again blend batch sheet detect control".split()),
            *([c] for c in "doctor plan serve verify".split()),
        ],
    ),
    "python -m car_train": (
        "car_train.cli",
        [
            [],
            *([c] for c in "data vqvae var car controls weights eval report sample import".split()),
        ],
    ),
    "python export/build_engines.py": ("car_export.cli", [[]]),
    "python export/numerics.py": ("car_export.precision.numerics", [[]]),
    **{
        f"python -m benchmarks.{name}": (f"benchmarks.{name}", [[]])
        for name in (
            "ablations attention control_features controlnet counting kv latency preference report scaling schedules "
            "training"
        ).split()
    },
}
"""Command → the module whose `main` it is, and its subcommands."""


def export_hashes(plan: Path) -> dict[str, str]:
    """SHA-256 of each file of a plan, of the manifest without what names tools.

    Goldens are left out: their last digits are this CPU's. Their tokens are in `golden_tokens`.
    """
    found = {}
    for path in sorted(plan.rglob("*")):
        if not path.is_file() or path.suffix == ".npz":
            continue
        content = path.read_bytes()
        if path.name == "manifest.json":
            manifest = json.loads(content)
            del manifest["provenance"]
            for name in [name for name in manifest["files"] if name.endswith(".npz")]:
                del manifest["files"][name]
            content = json.dumps(manifest, indent=1).encode()
        found[path.relative_to(plan).as_posix()] = hashlib.sha256(content).hexdigest()
    return found


def golden_tokens(plan: Path) -> dict[str, list[int]]:
    """Of the default branch, or of a plan without one."""
    branch = json.loads((plan / "manifest.json").read_text())["model"]["default_branch"]
    with np.load(plan / golden_file(branch or "")) as arrays:
        return {name: arrays[name].tolist() for name in ("tokens", "sampled_tokens")}


def shipped_tokens(backend: str) -> list[list[int]] | None:
    """Tokens of an image of the shipped plan; None where the backend does not open."""
    try:
        plan = car_runtime.open_plan(backend=backend)
    except car_runtime.BackendError:
        return None
    with plan:
        return plan.generate(EXAMPLE, label="fluent-travel-places", seed=3).tokens.tolist()


def help_texts() -> dict[str, str]:
    """The `--help` text of every command, 100 columns wide."""
    found = {}
    for command, (module, subcommands) in COMMANDS.items():
        main: Callable[[list[str]], int] = importlib.import_module(module).main
        for sub in subcommands:
            text = io.StringIO()
            with (
                mock.patch.dict(os.environ, COLUMNS="100"),
                contextlib.redirect_stdout(text),
                contextlib.suppress(SystemExit),
            ):
                main([*sub, "--help"])
            found[" ".join([command, *sub])] = text.getvalue()
    return found


def checkpoint_keys() -> dict[str, list[str]]:
    """File → names of tensors of a checkpoint, and of the entries of its config.json."""
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint.save(small_model(), Path(folder) / "step-0000001")
        found = {"config.json": sorted(_leaves(json.loads((path / "config.json").read_text())))}
        for file in sorted(path.glob("*.safetensors")):
            with safe_open(file, "numpy") as tensors:
                found[file.name] = sorted(tensors.keys())
        return found


def _leaves(value: Any, name: str = "") -> list[str]:
    if not isinstance(value, dict):
        return [name]
    return [leaf for key, inner in value.items() for leaf in _leaves(inner, f"{name}.{key}".strip("."))]


@pytest.fixture(scope="module")
def frozen() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(FROZEN.read_text())
    return content


@pytest.mark.parametrize("kind", ["car", "var"])
def test_an_export_of_tiny_has_the_same_bytes(
    kind: str, tiny: Golden, plans: Callable[..., Path], frozen: dict[str, Any]
) -> None:
    plan = plans(tiny, car=kind == "car")
    assert golden_tokens(plan) == frozen["golden_tokens"][kind]
    hashes, then = export_hashes(plan), frozen["export"][kind]
    assert hashes.keys() == then.keys()
    if (here := {name: version(name) for name in TOOLS}) != frozen["tools"]:
        pytest.skip(f"graphs were frozen with {frozen['tools']}; here is {here}")
    assert hashes == then


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_shipped_plan_draws_the_same_tokens(backend: str, frozen: dict[str, Any]) -> None:
    # OpenVINO computes in float32 on a CPU without bfloat16, as ort-cpu does.
    same_as = "ort-cpu" if backend == "openvino" and not has_bfloat16() else backend
    then = frozen["shipped_tokens"].get(same_as)
    now = shipped_tokens(backend)
    if now is None or then is None:
        pytest.skip(f"{backend} does not open here, or did not where the tokens were recorded")
    if backend in ("ort-cpu", "amx-fp32"):
        assert now == then
    else:  # bfloat16's roundings differ between CPUs
        assert np.mean(np.array(now) == np.array(then)) >= 0.9


def test_the_commands_say_what_they_said(frozen: dict[str, Any]) -> None:
    now, then = help_texts(), frozen["help"]
    assert now.keys() == then.keys()
    if list(sys.version_info[:2]) == frozen["python"]:
        assert now == then
    for command, text in then.items():  # argparse sets its lines differently from version to version
        assert _flags(now[command]) == _flags(text), command


def _flags(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", text))


def test_checkpoints_have_the_same_keys(frozen: dict[str, Any]) -> None:
    assert checkpoint_keys() == frozen["checkpoint_keys"]


def main() -> None:
    """Export `tiny` both ways and print everything."""
    from car_export.cli import main as build_engines
    from fixtures.golden import save_official

    golden = Golden("tiny")
    found: dict[str, Any] = {"tools": {name: version(name) for name in TOOLS}, "python": list(sys.version_info[:2])}
    found |= {"export": {}, "golden_tokens": {}}
    with tempfile.TemporaryDirectory() as folder:
        files = save_official(golden.state_dicts, Path(folder))
        for kind in ("car", "var"):
            argv = ["--vae", files["vae"], "--var", files["var"], "--patch-nums", ",".join(map(str, golden.sides))]
            argv += ["--car", files["car"], "--control-type", "canny"] if kind == "car" else []
            plan = Path(folder) / ("tiny.plan" if kind == "car" else "tiny-var.plan")
            with contextlib.redirect_stdout(sys.stderr):
                assert build_engines([str(a) for a in [*argv, "-o", plan]]) == 0
            found["export"][kind], found["golden_tokens"][kind] = export_hashes(plan), golden_tokens(plan)
    found["shipped_tokens"] = {name: tokens for name in BACKENDS if (tokens := shipped_tokens(name)) is not None}
    found |= {"help": help_texts(), "checkpoint_keys": checkpoint_keys()}
    print(json.dumps(found, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()

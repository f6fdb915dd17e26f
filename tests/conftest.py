from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from car_export.cli import main as build_engines
from car_train.interop.official import build_model
from car_train.model import Model
from fixtures import shared
from fixtures.golden import Golden, save_official
from fixtures.shared import build_once

# Models are small here: more threads gain nothing, and on a busy machine they wait for each other.
torch.set_num_threads(1)
SHARED = pytest.StashKey[Path]()
with suppress(ImportError, AttributeError):  # no public name
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    # torch's exporter parses the sources of its whole operator library for every graph, an eighth of an export.
    ONNXRegistry.from_torchlib = staticmethod(cache(ONNXRegistry.from_torchlib))  # type: ignore[method-assign]


NEED_TRITON = ["export/test_cuda_kernels.py", *(f"benchmarks/test_gpu_{name}.py" for name in ("model", "session"))]
NEED_TRITON += [f"runtime/test_cuda_{name}.py" for name in ("backend", "cubins", "steps", "tiles")]
collect_ignore = [] if find_spec("triton") else NEED_TRITON
"""There is no Triton for this platform."""


def pytest_configure(config: pytest.Config) -> None:
    """One folder for what the processes of a run share (fixtures/shared.py); the first one makes and removes it."""
    given = getattr(config, "workerinput", {}).get("shared")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what it has in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton (fixtures/kernel_device.py)
    folder = Path(given or tempfile.mkdtemp(prefix="car-tests-"))
    shared.use_folder(folder)
    if given is None:
        config.stash[SHARED] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


LONG = ("export/test_golden.py", "export/test_int8_branches.py", "export/test_d36s.py", "export/test_format2.py")
LONG += ("export/test_upgrade.py", "serve/test_web_gpu.py", "test_docs_site.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Few and long tests come first, then files by their number of tests, so that all processes end together."""
    counts = Counter(item.path for item in items)
    items.sort(key=lambda item: (not item.path.as_posix().endswith(LONG), -counts[item.path], item.path))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Give a process of pytest-xdist the name of that folder."""
    node.workerinput["shared"] = str(node.config.stash[SHARED])


@pytest.fixture(scope="session", params=["tiny", "ten", "tiny_saln"])
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


@pytest.fixture(scope="session")
def tiny() -> Golden:
    return Golden("tiny")


@pytest.fixture(scope="session")
def official_files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Golden], dict[str, Path]]:
    """Official-format .pth files of a golden model, written once."""
    written: dict[str, dict[str, Path]] = {}

    def files(golden: Golden) -> dict[str, Path]:
        if golden.name not in written:
            written[golden.name] = save_official(golden.state_dicts, tmp_path_factory.mktemp(f"{golden.name}-pth"))
        return written[golden.name]

    return files


@pytest.fixture(scope="session")
def plans(official_files: Callable[[Golden], dict[str, Path]]) -> Callable[..., Path]:
    """Plans of official-format files, by the command line, each built once in a test run: `plans(golden, *flags)`."""

    def plan(golden: Golden, *flags: str, car: bool = True) -> Path:
        name = f"{golden.name}{'' if car else '-var'}.plan"

        def export(folder: Path) -> None:
            files = official_files(golden)
            argv = ["--vae", files["vae"], "--var", files["var"], *flags]
            argv += ["--patch-nums", ",".join(map(str, golden.sides)), "-o", folder / name]
            argv += ["--car", files["car"], "--control-type", "canny"] if car else []
            assert build_engines([str(a) for a in argv]) == 0

        return (
            build_once("".join(c if c.isalnum() else "-" for c in f"golden {name} {' '.join(flags)}"), export) / name
        )

    return plan


@pytest.fixture(scope="session")
def models() -> Callable[..., Model]:
    """PyTorch models of the goldens, with or without control."""
    made: dict[tuple[str, bool], Model] = {}

    def model(golden: Golden, car: bool = True) -> Model:
        if (golden.name, car) not in made:
            parts = golden.state_dicts
            made[golden.name, car] = build_model(
                parts["vae"], parts["var"], parts["car"] if car else None, sides=golden.sides
            )
        return made[golden.name, car]

    return model

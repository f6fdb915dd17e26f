from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from car_export.cli import main as build_engines
from car_train.interop.official import build_model
from car_train.model import Model
from fixtures.golden import Golden, save_official

# Models are small here: more threads gain nothing, and on a busy machine they wait for each other.
torch.set_num_threads(1)


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
def plans(
    tmp_path_factory: pytest.TempPathFactory, official_files: Callable[[Golden], dict[str, Path]]
) -> Callable[..., Path]:
    """Plans built by the command line from official-format files, each once: `plans(golden, car=True, *flags)`."""
    built: dict[tuple[object, ...], Path] = {}

    def plan(golden: Golden, *flags: str, car: bool = True) -> Path:
        key = (golden.name, car, *flags)
        if key not in built:
            files = official_files(golden)
            output = tmp_path_factory.mktemp("plans") / f"{golden.name}{'' if car else '-var'}.plan"
            argv = [
                "--vae",
                files["vae"],
                "--var",
                files["var"],
                "--sides",
                ",".join(map(str, golden.sides)),
                "-o",
                output,
                *flags,
            ]
            argv += ["--car", files["car"], "--control-type", "canny"] if car else []
            assert build_engines([str(a) for a in argv]) == 0
            built[key] = output
        return built[key]

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

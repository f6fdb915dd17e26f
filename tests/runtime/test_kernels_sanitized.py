"""The kernels for AMX, tiles emulated, under AddressSanitizer and UBSan; and next to PyTorch on random decoders.

A plan is run right, or refused: it never reads or writes a byte that is not its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from car_runtime.backends.amx import build
from car_runtime.plan import default_plan
from fixtures.amx_machine import EMULATED, EMULATED_FLAGS, needs_kernels, without_emulation, without_sanitizers
from fixtures.convolutions import reference
from fixtures.kernel_graphs import random_decoder
from fixtures.shared import build_once

ROOT = Path(__file__).parents[2]
SANITIZED = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
_WITHOUT = without_emulation() or without_sanitizers()
needs_sanitizers = pytest.mark.skipif(_WITHOUT is not None, reason=str(_WITHOUT))


def sanitized_library(terms: int) -> Path:
    def compile_(folder: Path) -> None:
        flags = [flag for flag in EMULATED_FLAGS if not flag.startswith("-O")] + SANITIZED + [f"-DBF16_TERMS={terms}"]
        sources = [str(source) for source in build.SOURCES if source.suffix == ".c"]
        subprocess.run(["gcc", *flags, *sources, "-o", str(folder / "kernels.so"), "-lm"], check=True, timeout=120)

    return build_once(f"sanitized-kernels-{terms}", compile_) / "kernels.so"


def run_sanitized(terms: int, seed: int, count: int) -> str:
    """What is printed. Fails with a sanitizer's report, or the error of a case."""
    asan = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": asan.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # Python's own leaks aren't ours
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "runtime", ROOT / "tests"))),
    }
    command = [sys.executable, EMULATED / "run_graphs.py", sanitized_library(terms), default_plan()]
    command += [str(seed), str(count)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=6000)
    case = (done.stdout.splitlines() or [""])[-1]
    assert done.returncode == 0, f"{case}\n{done.stderr[-6000:]}"
    assert "runtime error" not in done.stderr, f"{case}\n{done.stderr[-6000:]}"
    return case


@needs_sanitizers
@pytest.mark.parametrize("terms", [1, 2])
def test_no_plan_makes_the_kernels_leave_their_memory(terms: int) -> None:
    assert "ran" in run_sanitized(terms, 1000 * terms, 36)


@pytest.mark.slow
@needs_sanitizers
@pytest.mark.parametrize("terms", [1, 2])
def test_no_plan_of_many_makes_the_kernels_leave_their_memory(terms: int) -> None:
    assert "ran" in run_sanitized(terms, 100_000 * terms, 6000)


@needs_kernels
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("terms", "levels"), [(1, 12), (2, 1)])
def test_decoders_of_random_architectures_are_pytorchs(tmp_path: Path, terms: int, levels: int) -> None:
    """Within so many of 255 levels: steps that amplify make bf16's 8 bits more than one of them."""
    library = build.load(terms)
    for seed in range(24):
        network, f_hat, image = random_decoder(library, tmp_path, seed, change=False)
        pixels = reference(network, f_hat)[-1].numpy().transpose(1, 2, 0)
        wanted = np.round((np.clip(pixels, -1, 1) + 1) * 127.5)
        assert np.abs(image[0].astype(int) - wanted).max() <= levels, seed
        assert wanted.std() > 20, seed

"""Launches, bytes and FLOPs of the `cuda` kernels by count, and times that say that they are computed."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from benchmarks.analysis.gpu_model import (
    DECODER,
    ENCODER,
    GPUS,
    NOTHING,
    SIDES,
    Cost,
    CountedWeights,
    cost,
    d16,
    main,
    memory,
    others,
    seconds,
    steps,
)
from car_runtime.backends.cuda.launch_plan import LaunchPlan, sizes_of, strides_of
from car_runtime.backends.onnxruntime.kernels import Cuda
from car_runtime.format.manifest import read_manifest
from car_runtime.plan import Plan
from fixtures.kernel_device import KernelDevice
from fixtures.kernel_models import narrow_plan

C, DEPTH, BLOCKS = 1024, 16, 8


def total(batch: int, branches: int = 1) -> list[Cost]:
    return [sum((cost(launch) for launch in scale), NOTHING) for scale in steps(d16(branches), batch)]


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_a_step_of_d16_is_at_most_200_launches(batch: int) -> None:
    """ONNX Runtime takes about 1,500. Few rows take the norms into the products."""
    launches = [len(scale) for scale in steps(d16(), batch)]
    assert max(launches) == 193
    assert launches[0] == 145


def test_every_weight_of_a_step_is_read_once() -> None:
    matrices = (DEPTH + BLOCKS) * 12 * C * C + BLOCKS * 2 * C * C + 9 * C * C + 4096 * C + 32 * C
    assert {one.weight_bytes for one in total(1)} == {2 * matrices}
    assert {one.weight_bytes for one in total(4)} == {2 * matrices}


def test_flops_are_those_of_the_products_and_of_attention() -> None:
    seen = 0
    for side, one in zip(SIDES, total(2), strict=True):
        rows = 4 * side * side
        seen += side * side
        blocks = (DEPTH + BLOCKS) * (24 * rows * C * C + 4 * rows * seen * C)
        rest = rows * (BLOCKS * 4 * C * C + 18 * C * C + 2 * 4096 * C)
        following = 0 if side == 16 else SIDES[SIDES.index(side) + 1]
        embedded = 2 * 4 * max(following, 1) ** 2 * 32 * C
        phi = 18 * 2 * 32 * 32 * 16 * 16
        assert one.flops == blocks + rest + embedded + phi


def conv(side: int, inputs: int, outputs: int, reach: int = 3) -> int:
    return 2 * reach**2 * inputs * outputs * side**2


def residual(side: int, inputs: int, outputs: int) -> int:
    across = conv(side, inputs, outputs, 1) if inputs != outputs else 0
    return conv(side, inputs, outputs) + conv(side, outputs, outputs) + across


def test_flops_of_the_decoder_are_those_of_its_convolutions() -> None:
    """Attention computes its scores for each of its ten output tiles anew."""
    attention = conv(16, 640, 3 * 640, 1) + conv(16, 640, 640, 1) + 2 * 256 * 256 * 640 * 11
    want = conv(16, 32, 32) + conv(16, 32, 640) + 2 * residual(16, 640, 640) + attention
    side, before = 16, 640
    for level in reversed(range(5)):
        width = DECODER[level]
        want += (
            residual(side, before, width) + 2 * residual(side, width, width) + (3 * attention if level == 4 else 0)
        )
        before = width
        if level:
            side *= 2
            want += conv(side, width, width)
    want += conv(side, before, 16)
    decoder = others(d16(), 1)["decoder"]
    assert sum(cost(launch).flops for launch in decoder) == want
    assert len(others(d16(), 4)["decoder"]) == 4 * len(decoder)


def test_flops_of_a_control_encoder_and_of_the_class() -> None:
    want = 0
    for scale in SIDES:
        side = 16 * scale
        want += conv(side, 16, ENCODER[0])
        for inputs, outputs in pairwise(ENCODER):
            want += conv(side, inputs, inputs) + conv(side // 2, inputs, outputs)
            side //= 2
        want += conv(side, ENCODER[-1], C)
    found = others(d16(), 2)
    assert sum(cost(launch).flops for launch in found["control.branch0"]) == want
    assert sum(cost(launch).flops for launch in found["condition"]) == 2 * 4 * C * C * (6 * (DEPTH + BLOCKS) + 2)


@pytest.mark.slow
def test_memory_is_what_the_backend_takes() -> None:
    """Weights to the byte; what an image takes beyond them within the rounding of small buffers."""
    root = narrow_plan()
    manifest = read_manifest(root)
    model, counted = sizes_of(manifest, strides_of(manifest, root)), CountedWeights()
    LaunchPlan(model, counted)
    device = KernelDevice()
    backend = Cuda(root, manifest, device)
    assert 0 <= backend.report()["buffer_bytes"] - counted.bytes < 512 * 400  # pieces of 512 bytes
    before = device.allocated()
    with Plan(root, manifest, backend, "a test") as plan:
        control = np.zeros((12, 12, 3), np.uint8)
        plan.generate({"one": control, "two": (control, 0.5)}, 1, cfg=2.0)
        held = memory(model, 1, manifest.tokens)
        wanted = sum(held.values()) - counted.bytes
        assert 0.8 * wanted < device.allocated() - before < 1.2 * wanted + 512 * 200


def test_memory_of_a_d16() -> None:
    one, four = (memory(d16(), batch, 680) for batch in (1, 4))
    assert one["weights"] == four["weights"]
    assert 1.0e9 < one["weights"] < 1.2e9
    assert one["keys and values"] == 2 * 2 * 24 * 680 * 2 * C
    assert four["keys and values"] == 4 * one["keys and values"]
    assert sum(four.values()) < 3e9


def test_times_follow_from_the_assumptions() -> None:
    gpu = GPUS["h100"]
    launches = steps(d16(), 1)[-1]

    def time(**changes: float) -> float:
        return sum(seconds(launch, replace(gpu, **changes)) for launch in launches)

    assert time(launch=gpu.launch + 1e-6) == pytest.approx(time() + 193e-6)
    assert time(bandwidth=gpu.bandwidth / 10) > time()
    assert time(peak=gpu.peak / 100) > time()
    assert time(per_multiprocessor=gpu.per_multiprocessor / 2) > time()


def test_the_command_says_that_nothing_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--gpu", "h200", "--batch", "2"]) == 0
    assert "computed, not measured" in capsys.readouterr().out
    assert main(["--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["computed"] is True
    assert answer["memory"] == memory(d16(), 1, 680)
    sides, rest = list(answer["graphs"])[: len(SIDES)], list(answer["graphs"])[len(SIDES) :]
    assert sides == [str(side) for side in SIDES]
    assert rest == ["condition", "control.branch0", "decoder"]

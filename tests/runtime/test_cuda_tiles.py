"""Tiles that are timed on the GPU: which one is taken, what is remembered, and what is not believed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from car_runtime.backends.cuda.buffers import Memory
from car_runtime.backends.cuda.kernels import kernels, launch
from car_runtime.backends.cuda.tiles import TIMED, Tiles
from fixtures.fake_device import GPU
from fixtures.kernel_device import KernelDevice

M, C = 20, 64


class Slow(KernelDevice):
    """A GPU on which some variants take long."""

    slow: tuple[str, ...] = ()

    def _compute(self, variant: Any, grid: tuple[int, int, int], given: Mapping[str, int]) -> None:
        super()._compute(variant, grid, given)
        self.clock += 1.0 if variant.name in self.slow else 0.0


class Work:
    """Two products of one size, and a norm."""

    def __init__(self, *slow: str) -> None:
        self.device = Slow()
        self.device.slow = slow
        self.memory = Memory(self.device)
        rng = np.random.default_rng(1)
        self._kept = []

        def up(*shape: int, dtype: str = "float16") -> int:
            array = self.memory.allocate(shape, dtype)
            self.memory.write(array, rng.normal(size=shape).astype(dtype))
            self._kept.append(array)
            return array.address

        x, a, w, bias, rows = up(M, C, dtype="float32"), up(M, C), up(C, C), up(C), up(1, 2, C, dtype="float32")
        norm = {"x": x, "scale": rows, "shift": rows, "out": a, "C": C, "R": 1, "mod_stride": 2 * C}
        product = {"a": a, "w": w, "bias": bias, "M": M, "N": C, "K": C}
        products = [launch("gelu.s", (2, 2), out=up(M, C), **product) for _ in range(2)]
        self.launches = [launch("ln_mod.row", (M,), **norm), *products]

    def put(self, launches: Any) -> None:
        for one in launches:
            self.device.put_kernel(one.kernel, one.grid, one.arguments)
        self.device.synchronize()


@pytest.mark.parametrize("best", ["gelu.s", "gelu.m", "gelu.l"])
def test_the_fastest_tile_is_taken_and_remembered(best: str, tmp_path: Path) -> None:
    work = Work(*{"gelu.s", "gelu.m", "gelu.l"} - {best})
    tiles = Tiles(GPU, tmp_path)
    assert tiles.chosen(work.launches) == work.launches
    assert tiles.lack(work.launches)
    tiles.measure(work.memory, work.launches)
    assert all(graph.freed and len(graph.works) == 2 for graph in work.device.graphs)
    chosen = tiles.chosen(work.launches)
    assert [one.kernel for one in chosen] == ["ln_mod.row", best, best]
    tile = kernels()[best].constants
    assert chosen[1].grid == (-(-C // tile["BN"]), -(-M // tile["BM"]), 1)
    work.put(chosen)
    again = Tiles(GPU, tmp_path)
    assert not again.lack(work.launches)
    assert again.chosen(work.launches) == chosen


def test_another_gpu_driver_or_file_is_not_believed(tmp_path: Path) -> None:
    work = Work("gelu.s", "gelu.l")
    Tiles(GPU, tmp_path).measure(work.memory, work.launches)
    (file,) = tmp_path.iterdir()
    good = file.read_text(encoding="utf-8")
    for other in (replace(GPU, driver="99.0"), replace(GPU, name="Fake RTX 4080")):
        assert Tiles(other, tmp_path).lack(work.launches)
    facts = json.loads(good)
    (key,) = facts["tiles"]
    broken = ["", "[]", "{", "7", json.dumps({"for": facts["for"], "tiles": [1]})]
    broken += [json.dumps(facts | {"tiles": tiles}) for tiles in ({key: "gate.m"}, {key: ["x"]}, {key: "nothing"})]
    broken += [good + " " * (1 << 20), good.replace("gelu.m", "gelu.m.bf16")]
    for text in broken:
        file.write_text(text, encoding="utf-8")
        assert Tiles(GPU, tmp_path).lack(work.launches), text[:60]
    file.write_text(good, encoding="utf-8")
    assert not Tiles(GPU, tmp_path).lack(work.launches)


def test_what_cannot_be_timed_or_kept_is_no_error(tmp_path: Path) -> None:
    work = Work()
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    tiles = Tiles(GPU, tmp_path / "file")
    work.device.refuse_capture = True
    tiles.measure(work.memory, work.launches)
    assert tiles.chosen(work.launches) == work.launches
    work.device.refuse_capture = False
    tiles.measure(work.memory, work.launches)
    assert not tiles.lack(work.launches)


def test_variants_of_a_timed_kernel_take_the_same_arguments() -> None:
    timed = [one for one in kernels().values() if one.kernel in TIMED]
    assert {one.kernel for one in timed} == set(TIMED)
    for one in timed:
        half = one.name.endswith(".bf16")
        alike = [o for o in timed if o.kernel == one.kernel and o.name.endswith(".bf16") == half]
        assert all(other.arguments == one.arguments for other in alike)

"""Costs of other sizes and depths: counted by two small depths as in a real export, and held against a card."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import growth
from benchmarks.counting import (
    RTX_4090,
    RTX_4090_FP32,
    GraphCount,
    ImageCount,
    count_image,
    extrapolate,
    roofline,
)
from benchmarks.harness.machine import BenchmarkError
from benchmarks.harness.workload import MODELS, made_up, make_up
from car_export.plan import ExportOptions, build_plan
from car_export.weights import INLINE
from fixtures.toy_plan import folder, toy

COUNTED = [f.name for f in dataclasses.fields(GraphCount) if f.name not in ("graph", "weights", "stored", "products")]


def assert_same(ours: ImageCount, exported: ImageCount) -> None:
    """Everything that is counted, to the last one; weights by their sum, products whatever their order."""
    assert [(s.name, s.runs) for s in ours.stages] == [(s.name, s.runs) for s in exported.stages]
    for a, b in zip(ours.stages, exported.stages, strict=True):
        for name in COUNTED:
            assert getattr(a.count, name) == getattr(b.count, name), (a.name, name)
        assert a.count.weight_elements == b.count.weight_elements, a.name
        assert set(a.count.products) == set(b.count.products), a.name


@cache
def traced(blocks: int) -> dict[int, ImageCount]:
    """The toy cut to so many blocks, without weights."""
    return growth.count_blocks(growth.with_blocks(MODELS["tiny"], blocks), (1, 2), {}, lambda _: None)


def test_two_depths_tell_what_a_really_exported_deeper_model_counts(tmp_path: Path) -> None:
    depth = 6
    model = make_up(growth.with_blocks(MODELS["tiny"], depth))
    for number, p in enumerate(model.parameters()):
        if p.numel() < INLINE:
            p.add_(0.001 * number)  # equal ones would be stored once, and in a trained model none are
    plan = build_plan(model, ExportOptions(output=tmp_path / "deep.plan", name="deep"))
    for batch in (1, 2):
        assert_same(growth.grow(traced(2)[batch], traced(4)[batch], depth), count_image(plan, batch))


def test_an_empty_store_has_a_place_for_every_weight_and_holds_none(tmp_path: Path) -> None:
    store, weight = growth.EmptyStore(tmp_path), torch.empty(1000, 300)
    first, again, turned = store.add("w", weight), store.add("same", weight), store.add("w", weight, transpose=True)
    table = store.add_array("table", np.arange(5.0))
    store.close()
    assert again is first
    assert ([*first.shape], [*turned.shape]) == ([1000, 300], [300, 1000])
    assert (first.offset, turned.offset, table.offset) == (0, 1_200_000, 2_400_000)
    assert table.numpy().tolist() == [0, 1, 2, 3, 4]  # the exporter reads small constants
    size = (tmp_path / "weights.bin").stat()
    assert size.st_size == 2_400_040
    assert size.st_blocks * 512 < 100_000


def test_graphs_that_differ_in_more_than_depth_are_not_extrapolated() -> None:
    counts = {s.name: s.count for s in count_image(toy().plan).stages}
    with pytest.raises(BenchmarkError, match="differ in depth alone"):
        extrapolate(counts["scale_1"], counts["scale_2"], 3)
    same = extrapolate(counts["scale_1"], counts["scale_1"], 3)
    assert (same.flops, same.kv_bytes) == (counts["scale_1"].flops, counts["scale_1"].kv_bytes)


@pytest.mark.parametrize("depth", [5, 0])
def test_a_depth_that_two_and_four_do_not_tell_is_refused(depth: int) -> None:
    counts = count_image(toy().plan)
    with pytest.raises(BenchmarkError, match=rf"depth is {depth}; give an even number from 2"):
        growth.grow(counts, counts, depth)


def test_memory_is_that_of_the_buffers_and_weights() -> None:
    config, manifest = MODELS["tiny"], toy().manifest
    row = growth.memory_row(config, 4, 2)
    last = count_image(toy().plan, 2).stages[-2].count
    # At the last scale all the cache is either read or written.
    assert row["kv_bytes"] == last.kv_bytes
    scores = max(p.batch * p.M * p.N for p in last.products if p.kind == "activation" and p.K == 32 // 2)
    assert row["score_bytes"] == 4 * scores
    assert row["parameters"] == sum(p.numel() for p in toy().reference().parameters())
    assert row["weight_bytes"] == 4 * row["parameters"]
    assert growth.memory_row(config, 2, 1)["kv_bytes"] == row["kv_bytes"] / 4
    assert manifest.model.cache_layers == 3


def test_sizes_are_the_published_ones_and_the_assumed_one_goes_on_like_them() -> None:
    assert [growth.SIDES[s][-1] * 16 for s in (256, 512, 1024)] == [256, 512, 1024]
    sides = growth.SIDES[1024]
    assert sides[0] == 1
    ratios = [b / a for a, b in pairwise(sides)][4:]
    assert 1.25 < min(ratios) <= max(ratios) < 1.45  # the published ones: 1.2 to 1.34, and 1.3 to 1.5
    assert MODELS["d16-512"].vqvae.sides == growth.SIDES[512]


def test_floors_are_counts_divided_by_a_cards_rates() -> None:
    counts = count_image(toy().plan, 2)
    for card in (RTX_4090, RTX_4090_FP32):
        rows = growth.floor_rows(counts, card, image_size=8)
        for row, floor in zip(
            rows, roofline(counts, card.flops_per_s, card.bytes_per_s, card.precision_bytes), strict=True
        ):
            moved = row["weight_bytes"] + row["kv_bytes"] + row["io_bytes"]
            assert row["floor_s"] == floor["floor_s"]
            assert row["compute_s"] == pytest.approx(1e9 * row["gflop"] / card.flops_per_s)
            assert row["memory_s"] == pytest.approx(moved / card.bytes_per_s)
            assert row["image_size"] == 8
        assert rows[-1]["stage"] == "image"
        assert rows[-1]["floor_s"] == pytest.approx(sum(row["floor_s"] for row in rows[:-1]))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One real run on toys, as it was written; stdout is beside it."""
    toy()
    file, out, log = tmp_path_factory.mktemp("growth") / "results.jsonl", io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(log):
        patch.setattr(growth, "count_blocks", lambda config, *_: traced(config.var.depth))
        flags = f"--sizes 256,512 --depths 2,4 --batch 1,2 --measure --models tiny --cache {folder()}"
        flags += " --runs 2 --threads 1"
        assert growth.main([*flags.split(), "-o", str(file)]) == 0, log.getvalue()
    (line,) = file.read_text(encoding="utf-8").splitlines()
    assert out.getvalue().splitlines()[-1] == line
    return {**json.loads(line), "stdout": out.getvalue()}


def rows(found: dict[str, Any], question: str) -> list[dict[str, Any]]:
    return [row for row in found["results"] if row["question"] == question]


def test_every_size_depth_precision_and_batch_has_its_rows(found: dict[str, Any]) -> None:
    images = [row for row in rows(found, "floor") if row["stage"] == "image"]
    keys = [(r["image_size"], r["depth"], r["precision"], r["batch"]) for r in images]
    assert sorted(keys) == sorted(
        (s, d, p, b) for s in (256, 512) for d in (2, 4) for p in ("fp16", "fp32") for b in (1, 2)
    )
    assert sorted(keys) == sorted(
        (r["image_size"], r["depth"], r["precision"], r["batch"]) for r in rows(found, "memory")
    )
    assert {r["card"] for r in images if r["precision"] == "fp32"} == {RTX_4090_FP32.name}
    by_key = dict(zip(keys, images, strict=True))
    assert by_key[256, 4, "fp16", 1]["gflop"] > by_key[256, 2, "fp16", 1]["gflop"]
    assert by_key[256, 4, "fp16", 1]["floor_s"] < by_key[256, 4, "fp32", 1]["floor_s"]
    assert [r["published"] for r in rows(found, "size")] == [True, True]


def test_what_is_quoted_says_from_where_and_is_not_measured(found: dict[str, Any]) -> None:
    quoted = rows(found, "quoted")
    assert [row["seconds"] for row in quoted] == [0.3, 1.7, 2.3, 20 / 18.9, 20 / 22.7, 20 / 42.3]
    assert all(row["source"] for row in quoted)
    for words in ("Computed from counts, not measured", "Quoted, not measured here", "assumed"):
        assert words in found["stdout"]


def test_pictures_of_a_model_are_measured_in_processes_of_their_own(found: dict[str, Any]) -> None:
    measured = rows(found, "measured")
    assert [(r["model"], r["backend"], r["batch"]) for r in measured] == [
        ("tiny", "ort-cpu", 1),
        ("tiny", "ort-cpu", 2),
    ]
    for row in measured:
        assert 0 < row["min"] <= row["p50"] <= row["p95"]
        assert row["runs"] == 2
        assert row["images_per_s"] == pytest.approx(row["batch"] / row["p50"])
        assert row["gflop"] == pytest.approx(count_image(toy().plan, row["batch"]).total("flops") / 1e9)
        assert row["of_limit"] == pytest.approx(row["limit_s"] / row["p50"])
        assert row["memory_bytes"] > 0
    assert found["settings"]["models"] == ["tiny"]


@pytest.mark.parametrize(
    ("flags", "remedy"),
    [
        ("--sizes 128", "give e.g. 256,512"),
        ("--depths 15", "a branch has half as many blocks; give e.g. 16,30"),
        ("--batch 0", "give e.g. 1,4"),
        ("--precisions int8", "give e.g. fp32,fp16"),
        ("--measure --models d17", "give e.g. d16,d16-512"),
        ("--measure --backends nothing", "there is no backend"),
        ("--measure --backends auto", "name them"),
        ("--runs 0", "give at least 1"),
        ("--threads 0", "give 1…1024"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_with_a_remedy(
    flags: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        growth.main(flags.split())
    assert stop.value.code == 2
    assert remedy in capsys.readouterr().err


def test_a_result_that_cannot_be_written_is_told_before_anything_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert growth.main(["-o", str(tmp_path / "no" / "folder.jsonl")]) == 2
    assert capsys.readouterr().err.startswith("benchmarks.growth: error: ")


@pytest.mark.slow
def test_a_d16_plan_counts_what_was_said_of_it_on_paper(tmp_path: Path) -> None:
    exported = made_up("d16", None, "fp32", (1,), tmp_path, print)
    few, more = (growth.count_blocks(growth.with_blocks(MODELS["d16"], n), (1,), {}, print)[1] for n in (2, 4))
    ours, theirs = growth.grow(few, more, 16), count_image(exported.plan, 1)
    assert [s.count.flops for s in ours.stages] == [s.count.flops for s in theirs.stages]
    for a, b in zip(ours.stages, theirs.stages, strict=True):
        # Made-up scales of attention are equal in all 24 layers, and stored once.
        assert a.count.weight_elements - b.count.weight_elements in (0, 23 * 16)

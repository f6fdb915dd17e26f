"""The latency benchmark: the whole command on a toy, and the arithmetic of its rows."""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import latency
from benchmarks.analysis.counting import count_image
from benchmarks.analysis.limits import Limits, _size
from benchmarks.baselines.candidates import BF16, FP32
from benchmarks.harness import workload
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.measure import ratio, run_python
from car_runtime.format.manifest import WEIGHTS
from car_train import checkpoint
from fixtures.small import small_model
from fixtures.toy_plan import folder, toy

STAGES = ["control", "condition", "scale_0", "scale_1", "scale_2", "decoder"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One real run, as it was written; stdout is next to it."""
    toy()
    file, out, log = tmp_path_factory.mktemp("latency") / "results.jsonl", io.StringIO(), io.StringIO()
    flags = f"--model tiny --cache {folder()} --backends ort-cpu --batch 1,2 --runs 3 --warmup 1 --threads 1"
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(log):
        assert latency.main([*flags.split(), "-o", str(file)]) == 0, log.getvalue()
    (line,) = file.read_text(encoding="utf-8").splitlines()
    assert out.getvalue().splitlines()[-1] == line
    assert "exporting" not in log.getvalue()  # it was there already
    return {**json.loads(line), "stdout": out.getvalue()}


def rows(found: dict[str, Any], question: str) -> list[dict[str, Any]]:
    return [row for row in found["results"] if row["question"] == question]


def test_all_candidates_are_measured_in_one_run(found: dict[str, Any]) -> None:
    table = rows(found, "end_to_end")
    names = [FP32, BF16, "ort-cpu"]
    assert Counter((r["candidate"], r["batch"]) for r in table) == Counter((n, b) for n in names for b in (1, 2))
    for row in table:
        assert 0 < row["min"] <= row["p50"] <= row["p95"]
        assert row["runs"] == 3
        assert row["images_per_s"] == pytest.approx(row["batch"] / row["p50"])
        assert row["limit_s"] > 0
        assert row["of_limit"] == pytest.approx(row["limit_s"] / row["p50"])
        assert row["speedup_p10"] <= row["speedup"] <= row["speedup_p90"]
        assert row["gflop"] == pytest.approx(count_image(toy().plan, row["batch"]).total("flops") / 1e9)
        if row["batch"] == 1:
            assert row["batch_gain"] == 1
    first = {r["candidate"]: r for r in table if r["batch"] == 1}
    assert first[FP32]["speedup"] == first[BF16]["speedup_bf16"] == 1
    # The same tokens from the same weights, control, class and numbers: what is compared is the same work.
    assert first["ort-cpu"]["tokens_equal"] == first[FP32]["tokens_equal"] == 1
    assert {r["precision"] for r in table} == {"fp32", "bf16"}


def test_stages_are_those_of_an_image_and_fit_into_it(found: dict[str, Any]) -> None:
    ours = [r for r in rows(found, "stage") if r["candidate"] == "ort-cpu" and r["batch"] == 1]
    loop = [r for r in rows(found, "stage") if r["candidate"] == FP32 and r["batch"] == 1]
    assert [r["stage"] for r in ours] == STAGES
    assert [r["stage"] for r in loop] == [s for s in STAGES if s != "condition"]
    for row in (*ours, *loop):
        assert row["bound"] in ("compute", "memory")
        assert 0 < row["p50"] <= row["p95"]
        assert row["of_limit"] == pytest.approx(row["limit_s"] / row["p50"])
    whole = {r["candidate"]: r for r in rows(found, "end_to_end") if r["batch"] == 1}
    assert sum(r["limit_s"] for r in ours) == pytest.approx(whole["ort-cpu"]["limit_s"])
    assert sum(r["gflop"] for r in ours) == pytest.approx(whole["ort-cpu"]["gflop"])


def test_a_further_seed_pays_for_neither_control_nor_class(found: dict[str, Any]) -> None:
    (row,) = rows(found, "next_seed")
    whole = {r["stage"]: r for r in rows(found, "stage") if r["candidate"] == "ort-cpu" and r["batch"] == 1}
    assert row["candidate"] == "ort-cpu"
    assert row["condition_p50"] < whole["condition"]["p50"]
    assert row["control_p50"] < whole["control"]["p50"]
    assert row["ratio"] > 0


def test_starts_and_memory_are_measured_in_processes_of_their_own(found: dict[str, Any]) -> None:
    ours, loop = rows(found, "start")
    assert (ours["candidate"], loop["candidate"]) == ("ort-cpu", FP32)
    assert 0 < ours["import_s"] < ours["cold_start_s"]
    assert ours["open_s"] > 0
    assert ours["first_image_s"] > 0
    assert loop["cold_start_s"] is None
    for row in (ours, loop):
        assert row["rss_less_weights"] == row["peak_rss"] - row["weights_bytes"]
        assert row["weights_bytes"] == (toy().plan / WEIGHTS).stat().st_size
    assert ours["peak_rss"] < loop["peak_rss"]  # the one has loaded PyTorch, the other must not have
    files = sum(p.stat().st_size for p in toy().plan.iterdir() if p.name != "manifest.json")
    assert ours["plan_bytes"] == files


def test_the_limit_is_measured_for_every_type_that_is_multiplied_in(found: dict[str, Any]) -> None:
    limits = {row["dtype"]: row for row in rows(found, "limit")}
    assert set(limits) == {"float32", "bfloat16"}
    for row in limits.values():
        assert 0 < row["gemm_gflops"] <= row["gemm_gflops_best"]
        assert row["memory_gbs"] > 0
        assert row["threads"] == 1
    assert [row["stage"] for row in rows(found, "roofline")] == [*STAGES, "image"]


def test_settings_say_what_was_measured_and_tables_answer_the_questions(found: dict[str, Any]) -> None:
    settings = found["settings"]
    assert (settings["threads"], settings["batch"], settings["runs"], settings["warmup"]) == (1, [1, 2], 3, 1)
    assert settings["random_weights"] is True
    assert settings["model"]["width"] == 32
    assert settings["backends"]["ort-cpu"]["threads"] == 1
    assert found["benchmark"] == "latency"
    for heading in (
        "How long",
        "Where does it go",
        "further seed",
        "starting and memory",
        "computed from the counts",
    ):
        assert heading in found["stdout"]


def test_the_runtime_alone_is_measured_without_pytorch() -> None:
    code = (
        "import sys; from benchmarks.harness.workload import first_image; "
        f"first_image({str(toy().plan)!r}, 'ort-cpu', 1, 2.0); "
        "print(*[name for name in ('torch', 'onnx', 'car_export') if name in sys.modules])"
    )
    assert run_python("-c", code).split() == []


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    # Every round is ten times as slow as the one before; within a round the second takes twice the first.
    median, p10, p90 = ratio([1, 10, 100], [2, 20, 200])
    assert (median, p10, p90) == (2, 2, 2)
    assert ratio([1, 1, 1], [1, 2, 9])[0] == 2


def test_the_limit_of_a_stage_is_the_slower_of_products_and_memory() -> None:
    counts = count_image(toy().plan)
    limits = Limits(1, [counts], ["fp32"], "cpu")
    size = {_size(p) for stage in counts.stages for p in stage.count.gemms}
    assert len(limits.rates["fp32"]) == len(size) + 1  # and the best
    stage = counts.stages[2]
    limits.memory = 1e3  # nothing is slower than this memory
    c = stage.count
    found = limits.stage(stage, "fp32")
    assert found["bound"] == "memory"
    assert found["limit_s"] == pytest.approx((4 * (c.weight_elements + c.kv_read + c.kv_written) + c.io_bytes) / 1e3)
    limits.memory = 1e30
    found = limits.stage(stage, "fp32")
    assert found["bound"] == "compute"
    assert found["limit_s"] == pytest.approx(
        sum(p.flops / 1e9 / limits.rates["fp32"]["×".join(map(str, _size(p)))] for p in c.gemms)
    )


def test_an_int8_plan_is_made_once_and_measured_alongside_its_float32_one(tmp_path: Path) -> None:
    flags = (
        f"--plan {toy().plan} --cache {tmp_path} --backends ort-cpu --int8 --runs 2 --warmup 0 --threads 1".split()
    )
    out, log = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(log):
        assert latency.main(flags) == latency.main(flags) == 0, log.getvalue()
    assert log.getvalue().count("making tiny-") == 1
    found = json.loads(out.getvalue().splitlines()[-1])
    table = {row["candidate"]: row for row in rows(found, "end_to_end")}
    assert {name: row["precision"] for name, row in table.items()} == {"ort-cpu": "fp32", "ort-cpu, int8": "int8"}
    assert 0 < table["ort-cpu, int8"]["tokens_equal"] <= 1
    weights = {row["candidate"]: row["weights_bytes"] for row in rows(found, "start")}
    assert weights["ort-cpu, int8"] < weights["ort-cpu"]
    assert {row["dtype"] for row in rows(found, "limit")} == {"float32", "int8"}
    assert set(found["settings"]["backends"]) == {"ort-cpu", "ort-cpu, int8"}


def test_attention_of_an_int8_plan_is_held_to_the_other_type() -> None:
    counts = count_image(toy().plan)
    limits = Limits(1, [counts], ["int8", "fp32"], "cpu")
    stage = next(s for s in counts.stages if s.name == "scale_2")
    kinds = {p.kind for p in stage.count.gemms}
    assert {"weight", "activation"} <= kinds

    def seconds(precision: str, *kinds: str) -> float:
        chosen = [p for p in stage.count.gemms if p.kind in kinds]
        rates = limits.rates[precision]
        return sum(p.flops / 1e9 / rates["×".join(map(str, _size(p)))] for p in chosen)

    expected = seconds("int8", "weight", "conv") + seconds("fp32", "activation")
    assert limits.gemm_seconds(stage, "int8", "fp32") == pytest.approx(expected)
    limits.memory = 1e3
    c = stage.count
    moved = c.weight_elements + 4 * (c.kv_read + c.kv_written) + c.io_bytes
    assert limits.stage(stage, "int8", "fp32")["limit_s"] == pytest.approx(moved / 1e3)


@pytest.mark.parametrize(
    ("flags", "remedy"),
    [
        ("--int8 --device cuda", "leave out --device cuda"),
        ("--runs 0", "give at least 1"),
        ("--batch 0", "give e.g. 1,4"),
        ("--threads 0", "give 1…1024"),
        ("--depth 2", "give one, e.g. --model d16"),
        ("--model d16 --depth 1", "needs at least 2"),
        ("--checkpoint runs/car", "name the plan"),
        ("--backends ort-gpu", "use ort-cpu"),
        ("--backends auto", "leave --backends out"),
        ("--backends ort-cpu --device cuda", "add --device cpu"),
        ("--model d17", "invalid choice"),
        ("--model d16 --plan d16.plan", "not allowed with"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_with_a_remedy(
    flags: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        latency.main(flags.split())
    assert stop.value.code == 2
    assert remedy in capsys.readouterr().err


def test_a_plan_or_checkpoint_that_cannot_be_used_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert latency.main(["--plan", str(tmp_path / "no.plan")]) == 2
    assert latency.main(["--plan", str(toy().plan), "--checkpoint", str(tmp_path / "none")]) == 2
    assert latency.main(["--plan", str(toy().plan), "-o", str(tmp_path / "no" / "folder.jsonl")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("benchmarks.latency: error: ") for line in lines)


def test_a_plan_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    run = checkpoint.save(small_model(), tmp_path / "run")
    plan = tmp_path / "other.plan"
    plan.mkdir()
    for file in toy().plan.iterdir():
        (plan / file.name).symlink_to(file)
    text = (toy().plan / "manifest.json").read_text(encoding="utf-8")
    manifest = json.loads(text)
    manifest["provenance"]["sha256 var.safetensors"] = "0" * 64
    (plan / "manifest.json").unlink()
    (plan / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(BenchmarkError, match=r"was not exported from .*; give the checkpoint"):
        workload.existing(plan, run)


def test_a_cut_model_keeps_its_width_and_a_plan_is_known_by_what_made_it() -> None:
    cut = workload.Source(model="d16", depth=2).config()
    assert cut.var is not None
    assert (cut.var.depth, cut.var.C, cut.var.H) == (2, 1024, 16)
    d16 = workload.MODELS["d16"]
    assert workload._key(cut) != workload._key(d16)
    assert workload._key(d16) == workload._key(workload.published(16))
    assert toy().plan.name.startswith("tiny-depth2-fp32-b1.2-")
    control = workload.draw_control(64)
    assert control.shape == (64, 64, 3)
    assert len(np.unique(control)) == 3

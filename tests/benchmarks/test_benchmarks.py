"""The benchmarks' own instruments: they measure what they say, and say where."""

from __future__ import annotations

import argparse
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import scaling
from benchmarks.harness.cli import run_command
from benchmarks.harness.machine import (
    BenchmarkError,
    emit,
    gemm_rate,
    in_subprocess,
    interleaved,
    machine,
    markdown_table,
    memory_rate,
    peak_rss,
    record,
    timed,
)
from car_runtime.errors import RunError
from car_train import checkpoint
from car_train.config import ModelConfig, VQVAEConfig
from car_train.model import Model
from car_train.training.stages import TransformerStage

CANDIDATES = """
def held(megabytes):
    print("not the result")
    return len(bytearray(b"x") * (megabytes << 20)) >> 20

def failing():
    raise ValueError("on purpose")
"""


def test_the_machine_is_described_in_json(monkeypatch: pytest.MonkeyPatch) -> None:
    pets = Path("/").joinpath("home", "someone", "pets")
    monkeypatch.setattr("sys.argv", ["program.py", "--data", str(pets), "-o", "docs/x.json"])
    found = json.loads(json.dumps(machine(), allow_nan=False))
    assert found["cpu"]
    assert found["cores"] >= 1
    assert found["ram"] > 1 << 28
    assert found["numpy"].count(".") >= 1
    assert "someone" not in found["command"]
    assert "--data pets -o docs/x.json" in found["command"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the instruments take for the time; a candidate adds what it takes."""
    now = [0.0]
    monkeypatch.setattr("benchmarks.harness.machine.time.perf_counter", lambda: now[0])
    return now


def test_times_are_those_of_the_calls_after_the_warm_up(clock: list[float]) -> None:
    calls = iter([50.0, 1.0, 3.0, 2.0])

    def take() -> None:
        clock[0] += next(calls)

    found = timed(take, warmup=1, runs=3)
    assert (found["min"], found["p50"], found["runs"]) == (1, 2, 3)
    assert 2 < found["p95"] <= 3
    assert not list(calls)


def test_candidates_take_turns_and_each_begins_a_round() -> None:
    order: list[str] = []
    found = interleaved({name: lambda name=name: order.append(name) for name in "abc"}, warmup=1, runs=2)
    assert "".join(order) == "abc" + "bca" + "cab"
    assert found["a"]["ratio"] == found["a"]["ratio_p10"] == 1


def test_a_ratio_is_taken_within_a_round(clock: list[float]) -> None:
    # A machine that is ten times slower in its second round; b takes twice a's time in both.
    slow = {"a": iter([1.0, 10.0]), "b": iter([2.0, 20.0])}

    def take(name: str) -> None:
        clock[0] += next(slow[name])

    found = interleaved({"a": lambda: take("a"), "b": lambda: take("b")}, warmup=0, runs=2)
    assert (found["b"]["ratio"], found["b"]["ratio_p10"], found["b"]["ratio_p90"]) == (2, 2, 2)
    assert found["b"]["p50"] == 11


def test_memory_of_a_candidate_is_measured_apart_from_what_this_process_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "candidates.py").write_text(CANDIDATES)
    monkeypatch.syspath_prepend(str(tmp_path))
    ballast = bytearray(b"x") * (200 << 20)
    assert peak_rss() > len(ballast)
    found = in_subprocess("candidates:held", 64)
    assert found["result"] == 64
    assert found["peak_rss"] < 190 << 20
    assert 60 << 20 < found["peak_rss"] - found["rss_before"] < 90 << 20
    with pytest.raises(BenchmarkError, match=r"candidates:failing failed .* \(ValueError: on purpose\)"):
        in_subprocess("candidates:failing")


def test_rates_are_of_the_order_of_a_processors() -> None:
    rates = gemm_rate("float32", threads=1, shapes=[(256, 256, 256)], runs=3)
    assert set(rates) == {"256×256×256", "best"}
    assert 0.1 < rates["best"] < 1e5
    assert 0.1 < memory_rate(threads=1, size=1 << 24, runs=2) < 1e5
    assert gemm_rate("int8", threads=1, shapes=[(64, 32, 48)], runs=2)["best"] > 0
    with pytest.raises(BenchmarkError, match="no data type 'int7'"):
        gemm_rate("int7")


def test_a_result_is_one_line_that_says_where_it_comes_from() -> None:
    file = io.StringIO()
    emit(record("latency", {"batch": 1}, [{"name": "ours", "p50": 0.5}]), file)
    (line,) = file.getvalue().splitlines()
    found = json.loads(line)
    assert found["benchmark"] == "latency"
    assert found["results"] == [{"name": "ours", "p50": 0.5}]
    assert found["machine"]["command"]
    with pytest.raises(BenchmarkError, match="is no JSON"):
        emit(record("latency", {}, [{"p50": math.nan}]), file)
    with pytest.raises(BenchmarkError, match="without machine"):
        emit({k: v for k, v in found.items() if k != "machine"}, file)


def test_a_table_is_markdown_with_numbers_to_the_right() -> None:
    rows = [{"name": "a|b", "parameters": 147456, "p50": 0.012345}, {"name": "c", "parameters": 8, "p50": 12345.6}]
    assert markdown_table(rows).splitlines() == [
        "| name | parameters |    p50 |",
        "| ---- | ---------: | -----: |",
        "| a\\|b |    147,456 | 0.0123 |",
        "| c    |          8 | 12,346 |",
    ]


# ---- Scaling ----


@pytest.fixture(scope="module")
def tokenizer_and_data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An untrained tokenizer of 16 pixels, and two classes of noise for it."""
    root = tmp_path_factory.mktemp("scaling")
    rng = np.random.default_rng(0)
    for name in ("bee", "cat"):
        (root / "data" / name).mkdir(parents=True)
        for i in range(30):
            noise = rng.integers(0, 255, (4, 4, 3), np.uint8)
            Image.fromarray(noise).resize((16, 16)).save(root / "data" / name / f"{name}{i}.png")
    torch.manual_seed(0)
    config = VQVAEConfig(
        sides=(1, 2, 4), vocab=32, latent_channels=8, channels=8, multipliers=(1, 2, 2), res_blocks=1
    )
    return checkpoint.save(Model(ModelConfig(vqvae=config)), root / "vqvae"), root / "data"


@pytest.fixture
def scale(tokenizer_and_data: tuple[Path, Path], tmp_path: Path) -> Callable[..., int]:
    """The command on three sizes, three steps of 8 pictures each."""
    vqvae, data = tokenizer_and_data
    common = ["--data", data, "--vqvae", vqvae, "--runs", tmp_path / "runs", "--token-root", tmp_path / "tokens"]
    sizes = ["--depths", "1,2,4", "--width-per-depth", "16", "--tokens", 3 * 8 * 21, "--batch", "8"]
    quick = ["--warmup", "1", "--threads", "1"]

    def command(*flags: object) -> int:
        return scaling.main([str(a) for a in [*common, *sizes, *quick, "-o", tmp_path / "scaling.json", *flags]])

    return command


def test_scaling_trains_every_size_on_the_same_batches_and_fits_lines(
    scale: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[int, list[object]] = {}
    loss = TransformerStage.loss

    def spy(self: TransformerStage, batch: dict[str, torch.Tensor]) -> object:
        if self.trainable.training:
            seen.setdefault(self.car.base.config.depth, []).append((batch["tokens"].tolist(), batch["drop"].tolist()))
        return loss(self, batch)

    monkeypatch.setattr(TransformerStage, "loss", spy)
    assert scale("--plot", tmp_path / "scaling.png") == 0
    assert set(seen) == {1, 2, 4}
    assert len(seen[1]) == 3
    assert seen[1] == seen[2] == seen[4]

    found = json.loads((tmp_path / "scaling.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    rows = found["results"]
    assert [(r["depth"], r["width"]) for r in rows] == [(1, 16), (2, 32), (4, 64)]
    for row in rows:
        # 18·d·w² of matrices; biases: 6w AdaLN, 2w q and v, w proj, 5w MLP; d temperatures.
        depth, width = row["depth"], row["width"]
        assert row["block_parameters"] == depth * (18 * width**2 + 14 * width + depth)
        assert row["lr"] == pytest.approx(1e-3 * math.sqrt(192 / width))
        assert 0 < row["error_last"] <= 1
        assert row["loss"] == pytest.approx(math.log(32), rel=0.5)  # hardly trained: near chance
    assert set(found["fits"]) == {"loss", "loss_last", "error", "error_last"}
    assert found["settings"]["tokens"] == 3 * 8 * 21
    assert Image.open(tmp_path / "scaling.png").width > 1000


def test_scaling_does_not_train_a_size_twice(
    scale: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained: list[int] = []
    train = scaling.train

    def stop_at_the_last(plan: scaling.Plan, size: scaling.Size, folder: Path) -> None:
        trained.append(size.depth)
        if size.depth == 4:
            raise KeyboardInterrupt
        train(plan, size, folder)

    monkeypatch.setattr(scaling, "train", stop_at_the_last)
    assert scale() == 130
    assert json.loads((tmp_path / "scaling.json").read_text())["fits"] == {}
    (tmp_path / "scaling.json").unlink()  # the runs are still there
    assert scale() == 130
    assert scale() == 130
    assert trained == [1, 2, 4, 4, 4]
    assert scale("--lr", "1e-2") == 2
    assert "other settings (lr 0.001 → 0.01)" in capsys.readouterr().err


def test_a_power_law_is_found_exactly() -> None:
    sizes = [1e5, 3e5, 1e6, 7e6]
    fit = scaling.power_law(sizes, [(2e-8 * n) ** -0.2 for n in sizes])
    assert fit == pytest.approx({"alpha": -0.2, "beta": 2e-8, "pearson": -1.0})
    with pytest.raises(BenchmarkError, match="at least 3"):
        scaling.power_law(sizes[:2], [2.0, 1.0])
    with pytest.raises(BenchmarkError, match="positive"):
        scaling.power_law(sizes, [2.0, 1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tokens", "100"], "at least one step's, 168"),
        (["--plot", "x.gif"], "ends with .png"),
        (["--vqvae", "nowhere"], "no checkpoint there"),
        (["--data", "nowhere"], "is not a folder"),
        (["--width-per-depth", "0"], "at least 1"),
    ],
)
def test_scaling_refuses_what_it_cannot_do_in_one_line(
    scale: Callable[..., int], flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scale(*flags) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("scaling: error:")]
    assert words in line


@pytest.mark.parametrize(
    ("raised", "failed", "code", "says"),
    [
        (None, [], 0, ""),
        (None, ["memory grew"], 1, "benchmarks.x: failed: memory grew"),
        (BenchmarkError("no GPU; buy one"), [], 2, "benchmarks.x: error: no GPU; buy one"),
        (RunError("no memory; close something"), [], 2, "benchmarks.x: error: no memory; close something"),
        (KeyboardInterrupt(), [], 130, "benchmarks.x: interrupted; nothing was written"),
    ],
)
def test_a_command_writes_what_it_measured_and_its_exit_code_says_how_it_ended(
    raised: BaseException | None,
    failed: list[str],
    code: int,
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text("an earlier line\n", encoding="utf-8")

    def measure(args: argparse.Namespace, log: Callable[[str], None]) -> dict[str, Any]:
        log("begun")
        if raised is not None:
            raise raised
        return record("x", {}, [{"p50": 1.5}])

    args = argparse.Namespace(output=file)
    assert run_command("benchmarks.x", args, measure, lambda found: ["a table"], lambda found: failed) == code
    out, err = capsys.readouterr()
    begun, *rest = err.splitlines()
    assert begun.endswith(" s] begun")
    assert rest == ([says] if says else [])
    written = file.read_text(encoding="utf-8").splitlines()
    if raised is not None:
        assert (out, written) == ("", ["an earlier line"])
        return
    assert out == f"\na table\n\n{written[1]}\n"
    assert json.loads(written[1])["results"] == [{"p50": 1.5}]


def test_a_command_that_cannot_write_says_so_before_it_measures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(args: argparse.Namespace, log: Callable[[str], None]) -> dict[str, Any]:
        raise AssertionError("measured")

    args = argparse.Namespace(output=tmp_path / "no" / "folder.jsonl")
    assert run_command("benchmarks.x", args, measure, lambda found: []) == 2
    assert "folder.jsonl" in capsys.readouterr().err

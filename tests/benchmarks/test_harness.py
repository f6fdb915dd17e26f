"""The benchmarks' own instruments: they measure what they say, and say where."""

from __future__ import annotations

import argparse
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.analysis.limits import gemm_rate, memory_rate
from benchmarks.harness.cli import run_command
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.machine import machine
from benchmarks.harness.measure import in_subprocess, interleaved, peak_rss, timed
from benchmarks.harness.records import emit, record
from benchmarks.harness.tables import markdown_table, table
from car_runtime.errors import RunError

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
    monkeypatch.setattr("benchmarks.harness.measure.time.perf_counter", lambda: now[0])
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
    with pytest.raises(BenchmarkError, match=r"candidates:failing failed in .* \(ValueError: on purpose\)"):
        in_subprocess("candidates:failing")


def test_rates_are_of_the_order_of_a_processors() -> None:
    rates = gemm_rate("float32", threads=1, shapes=[(256, 256, 256)], runs=3)
    assert set(rates) == {"256×256×256", "best"}
    assert 0.1 < rates["best"] < 1e5
    assert 0.1 < memory_rate(threads=1, size=1 << 24, runs=2) < 1e5
    assert gemm_rate("int8", threads=1, shapes=[(64, 32, 48)], runs=2)["best"] > 0
    with pytest.raises(BenchmarkError, match="no data type 'int7'"):
        gemm_rate("int7", threads=1, shapes=[])


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


@pytest.mark.parametrize(
    ("raised", "code", "says"),
    [
        (None, 0, ""),
        (BenchmarkError("no GPU; buy one"), 2, "benchmarks.x: error: no GPU; buy one"),
        (RunError("no memory; close something"), 2, "benchmarks.x: error: no memory; close something"),
        (KeyboardInterrupt(), 130, "benchmarks.x: interrupted; nothing was written"),
    ],
)
def test_a_command_writes_what_it_measured_and_its_exit_code_says_how_it_ended(
    raised: BaseException | None,
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
    assert run_command("benchmarks.x", args, measure, lambda found: ["a table"]) == code
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


def test_columns_are_named_shown_as_asked_and_left_out_where_nothing_is_known() -> None:
    rows = [{"a": 0.5, "b": None, "c": None}, {"a": 0.25, "b": 2, "c": None}]
    shown = table(rows, {"a": ("half of it", lambda value: value / 2), "b": "B", "c": "C"})
    assert shown.splitlines() == [
        "| half of it |   B |",
        "| ---------: | --: |",
        "|       0.25 |     |",
        "|      0.125 |   2 |",
    ]

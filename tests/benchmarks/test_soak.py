"""The soak run: a plan that keeps its memory and its pictures passes, and each kind of fault is found."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

from benchmarks import soak
from benchmarks.harness.machine import BenchmarkError
from benchmarks.soak import Call, Part
from fixtures.toy_plan import toy

pytestmark = pytest.mark.skipif(not soak.PROC.is_dir(), reason="memory is told in Linux's /proc")

QUICK = ["--backend", "ort-cpu", "--cpu-threads", "1", "--images", "20", "--threads", "3", "--opens", "4"]


def run(*flags: str) -> int:
    return soak.main([*QUICK, "--plan", str(toy().plan), *flags])


def part(*resident: int) -> Part:
    """One picture between two samples."""
    return Part("one thread", samples=[(i + 1, rss) for i, rss in enumerate(resident)])


def test_memory_that_grows_after_the_first_third_does_not_pass() -> None:
    assert part(50, 70, 90, *[100] * 6).memory_row(0.01)["passed"]
    assert part(50, 70, 90, *[1000] * 3, *[1009] * 3).memory_row(0.01)["passed"]
    row = part(50, 70, 90, *[100] * 3, *[102] * 3).memory_row(0.01)
    assert (row["passed"], row["rss_first"], row["rss_last"], row["samples"]) == (False, 100, 102, 6)
    assert row["growth"] == pytest.approx(0.02)
    assert row["bytes_per_picture"] == pytest.approx(2 / 3)
    assert part(50, 70, 90, *[100] * 3, *[80] * 3).memory_row(0.01)["passed"]  # giving back is no fault
    assert part(0, 0, 0, 100, 100, 300, 100, 100, 100).memory_row(0.01)["passed"]  # nor is a single peak
    with pytest.raises(BenchmarkError, match="give --images 20 or more"):
        part(100).memory_row(0.01)


def test_what_an_opening_leaves_is_held_against_what_an_open_plan_holds() -> None:
    def row(*closed: int, left: tuple[int, int] = (5, 3)) -> dict[str, Any]:
        return soak.reopening_row(part(*closed), [rss + 1000 for rss in closed], [(5, 3)] * 8 + [left], 0.01)

    noisy = row(40, 80, 60, 50, 70, 60, 60, 50, 70)
    assert (noisy["passed"], noisy["rss_held"], noisy["left"]) == (True, 1000, 0)
    slow = row(*(60 + 20 * i for i in range(9)))
    assert not slow["passed"]
    assert (slow["bytes_per_opening"], slow["left"]) == (20, 0.02)
    assert row(*(60 + 9 * i for i in range(9)))["passed"]
    assert not row(*[60] * 9, left=(6, 3))["passed"]
    assert not row(*[60] * 9, left=(5, 4))["passed"]


def test_an_allocator_that_goes_up_and_down_hides_no_leak_and_is_none() -> None:
    # As with several heaps on the shipped plan: a quarter of what an open plan holds, over ten openings or so.
    generator, held = np.random.default_rng(0), 1000
    noise = np.convolve(generator.normal(0, 0.25 * held, 209), np.ones(10) / 10**0.5, "valid").astype(int)

    def passes(leak: int) -> bool:
        closed = [10_000 + int(n) + leak * i for i, n in enumerate(noise)]
        row = soak.reopening_row(part(*closed), [rss + held for rss in closed], [(5, 3)] * 200, 0.01)
        return bool(row["passed"])

    assert [passes(leak) for leak in (0, 5, 15, 20)] == [True, True, False, False]


def test_calls_are_the_same_every_time_and_vary_in_everything() -> None:
    first, again = (list(itertools.islice(soak.calls(5), 200)) for _ in range(2))
    assert first == again
    assert {call.n for call in first} == {1, 2, 3, 4}
    assert {call.label for call in first} == {None, 0, 1, 2, 3, 4}
    assert {call.cfg for call in first} == {None, 0.0}
    assert len({call.seed for call in first}) == 200
    assert {call.control for call in first} == set(range(soak.CONTROLS))


def test_a_plan_passes_and_its_result_says_what_was_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.jsonl"
    # So few pictures are no more than a warm-up, and memory is all of pytest's here: a tenth of that is no leak.
    assert run("--tolerance", "0.1", "-o", str(file)) == 0
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["benchmark"] == "soak"
    assert found["settings"]["backend"] == "ort-cpu"
    rows = {(r["question"], r.get("part")): r for r in found["results"] if r["question"] != "sample"}
    parts = [("pictures", name) for name in (soak.ALONE, soak.TOGETHER, soak.REOPENING)]
    parts += [("memory", name) for name in (soak.ALONE, soak.TOGETHER)]
    assert set(rows) == {*parts, ("reopening", None)}
    assert rows["reopening", None]["rss_held"] > 1 << 20
    assert all(row["passed"] for row in rows.values())
    threads = rows["pictures", soak.TOGETHER]
    assert threads["calls"] >= 3 * soak.ROUNDS
    assert threads["different"] == 0
    assert rows["pictures", soak.REOPENING]["calls"] == 4
    samples = [r for r in found["results"] if r["question"] == "sample" and r["part"] == soak.ALONE]
    assert samples[-1]["pictures"] >= 20
    assert all(r["rss"] > 1 << 20 for r in samples)
    out = capsys.readouterr().out
    for heading in ("Does memory stay", "same picture every time", "left when a plan is closed"):
        assert heading in out


def patched(monkeypatch: pytest.MonkeyPatch, fault: Callable[[], str]) -> None:
    """Every call does something besides, and its digest gets an ending; all in this process."""
    make = soak.make

    def faulty(plan: Any, controls: Any, call: Call) -> str:
        return make(plan, controls, call) + fault()

    monkeypatch.setattr(soak, "make", faulty)
    monkeypatch.setattr(soak, "one_heap", lambda: None)
    monkeypatch.setattr(soak, "in_subprocess", lambda _, *args: {"result": soak.openings(*args)})


def test_a_leak_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    kept: list[bytes] = []

    def leak() -> str:
        kept.append(b"x" * (20 << 20))
        return ""

    patched(monkeypatch, leak)
    assert run() == 1
    assert "failed: memory grew in part 'one thread'" in capsys.readouterr().err


def test_a_picture_that_changes_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    number = itertools.count()
    patched(monkeypatch, lambda: str(next(number)))
    assert run("--tolerance", "0.9") == 1
    err = capsys.readouterr().err
    for name in (soak.ALONE, soak.TOGETHER, soak.REOPENING):
        assert f"gave another picture in part {name!r}" in err


def test_a_picture_that_other_threads_disturb_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    patched(monkeypatch, lambda: "" if threading.current_thread() is threading.main_thread() else "disturbed")
    assert run("--tolerance", "0.9") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "failed" in line]
    assert "gave another picture in part 'threads'" in line


def test_what_a_closed_plan_leaves_open_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    left: list[IO[str]] = []

    def forget() -> str:
        left.append((tmp_path / "left").open("w"))
        return ""

    patched(monkeypatch, forget)
    assert run("--tolerance", "0.9") == 1
    assert "left after closing: descriptors" in capsys.readouterr().err
    for file in left:
        file.close()


@pytest.mark.parametrize(
    ("flags", "remedy"),
    [
        ("--images 19", "give at least 20 and 3"),
        ("--opens 2", "give at least 20 and 3"),
        ("--threads 0", "give 1…256"),
        ("--tolerance 1", "give a share"),
        ("--backend nothing", "there is no backend"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_with_a_remedy(
    flags: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        soak.main(flags.split())
    assert stop.value.code == 2
    assert remedy in capsys.readouterr().err


def test_what_cannot_be_run_is_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert soak.main(["--plan", str(tmp_path / "no.plan")]) == 2
    monkeypatch.setattr(soak, "PROC", tmp_path)
    assert run() == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("benchmarks.soak: error: ")
    assert second.endswith("run this on Linux, which tells a process's memory in it")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ort-cpu", "openvino"])
def test_five_hundred_pictures_of_the_shipped_plan_leave_memory_where_it_was(backend: str) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak", "--backend", backend], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr

"""The session on a GPU, as far as a machine without one can run it: its lines, its limits, its timing of tiles."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_session
from benchmarks.gpu_session import Step, session, steps, tiles
from car_runtime.cli import verify
from car_runtime.system.gpu import has_driver
from fixtures.kernel_device import KernelDevice


def python(name: str, code: str) -> Step:
    return Step(name, (sys.executable, "-c", code))


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_step_leaves_a_line_whatever_the_others_do(tmp_path: Path) -> None:
    output = tmp_path / "session.jsonl"
    todo = [
        python("good", "print('{\"a\": 1}')"),
        python("fault", "import os; os.abort()"),
        python("refused", "import sys; sys.exit('no GPU; use one')"),
        python("slow", "import time; time.sleep(60)"),
        python("wordy", "print('a table'); print('{\"b\": 2}')"),
    ]
    assert session(todo, output, 100, 3) == 3
    good, fault, refused, slow, wordy = lines(output)
    assert wordy["result"] == {"b": 2}
    assert good["result"] == {"a": 1}
    assert "error" not in good
    assert fault["error"] == "it said nothing"
    assert refused["error"] == "no GPU; use one"
    assert slow["error"] == "not done after 3 s"
    assert session([python("late", "")], output, 0, 3) == 1
    assert lines(output)[-1] == {"step": "late", "at": 0.0, "error": "no time was left"}


def test_the_most_wanted_comes_first() -> None:
    names = [step.name for step in steps([Path("a/tiny.plan"), Path("d16.plan")], ("cuda", "ort-cuda"), 5)]
    assert names[:4] == ["machine", "load", "kernels", "verify tiny.plan cuda"]
    assert names[-4:] == ["verify d16.plan ort-cuda", "latency d16.plan", "tiles", "controlnet"]


@pytest.mark.parametrize("module", ["latency", "controlnet"])
def test_the_comparisons_are_commands_that_exist(module: str) -> None:
    (command,) = [s.command for s in steps([Path("d16.plan")], ("cuda", "ort-cuda"), 5) if s.name.startswith(module)]
    arguments = list(command[command.index(f"benchmarks.{module}") + 1 :])
    arguments = [str(Path(__file__)) if value == "d16.plan" else value for value in arguments]
    options = import_module(f"benchmarks.{module}").parse_args(arguments)
    assert (options.device, options.runs) == ("cuda", 5)


def test_the_plans_are_verified_by_a_command_that_exists() -> None:
    chosen = steps([Path("d16.plan")], ("cuda", "ort-cuda"), 5)
    for command, backend in zip(
        (s.command for s in chosen if s.name.startswith("verify")), ("cuda", "ort-cuda"), strict=True
    ):
        assert command[1:4] == ("-m", "car_runtime", "verify")
        options = verify.parse_args(command[4:])
        assert (options.plan, options.backend, options.batch) == ("d16.plan", backend, (1, 4))
        assert (options.runs, options.json) == (5, True)


@pytest.mark.skipif(has_driver(), reason="this machine has an NVIDIA driver")
def test_without_a_gpu_every_step_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "session.jsonl"
    monkeypatch.chdir(Path(__file__).parents[2])
    assert gpu_session.main(["-o", str(output)]) == 1
    machine, load, checked, timed = lines(output)
    assert machine["result"]["gpu"]["usable"] is False  # type: ignore[index]
    for step in (load, timed):
        assert "there is no NVIDIA driver on this machine" in str(step["error"])
    outcomes: Any = checked["result"]
    assert (outcomes["passed"], outcomes["failed"]) == (0, [])
    assert len(outcomes["skipped"]) > 100


def test_every_tile_of_every_product_is_timed() -> None:
    found = tiles(KernelDevice(), width=32, vocab=48, rows=(2, 3), launches=1)
    assert [(one["kernel"], one["M"]) for one in found] == [(k, m) for k in ("gelu", "gate", "head") for m in (2, 3)]
    for one in found:
        assert set(one["us"]) == {f"{one['kernel']}.{size}" for size in "sml"}
        assert min(one["us"].values()) > 0

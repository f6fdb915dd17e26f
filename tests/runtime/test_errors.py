"""What a file says reaches a terminal as text, and never as long as it likes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from car_runtime.cli.main import main
from car_runtime.errors import LINE, PlanError, error_line, one_line, printable
from car_runtime.format.manifest import MANIFEST
from fixtures.runtime_plan import build_plan

ESCAPES = "x\x1b]0;title\x07\x1b[2J\nsecond\x7f\x9b1m\u202e"


def test_what_a_terminal_obeys_is_escaped() -> None:
    assert printable("a\x1b[2J\u202e\ud800\n\x9b") == "a\\x1b[2J\\u202e\\ud800\\n\\x9b"
    for text in ("", "猫 – naïve …", "👩\u200d🚒", "a\u00a0b"):
        assert printable(text) == text


def test_an_error_is_one_line() -> None:
    assert one_line(PlanError("a\n  b\x1b[2J; c")) == "a b\\x1b[2J; c"
    assert one_line(KeyError()) == "KeyError"


def test_a_long_error_keeps_its_remedy() -> None:
    assert error_line(PlanError("a" * LINE)) == "a" * LINE
    long = error_line(PlanError("a" * 10_000 + "; export the plan again"))
    assert len(long) == LINE
    assert long.endswith("a; export the plan again")
    assert len(error_line(PlanError("a" * 10_000))) == LINE


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_plan(tmp_path_factory.mktemp("errors") / "tiny.plan")


@pytest.mark.parametrize("command", ["run", "classes", "class", "doctor", "verify"])
def test_names_from_a_plan_are_escaped_wherever_they_are_printed(
    built: Path, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Path(shutil.copytree(built, tmp_path / "x.plan"))
    whole = json.loads((plan / MANIFEST).read_text())
    whole["name"] = ESCAPES
    whole["model"]["class_names"] = [ESCAPES, "b", "c"]
    (plan / MANIFEST).write_text(json.dumps(whole))
    run = ["-e", str(plan), "-o", str(tmp_path / "out.png")]
    arguments = {"run": run, "class": [*run, "--class", "x"], "classes": ["-e", str(plan), "--list-classes"]}
    main(arguments.get(command, [command, str(plan)]))
    out, err = capsys.readouterr()
    assert not any(c in "\x1b\x07\x7f\x9b\u202e" for c in out + err)
    assert all(len(line) <= 300 for line in err.splitlines() if " error: " in line)


@pytest.mark.parametrize("value", ["\ud800", "a\udfffb"])
def test_half_a_character_is_no_name(
    built: Path, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Path(shutil.copytree(built, tmp_path / "x.plan"))
    whole = json.loads((plan / MANIFEST).read_text())
    whole["name"] = value
    (plan / MANIFEST).write_text(json.dumps(whole))
    assert main(["-e", str(plan), "--list-classes"]) == 2
    assert "half a character" in capsys.readouterr().err

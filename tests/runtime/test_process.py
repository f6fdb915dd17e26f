"""What a run does to the process and the machine around it: streams that are closed, forks, and the home folder."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from car_runtime import RequestError, open_plan
from car_runtime.plan import Plan
from fixtures.runtime_plan import build_plan

ROOT = Path(__file__).parents[2]
CONTROL = np.zeros((40, 40, 3), np.uint8)
CONTROL[8:33, [8, 32]] = CONTROL[[8, 32], 8:33] = 255
CAR_RUN = f"{sys.executable} -m car_runtime -e car.plan --threads 1 --control"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a plan, a control image, and an empty home."""
    build_plan(tmp_path / "car.plan")
    Image.fromarray(CONTROL).save(tmp_path / "edges.png")
    (tmp_path / "home").mkdir()
    return tmp_path


def shell(command: str, here: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    path = os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))
    environment = {**kept, "PYTHONPATH": path, "HOME": str(here / "home"), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(["sh", "-c", command], cwd=here, env=environment, capture_output=True, text=True)


# Streams.


@pytest.mark.parametrize(
    ("redirection", "out"), [("2>&-", "out.png\n"), (">&-", ""), (">&- 2>&-", ""), ("<&- 2>&-", "out.png\n")]
)
def test_a_closed_stream_costs_no_image_and_lands_in_no_other(here: Path, redirection: str, out: str) -> None:
    done = shell(f"{CAR_RUN} edges.png {redirection}", here)
    assert done.returncode == 0
    assert done.stdout == out
    assert done.stderr.count("\n") == (0 if "2>&-" in redirection else 1)
    Image.open(here / "out.png").load()


def test_a_control_from_a_closed_stdin_is_said_in_one_line(here: Path) -> None:
    for given in ("--control", "--photo"):
        done = shell(f"{sys.executable} -m car_runtime -e car.plan {given} - <&-", here)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == (
            "car-run: error: the image is to come from stdin, which is closed; pipe it in, or name a file\n"
        )


def test_an_error_with_stderr_closed_is_a_code_and_nothing_on_stdout(here: Path) -> None:
    done = shell(f"{CAR_RUN} no.png 2>&-", here)
    assert (done.returncode, done.stdout) == (2, "")


def test_messages_that_nobody_reads_stop_nothing(here: Path) -> None:
    done = shell(f"{{ {CAR_RUN} edges.png; echo $? >code; }} 2>&1 >/dev/null | true; sleep 0", here)
    assert done.stderr == ""
    assert (here / "code").read_text() == "0\n"
    Image.open(here / "out.png").load()


@pytest.mark.parametrize(
    "command",
    ["-m car_train sample no", f"{ROOT}/export/build_engines.py no -o no.plan"],
    ids=["car_train", "build_engines"],
)
def test_training_and_export_keep_their_streams_apart_too(here: Path, command: str) -> None:
    done = shell(f"{sys.executable} {command} 2>&-", here)
    assert (done.returncode, done.stdout) == (2, "")
    done = shell(f"{sys.executable} {command} >&-", here)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


# The home folder.


def test_nothing_is_left_in_the_home_folder(here: Path) -> None:
    assert shell(f"{CAR_RUN} edges.png --backend ort-cpu", here).returncode == 0
    assert list((here / "home").iterdir()) == []


@pytest.mark.parametrize(
    "module", ["car_runtime.backends.onnxruntime.session", "car_train.data.annotator_net", "car_export.verify"]
)
def test_telemetry_is_off_before_onnxruntime_is_imported_unless_the_user_has_set_it(here: Path, module: str) -> None:
    code = f"import os, importlib; importlib.import_module('{module}'); print(os.environ['ORT_DISABLE_TELEMETRY'])"
    assert shell(f'{sys.executable} -c "{code}"', here).stdout == "1\n"
    assert shell(f'{sys.executable} -c "{code}"', here, ORT_DISABLE_TELEMETRY="0").stdout == "0\n"


# Forks.


@pytest.fixture
def plan(here: Path) -> Iterator[Plan]:
    with open_plan(here / "car.plan", "ort-cpu", threads=2) as opened:
        yield opened


def in_a_child(work: str, plan: Plan) -> None:
    """Do something in a forked child, which then ends as a program does; it must, and with exit code 0."""
    child = os.fork()
    if not child:
        try:
            globals()[work](plan)
            del plan
            code = 0
        except BaseException:
            code = 1
        os._exit(code)
    until = time.monotonic() + 60
    while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < until:
        time.sleep(0.05)
    if not ended[0]:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert ended == (child, 0)


def close_it(plan: Plan) -> None:
    plan.close()
    plan.close()
    plan.forget()


def use_it(plan: Plan) -> None:
    for use in (lambda: plan.generate(CONTROL), lambda: plan.encode(CONTROL), lambda: next(plan.stream(CONTROL))):
        with pytest.raises(RequestError, match=r"opened in another process, .*; open it again here with open_plan"):
            use()


def open_it_again(plan: Plan) -> None:
    with open_plan(plan.path, "ort-cpu", threads=2) as mine:
        assert mine.generate(CONTROL, 0, seed=1).tokens.any()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("work", ["close_it", "use_it", "open_it_again"])
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_leaves_the_parents_plan_alone(plan: Plan, work: str) -> None:
    before = plan.generate(CONTROL, 0, seed=1).tokens
    in_a_child(work, plan)
    assert (plan.generate(CONTROL, 0, seed=1).tokens == before).all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_stream_does_not_go_on_in_a_forked_child_and_a_child_may_just_end(here: Path) -> None:
    code = """
import os, sys, car_runtime, numpy as np
plan = car_runtime.open_plan("car.plan", "ort-cpu", threads=2)
stream = plan.stream(np.zeros((40, 50, 3), np.uint8), 0)
next(stream)
if not os.fork():
    try:
        next(stream)
    except car_runtime.RequestError as error:
        sys.exit(0 if "another process" in str(error) else 3)
    sys.exit(4)
assert os.wait()[1] == 0
assert len(list(stream)) == 2
"""
    (here / "fork.py").write_text(code)
    done = shell(f"timeout 60 {sys.executable} fork.py", here)
    assert (done.returncode, done.stderr) == (0, "")

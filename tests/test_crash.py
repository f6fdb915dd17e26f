"""A process that dies at any change of a file leaves the old result or the new one, and the next start clears up."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from car_runtime.system import files as runtime_files
from car_train import files as train_files
from fixtures.runtime_plan import build_plan
from fixtures.small import small_model

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("cc")
pytestmark = pytest.mark.skipif(sys.platform != "linux" or COMPILER is None, reason="needs Linux and a C compiler")

FOLDER = """
import sys
from importlib import import_module
from pathlib import Path
files = import_module(sys.argv[3])
if sys.argv[2] == "set aside":
    files.exchange = lambda one, other: False
target = Path(sys.argv[1])
with files.one_writer(target), files.folder_aside(target) as aside:
    for name in "ab":
        (aside / name).write_text("new" + name)
"""
FILE = """
import sys
from pathlib import Path
from car_train import files
target = Path(sys.argv[1])
files.write_text(target, "new")
"""
IMAGES = """
import sys
from pathlib import Path
from car_runtime.system.files import write_atomically
target = Path(sys.argv[1])
write_atomically({target: b"new"})
"""


@pytest.fixture(scope="module")
def killer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that kills the process which it is loaded into."""
    library = tmp_path_factory.mktemp("killer") / "kill_at.so"
    assert COMPILER is not None
    source = Path(__file__).parent / "fixtures" / "kill_at.c"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-w", "-o", library, source, "-ldl"], check=True)
    return library


def environment(killer: Path, under: Path, at: int = 0) -> dict[str, str]:
    """For a process that dies at its change `at` under a folder."""
    env = {**os.environ, "LD_PRELOAD": str(killer), "KILL_UNDER": str(under), "KILL_AT": str(at)}
    return env | {"PYTHONPATH": f"{ROOT}:{ROOT / 'runtime'}:{ROOT / 'export'}"}


def run_killed(killer: Path, command: list[str], under: Path, at: int) -> tuple[int, int]:
    """Exit code, and with `at` 0 the number of changes that the process made under a folder."""
    count = under.parent / "count"
    env = environment(killer, under, at) | {"KILL_COUNT": str(count)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode, int(count.read_text()) if done.returncode == 0 else 0


def looked_at(killer: Path, command: list[str], under: Path, whole: Callable[[], bool]) -> int:
    """Stop at every change and look: files are then as SIGKILL would leave them. Returns the number of changes."""
    looks = 0
    env = environment(killer, under) | {"STOP_FOR": str(os.getpid())}
    nothing = subprocess.DEVNULL
    with subprocess.Popen(command, env=env, stdout=nothing, stderr=nothing) as process:
        try:
            while os.WIFSTOPPED(status := os.waitpid(process.pid, os.WUNTRACED)[1]):
                looks += 1
                assert whole(), f"neither the old nor the new result before change {looks}"
                process.send_signal(signal.SIGCONT)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            process.kill()
    assert process.returncode == 0
    return looks


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(".*"))


def campaign(
    killer: Path,
    command: list[str],
    under: Path,
    set_up: Callable[[], None],
    whole: Callable[[], bool],
    kills: int | None = None,
) -> int:
    """Kill at every change, look, run again and look again; returns the number of kills.

    With `kills` only at so many of them, after a look at each in a process that is stopped there.
    """
    set_up()
    if kills is None:
        code, changes = run_killed(killer, command, under, 0)
        assert code == 0
    else:
        changes = looked_at(killer, command, under, whole)
        assert whole()
    assert changes >= 2
    step, killed = 1 if kills is None else max(1, changes // kills), 0
    for at in range(1, changes + 1, step):
        set_up()
        code, _ = run_killed(killer, command, under, at)
        killed += code != 0
        assert whole(), f"neither the old nor the new result after change {at} of {changes}"
        assert run_killed(killer, command, under, 0)[0] == 0
        assert whole()
        assert hidden(under) == [], f"the start after change {at} left something"
    assert killed >= changes // step - 1, "runs differ in their changes"
    return killed


@pytest.mark.parametrize("module", ["car_train.files", "car_runtime.system.files"])
@pytest.mark.parametrize("how", ["exchange", "set aside"])
def test_a_folder_is_replaced_whole_wherever_the_process_dies(
    killer: Path, tmp_path: Path, how: str, module: str
) -> None:
    under = tmp_path / "under"
    target = under / "a.plan"

    def set_up() -> None:
        shutil.rmtree(under, ignore_errors=True)
        target.mkdir(parents=True)
        for name in "abc":
            (target / name).write_text("old" + name)

    def whole() -> bool:
        place = target
        if (
            how == "set aside" and not target.exists()
        ):  # put back by the next start, as a system without exchange has it
            (place,) = under.glob(".a.plan.car-*-old*")
        found = {path.name: path.read_text() for path in place.iterdir()}
        return found in ({n: "old" + n for n in "abc"}, {n: "new" + n for n in "ab"})

    command = [sys.executable, "-c", FOLDER, str(target), how, module]
    assert campaign(killer, command, under, set_up, whole) > 10


@pytest.mark.parametrize("program", [FILE, IMAGES], ids=["training", "runtime"])
def test_a_file_is_replaced_whole_wherever_the_process_dies(killer: Path, tmp_path: Path, program: str) -> None:
    under = tmp_path / "under"
    target = under / "out.png"

    def set_up() -> None:
        shutil.rmtree(under, ignore_errors=True)
        under.mkdir()
        target.write_text("old")

    campaign(
        killer,
        [sys.executable, "-c", program, str(target)],
        under,
        set_up,
        lambda: target.read_text() in ("old", "new"),
    )


@pytest.mark.parametrize("files", [train_files, runtime_files])
@pytest.mark.parametrize("exchanged", [True, False])
def test_a_link_to_a_folder_is_replaced_and_what_it_leads_to_stays(
    files: object, exchanged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchanged:
        monkeypatch.setattr(files, "exchange", lambda one, other: False)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "a").write_text("old")
    (tmp_path / "link").symlink_to("old")
    with files.folder_aside(tmp_path / "link") as aside:  # type: ignore[attr-defined]
        (aside / "a").write_text("new")
    assert (tmp_path / "link" / "a").read_text() == "new"
    assert (tmp_path / "old" / "a").read_text() == "old"
    assert hidden(tmp_path) == []


def test_what_was_set_aside_comes_back(tmp_path: Path) -> None:
    left = tmp_path / ".a.plan.car-999999999-old0123abcd"
    left.mkdir()
    (left / "manifest.json").write_text("{}")
    train_files.sweep(tmp_path)
    assert (tmp_path / "a.plan" / "manifest.json").read_text() == "{}"
    assert hidden(tmp_path) == []


def test_only_leftovers_of_dead_processes_are_swept(tmp_path: Path) -> None:
    mine = [f".x.car-{os.getpid()}-part0123abcd", ".x.part", ".x.car-1-other0123abcd", ".git", ".x.car-lock"]
    for name in [*mine, ".x.car-999999999-part0123abcd", ".y.car-999999999-part89abcdef"]:
        (tmp_path / name).write_text("")
    runtime_files.sweep(tmp_path)
    assert hidden(tmp_path) == sorted(mine)
    (tmp_path / ".x.car-999999999-part0123abcd").write_text("")
    train_files.sweep(tmp_path)
    assert hidden(tmp_path) == sorted(mine)


def test_a_second_writer_is_refused_and_the_first_named(tmp_path: Path) -> None:
    target = tmp_path / "a.plan"
    with (
        train_files.one_writer(target),
        pytest.raises(train_files.BusyError, match=rf"a\.plan is being written by process {os.getpid()}; wait"),
        train_files.one_writer(target),
    ):
        pass
    with train_files.one_writer(target):
        pass
    assert hidden(tmp_path) == []


def test_a_lock_holds_on_a_full_disk_and_names_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full does not do here: the lock is a file of its own. What writing to it raises does."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(train_files.os, "pwrite", full)
    target = tmp_path / "a.plan"
    with (
        train_files.one_writer(target),
        pytest.raises(train_files.BusyError, match=r"by process \(unknown\)"),
        train_files.one_writer(target),
    ):
        pass


HOLD = """
import sys, time
from pathlib import Path
from car_train import cli, files
def run(args):
    with files.one_writer(Path(args.output)), files.folder_aside(Path(args.output)) as aside:
        print(aside, flush=True)
        time.sleep(60)
cli.COMMANDS["data"][1].run = run
sys.exit(cli.main(["data", "emoji", "-o", sys.argv[1]]))
"""


def test_sigterm_clears_up(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLD, str(tmp_path / "set")]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert Path(process.stdout.readline().strip()).is_dir()
        assert len(hidden(tmp_path)) == 2, "the folder and the lock"
        process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=30)[1]
    assert process.returncode == 143
    assert "interrupted" in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


DRAW = """
import sys
from car_runtime.cli.main import main
plan, control, out = sys.argv[1:]
flags = ["-e", plan, "--control", control, "--threads", "1", "-n", "2", "-o", f"{out}/o.png"]
sys.exit(main([*flags, "--grid", "--tokens", f"{out}/t.npz", "--preview", f"{out}/steps"]))
"""
BATCH = """
import sys
from pathlib import Path
from car_runtime.cli.main import main
plan, control, out = sys.argv[1:]
jobs = Path(out).with_name("jobs.csv")
jobs.write_text(f"control,n\\n{control},1\\n{control},2\\n{control},1\\n")
sys.exit(main(["batch", str(jobs), "-e", plan, "-o", out, "--resume", "--threads", "1"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("program", "files"), [(DRAW, 10), (BATCH, 5)], ids=["car-run", "batch"])
def test_results_are_whole_wherever_a_command_dies(killer: Path, tmp_path: Path, program: str, files: int) -> None:
    """Every file under its own name can be read; a batch that goes on does what is missing."""
    plan, under = build_plan(tmp_path / "tiny.plan"), tmp_path / "under"
    control = ROOT / "examples/umbrella.png"

    def set_up() -> None:
        shutil.rmtree(under, ignore_errors=True)
        under.mkdir()

    def whole() -> bool:
        for path in under.rglob("[!.]*"):
            if path.suffix == ".png":
                with Image.open(path) as image:
                    image.load()
            elif path.suffix == ".npz":
                with np.load(path) as arrays:
                    assert arrays["tokens"].shape == (2, 21)
        return True

    command = [sys.executable, "-c", program, str(plan), str(control), str(under)]
    assert campaign(killer, command, under, set_up, whole) > 10
    assert sum(path.is_file() for path in under.rglob("*")) == files


TRAIN = """
import sys
from pathlib import Path
from car_train.cli import main
data, run = sys.argv[1:]
model = ["--patch-nums", "1,2", "--channels", "8", "--multipliers", "1,2", "--vocab", "16", "--batch", "2"]
steps = ["--steps", "3", "--save-every", "1", "--keep", "2", "--workers", "0", "--validate-every", "1000"]
resume = ["--resume"] if any(Path(run).glob("step-*")) else []
sys.exit(main(["vqvae", "--data", data, "-o", run, *model, *steps, *resume]))
"""


@pytest.mark.slow
def test_a_training_run_goes_on_wherever_it_dies(killer: Path, tmp_path: Path) -> None:
    from car_train import checkpoint

    under, data = tmp_path / "under", tmp_path / "data"
    for split, images in (("train", 8), ("val", 2)):
        (data / split / "one").mkdir(parents=True)
        for i in range(images):
            Image.new("RGB", (16, 16), (30 * i, 99, 0)).save(data / split / "one" / f"{i}.png")

    def set_up() -> None:
        shutil.rmtree(under, ignore_errors=True)
        under.mkdir()

    def whole() -> bool:
        for step in under.glob("step-*"):
            checkpoint.load(step)
            checkpoint.load_trainer(step)
        return True

    command = [sys.executable, "-c", TRAIN, str(data), str(under)]
    campaign(killer, command, under, set_up, whole, kills=12)
    assert sorted(step.name for step in under.glob("step-*"))[-1] == "step-0000003"


REMOVE = """
import sys
from pathlib import Path
from car_runtime.cli.main import main
from car_runtime.format.manifest import read_manifest
plan = sys.argv[1]
there = "other" in read_manifest(plan).model.branches
code = main(["plan", "remove-branch", plan, "other"])
sys.exit(code if there else code - 2)  # 2: it is gone
"""


@pytest.mark.slow
def test_a_plan_has_all_its_branches_or_one_less_wherever_a_change_dies(killer: Path, tmp_path: Path) -> None:
    from car_runtime.format.hashing import verify_files
    from car_runtime.format.manifest import read_manifest
    from fixtures.two_branches import two_branches

    source, under = two_branches(), tmp_path / "under"
    target = under / "a.plan"

    def set_up() -> None:
        shutil.rmtree(under, ignore_errors=True)
        shutil.copytree(source, target)

    def whole() -> bool:
        manifest = read_manifest(target)
        verify_files(target, manifest)
        return list(manifest.model.branches) in (["sketch"], ["sketch", "other"])

    campaign(killer, [sys.executable, "-c", REMOVE, str(target)], under, set_up, whole, kills=8)


@pytest.mark.slow
def test_an_export_is_whole_wherever_it_dies(killer: Path, tmp_path: Path) -> None:
    from car_runtime.format.hashing import verify_files
    from car_runtime.format.manifest import read_manifest
    from car_train import checkpoint

    under = tmp_path / "under"
    under.mkdir()
    target = under / "a.plan"
    saved = checkpoint.save(small_model(), tmp_path / "run" / "step-0000001")
    command = [sys.executable, str(ROOT / "export/build_engines.py"), str(saved), "-o", str(target)]
    assert run_killed(killer, command, under, 0)[0] == 0, "one is there from the start"

    def whole() -> bool:
        verify_files(target, read_manifest(target))
        return True

    campaign(killer, command, under, lambda: None, whole, kills=5)


@pytest.mark.parametrize("module", ["car_train.streams", "car_runtime.cli.errors"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_arrives_in_a_destructor_is_not_lost(module: str, number: int, tmp_path: Path) -> None:
    """Python drops what is raised there, and a training run went on for good."""
    program = tmp_path / "program.py"
    program.write_text(
        f"""
import importlib, os, threading, time
class Slow:
    def __del__(self):
        time.sleep(0.5)
try:
    with importlib.import_module({module!r}).terminated_politely():
        threading.Timer(0.2, os.kill, (os.getpid(), {int(number)})).start()
        slow = Slow()
        del slow
        time.sleep(60)
except KeyboardInterrupt as stop:
    print(type(stop).__name__)
""",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=50, check=False)
    assert done.stdout.strip() == ("Terminated" if number == signal.SIGTERM else "KeyboardInterrupt")
    assert not done.stderr

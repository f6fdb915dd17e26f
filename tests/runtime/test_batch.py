"""`car-run batch`: each job as alone, failures kept apart, interruptions survived, bad rows named."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from car_runtime import RunError
from car_runtime import plan as plan_module
from car_runtime.cli.main import main
from car_runtime.cli.progress import Bar, duration
from car_runtime.request import Request
from car_runtime.system.files import one_writer
from fixtures.runtime_plan import build_plan

RUNTIME = Path(__file__).parents[2] / "runtime"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("batch")
    build_plan(folder / "car.plan")
    build_plan(folder / "var.plan", control=False)
    for i in range(3):
        edges = Image.new("L", (40, 40))
        ImageDraw.Draw(edges).rectangle((8, 8 + i, 30, 28), outline=255, width=3)
        edges.save(folder / f"edges{i}.png")
    return folder


@pytest.fixture
def here(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the control images, next to the plans."""
    (tmp_path / "in").symlink_to(built)
    (tmp_path / "cwd").mkdir()
    for path in built.glob("*.png"):
        (tmp_path / "cwd" / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "cwd"


PLAN = ["-e", "../in/car.plan", "--threads", "1"]


def lines(folder: str = "out") -> list[dict[str, object]]:
    return [json.loads(line) for line in Path(folder, "results.jsonl").read_text().splitlines()]


def test_a_job_gives_the_file_that_the_command_gives_alone(here: Path) -> None:
    Path("jobs.csv").write_text(
        "name, Control,class,seed,n,top-k,cfg_scales\nfirst,edges0.png,cat,5,2,,\n,edges1.png,,,,3,1-\n"
    )
    Path("jobs.jsonl").write_text(
        '{"name": "first", "control": "edges0.png", "label": 0, "seed": 5, "num": 2}\n\n'
        '{"name": "0003", "control": "edges1.png", "top_k": 3, "cfg-scales": "1-"}\n'
    )
    assert main(["batch", "jobs.csv", *PLAN, "--cfg", "2", "-o", "out"]) == 0
    assert main(["batch", "jobs.jsonl", *PLAN, "--cfg", "2", "-o", "again"]) == 0
    alone = [*PLAN, "--cfg", "2"]
    assert main([*alone, "--control", "edges0.png", "--class", "0", "--seed", "5", "-n", "2", "-o", "first.png"]) == 0
    assert main([*alone, "--control", "edges1.png", "--top-k", "3", "--cfg-scales", "1-", "-o", "0003.png"]) == 0
    for name in ("first-0.png", "first-1.png", "0003.png"):
        assert Path("out", name).read_bytes() == Path(name).read_bytes()
        assert Path("again", name).read_bytes() == Path(name).read_bytes()
    first, second = lines()
    assert (first["name"], first["row"], first["status"]) == ("first", 2, "done")
    assert first["images"] == [{"path": "first-0.png", "seed": 5}, {"path": "first-1.png", "seed": 6}]
    assert first["class"] == {"index": 0, "name": "cat"}
    assert (second["name"], second["schedule"]) == ("0003", {"cfg_scales": "1-2"})


def test_a_folder_is_a_job_per_image(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = here / "maps"
    folder.mkdir()
    for i in range(2):
        Path(f"edges{i}.png").rename(folder / f"edges{i}.png")
    (folder / "notes.txt").write_text("no image")
    assert main(["batch", "maps", *PLAN, "--seed", "4", "--no-receipt", "-o", "out"]) == 0
    assert capsys.readouterr().out == f"{Path('out', 'results.jsonl')}\n"
    assert {path.name for path in Path("out").iterdir()} == {"edges0.png", "edges1.png", "results.jsonl"}
    assert main([*PLAN, "--control", "maps/edges1.png", "--seed", "4", "--no-receipt", "-o", "alone.png"]) == 0
    assert Path("out/edges1.png").read_bytes() == Path("alone.png").read_bytes()


def test_photos_become_controls(here: Path) -> None:
    Path("photos").mkdir()
    Path("edges0.png").rename("photos/shot.png")
    shipped = ["-e", str(plan_module.DEFAULT_PLAN), "--threads", "1", "--class", "3"]
    assert main(["batch", "photos", *shipped, "--photos", "-o", "out"]) == 0
    assert main([*shipped, "--photo", "photos/shot.png", "-o", "alone.png"]) == 0
    assert Path("out/shot.png").read_bytes() == Path("alone.png").read_bytes()


def test_failed_jobs_are_listed_and_the_rest_is_done(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("jobs.csv").write_text("control,name\nedges0.png,a\ngone.png,b\nedges1.png,c\n")
    Path("bad.png").write_bytes(b"\x89PNG")
    assert main(["batch", "jobs.csv", *PLAN, "-o", "out", "--json"]) == 2
    out, err = capsys.readouterr()
    assert "car-run: job b (row 3) failed: there is no image 'gone.png'; check the path" in err.splitlines()
    report = json.loads(out)
    assert (report["done"], report["skipped"], report["failed"]) == (2, 0, ["b"])
    assert [line["status"] for line in lines()] == ["done", "failed", "done"]
    assert sorted(path.name for path in Path("out").glob("*.png")) == ["a.png", "c.png"]


def test_going_on_does_what_failed_is_missing_or_has_changed(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = Path("jobs.csv")
    jobs.write_text("name,control,seed\na,edges0.png,1\nb,gone.png,1\nc,edges0.png,1\nd,edges0.png,1\n")
    assert main(["batch", "jobs.csv", *PLAN, "-o", "out"]) == 2
    before = Path("out/a.png").stat().st_mtime_ns
    Path("edges1.png").rename("gone.png")
    Path("out/c.png").unlink()
    jobs.write_text(jobs.read_text().replace("d,edges0.png,1", "d,edges0.png,2"))
    results = Path("out/results.jsonl")
    results.write_text(results.read_text() + '{"name": "torn')  # the machine went down
    drawn: list[int] = []
    real = plan_module.Plan.generate_many

    def counted(self: plan_module.Plan, requests: list[Request]) -> list[plan_module.Result]:
        drawn.extend(request.seeds[0] for request in requests)
        return real(self, requests)

    monkeypatch.setattr(plan_module.Plan, "generate_many", counted)
    assert main(["batch", "jobs.csv", *PLAN, "-o", "out", "--resume"]) == 0
    assert drawn == [1, 1, 2]
    assert Path("out/a.png").stat().st_mtime_ns == before
    assert [line["name"] for line in lines()] == ["a", "b", "c", "d"]
    assert {line["status"] for line in lines()} == {"done"}
    capsys.readouterr()
    assert main(["batch", "jobs.csv", *PLAN, "-o", "out", "--resume"]) == 0
    assert "0 done, 4 skipped, 0 failed" in capsys.readouterr().err
    assert main(["batch", "jobs.csv", *PLAN, "--cfg", "3", "-o", "out", "--resume"]) == 0
    assert "4 done, 0 skipped" in capsys.readouterr().err, "other settings are other images"


@pytest.mark.parametrize("shared", [1, 2])
def test_an_engine_that_fails_costs_its_job_alone(
    shared: int, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("jobs.csv").write_text("control,seed\nedges0.png,1\nedges0.png,2\nedges0.png,3\n")
    real = plan_module.Plan.generate_many

    def failing(self: plan_module.Plan, requests: list[Request]) -> list[plan_module.Result]:
        if any(2 in request.seeds for request in requests):
            raise RunError("the engine is on fire; put it out")
        return real(self, requests)

    monkeypatch.setattr(plan_module.Plan, "generate_many", failing)
    monkeypatch.setattr(plan_module.Plan, "shared_batch", shared)
    assert main(["batch", "jobs.csv", *PLAN, "-o", "out"]) == 1
    assert "job 0003 (row 3) failed: the engine is on fire" in capsys.readouterr().err
    assert sorted(path.name for path in Path("out").glob("*.png")) == ["0002.png", "0004.png"]
    assert [line["status"] for line in lines()] == ["done", "failed", "done"]


def _started(jobs: int) -> subprocess.Popen[str]:
    rows = "".join(f"edges{i % 3}.png,{i}\n" for i in range(jobs))
    Path("jobs.csv").write_text(f"control,seed\n{rows}")
    command = [sys.executable, "-m", "car_runtime", "batch", "jobs.csv", *PLAN, "-o", "out"]
    environment = os.environ | {"PYTHONPATH": str(RUNTIME)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _wait_for(count: int, process: subprocess.Popen[str]) -> None:
    results = Path("out/results.jsonl")
    while not results.exists() or results.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_loses_nothing_that_is_finished(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = _started(3000)
    _wait_for(5, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    done = len(lines())
    assert f"car-run: {done} of 3000 jobs are done; go on with --resume" in err
    assert all(Path("out", f"{i:04d}.png").is_file() for i in range(2, done + 2))
    Path("jobs.csv").write_text("".join(Path("jobs.csv").read_text().splitlines(keepends=True)[: done + 3]))
    assert main(["batch", "jobs.csv", *PLAN, "-o", "out", "--resume"]) == 0
    assert f"2 done, {done} skipped, 0 failed" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_stays_flat_while_jobs_are_done(here: Path) -> None:
    """Measured over 10,000 jobs by hand: 85 MB after 1,900 and after 9,900."""

    def resident() -> int:
        status = Path(f"/proc/{process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])

    process = _started(600)
    try:
        _wait_for(150, process)
        early = resident()
        _wait_for(550, process)
        assert resident() - early < 2048, "KB; an image, its tokens and features are 3 KB a job here"
    finally:
        process.kill()
        process.communicate()


def test_output_is_written_with_room_or_the_batch_ends(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("jobs.csv").write_text("control\n" + "edges0.png\n" * 50)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        assert main(["batch", "jobs.csv", *PLAN, "-o", "out"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert "cannot write" in capsys.readouterr().err
    assert not [path for path in Path("out").iterdir() if "part" in path.name]


BAD = [
    ("control,seed\nedges0.png,x\n", "row 2, column 'seed': 'x' is no whole number"),
    ("control,seed\nedges0.png,1\nedges0.png,-1\n", "row 3, column 'seed': seed is -1, but must be"),
    ("control,class\nedges0.png,dog\n", "row 2, column 'class': there is no class 'dog'"),
    ("control,cfg\nedges0.png,nan\n", "row 2, column 'cfg': cfg is nan"),
    ("control,top_p\nedges0.png,2\n", "row 2, column 'top_p': top_p is 2.0"),
    ("control,n\nedges0.png,0\n", "row 2, column 'n': n is 0"),
    ("control,more-smooth\nedges0.png,maybe\n", "row 2, column 'more-smooth': 'maybe' is neither true nor false"),
    ("control,fit\nedges0.png,zoom\n", "row 2, column 'fit': fit is 'zoom'"),
    ("control,control-scales\nedges0.png,7-9\n", "row 2, column 'control-scales': control_scales is '7-9'"),
    ("control,watermark\nedges0.png,@/etc/hostname\n", "row 2, column 'watermark': a table names no key file"),
    ("control,colour\nedges0.png,red\n", "row 1: there is no column 'colour'; the columns are name, photo, control"),
    ("control,seed,Seed\nedges0.png,1,2\n", "row 1: the columns 'seed' and 'Seed' are the same setting"),
    ("control,seed\nedges0.png,1,2\n", "row 2 has 3 cells and the header 2"),
    ("seed\n1\n", "row 2, column 'control': the plan 'tiny' follows a control image"),
    ("control,photo\nedges0.png,edges1.png\n", "row 2: control and photo are both given"),
    ("control,name\nedges0.png,a\nedges0.png,A\n", "row 3, column 'name': 'A' is the name of row 2, too"),
    ("control,name\nedges0.png,../a\n", "row 2, column 'name': '../a' is no file name"),
    ("control,name,n\nedges0.png,a-0,\nedges0.png,a,2\n", "row 3: 'a-0.png' is an image of row 2, too"),
    ('control\n"edges0.png\n', "is no CSV"),
    ("control\n", "has no jobs"),
    ("", "has no jobs"),
    ("control,seed,n\nedges0.png,9223372036854775807,2\n", "row 2: seed is 9223372036854775807"),
]


@pytest.mark.parametrize(("text", "said"), BAD, ids=[said[:40] for _, said in BAD])
def test_a_bad_row_is_named_with_its_column(
    text: str, said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("jobs.csv").write_text(text)
    _refused(["batch", "jobs.csv", *PLAN, "-o", "out"], said, capsys)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"seed": 1', "row 1 of 'jobs.jsonl' is not JSON"),
        ("[1]", "row 1 of 'jobs.jsonl' is no object"),
        ("[" * 100_000, "row 1 of 'jobs.jsonl' is not JSON"),
        (
            '{"control": "edges0.png"}\n{"control": "edges0.png", "seed": [1]}',
            "row 2, column 'seed': '[1]' is no single",
        ),
        ('{"control": "edges0.png", "seed": true}', "row 1, column 'seed': seed is True"),
        ('{"control": "edges0.png", "seed": 1.5}', "row 1, column 'seed': seed is 1.5"),
        ('{"control": 5}', "row 1, column 'control': '5' is no text"),
        ('{"control": "a\\u0000b"}', "row 1, column 'control': 'a\\x00b' is no path"),
        ('{"control": "edges0.png", "name": "\\ud800"}', "row 1, column 'name': '\\ud800' is no file name"),
        ('{"control": "edges0.png", "class": "%s"}' % ("x" * 5000), "row 1, column 'class': 5000 characters"),
        ('{"control": "edges0.png", "known_tokens": 1}', "row 1: there is no column 'known_tokens'"),
        ('{"control": "edges0.png", "cfg": 1, "CFG": 2}', "row 1: the column 'CFG' is a setting given twice"),
    ],
)
def test_a_bad_object_is_named_with_its_key(
    text: str, said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("jobs.jsonl").write_text(text)
    _refused(["batch", "jobs.jsonl", *PLAN, "-o", "out"], said, capsys)


def test_a_fifo_in_the_place_of_results_is_not_waited_for(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("jobs.csv").write_text("control\nedges0.png\n")
    Path("old").mkdir()
    os.mkfifo("old/results.jsonl")
    assert main(["batch", "jobs.csv", *PLAN, "-o", "old", "--resume"]) == 2
    assert "'old/results.jsonl' (it is not a regular file)" in capsys.readouterr().err


def test_the_images_of_a_table_are_bounded(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of three characters can ask for 1,024."""
    monkeypatch.setattr("car_runtime.cli.jobs.MAX_JOBS", 2000)
    Path("jobs.csv").write_text("control,n\nedges0.png,1024\nedges1.png,1024\n")
    _refused(["batch", "jobs.csv", *PLAN, "-o", "out"], "'jobs.csv' asks for over 2000 images; split it", capsys)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["gone.csv", "-o", "out"], "there is no file of jobs 'gone.csv'"),
        (["edges0.png", "-o", "out"], "is no folder, .csv or .jsonl file"),
        (["empty", "-o", "out"], "the folder 'empty' holds no image"),
        (["fifo.csv", "-o", "out"], "'fifo.csv' is not a file"),
        (["latin.csv", "-o", "out"], "row 2 of 'latin.csv' is not UTF-8"),
        (["good.csv"], "the following arguments are required: -o/--output"),
        (["good.csv", "-o", "edges0.png"], "is a file; name a folder"),
        (["good.csv", "-o", "no/out"], "does not exist; create it first"),
        (["good.csv", "-o", "."], "would replace the input"),
        ([".", "-o", "."], "is the folder of the jobs"),
        ([".", "-o", "out", "--control", "edges0.png"], "leave one of them out"),
        (["good.csv", "-o", "out", "--photos"], "name the column photo"),
        (["good.csv", "-o", "out", "--control", "-"], "can be read once"),
        (["good.csv", "-o", "out", "--cfg", "-1"], "cfg is -1.0"),
        (["twice", "-o", "out"], "would have results of one name"),
    ],
)
def test_misuse_is_one_line_and_writes_nothing(
    args: list[str], said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty").mkdir()
    Path("twice").mkdir()
    os.mkfifo("fifo.csv")
    for suffix in ("png", "jpg"):
        Image.new("RGB", (9, 9)).save(f"twice/a.{suffix}")
    Path("latin.csv").write_bytes(b"name\n\xe4\n")
    Path("good.csv").write_text("control,name\nedges0.png,edges0\n")
    _refused(["batch", *args, *PLAN], said, capsys)


def test_a_folder_with_results_is_gone_on_with_only_when_asked(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("jobs.csv").write_text("control\nedges0.png\n")
    assert main(["batch", "jobs.csv", *PLAN, "-o", "out"]) == 0
    capsys.readouterr()
    _refused(["batch", "jobs.csv", *PLAN, "-o", "out"], "go on with --resume", capsys)


def test_a_plan_without_control_takes_jobs_without(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("jobs.csv").write_text("seed\n1\n2\n")
    assert main(["batch", "jobs.csv", "-e", "../in/var.plan", "--threads", "1", "-o", "out"]) == 0
    Path("jobs.csv").write_text("control\nedges0.png\n")
    said = "row 2, column 'control': the plan 'tiny-var' has no control branch"
    capsys.readouterr()
    _refused(["batch", "jobs.csv", "-e", "../in/var.plan", "-o", "new"], said, capsys)


def _refused(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path().rglob("*"))
    assert main(args) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
    assert sorted(Path().rglob("*")) == before


def test_the_bar_says_how_much_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    bar = Bar(200, "jobs")
    for i in range(50):
        bar.advance(failed=i == 3)
    assert bar.line(100.0) == "██████░░░░░░░░░░░░░░░░░░ 50/200 jobs, 1 failed, 0.50/s, 5:00 left"
    assert [duration(seconds) for seconds in (0.4, 59.7, 185, 7209)] == ["0 s", "1:00", "3:05", "2:00:09"]


def test_a_second_batch_in_a_folder_is_refused_and_the_first_named(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each would take the other's lines of results.jsonl away."""
    Path("jobs.csv").write_text("control\nedges0.png\n")
    Path("out").mkdir()
    with one_writer(Path("out/results.jsonl")):
        assert main(["batch", "jobs.csv", *PLAN, "-o", "out", "--resume"]) == 2
        assert f"results.jsonl is being written by process {os.getpid()}; wait for it" in capsys.readouterr().err
    assert main(["batch", "jobs.csv", *PLAN, "-o", "out", "--resume"]) == 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["0002.png", "results.jsonl"]

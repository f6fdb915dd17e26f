"""`car-run`: what it writes and prints, and how it fails: one line, exit code 2, nothing left behind."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from car_runtime import __version__, open_plan
from car_runtime import plan as plan_module
from car_runtime.cli.main import main
from fixtures.runtime_plan import NAMES, SIDES, SIZE, L, build_plan

RUNTIME = Path(__file__).parents[2] / "runtime"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    build_plan(folder / "car.plan")
    build_plan(folder / "var.plan", control=False)
    edges = Image.new("L", (40, 40))
    ImageDraw.Draw(edges).rectangle((8, 12, 30, 28), outline=255, width=3)
    edges.save(folder / "edges.png")
    return folder


@pytest.fixture
def here(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, next to what `built` holds."""
    (tmp_path / "in").symlink_to(built)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "cwd"


CAR = ["-e", "../in/car.plan", "--threads", "1"]
GIVEN = [*CAR, "--control", "../in/edges.png"]


def _expected(built: Path, **settings: Any) -> np.ndarray:
    with open_plan(built / "car.plan", threads=1) as plan:
        return plan.generate(built / "edges.png", **settings).images


def test_one_image_goes_to_out_png(here: Path, built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*GIVEN, "--class", "cat", "--seed", "3"]) == 0
    out, err = capsys.readouterr()
    assert out == "out.png\n"
    assert err.startswith("car-run: tiny on ort-cpu (auto: ort-cpu, best that opens here")
    assert err.count("\n") == 1
    assert [path.name for path in here.iterdir()] == ["out.png"]
    assert (np.asarray(Image.open("out.png")) == _expected(built, label="cat", seed=3)[0]).all()


TILE = 128 // SIZE * SIZE
"""Side of an image on a sheet: small ones are enlarged to about 128 pixels, by a whole factor."""


def _tile(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((TILE, TILE), Image.Resampling.LANCZOS))


def test_several_images_are_numbered_and_share_a_sheet(
    here: Path, built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*GIVEN, "-n", "3", "--seed", "5", "--cfg", "2", "--top-k", "4", "--top-p", "0", "--grid"]) == 0
    names = ["out-0.png", "out-1.png", "out-2.png", "out-grid.png"]
    assert capsys.readouterr().out.split() == names
    assert sorted(path.name for path in here.iterdir()) == names
    expected = _expected(built, seed=5, n=3, cfg=2, top_k=4, top_p=0)
    for i in range(3):
        assert (np.asarray(Image.open(f"out-{i}.png")) == expected[i]).all()
    sheet = np.asarray(Image.open("out-grid.png"))
    assert sheet.shape == (TILE, 4 * TILE + 12, 3)
    for i in range(3):
        assert (sheet[:, (i + 1) * (TILE + 4) :][:, :TILE] == _tile(expected[i])).all()


def test_an_image_records_how_to_make_it_again(here: Path) -> None:
    assert main([*GIVEN, "--class", "goldie", "-n", "2", "--seed", "8", "--top-p", "0.5", "-o", "a.png"]) == 0
    with Image.open("a-1.png") as image:
        image.load()
        text = dict(image.text)  # type: ignore[attr-defined]
        first = np.asarray(image)
    assert {"car-receipt", "car-control"} <= text.keys()
    assert {key: value for key, value in text.items() if not key.startswith("car-")} == {
        "Software": f"car_runtime {__version__}",
        "version": __version__,
        "plan": "tiny",
        "class": "Golden Retriever, goldie",
        "seed": "9",
        "cfg": "1.5",
        "top_k": "16",
        "top_p": "0.5",
    }
    again = [f"--{key.replace('_', '-')}={text[key]}" for key in ("class", "seed", "cfg", "top_k", "top_p")]
    assert main([*GIVEN, *again, "-o", "b.png"]) == 0
    assert (np.asarray(Image.open("b.png")) == first).all()


def test_json_is_all_of_stdout(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "-n",
        "5",
        "--seed",
        "2",
        "--class",
        "2",
        "--grid",
        "--tokens",
        "t.npz",
        "--preview",
        "steps",
        "--json",
    ]
    assert main([*GIVEN, *options]) == 0
    report = json.loads(capsys.readouterr().out)
    timings, why = report.pop("timings"), report["backend"]["why"]
    assert why.startswith("auto: ort-cpu, best that opens here")
    assert list(timings) == [
        *("read", "open", "control", "condition", "scale_0", "scale_1", "scale_2", "decoder", "write", "total"),
    ]
    assert timings["total"] >= timings["open"] + timings["decoder"]
    assert report == {
        "version": __version__,
        "plan": {"name": "tiny", "path": "../in/car.plan"},
        "warnings": [],
        "backend": {"name": "ort-cpu", "why": why},
        "class": {"index": 2, "name": "lion"},
        "cfg": 1.5,
        "top_k": 16,
        "top_p": 0.95,
        "schedule": {},
        "images": [{"path": f"out-{i}.png", "seed": 2 + i} for i in range(5)],
        "grid": "out-grid.png",
        "tokens": "t.npz",
        "previews": [f"steps/{i}-scale-{k:02d}.png" for of in ((0, 1, 2, 3), (4,)) for k in range(3) for i in of],
    }
    for path in (*(image["path"] for image in report["images"]), "out-grid.png", "t.npz", *report["previews"]):
        assert Path(path).is_file()


def test_tokens_can_be_read_back(here: Path, built: Path) -> None:
    assert main([*GIVEN, "-n", "2", "--tokens", "t.npz"]) == 0
    with np.load("t.npz") as stored, open_plan(built / "car.plan", threads=1) as plan:
        assert stored["tokens"].dtype == np.int64
        assert stored["tokens"].shape == (2, L)
        assert stored["sides"].tolist() == list(SIDES)
        assert (stored["tokens"] == plan.generate(built / "edges.png", n=2).tokens).all()


def test_the_last_preview_is_the_image(here: Path) -> None:
    assert main([*GIVEN, "--preview", "steps"]) == 0
    assert sorted(path.name for path in Path("steps").iterdir()) == [f"scale-{k:02d}.png" for k in range(3)]
    assert (np.asarray(Image.open("steps/scale-02.png")) == np.asarray(Image.open("out.png"))).all()


def test_a_control_may_come_from_stdin(here: Path, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = io.BytesIO((built / "edges.png").read_bytes())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(content))
    assert main([*CAR, "--control", "-"]) == 0
    assert (np.asarray(Image.open("out.png")) == _expected(built)[0]).all()


@pytest.mark.parametrize("flag", ["--control", "--photo"])
def test_an_input_image_is_decoded_once(here: Path, flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda source, **kw: opened.append(source) or original(source, **kw))
    assert main([*CAR, flag, "../in/edges.png"]) == 0
    assert opened == ["../in/edges.png"]


def test_a_photo_gives_its_control(here: Path, built: Path) -> None:
    controls = pytest.importorskip("car_runtime.controls")
    assert main([*CAR, "--photo", "../in/edges.png", "--grid"]) == 0
    derived = controls.derive(Image.open(built / "edges.png"), "canny-grey", SIZE)
    assert (np.asarray(Image.open("out-grid.png"))[:, :TILE] == _tile(derived)).all()
    with open_plan(built / "car.plan", threads=1) as plan:
        assert (np.asarray(Image.open("out.png")) == plan.generate(derived).images[0]).all()


def test_a_var_plan_runs_without_control(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-e", "../in/var.plan", "--class", "1", "--grid"]) == 0
    assert capsys.readouterr().out.split() == ["out.png", "out-grid.png"]


def test_the_plan_in_the_package_is_the_default(here: Path, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "DEFAULT_PLAN", built / "car.plan")
    assert main(["--control", "../in/edges.png"]) == 0
    assert Path("out.png").is_file()


def test_classes_are_listed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CAR, "--list-classes"]) == 0
    assert capsys.readouterr().out == "".join(f"{i}\t{name}\n" for i, name in enumerate(NAMES))
    assert main([*CAR, "--list-classes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"classes": list(NAMES)}
    assert list(here.iterdir()) == []


def test_classes_of_several_styles_are_listed_style_by_style(
    here: Path, built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = shutil.copytree(built / "car.plan", Path("styles.plan"))
    manifest = json.loads((plan / "manifest.json").read_text())
    manifest["model"]["class_names"] = ["flat-flags", "flat-food-drink", "noto-flags"]
    (plan / "manifest.json").write_text(json.dumps(manifest))
    assert main(["-e", "styles.plan", "--list-classes"]) == 0
    assert capsys.readouterr().out == "0\tflat-flags\n1\tflat-food-drink\n\n2\tnoto-flags\n"


@pytest.mark.parametrize(("flag", "says"), [("--version", f"car-run {__version__}\n"), ("--help", "examples:")])
def test_version_and_help_succeed(flag: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([flag]) == 0
    assert says in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([*GIVEN, "--frobnicate"], "unrecognized arguments: --frobnicate; see car-run --help"),
        ([*GIVEN, "--seed", "x"], "argument --seed: invalid int value: 'x'; see car-run --help"),
        ([*GIVEN, "--seed", "-1"], "seed is -1"),
        ([*GIVEN, "--seed", "9" * 30], "seed is 999999999999999999999999999999"),
        ([*GIVEN, "-n", "0"], "n is 0"),
        ([*GIVEN, "-n", "1000000"], "n is 1000000"),
        ([*GIVEN, "--cfg", "nan"], "cfg is nan"),
        ([*GIVEN, "--cfg", "-1"], "cfg is -1.0"),
        ([*GIVEN, "--top-k", "17"], "top_k is 17, but must be a whole number in 0…16"),
        ([*GIVEN, "--top-p", "2"], "top_p is 2.0"),
        ([*GIVEN, "--threads", "0"], "threads is 0"),
        ([*GIVEN, "--class", "3"], "class is 3, but must be a whole number in 0…2"),
        ([*GIVEN, "--class", "cta"], "there is no class 'cta'; did you mean 'cat'?"),
        ([*GIVEN, "--backend", "gpu"], "there is no backend 'gpu'; use"),
        ([*GIVEN, "-o", "no/out.png"], "the output's directory 'no' does not exist; create it"),
        ([*GIVEN, "-o", "out.jpg"], "the output is 'out.jpg', but images are written as PNG; name it *.png"),
        ([*GIVEN, "-o", ""], "images are written as PNG"),
        ([*GIVEN, "-o", "../in/edges.png"], "would replace the input; choose another -o"),
        ([*GIVEN, "--tokens", "t.txt"], "the token file is 't.txt'"),
        ([*GIVEN, "--tokens", "no/t.npz"], "the output's directory 'no' does not exist"),
        ([*GIVEN, "--preview", "../in/edges.png"], "is a file; name a directory"),
        (
            [*GIVEN, "--preview", "../in", "-o", "../in/scale-02.png"],
            "is the file '../in/scale-02.png' of -o; choose",
        ),
        ([*GIVEN, "--preview", "a.png", "-o", "a.png"], "'a.png' of --preview is the file 'a.png' of -o"),
        (
            ["verify", "../in/car.plan", "-o", "../in/car.plan/manifest.json"],
            "would replace the input; choose another -o",
        ),
        ([*GIVEN, "--preview", "no/steps"], "the output's directory 'no' does not exist"),
        ([*GIVEN, "--photo", "../in/edges.png"], "argument --photo: not allowed with argument --control"),
        (CAR, "follows a control image of type 'canny' and none was given; give control=…, on the command line"),
        ([*CAR, "--control", "no.png"], "there is no image 'no.png'; check the path"),
        ([*CAR, "--control", ""], "there is no image ''"),
        ([*CAR, "--control", "../in"], "'../in' is a directory; give an image file"),
        ([*CAR, "--control", "../in/car.plan/manifest.json"], "is not an image that can be read; give a PNG"),
        ([*CAR, "--photo", "no.png"], "there is no image 'no.png'; check the path"),
        (["-e", "no.plan", "--control", "x"], "no plan at 'no.plan'; check the path"),
        (["-e", "../in", "--control", "x"], "is not a plan: it has no manifest.json"),
        (["-e", "x" * 5000, "--control", "x"], "(File name too long); check the path"),
        ([*GIVEN, "-o", "x" * 5000 + "/out.png"], "(File name too long); choose another place"),
        (["-e", "", "--control", "x"], "the plan is ''; give its directory or hf:ORG/NAME"),
        (["-e", "../in/edges.png", "--control", "x"], "is a file, but a plan is a directory"),
        (["-e", "../in/var.plan", "--control", "../in/edges.png"], "has no control branch (plain VAR); leave"),
        (["-e", "../in/var.plan", "--photo", "../in/edges.png"], "has no control branch (plain VAR); leave"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_what_cannot_be_used_is_said_in_one_line(
    here: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("car-run: error: ")
    assert says in err
    assert "; " in err
    assert err.count("\n") == 1
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("given", ["--control", "--photo"])
@pytest.mark.parametrize("how", ["itself", "link", "linked folder"])
def test_a_preview_never_replaces_the_input(
    here: Path, built: Path, given: str, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "steps").mkdir()
    source = here / "steps" / "1-scale-02.png"
    if how == "link":
        shutil.copy(built / "edges.png", here / "edges.png")
        source.symlink_to(here / "edges.png")
        source = here / "edges.png"
    else:
        shutil.copy(built / "edges.png", source)
    if how == "linked folder":
        (here / "also").symlink_to(here / "steps")
    before = source.read_bytes()
    preview = "also" if how == "linked folder" else "steps"
    assert main([*CAR, given, str(source), "-n", "2", "--preview", preview]) == 2
    assert "would replace the input; choose another --preview" in capsys.readouterr().err
    assert source.read_bytes() == before
    assert main([*CAR, given, str(source), "-n", "2", "--preview", preview, "--stop-after", "1"]) == 0


@pytest.mark.parametrize("damage", ["truncated", "edited", "missing", "newer", "broken json"])
def test_a_damaged_plan_is_said_in_one_line(
    here: Path, built: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Path(shutil.copytree(built / "car.plan", here.parent / "damaged.plan"))
    weights, manifest = plan / "weights.bin", plan / "manifest.json"
    if damage == "truncated":
        os.truncate(weights, weights.stat().st_size // 2)
    elif damage == "edited":
        weights.write_bytes(b"x" + weights.read_bytes()[1:])
    elif damage == "missing":
        (plan / "step.onnx").unlink()
    elif damage == "newer":
        manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 7'))
    else:
        manifest.write_text(manifest.read_text()[:1000])
    assert main(["-e", "../damaged.plan", "--control", "../in/edges.png"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "; " in err
    assert list(here.iterdir()) == []


def test_hashes_are_skipped_only_when_asked(here: Path, built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Path(shutil.copytree(built / "car.plan", here.parent / "edited.plan"))
    content = bytearray((plan / "weights.bin").read_bytes())
    content[1] ^= 1
    (plan / "weights.bin").write_bytes(content)
    arguments = ["-e", "../edited.plan", "--control", "../in/edges.png"]
    assert main(arguments) == 2
    assert "weights.bin was changed after the export" in capsys.readouterr().err
    assert main([*arguments, "--no-verify"]) == 0


def test_a_failure_inside_is_one_line_and_code_1(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("the engine\nis on fire")

    monkeypatch.setattr(plan_module.Plan, "_decode", fail)
    assert main(GIVEN) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "car-run: error: ZeroDivisionError: the engine is on fire; --debug shows where"
    assert list(here.iterdir()) == []
    with pytest.raises(ZeroDivisionError):
        main([*GIVEN, "--debug"])


def test_an_interrupt_is_code_130(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(plan_module.Plan, "_decode", interrupt)
    assert main(GIVEN) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "car-run: interrupted"
    assert list(here.iterdir()) == []


def test_progress_is_shown_to_a_person(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main([*GIVEN, "-n", "5"]) == 0
    lines = capsys.readouterr().err.splitlines()[1:]
    assert len(lines) == 6
    assert lines[2].startswith("car-run: images 0-3: scale 3/3, 4×4 tokens, ")
    assert lines[3].startswith("car-run: image 4: scale 1/3, 1×1 tokens, ")


def _run(arguments: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(RUNTIME)}
    command = [sys.executable, "-m", "car_runtime", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, **options)


def test_the_command_works_as_a_process(here: Path) -> None:
    good = _run(GIVEN)
    assert (good.returncode, good.stdout) == (0, "out.png\n")
    bad = _run([*CAR, "--control", "no.png"])
    assert bad.returncode == 2
    assert bad.stderr == "car-run: error: there is no image 'no.png'; check the path\n"


def test_generating_never_loads_torch(here: Path) -> None:
    code = (
        "import sys; from car_runtime.cli.main import main; code = main(sys.argv[1:]);"
        "print([name for name in ('torch', 'onnx', 'cv2', 'tensorrt') if name in sys.modules], code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(RUNTIME)}
    command = [sys.executable, "-c", code, *CAR, "--photo", "../in/edges.png"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout == "out.png\n[] 0\n"


def test_a_reader_that_goes_away_is_no_traceback(here: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(RUNTIME)}
    command = [sys.executable, "-m", "car_runtime", *CAR, "--list-classes"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 1

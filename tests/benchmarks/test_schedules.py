"""The benchmark of schedules: its numbers, found again by another way, and what it refuses."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from benchmarks import schedules
from benchmarks.harness.errors import BenchmarkError
from car_runtime import open_plan
from car_runtime.format.manifest import read_manifest
from car_runtime.plan import default_plan
from car_runtime.schedule import parse_scales
from car_train.conventions import PRESETS
from car_train.data.controls import make_control
from car_train.data.dataset import ControlledImages, DataError
from car_train.evaluation.metrics import edge_f1
from car_train.evaluation.sets import compare_sets
from car_train.images import to_pixels
from fixtures.thumbnail import Thumbnail
from fixtures.toy_plan import folder, toy

IMAGES, CFG = 4, 2.0
"""As few as are compared as sets, and with guidance, which is not the shipped plan's default."""
ASKED = {
    "--cfg-scales -2": {"cfg_scales": "-2"},
    "--cfg 0": {"cfg": 0.0},
    "--control-strength 0.5 --stop-after 4": {"control_strength": 0.5, "stop_after": 4},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the shipped plan's classes, one drawn image each."""
    root = tmp_path_factory.mktemp("data") / "drawn"
    rng = np.random.default_rng(0)
    for name in read_manifest(default_plan()).model.class_names or ():
        (root / name).mkdir(parents=True)
        image = Image.new("RGB", (48, 48), "white")
        pen = ImageDraw.Draw(image)
        left, top, width, height = rng.integers(4, 22, 4).tolist()
        pen.ellipse((left, top, left + width, top + height), fill=tuple(rng.integers(0, 200, 3).tolist()))
        image.save(root / name / "a.png")
    return root


@pytest.fixture(scope="module")
def found(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run on the shipped plan, as it was written; stdout is next to it."""
    file, out = tmp_path_factory.mktemp("schedules") / "results.jsonl", io.StringIO()
    flags = [*f"--data {images} --split all --limit {IMAGES} --backend ort-cpu --threads 1".split()]
    flags += [*f"--runs 2 --warmup 0 --seed 3 --cfg {CFG} -o".split(), str(file)]
    flags += [part for schedule in ASKED for part in ("--schedule", schedule)]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(schedules, "features", lambda args: Thumbnail())
        assert schedules.main(flags) == 0
    (line,) = file.read_text(encoding="utf-8").splitlines()
    assert out.getvalue().splitlines()[-1] == line
    return {**json.loads(line), "stdout": out.getvalue()}


@pytest.fixture(scope="module")
def by_hand(images: Path) -> dict[str, list[dict[str, Any]]]:
    """Tokens, F1 and features of every schedule on every image, by the runtime alone."""
    size = read_manifest(default_plan()).model.image_size
    data = ControlledImages(
        images, size, split="all", control_type="canny", convention=PRESETS["canny"], preload=False
    )
    order = np.random.default_rng(3).permutation(len(data))[:IMAGES].tolist()
    drawn: dict[str, list[dict[str, Any]]] = {flags: [] for flags in ("", *ASKED, "truth")}
    with open_plan(backend="ort-cpu", threads=1) as plan:
        for i in order:
            item = data[i]
            given = item["control"].numpy()
            drawn["truth"].append({"features": Thumbnail()(to_pixels(item["image"][None]))[0]})
            for flags, settings in {"": {}, **ASKED}.items():
                result = plan.generate(given, item["label"], 3 + i, **{"cfg": CFG, **settings})
                edges = make_control(result.images[0], "canny")[..., 0] > 0
                drawn[flags].append(
                    {
                        "tokens": result.tokens[0],
                        "f1": edge_f1(given[..., 0] > 0, edges)[2],
                        "features": Thumbnail()(result.images)[0],
                    }
                )
    return drawn


def rows(found: dict[str, Any], question: str) -> list[dict[str, Any]]:
    return [row for row in found["results"] if row["question"] == question]


def test_exact_comes_first_and_every_schedule_is_a_row(found: dict[str, Any]) -> None:
    table = rows(found, "schedule")
    assert [row["flags"] for row in table] == ["", *ASKED]
    assert (table[0]["schedule"], table[0]["ratio"], table[0]["loop_ratio"]) == ("exact", 1, 1)
    assert (table[0]["tokens_equal"], table[0]["f1_change"]) == (1, None)
    for row in table:
        assert 0 < row["min"] <= row["p50"] <= row["p95"]
        assert 0 < row["loop_p50"] < row["p95"]
        assert (row["runs"], row["images"], row["rows_shrink"]) == (2, IMAGES, True)
    assert all(row.keys() == table[0].keys() for row in table)


def test_tokens_and_controls_are_those_of_single_images(found: dict[str, Any], by_hand: Any) -> None:
    for row in rows(found, "schedule"):
        own, exact = by_hand[row["flags"]], by_hand[""]
        shares = []
        for mine, other in zip(own, exact, strict=True):
            drawn = mine["tokens"] >= 0
            shares.append((mine["tokens"] == other["tokens"])[drawn].mean())
        assert row["tokens_equal"] == pytest.approx(np.mean(shares))
        f1 = np.array([image["f1"] for image in own])
        assert row["f1"] == pytest.approx(f1.mean())
        if row["flags"]:
            change = f1 - [image["f1"] for image in exact]
            assert row["f1_change"] == pytest.approx(change.mean())
            assert row["f1_change_error"] == pytest.approx(change.std(ddof=1) / IMAGES**0.5)
    assert min(row["tokens_equal"] for row in rows(found, "schedule")) < 1


def test_distances_are_those_of_eval(found: dict[str, Any], by_hand: Any) -> None:
    bank = {flags: np.stack([p["features"] for p in drawn]) for flags, drawn in by_hand.items()}
    expected = compare_sets({"truth": bank.pop("truth"), **bank}, 3, [])
    for row in rows(found, "schedule"):
        for name in ("kid", "kid_std", "kid_half", "kid_half_std", "precision", "recall"):
            assert row[name] == pytest.approx(expected[row["flags"]][name])
        assert row["kid_floor"] == pytest.approx(expected["floor"]["kid_half"])
        assert row["kid_floor_std"] == pytest.approx(expected["floor"]["kid_half_std"])


def test_scales_are_compared_with_and_without_guidance(found: dict[str, Any]) -> None:
    table = rows(found, "scale")
    assert [(row["scale"], row["side"]) for row in table] == list(enumerate(found["settings"]["sides"]))
    for row in table:
        assert row["guided_p50"] > 0
        assert row["unguided_p50"] > 0
        assert row["ratio"] > 0


def test_settings_say_what_was_measured_and_tables_answer_the_questions(found: dict[str, Any]) -> None:
    settings, stated = found["settings"], read_manifest(default_plan()).sampling
    assert settings["backend"]["name"] == "ort-cpu"
    assert settings["data"] == {"name": "drawn", "split": "all", "images": IMAGES}
    assert settings["features"] == {"network": "thumbnail"}
    assert (settings["cfg"], settings["top_k"], settings["top_p"]) == (CFG, stated.top_k, stated.top_p)
    for heading in ("What does each schedule cost?", "What does it change?", "What does each scale cost?"):
        assert heading in found["stdout"]
    assert "real images (noise floor)" in found["stdout"]


def test_random_weights_are_measured_without_images(capsys: pytest.CaptureFixture[str]) -> None:
    toy()
    flags = f"--model tiny --cache {folder()} --backend ort-cpu --threads 1 --runs 1 --warmup 0 --batch 2".split()
    assert schedules.main(flags) == 0
    out, _ = capsys.readouterr()
    found = json.loads(out.splitlines()[-1])
    table = rows(found, "schedule")
    assert len(table) >= 8
    assert found["settings"]["random_weights"] is True
    for row in table:
        assert row["images"] == schedules.SEEDS
        assert 0 <= row["tokens_equal"] <= 1
        assert row["kid"] is row["kid_floor"] is row["f1"] is None
    assert "KID" not in out.partition('{"format"')[0]
    stopped = [row for row in table if row["flags"].startswith("--stop-after")]
    assert [row["tokens_equal"] for row in stopped] == len(stopped) * [1.0]


def test_the_int8_form_is_a_row_next_to_the_exact_loop(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedules, "features", lambda args: Thumbnail())
    flags = f"--data {images} --split all --limit 4 --backend ort-cpu --threads 1 --runs 2 --warmup 0".split()
    assert schedules.main([*flags, "--int8", "--cache", str(tmp_path), "--schedule", "--cfg 0"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = [row["schedule"] for row in rows(found, "schedule")]
    assert names == ["exact", "--cfg 0", "int8"]
    exact, _, small = rows(found, "schedule")
    assert small["flags"] == ""
    assert 0.2 < small["tokens_equal"] < 1  # another plan drew it
    assert abs(small["f1_change"]) < 0.2
    assert small["p50"] > 0 < exact["p50"]
    (plan,) = tmp_path.iterdir()
    assert read_manifest(plan).precision.weights == "int8"


@pytest.mark.parametrize("K", [3, 6, 10])
@pytest.mark.parametrize("steered", [True, False])
def test_the_default_schedules_fit_any_number_of_scales(K: int, steered: bool) -> None:
    named = schedules.default_schedules(K, steered)
    assert len(named) >= 8
    assert any("control" in flags for flags in named.values()) == steered
    for flags in named.values():
        words = shlex.split(flags)
        for flag, value in zip(words[::2], words[1::2], strict=True):
            if flag.endswith("-scales"):
                parse_scales(flag, value, K)
            elif flag == "--stop-after":
                assert 0 <= int(value) < K - 1


def test_schedules_that_come_to_the_same_are_measured_once() -> None:
    manifest = toy().manifest
    named = {"a": "--cfg-scales -1", "b": "--cfg-scales 0-1", "all": "--cfg-scales 0-2", "c": "--cfg 0"}
    found = schedules.candidates(manifest, named, {"cfg": 2.0, "top_k": None, "top_p": None})
    assert [candidate.name for candidate in found] == ["exact", "a", "c"]
    assert [candidate.request.guided for candidate in found] == [True, True, False]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--schedule", "--cfg-scales 0-9"], "cfg_scales is '0-9', but the plan's scales are 0…6; give"),
        (["--schedule", "--cfg-scale 3"], "a schedule's flags: unrecognized arguments: --cfg-scale 3; give"),
        (["--schedule", "--stop-after x"], "a schedule's flags: argument --stop-after: invalid int value: 'x'; give"),
        (["--cfg", "-1"], "cfg is -1.0"),
        (["-o", "no/results.jsonl"], "No such file or directory"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_said_in_one_line(
    flags: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert schedules.main(["--data", "none", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("benchmarks.schedules: error: ")
    assert says in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--runs 0", "runs is 0; give at least 1"),
        ("--threads 0", "threads is 0; give 1…1024"),
        ("--depth 4", "--depth cuts --model; give one"),
        ("--model tiny --data x", "images of random weights show nothing, leave one out"),
        ("--backend gpu", "there is no backend 'gpu'; use"),
    ],
)
def test_misuse_is_an_error_with_its_remedy(flags: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        schedules.parse_args(flags.split())
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


def test_images_of_other_classes_are_refused(images: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cat").symlink_to(next(iter(sorted(images.iterdir()))))
    args = schedules.parse_args(["--data", str(tmp_path / "data"), "--split", "all", "--features", "none"])
    with pytest.raises(BenchmarkError, match=r"has 1 classes \(cat, …\), the plan 36; give a folder of the plan's"):
        schedules.measure(args, lambda _: None)
    args.data = tmp_path / "absent"
    with pytest.raises(DataError, match="is not a folder; give a folder with one sub-folder"):
        schedules.measure(args, lambda _: None)

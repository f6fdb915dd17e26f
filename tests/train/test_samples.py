"""`eval --samples`: N images of every class are those that drawing one by one gives, whatever draws them and how."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from car_runtime import open_plan
from car_runtime.format import schema
from car_train import checkpoint
from car_train.conventions import PRESETS
from car_train.data.controls import make_control
from car_train.data.dataset import ControlledImages
from car_train.data.folder import split_of
from car_train.errors import UserError
from car_train.evaluation import evaluate, reference, sample_set, sets
from car_train.evaluation.draw import Drawing, drawing
from car_train.evaluation.features import Inception, import_torch_fidelity
from car_train.evaluation.metrics import control_errors, inception_score, precision_recall
from car_train.evaluation.options import EvalOptions, EvaluationError
from car_train.evaluation.reference import read_reference
from car_train.evaluation.sample_set import RealImages, discriminant, evaluate_samples, most_confident, strangers
from car_train.evaluation.sets import compare_sets
from car_train.evaluation.table import table
from car_train.evaluation.targets import LARGEST, open_target
from car_train.files import BusyError, one_writer
from car_train.images import to_pixels
from car_train.model import Model
from car_train.model.sample import control_pyramid, sample
from fixtures.small import small_model
from fixtures.small_plans import small_plan
from fixtures.two_branches import two_branches

CLASSES = ("ant", "bee", "cat", "dog", "eel")


class Thumbnail:
    """Features without a network: the mean colours of a 4×4 grid."""

    about = {"network": "thumbnail", "input": "as it is"}  # noqa: RUF012

    def __call__(self, images_BHW3: np.ndarray) -> np.ndarray:
        small = [np.asarray(Image.fromarray(p).resize((4, 4), Image.Resampling.BOX)) for p in images_BHW3]
        return np.stack(small).reshape(len(small), -1).astype(np.float32) / 255


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four to six discs and bars of each of five classes, named so that some are in both splits."""
    root = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for k, name in enumerate(CLASSES):
        (root / name).mkdir()
        for i in range(4 + k % 3):
            image = Image.new("RGB", (20, 20), "white")
            x, y, w, h = draw.integers((1, 1, 6, 6), (7, 7, 12, 12)).tolist()
            shape = ImageDraw.Draw(image).ellipse if i % 2 else ImageDraw.Draw(image).rectangle
            shape((x, y, x + w, y + h), fill=tuple(draw.integers(0, 200, 3).tolist()))
            image.save(root / name / f"{name}{i}.png")
    return root


def small(control: bool) -> Model:
    """The model that the plan `steered` was exported of, with edges for control; or without any."""
    return small_model(control, depth=2, sides=(1, 2, 4))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    found = {}
    for name in ("car", "var"):
        model = small(name == "car")
        found[name] = checkpoint.save(model, root / name)
    return found


def options(target: Path, data: Path | None, **changes: Any) -> EvalOptions:
    settings = {"split": "all", "cfg": 2.0, "top_k": 20, "top_p": 0.9, "per_class": 4, "threads": 1, **changes}
    return EvalOptions(checkpoint=target, data=data, **settings)


def drawn(target: Path, data: Path | None, folder: Path, **changes: Any) -> tuple[Any, np.ndarray]:
    """(report, images) of one evaluation."""
    wanted = options(target, data, **changes)
    report = evaluate_samples(open_target(wanted), wanted, folder / "s.npz", features=Thumbnail())
    with np.load(folder / "s.npz", allow_pickle=False) as arrays:
        assert list(arrays) == ["arr_0"]
        return report, arrays["arr_0"]


@pytest.fixture(scope="module")
def sketched(checkpoints: dict[str, Path], images: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return drawn(checkpoints["car"], images, tmp_path_factory.mktemp("samples"))


def test_each_class_has_n_images_and_each_is_that_of_its_seed_and_control(
    sketched: Any, checkpoints: dict[str, Path], images: Path
) -> None:
    report, found = sketched
    assert (found.dtype, found.shape) == (np.uint8, (20, 16, 16, 3))
    assert report["samples"] == {"file": "s.npz", "images": 20, "drawn": 20}
    model = checkpoint.load(checkpoints["car"])
    assert model.config.car is not None
    convention = model.config.car.control_convention
    data = ControlledImages(images, 16, split="all", control_type="sketch", convention=convention)
    errors, place = [], 0
    for label in range(5):
        real = [i for i, (_, of) in enumerate(data.files) if of == label]
        for k in range(4):
            control = data[real[k % len(real)]]["control"].numpy()
            pyramid = control_pyramid(Image.fromarray(control), [4 * s for s in (1, 2, 4)])
            noise = np.random.default_rng(place).random((1, 21), dtype=np.float32)
            one = to_pixels(
                sample(model.vqvae, model.car, torch.tensor([label]), torch.from_numpy(noise), pyramid, 2.0, 20, 0.9)[
                    1
                ]
            )[0]
            assert np.abs(one.astype(int) - found[place]).max() <= 1  # sums of a batch are taken in another order
            errors.append(control_errors(convention, control, make_control(found[place], convention))["mae"])
            place += 1
    assert report["control"]["generated"]["mae"] == pytest.approx(np.mean(errors))
    for label, name in enumerate(CLASSES):
        assert report["classes"][name]["generated_mae"] == pytest.approx(np.mean(errors[4 * label : 4 * label + 4]))
    assert report["control"]["shuffled"]["mae"] != report["control"]["generated"]["mae"]
    assert {"floor", "generated"} < set(report["distribution"])


def test_any_branch_of_a_plan_is_evaluated(images: Path, tmp_path: Path) -> None:
    """Its images are those of its own checkpoint, its default branch's are others; an unknown one is refused."""
    plan = two_branches()
    few = {"per_class": 2}
    found = {}
    for name, path, flags in (
        ("checkpoint", plan.parent / "other", {}),
        ("branch", plan, {"branch": "other", "backend": "ort-cpu", "tolerance": 3, "controls": tmp_path / "c.npz"}),
        ("default", plan, {"backend": "ort-cpu"}),
    ):
        (tmp_path / name).mkdir()
        found[name] = drawn(path, images, tmp_path / name, **few | flags)
    assert np.abs(found["branch"][1].astype(int) - found["checkpoint"][1]).max() <= 1
    assert not np.array_equal(found["branch"][1], found["default"][1])
    assert found["branch"][0]["options"]["branch"] == "other"
    with np.load(tmp_path / "c.npz", allow_pickle=False) as arrays:
        assert arrays["arr_0"].shape == found["branch"][1].shape
    assert found["branch"][0]["options"]["tolerance"] == 3
    with pytest.raises(EvaluationError, match=r"'none'.*sketch, other"):
        open_target(options(plan, images, branch="none"))


def test_a_plan_gives_the_images_of_its_checkpoint(sketched: Any, images: Path, tmp_path: Path) -> None:
    """The plan was exported of the same weights: the same tokens, and pixels within one grey level."""
    report, found = drawn(small_plan("steered"), images, tmp_path, backend="ort-cpu", processes=2)
    assert report["plan"]["control"] == "sketch"
    assert np.abs(found.astype(int) - sketched[1]).max() <= 1
    assert report["control"]["generated"]["mae"] == pytest.approx(
        sketched[0]["control"]["generated"]["mae"], rel=0.02
    )


@pytest.mark.parametrize("kind", ["plan", "checkpoint"])
def test_the_baseline_is_of_the_same_classes_and_seeds_without_the_control(
    kind: str, checkpoints: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    """With and without change neither the samples nor their figures; of a plan it is what the runtime draws."""
    plan = two_branches()
    target = plan if kind == "plan" else plan.parent / "other"
    flags = {"per_class": 2, "backend": "ort-cpu" if kind == "plan" else "auto"}
    flags |= {"branch": "other"} if kind == "plan" else {}
    for folder in ("alone", "both"):
        (tmp_path / folder).mkdir()
    alone, expected = drawn(target, images, tmp_path / "alone", **flags)
    report, found = drawn(target, images, tmp_path / "both", baseline=True, **flags)
    np.testing.assert_array_equal(found, expected)
    assert report["control"]["generated"] == alone["control"]["generated"]
    assert report["distribution"]["generated"] == alone["distribution"]["generated"]
    assert "base" in report["distribution"]
    assert "base" not in alone["distribution"]
    control = report["control"]
    assert control["generated_over_base"]["mae"] == control["generated"]["mae"] / control["base"]["mae"]
    assert "without control" in table(report)

    opened = open_target(options(target, images, **flags))
    assert opened.convention is not None
    data = ControlledImages(
        images,
        opened.image_size,
        split="all",
        control_type=opened.control_type,
        convention=opened.convention,
        preload=False,
    )
    errors, place = [], 0
    with open_plan(plan, "ort-cpu", threads=1) as runtime:
        for label in range(5):
            for owner in [i for i, (_, of) in enumerate(data.files) if of == label][:2]:
                image = runtime.generate(label=label, seed=place, cfg=2.0, top_k=20, top_p=0.9).images[0]
                made = make_control(image, opened.convention)
                errors.append(control_errors(opened.convention, data[owner]["control"].numpy(), made)["mae"])
                place += 1
    assert control["base"]["mae"] == pytest.approx(np.mean(errors), rel=0.02)


def test_every_network_scores_the_baseline_where_there_is_one() -> None:
    class Mean(Inception):
        about = {"network": "mean", "input": "as it is"}  # noqa: RUF012

        def __init__(self) -> None:
            """No weights: a score is the mean of the features."""

        def scores(self, real_ND: Any, made_ND: np.ndarray, *_: Any) -> dict[str, float | None]:
            return {"fid": float(made_ND.mean())}

    made, base = ({"inception": np.full((3, 2), value, np.float32)} for value in (1, 5))
    made["inception"][1] = 100  # is not kept
    plan = sample_set.Plan(
        requests=(), without=(), labels=np.zeros(3, np.intp), owners=np.full(3, -1, np.intp), per_class=2
    )
    for rows, expected in (
        (base, {"generated": {"fid": 1.0}, "base": {"fid": 5.0}}),
        ({}, {"generated": {"fid": 1.0}}),
    ):
        wanted = options(Path("plan"), None)
        networks: Any = {"inception": Mean()}
        found = sample_set._distributions(plan, [0, 2], made, rows, {}, networks, None, wanted, [])
        assert found == {"inception": Mean.about | expected}


def test_processes_and_a_stop_in_between_change_nothing(
    checkpoints: dict[str, Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "once").mkdir()
    _, whole = drawn(checkpoints["var"], None, tmp_path / "once", per_class=13)
    wanted = options(checkpoints["var"], None, per_class=13, processes=2)
    target = open_target(wanted)
    with monkeypatch.context() as patched:
        patched.setattr(sample_set, "_distributions", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate_samples(target, wanted, tmp_path / "s.npz", features=Thumbnail())
    parts = tmp_path / ".s.npz.parts"
    assert len(list((parts / "images").iterdir())) == 65
    for k in range(32, 65):
        (parts / "images" / f"{k:07d}.png").unlink()
    # What a process had drawn when it was killed.
    (parts / "process-1").mkdir()
    for folder, k in (("images", 0), ("process-1", 33)):
        Image.new("RGB", (16, 16)).save(parts / folder / f"{k:07d}.png")

    other = dataclasses.replace(wanted, resume=True, seed=1)
    with pytest.raises(EvaluationError, match="with other settings; give these, or leave out --resume"):
        evaluate_samples(target, other, tmp_path / "s.npz", features=Thumbnail())
    _, resumed = drawn(checkpoints["var"], None, tmp_path, per_class=13, processes=2, resume=True)
    kept = [0, 33]
    assert not resumed[kept].any()  # what was there is not drawn again
    np.testing.assert_array_equal(np.delete(resumed, kept, 0), np.delete(whole, kept, 0))
    assert not parts.exists()


def test_rejection_keeps_of_each_class_what_the_classifier_is_surest_of(
    checkpoints: dict[str, Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    drawn_parts: list[np.ndarray] = []
    write = Drawing.write

    def spy(self: Drawing, samples: Path, keep: Any) -> None:
        drawn_parts.extend(self.images())
        write(self, samples, keep)

    monkeypatch.setattr(Drawing, "write", spy)
    report, kept = drawn(checkpoints["car"], images, tmp_path, per_class=4, reject=0.5)
    assert report["samples"] == {"file": "s.npz", "images": 20, "drawn": 40}
    everything = np.concatenate(drawn_parts)
    train = ControlledImages(images, 16, split="train")
    shown = to_pixels(torch.stack([train[i]["image"] for i in range(len(train))]))
    labels = [train[i]["label"] for i in range(len(train))]
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(Thumbnail()(shown), labels)
    p = model.predict_log_proba(Thumbnail()(everything))
    column = {label: i for i, label in enumerate(model.classes_)}
    for label in range(5):
        mine = everything[8 * label : 8 * label + 8]
        surest = np.sort(np.argsort(-p[8 * label : 8 * label + 8, column[label]])[:4])
        np.testing.assert_array_equal(kept[4 * label : 4 * label + 4], mine[surest])


def test_a_file_that_another_process_writes_is_refused_before_a_classifier_is_fitted(
    checkpoints: dict[str, Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_set, "_classifier", lambda *_: pytest.fail("fitted"))
    wanted = options(checkpoints["car"], images, reject=0.5)
    with one_writer(tmp_path / "s.npz"), pytest.raises(BusyError):
        evaluate_samples(open_target(wanted), wanted, tmp_path / "s.npz", features=Thumbnail())


def test_a_classifier_of_two_classes_ranks_as_scikit_learn_does(images: Path) -> None:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    data = ControlledImages(images, 16, split="all", classes="bee,dog")
    shown = to_pixels(torch.stack([data[i]["image"] for i in range(len(data))]))
    labels = [label for _, label in data.files]
    found = discriminant(data, Thumbnail(), 0, 5)(Thumbnail()(shown))
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(Thumbnail()(shown), labels)
    log_p = found[:, [1, 3]] - np.logaddexp(found[:, 1], found[:, 3])[:, None]
    np.testing.assert_allclose(log_p, model.predict_log_proba(Thumbnail()(shown)), rtol=1e-3)  # float32 features
    assert np.isneginf(found[:, [0, 2, 4]]).all()


@pytest.mark.parametrize(
    ("data", "words"), [(None, "which the classifier learns; give --data"), ("ONE", "of 1 classes, none of bee")]
)
def test_what_rejection_needs_is_asked_for_before_anything_is_drawn(
    data: str | None,
    words: str,
    checkpoints: dict[str, Path],
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Drawing, "draw", lambda *_: pytest.fail("drawn"))
    if data is not None:
        files = {split_of(Path(name)): name for name in (f"{i}.png" for i in range(200))}
        for name in CLASSES:
            (tmp_path / "data" / name).mkdir(parents=True)
            for file in files.values() if name == "ant" else [files["val"]]:
                Image.open(images / name / f"{name}0.png").save(tmp_path / "data" / name / file)
    root = None if data is None else tmp_path / "data"
    wanted = options(checkpoints["var"], root, reject=0.5)
    with pytest.raises(EvaluationError, match=words):
        evaluate_samples(open_target(wanted), wanted, tmp_path / "s.npz", features=Thumbnail())


def test_of_equally_sure_images_the_first_stay() -> None:
    kept = most_confident(np.array([1.0, 3.0, 3.0, 2.0, 9.0]), np.array([0, 0, 0, 0, 1]), 2)
    assert kept == [1, 2, 4]


def test_chance_is_the_control_of_another_real_image() -> None:
    labels = np.repeat([0, 1, 2], 4)
    assert (labels[strangers(labels, np.tile([0, 1], 6))] != labels).all()
    owners = np.tile([5, 6], 4)  # one class: half of the images further on has the same control
    assert (owners[strangers(np.zeros(8, int), owners)] != owners).all()
    assert strangers(np.zeros(8, int), np.full(8, 5)) is None


def test_chosen_classes_are_compared_with_the_real_images_of_these(
    checkpoints: dict[str, Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(self: Drawing, *_: object) -> None:
        Image.new("RGB", (16, 16)).save(self.images_folder / "0000000.png")

    monkeypatch.setattr(Drawing, "draw", draw)
    report, found = drawn(checkpoints["car"], images, tmp_path, per_class=1, classes="cat")
    assert len(found) == 1
    assert report["data"]["pictures"] == len(list((images / "cat").iterdir())) < 25
    assert "shuffled" not in report["control"]
    assert "kid" not in report["distribution"].get("generated", {})
    assert "1 images (generated) are too few for distances; draw at least 4" in report["notes"]
    assert "following the control" in table(report)


def test_classes_without_a_real_image_are_named(checkpoints: dict[str, Path], images: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in CLASSES[: len(CLASSES) if split == "train" else 2]:
            (tmp_path / "data" / split / name).mkdir(parents=True)
            image = next((images / name).iterdir())
            Image.open(image).save(tmp_path / "data" / split / name / f"{split}.png")
    report, found = drawn(checkpoints["car"], tmp_path / "data", tmp_path, per_class=1, split="val")
    assert len(found) == 2
    assert any(
        note.startswith("3 of 5 classes have no real image") and ": cat, dog, eel;" in note
        for note in report["notes"]
    )


def test_more_images_than_any_evaluation_has_are_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    wanted = options(checkpoints["var"], None, per_class=10**400)
    with pytest.raises(EvaluationError, match=r"more than 10,000,000; give fewer"):
        evaluate_samples(open_target(wanted), wanted, tmp_path / "s.npz", features=Thumbnail())


# --- what stays of a stopped one


def test_one_process_at_a_time_draws_and_one_that_drew_nothing_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "s.npz"
    with one_writer(file), pytest.raises(BusyError), drawing(file, {}, [], False):
        pass

    def stopped(made: str) -> None:
        with drawing(file, {}, [], False) as parts:
            (parts.folder / made).mkdir()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stopped("controls")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError):
        stopped("images/0000000.png")
    assert [p.name for p in tmp_path.iterdir()] == [".s.npz.parts"]
    with drawing(file, {}, [], True) as parts:
        assert (parts.images_folder / "0000000.png").exists()
    assert not list(tmp_path.iterdir())


def test_controls_from_elsewhere_are_other_settings(
    checkpoints: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    target = open_target(options(checkpoints["car"], images))
    found = [
        sample_set._settings(target, options(checkpoints["car"], images, control_root=root), RealImages(None, None))
        for root in (None, tmp_path, tmp_path / "other")
    ]
    assert len({json.dumps(settings) for settings in found}) == 3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux ends them")
def test_a_process_that_draws_dies_with_the_evaluation_however_that_dies() -> None:
    program = """
import subprocess, sys
from car_train.streams import ending_with_this_process
child = subprocess.Popen(ending_with_this_process(["/bin/sh", "-c", "echo $$; exec sleep 60"]))
child.wait()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    for _ in range(200):
        try:
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":  # where nobody waits for orphans
            return
        time.sleep(0.05)
    pytest.fail(f"process {child} goes on")


# --- references


def test_a_reference_has_images_or_statistics_and_runs_nothing(tmp_path: Path) -> None:
    images = np.zeros((3, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=images)
    assert read_reference(tmp_path / "images.npz").pool is None
    np.savez(tmp_path / "both.npz", arr_0=images, mu=np.ones(2), sigma=np.eye(2), mu_s=np.ones(3), sigma_s=np.eye(3))
    found = read_reference(tmp_path / "both.npz")
    assert found.pool is not None
    assert found.spatial is not None
    assert found.spatial[1].shape == (3, 3)


class Mischief:
    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"arr_0": np.zeros((3, 8, 8, 3))}, "arr_0 is float64"),
        ({"mu": np.ones(2)}, r"mu and sigma are of shapes \[\[2\], None\]"),
        ({"mu": np.ones(2), "sigma": np.full((2, 2), np.nan)}, "or not finite"),
        ({"mu": np.ones(2), "sigma": np.full((2, 2), "a")}, "float64 and <U1, not floats"),
        ({"mu": np.ones(2), "sigma": np.eye(2) + 1j}, "complex128, not floats"),
        ({"mu": np.ones(2), "sigma": -np.eye(2)}, "no covariance, eigenvalues from -1"),
        ({"mu": np.ones(2), "sigma": np.array([[1.0, 5.0], [0.0, 1.0]])}, "no covariance, it is not symmetric"),
        ({"mu": np.full(2, 1e300), "sigma": np.eye(2)}, "mu or sigma has a number over 1e\\+12"),
        ({"mu_s": np.ones(2), "sigma_s": np.eye(2)}, r"has mu_s, sigma_s, and neither arr_0 nor mu and sigma"),
        ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, r"arr_0 is uint8 \[0, 8, 8, 3\]"),
        ({"other": np.ones(2)}, "has none of them, and neither arr_0"),
        ({"arr_0": np.array([None], object)}, "can't be read"),
        (None, "can't be read"),
    ],
)
def test_other_files_are_no_reference(tmp_path: Path, arrays: dict[str, Any] | None, words: str) -> None:
    file = tmp_path / "r.npz"
    if arrays is None:
        file.write_bytes(b"PK\x03\x04 and so on")
    else:
        if arrays.get("arr_0") is not None and arrays["arr_0"].dtype == object:
            arrays = {"arr_0": np.array([Mischief(tmp_path / "done")], object)}
        np.savez(file, **arrays, allow_pickle=True)
    with pytest.raises(EvaluationError, match=words):
        read_reference(file)
    assert not (tmp_path / "done").exists()


@pytest.mark.parametrize(("at", "byte"), [(6, 1), (8, 99)], ids=["encrypted", "packed by another method"])
def test_a_reference_that_zipfile_does_not_open_is_refused(at: int, byte: int, tmp_path: Path) -> None:
    file = tmp_path / "r.npz"
    np.savez(file, arr_0=np.zeros((1, 8, 8, 3), np.uint8))
    spoiled = bytearray(file.read_bytes())
    spoiled[at] = spoiled[spoiled.rfind(b"PK\x01\x02") + at + 2] = byte
    file.write_bytes(spoiled)
    with pytest.raises(EvaluationError, match="can't be read"):
        read_reference(file)


def test_a_reference_that_unpacks_to_more_than_the_memory_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "r.npz"
    np.savez_compressed(file, arr_0=np.zeros((500, 64, 64, 3), np.uint8))
    monkeypatch.setattr(reference, "physical_memory", lambda: 6e6)
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(EvaluationError, match=r"unpacks to 0.0 GB, and there are 0.0 GB of memory"):
        read_reference(file)


def test_a_reference_that_nothing_could_be_compared_with_is_refused_before_anything_is_drawn(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Drawing, "draw", lambda *_: pytest.fail("drawn"))
    file = tmp_path / "r.npz"
    np.savez(file, mu=np.ones(2), sigma=np.eye(2))
    wanted = options(checkpoints["var"], None, reference=file)
    with pytest.raises(EvaluationError, match=r"nothing is there to compare it with; give --inception$"):
        evaluate_samples(open_target(wanted), wanted, tmp_path / "s.npz", features=Thumbnail())
    with pytest.raises(EvaluationError, match="would replace the reference"):
        evaluate_samples(open_target(wanted), wanted, file, features=Thumbnail())
    with pytest.raises(EvaluationError, match="of 2 features, Inception's of 2048"):
        Inception.check_statistics(read_reference(file).pool, None)
    with pytest.raises(EvaluationError, match="of 3 features, Inception's of 2023"):
        Inception.check_statistics(None, (np.ones(3), np.eye(3)))
    assert [p.name for p in tmp_path.iterdir()] == ["r.npz"]


def test_a_reference_takes_the_place_of_the_real_images(
    sketched: Any, checkpoints: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    """The model's own images as reference are at no distance from themselves."""
    np.savez(tmp_path / "r.npz", arr_0=sketched[1])
    report, found = drawn(checkpoints["car"], images, tmp_path, reference=tmp_path / "r.npz")
    np.testing.assert_array_equal(found, sketched[1])
    assert report["distribution"]["generated"]["precision"] == 1
    assert abs(report["distribution"]["generated"]["kid"]) < abs(sketched[0]["distribution"]["generated"]["kid"])


# --- numbers


def test_inception_scores_at_their_ends_and_as_torch_fidelity_has_them() -> None:
    assert inception_score(np.zeros((20, 7))) == pytest.approx((1.0, 0.0))
    sure = np.tile(np.eye(5) * 1e4, (10, 1))
    assert inception_score(sure, parts=2) == pytest.approx((5.0, 0.0))
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("needs torch-fidelity")
    import_torch_fidelity()
    from torch_fidelity import metric_isc, metric_prc

    draw = np.random.default_rng(0)
    logits = draw.standard_normal((60, 9)) * 3
    expected = metric_isc.isc_features_to_metric(torch.from_numpy(logits), splits=10, shuffle=False)
    assert inception_score(logits) == pytest.approx(
        (expected["inception_score_mean"], expected["inception_score_std"]), rel=1e-12
    )
    real, made = draw.standard_normal((80, 6)), draw.standard_normal((70, 6)) * 0.8 + 0.2
    theirs = metric_prc.prc_features_to_metric(torch.from_numpy(made), torch.from_numpy(real), verbose=False)
    # The library's shares are float32.
    assert precision_recall(real, made) == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-6)


def test_images_that_belong_to_real_ones_are_compared_with_the_other_half() -> None:
    draw = np.random.default_rng(3)
    real = draw.standard_normal((200, 8))
    # Copies of the real images: whoever compared a half with its own copies would find no distance at all.
    owners = np.tile(np.arange(200), 3)
    found = compare_sets({"truth": real, "generated": real[owners]}, 0, [], owners)
    low, std = found["floor"]["kid_half"], found["floor"]["kid_half_std"]
    # Three copies of each are drawn from, so that a half has up to 100 of 300, some of them twice.
    assert found["generated"]["kid_half"] == pytest.approx(low, abs=4 * std)
    assert found["generated"]["precision_half"] < 0.99
    paired = compare_sets({"truth": real, "generated": real + 1}, 0, [], np.arange(200))
    plain = compare_sets({"truth": real, "generated": real + 1}, 0, [])
    assert paired["generated"]["kid_half"] == pytest.approx(plain["generated"]["kid_half"])


def test_precision_and_recall_of_many_images_are_not_those_of_the_first_classes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sets, "MOST_NEIGHBOURS", 100)
    real = np.random.default_rng(0).standard_normal((200, 4))
    real[100:] += 50
    found = compare_sets({"truth": real, "generated": real[::-1] + 1e-3}, 0, [])["generated"]
    assert min(found["precision"], found["recall"]) > 0.5  # the first hundreds have nothing in common


def test_halves_of_few_images_are_scored_by_what_all_of_them_have() -> None:
    draw = np.random.default_rng(0)
    real, owners = draw.standard_normal((64, 4)), np.arange(0, 64, 8)
    found = compare_sets({"truth": real, "generated": draw.standard_normal((8, 4))}, 0, notes := [], owners)
    assert "kid_half" in found["generated"]
    assert "fid" not in found["generated"]
    assert "8 images (generated) are too few for a Fréchet distance; draw at least 64" in notes


def test_images_without_a_real_one_belong_to_either_half() -> None:
    half = np.arange(3)
    owners = np.array([-1, 0, 5, -1])
    assert set(sets._of_owners(owners, half, 6, np.random.default_rng(0)).tolist()) == {0, 1, 3}
    assert set(sets._of_owners(owners, np.arange(3, 6), 6, np.random.default_rng(0)).tolist()) == {0, 2, 3}


# --- the command


def run(*argv: object) -> None:
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    evaluate.run(parser.parse_args([str(a) for a in argv]))


def test_the_command_takes_a_plan_and_leaves_the_samples_where_the_report_is(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    report = ["-o", tmp_path / "r.json", "--controls", tmp_path / "c.npz"]
    run(small_plan("steered"), "--data", images, "--split", "all", "--per-class", 1, "--features", "none", *report)
    assert "small-steered (sketch): 5 images in samples.npz (5 drawn)" in capsys.readouterr().out
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["options"]["cfg"] == 4.0  # the plan's own
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["c.npz", "elsewhere", "r.json", "samples.npz"]
    maps = read_reference(tmp_path / "c.npz").images
    assert maps is not None
    data = ControlledImages(images, 16, split="all", control_type="sketch", convention=PRESETS["sketch"])
    first = [next(i for i, (_, of) in enumerate(data.files) if of == label) for label in range(5)]
    np.testing.assert_array_equal(maps, [data[i]["control"].numpy() for i in first])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["CAR", "--samples", "S"], "nothing to take any from; give --data"),
        (["VAR", "--samples", "S", "--reject", "1"], "below 1"),
        (["VAR", "--samples", "S", "--reject", "0.5"], "--reject needs a classifier"),
        (["VAR", "--samples", "S", "--limit", "3"], "give --per-class"),
        (["VAR", "--samples", "S.txt"], "give a .npz"),
        (["VAR", "--samples", "FOLDER"], "it is a folder"),
        (["VAR", "--samples", "S", "--controls", "C"], "follows no control; leave out --controls"),
        (["VAR", "--samples", "S", "--baseline"], "is its own baseline; leave out --baseline"),
        (["CAR", "--samples", "S", "--controls", "S"], "can't be both"),
        (["VAR", "--samples", "S", "-o", "/proc/r.json"], "can't write /proc/r.json: "),
        (["VAR", "--samples", "S", "--per-class", "1" + 9 * "0"], "more than 10,000,000; give fewer"),
        (["VAR", "--reject", "0.5", "--data", "IMAGES"], "give --samples"),
        (["VAR"], "is measured on images; give --data"),
        (["VAR", "--samples", "S", "--processes", "0"], "at least 1"),
        (["PLAN", "--data", "IMAGES", "--split", "all", "--backend", "abacus"], "drawing failed: .*abacus"),
    ],
)
def test_what_cannot_be_done_is_said_with_a_remedy(
    argv: list[str], words: str, checkpoints: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    names = {"CAR": checkpoints["car"], "VAR": checkpoints["var"], "IMAGES": images, "S": tmp_path / "s.npz"}
    names["C"] = tmp_path / "c.npz"
    names["FOLDER"] = tmp_path / "folder.npz"
    names["FOLDER"].mkdir()
    given: list[object] = [names.get(a, small_plan("steered") if a == "PLAN" else a) for a in argv]
    if "--samples" not in argv and "PLAN" in argv:
        given += ["--samples", tmp_path / "s.npz"]
    with pytest.raises(UserError, match=words):
        run("--features", "none", *given)
    assert [p.name for p in tmp_path.iterdir()] == ["folder.npz"]


@pytest.mark.parametrize(("name", "size"), [("image_size", 10**5), ("classes", 10**12), ("vocab", "9")])
def test_a_plan_of_absurd_sizes_is_refused_before_images_are_made_for_it(
    name: str, size: object, tmp_path: Path
) -> None:
    shipped = Path(__file__).parents[2] / "runtime/car_runtime/plans/emoji.plan/manifest.json"
    about = json.loads(shipped.read_text())
    about["model"][name] = size
    (tmp_path / "manifest.json").write_text(json.dumps(about))
    with pytest.raises(EvaluationError, match=f"{name} is .*export the plan again"):
        open_target(options(tmp_path, None))


def test_the_largest_sizes_of_a_plan_are_the_runtimes() -> None:
    assert {name: schema.LIMITS[name] for name in LARGEST} == LARGEST

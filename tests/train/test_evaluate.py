"""`eval` on a tiny random model and drawn images: every number is found again by another way."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from car_train import checkpoint
from car_train.data.controls import make_control
from car_train.data.dataset import ControlledImages
from car_train.data.folder import DataError
from car_train.data.pretrained import DEFAULT_ROOT as WEIGHTS_ROOT
from car_train.evaluation import evaluate
from car_train.evaluation.controls import control_maker, silhouette
from car_train.evaluation.evaluate import choose, open_images
from car_train.evaluation.features import EfficientNetLite0, Inception, import_torch_fidelity
from car_train.evaluation.metrics import control_errors, kernel_distance, psnr
from car_train.evaluation.options import EvalOptions, EvaluationError
from car_train.evaluation.sets import compare_sets
from car_train.evaluation.table import table
from car_train.files import OutputError, sha256
from car_train.images import contact_sheet, to_pixels
from car_train.model import Model
from car_train.model.sample import control_pyramid, sample
from car_train.model.vqvae import join_tokens
from fixtures.small import small_model

IMAGES = 34  # in 5 classes
CONTROLS = ("canny", "hed", "depth", "normal", "sketch")


class Thumbnail:
    """Features without a network: the mean colours of a 4×4 grid."""

    def __init__(self) -> None:
        self.about = {"network": "thumbnail", "input": "as it is"}

    def __call__(self, images_BHW3: np.ndarray) -> np.ndarray:
        small = [np.asarray(Image.fromarray(p).resize((4, 4), Image.Resampling.BOX)) for p in images_BHW3]
        return np.stack(small).reshape(len(small), -1).astype(np.float32) / 255


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Maps of 20 pixels are too small to share: two threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Discs and bars of random colours on transparent ground: 4, 6, 7, 8 and 9 of the five classes."""
    root = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for k, name in enumerate(("ant", "bee", "cat", "dog", "eel")):
        (root / name).mkdir()
        for i in range(k + 5 - (k == 0)):
            image = Image.new("RGBA", (40, 40))
            x, y, w, h = draw.integers((2, 2, 12, 12), (14, 14, 24, 24)).tolist()
            shape = ImageDraw.Draw(image).ellipse if i % 2 else ImageDraw.Draw(image).rectangle
            shape((x, y, x + w, y + h), fill=(*draw.integers(0, 200, 3).tolist(), 255))
            image.save(root / name / f"{name}{i}.png")
    return root


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoints of the tiny model: a stage (`vqvae`, `var`) or, with a branch, a control type."""
    root = tmp_path_factory.mktemp("checkpoints")

    def saved(name: str) -> Path:
        if not (root / name).is_dir():
            model = small_model(name in CONTROLS)
            if name == "vqvae":
                config = dataclasses.replace(model.config, var=None, car=None, class_names=None)
            elif name == "var":
                config = model.config
            else:
                assert model.config.car is not None
                config = dataclasses.replace(
                    model.config, car=dataclasses.replace(model.config.car, control_type=name)
                )
            written = Model(config)
            written.load_state_dict({k: v for k, v in model.state_dict().items() if k in written.state_dict()})
            checkpoint.save(written, root / name)
        return root / name

    return saved


def options(checkpoint: Path, data: Path, **changes: Any) -> EvalOptions:
    return EvalOptions(
        **{"checkpoint": checkpoint, "data": data, "split": "all", "cfg": 2.5, "top_k": 0, "top_p": 0, **changes}
    )


def numbers(report: Any) -> Any:
    """A report without what may differ between equal evaluations."""
    return {k: v for k, v in report.items() if k not in ("seconds", "options")}


def close(a: Any, b: Any, rel: float) -> None:
    """The same structure, names and texts; numbers within `rel` (and 1e-6, for errors that are 0)."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            close(a[key], b[key], rel)
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            close(x, y, rel)
    elif isinstance(a, float):
        assert b == pytest.approx(a, rel=rel, abs=1e-6)
    else:
        assert a == b


# --- the whole


@pytest.fixture(scope="module")
def report(checkpoints: Callable[[str], Path], image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    sheet = tmp_path_factory.mktemp("sheet") / "s.png"
    found = evaluate.evaluate(options(checkpoints("canny"), image_folder), features=Thumbnail(), sheet=sheet)
    return {**found, "sheet": sheet}


def test_a_branch_is_measured_alongside_its_yardsticks(report: Any) -> None:
    assert report["data"]["pictures"] == IMAGES
    assert set(report["teacher_forced"]) == {"model", "base"}
    control = report["control"]
    assert control["type"] == "canny"
    rows = {name: row for name, row in control.items() if isinstance(row, dict)}
    assert set(rows) == {"generated", "base", "reconstruction", "truth", "shuffled", "generated_over_base"}
    assert control["truth"] == {"precision": 1, "recall": 1, "f1": 1}
    ratio = control["generated"]["f1"] / control["base"]["f1"]
    assert control["generated_over_base"]["f1"] == pytest.approx(ratio)
    assert {"generated", "base", "reconstruction", "floor"} < set(report["distribution"])


def test_each_number_of_the_drawn_images_is_that_of_drawing_one_by_one(
    report: Any, checkpoints: Callable[[str], Path], image_folder: Path
) -> None:
    model, wanted = checkpoint.load(checkpoints("canny")), options(checkpoints("canny"), image_folder)
    config, data = model.config.vqvae, ControlledImages(image_folder, 20, split="all", control_type="canny")
    order = choose(data, wanted)
    errors: dict[str, list[float]] = {"generated": [], "base": [], "shuffled": []}
    before = data[order[-1]]["control"].numpy()
    for i in order:
        given, label = data[i]["control"].numpy(), torch.tensor([data[i]["label"]])
        noise = torch.from_numpy(np.random.default_rng(i).random((1, config.tokens), dtype=np.float32))
        pyramid = control_pyramid(Image.fromarray(given), [4 * s for s in config.sides])
        for name, controls in (("generated", pyramid), ("base", None)):
            drawn = to_pixels(sample(model.vqvae, model.car, label, noise, controls, 2.5)[1])[0]
            edges = make_control(drawn, "canny")
            errors[name].append(control_errors("canny", given, edges)["f1"])
            if controls is not None:
                errors["shuffled"].append(control_errors("canny", before, edges)["f1"])
        before = given
    for name, values in errors.items():
        assert report["control"][name]["f1"] == pytest.approx(np.mean(values), abs=1e-3), (
            name
        )  # a rounded pixel or two
    labels = np.array([data[i]["label"] for i in order])
    for label, name in enumerate(data.class_names):
        expected = np.mean(np.array(errors["generated"])[labels == label])
        assert report["classes"][name]["generated_f1"] == pytest.approx(expected, abs=0.01)
        assert report["classes"][name]["pictures"] == (labels == label).sum() == label + 5 - (label == 0)


def test_loss_and_accuracy_are_those_of_the_true_tokens(
    report: Any, checkpoints: Callable[[str], Path], image_folder: Path
) -> None:
    model, data = checkpoint.load(checkpoints("canny")), ControlledImages(image_folder, 20, split="all")
    assert model.car is not None
    images = torch.stack([data[i]["image"] for i in range(len(data))])
    labels = torch.tensor([data[i]["label"] for i in range(len(data))])
    grids = model.vqvae.encode(images)
    tokens = join_tokens(grids)
    logits = model.car(labels, model.vqvae.quantizer.decode(grids)[1])
    chosen = logits.double().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    base = report["teacher_forced"]["base"]
    assert base["loss"] == pytest.approx(-chosen.mean().item(), rel=1e-5)
    assert base["loss_last"] == pytest.approx(-chosen[:, -25:].mean().item(), rel=1e-5)
    assert base["loss_per_scale"][1] == pytest.approx(-chosen[:, 1:5].mean().item(), rel=1e-5)
    assert base["accuracy"] == pytest.approx((logits.argmax(-1) == tokens).double().mean().item(), rel=1e-3)
    assert report["teacher_forced"]["model"]["loss"] != pytest.approx(base["loss"], rel=1e-3)
    dogs = -chosen[labels == 3].mean().item()
    assert report["classes"]["dog"]["base_loss"] == pytest.approx(dogs, rel=1e-5)


def test_reconstruction_is_measured_image_by_image(
    report: Any, checkpoints: Callable[[str], Path], image_folder: Path
) -> None:
    model, data = checkpoint.load(checkpoints("canny")), ControlledImages(image_folder, 20, split="all")
    images = torch.stack([data[i]["image"] for i in range(len(data))])
    grids = model.vqvae.encode(images)
    error = model.vqvae.decode(grids).double() - images
    mse = error.square().mean((1, 2, 3)).numpy()
    found = report["reconstruction"]
    assert found["psnr"] == pytest.approx(np.mean([psnr(e) for e in mse]), rel=1e-5)
    assert found["psnr_pooled"] == pytest.approx(psnr(mse.mean()), rel=1e-5)
    assert found["psnr_pooled"] < found["psnr"]
    assert found["l1"] == pytest.approx(error.abs().mean().item(), rel=1e-5)
    assert -1 < found["ssim"] < 1
    used = [len(g.unique()) / 48 for g in grids]
    assert found["codes_used_per_scale"] == pytest.approx(used)
    assert found["codes_used"] == pytest.approx(len(join_tokens(grids).unique()) / 48)
    assert all(1 <= p <= 48 * u for p, u in zip(found["perplexity_per_scale"], used, strict=True))


def test_neither_the_batch_nor_a_second_run_changes_the_result(
    report: Any, checkpoints: Callable[[str], Path], image_folder: Path, tmp_path: Path
) -> None:
    wanted = options(checkpoints("canny"), image_folder, batch=5)
    parts, again = (
        evaluate.evaluate(wanted, features=Thumbnail(), sheet=tmp_path / f"{name}.png") for name in ("a", "b")
    )
    assert numbers(parts) == numbers(again)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    # Sums in another order may move a value across a rounding border: at most one grey level, in the images too.
    close(numbers({k: v for k, v in report.items() if k not in ("sheet", "control", "classes")}),
          numbers({k: v for k, v in parts.items() if k not in ("control", "classes")}), rel=1e-2)  # fmt: skip
    pixels = [np.asarray(Image.open(p), np.int16) for p in (report["sheet"], tmp_path / "a.png")]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1
    other = evaluate.evaluate(dataclasses.replace(wanted, seed=1), features=Thumbnail())
    assert other["control"]["generated"] != parts["control"]["generated"]
    assert other["reconstruction"]["psnr"] == pytest.approx(parts["reconstruction"]["psnr"], rel=1e-6)


def test_the_sheet_shows_control_drawn_and_real_enlarged(report: Any) -> None:
    with Image.open(report["sheet"]) as sheet:
        # 34 groups of three tiles, four a line; 20 pixels become 100.
        assert sheet.size == (4 * (3 * 101 + 4) + 4, 16 + 9 * 104 + 4)


def test_a_report_is_json_and_a_table(report: Any) -> None:
    plain = {k: v for k, v in report.items() if k != "sheet"}
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    text = table(plain)
    for words in ("PSNR", "with canny", "without control", "another's control", "with / without", "real images"):
        assert words in text


# --- other models, other controls


@pytest.mark.parametrize("control", ["hed", "depth", "normal", "sketch"])
def test_every_control_type_is_measured(control: str, checkpoints: Callable[[str], Path], image_folder: Path) -> None:
    found = evaluate.evaluate(options(checkpoints(control), image_folder, limit=6))["control"]
    measure = {"hed": "mae", "sketch": "mae", "depth": "rmse", "normal": "degrees"}[control]
    assert 0 <= found["truth"][measure] < found["reconstruction"][measure]
    assert found["truth"][measure] < found["shuffled"][measure]
    if control in ("depth", "normal"):
        assert "silhouette" in found["made_by"]
    else:
        assert found["truth"][measure] == 0
    if control == "hed":
        assert "approximation" in found["made_by"]


def test_without_a_branch_or_a_transformer_there_is_less_to_say(
    checkpoints: Callable[[str], Path], image_folder: Path, tmp_path: Path
) -> None:
    var = evaluate.evaluate(options(checkpoints("var"), image_folder, limit=8), sheet=tmp_path / "s.png")
    assert set(var["teacher_forced"]) == {"model"}
    assert "control" not in var
    assert "distribution" not in var
    tokenizer = evaluate.evaluate(options(checkpoints("vqvae"), image_folder, limit=8), features=Thumbnail())
    assert "teacher_forced" not in tokenizer
    assert {k for k, v in tokenizer["distribution"].items() if isinstance(v, dict)} == {"floor", "reconstruction"}
    assert "transformer" in table(var)
    assert "PSNR" in table(tokenizer)


def test_the_baseline_can_be_left_out(checkpoints: Callable[[str], Path], image_folder: Path) -> None:
    found = evaluate.evaluate(
        options(checkpoints("sketch"), image_folder, limit=4, baseline=False), features=Thumbnail()
    )
    assert set(found["teacher_forced"]) == {"model"}
    assert not {"base", "generated_over_base"} & (set(found["control"]) | set(found["distribution"]))


def test_one_image_is_enough_for_what_needs_no_others(checkpoints: Callable[[str], Path], image_folder: Path) -> None:
    found = evaluate.evaluate(options(checkpoints("sketch"), image_folder, limit=1), features=Thumbnail())
    assert "shuffled" not in found["control"]
    assert found["control"]["generated"]["mae"] > 0
    assert any("can't be halved" in note for note in found["notes"])
    assert table(found)


def test_controls_from_files_are_compared_too(
    checkpoints: Callable[[str], Path], image_folder: Path, tmp_path: Path
) -> None:
    for file in image_folder.rglob("*.png"):
        target = tmp_path / file.relative_to(image_folder)
        target.parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 20), "black").save(target)  # nothing but edges is asked for
    found = evaluate.evaluate(options(checkpoints("canny"), image_folder, control_root=tmp_path, limit=5))["control"]
    assert found["truth"]["f1"] == 0


# --- what belongs to an object on white


def test_white_that_is_enclosed_belongs_to_the_object() -> None:
    image = np.full((12, 12, 3), 255, np.uint8)
    image[3:9, 3:9] = (250, 100, 255)
    image[5:7, 5:7] = 255  # an eye
    image[0, 0] = 245  # what a decoder leaves on white
    expected = np.zeros((12, 12), bool)
    expected[3:9, 3:9] = True
    np.testing.assert_array_equal(silhouette(image), expected)
    image[5:7, :5] = 255  # the eye opens to the ground
    expected[5:7, :7] = False
    np.testing.assert_array_equal(silhouette(image), expected)
    assert not silhouette(np.full((5, 5, 3), 255, np.uint8)).any()
    assert silhouette(np.zeros((5, 5, 3), np.uint8)).all()


@pytest.mark.parametrize("control", ["depth", "normal"])
def test_geometry_of_a_drawn_image_is_that_of_its_silhouette(control: str, image_folder: Path) -> None:
    make, _ = control_maker(control, options(Path(), image_folder))
    image = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    ImageDraw.Draw(image).ellipse((4, 6, 25, 28), fill=(200, 40, 90, 255))
    rgba = np.asarray(image)
    (found,) = make([np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image))[..., :3]])
    np.testing.assert_array_equal(found, make_control(rgba, control))


# --- sets


def test_images_like_the_real_ones_are_at_the_noise_floor_and_others_are_not() -> None:
    draw = np.random.default_rng(1)
    bank = {
        "truth": draw.standard_normal((300, 16)),
        "generated": draw.standard_normal((300, 16)),
        "base": draw.standard_normal((300, 16)) + 0.3,
    }
    notes: list[str] = []
    found = compare_sets(bank, 0, notes)
    assert notes == []
    for name in ("kid", "fid"):
        low, std = found["floor"][f"{name}_half"], found["floor"][f"{name}_half_std"]
        assert abs(found["generated"][f"{name}_half"] - low) < 4 * std
        assert found["base"][f"{name}_half"] - low > 4 * std
    assert found["generated"]["fid"] < found["generated"]["fid_half"]  # more images, less bias
    assert found["generated"]["precision"] > found["base"]["precision"]
    again = compare_sets(bank, 0, [])
    assert found == again
    halves = [
        kernel_distance(bank["truth"][a], bank["truth"][b])
        for a, b in (np.array_split(r, 2) for r in _permutations(300))
    ]
    assert found["floor"]["kid_half"] == pytest.approx(np.mean(halves))


def _permutations(n: int) -> list[np.ndarray]:
    draw = np.random.default_rng([0, 1])
    return [draw.permutation(n) for _ in range(10)]


def test_too_few_images_for_covariances_give_kid_alone_and_say_so() -> None:
    draw = np.random.default_rng(2)
    notes: list[str] = []
    found = compare_sets({"truth": draw.random((20, 8)), "generated": draw.random((20, 8))}, 0, notes)
    assert "kid" in found["generated"]
    assert "fid" not in found["generated"]
    assert "no Fréchet distance, only KID" in notes[0]
    compare_sets({"truth": draw.random((70, 48)), "generated": draw.random((70, 48))}, 0, notes)
    assert "singular" in notes[1]


# --- which images


def test_limits_take_random_images_of_the_classes_asked_for(
    checkpoints: Callable[[str], Path], image_folder: Path
) -> None:
    wanted = options(checkpoints("var"), image_folder, classes="bee,3-4", per_class=3)
    data = open_images(checkpoint.load(checkpoints("var")), wanted)
    order = choose(data, wanted)
    assert sorted(data.files[i][1] for i in order) == [1] * 3 + [3] * 3 + [4] * 3
    assert order != sorted(order)
    assert choose(data, dataclasses.replace(wanted, limit=4)) == order[:4]
    assert set(choose(data, dataclasses.replace(wanted, seed=1))) != set(order)
    assert sorted(choose(data, options(checkpoints("var"), image_folder))) == list(range(IMAGES))


# --- the command


def run(*argv: object) -> None:
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    evaluate.run(parser.parse_args([str(a) for a in argv]))


def test_the_command_writes_the_report_and_prints_a_table_or_json(
    checkpoints: Callable[[str], Path], image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = [checkpoints("canny"), "--data", image_folder, "--split", "all", "--features", "none", "--limit", 3]
    run(*base, "-o", tmp_path / "r.json", "--sheet", tmp_path / "s.png", "--classes", "ant,2-3")
    assert "with canny" in capsys.readouterr().out
    written = json.loads((tmp_path / "r.json").read_text())
    assert set(written["classes"]) <= {"ant", "cat", "dog"}
    assert sorted(os.listdir(tmp_path)) == ["r.json", "s.png"]
    run(*base, "--json", "--no-baseline")
    out, err = capsys.readouterr()
    assert json.loads(out)["data"]["pictures"] == 3
    assert "with canny" in err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["VAR", "--control-root", "IMAGES"], "no control branch; leave out --control-root"),
        (["VAR", "--annotator-onnx", "net.onnx"], "no control branch; leave out --annotator-onnx"),
        (["VAR", "--data", "OTHER"], "the model 5 .* give a folder of the model's classes"),
        (["VAR", "--classes", "fox"], "class 'fox' of 'fox' isn't there"),
        (["VAR", "--batch", "0"], "at least 1"),
        (["VAR", "--limit", "-1"], "at least 0"),
        (["VAR", "--cfg", "nan"], "a number from 0"),
        (["VAR", "--top-p", "1.5"], "between 0 and 1"),
        (["VAR", "--device", "abacus"], "can't be used"),
        (["VAR", "--threads", "-1"], "at least 0"),
        (["VAR", "--tolerance", "65"], "tolerance is 65; it must be at most 64 pixels"),
        (["VAR", "-o", "report.txt"], "give a .json"),
        (["VAR", "--sheet", "nowhere/s.png"], "in a folder that exists"),
    ],
)
def test_what_cannot_be_done_is_said_with_a_remedy(
    argv: list[str], words: str, checkpoints: Callable[[str], Path], image_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "ant").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "ant" / "a.png")
    names = {"VAR": checkpoints("var"), "IMAGES": image_folder, "OTHER": tmp_path}
    with pytest.raises((EvaluationError, DataError, OutputError), match=words):
        run("--features", "none", "--split", "all", "--data", image_folder, *(names.get(a, a) for a in argv))


def test_a_contact_sheet_keeps_large_images_readable() -> None:
    rows = [[np.zeros((300, 300, 3), np.uint8)] * 2]
    assert contact_sheet(rows, ["a", "b"]).size == (2 * 257 + 4 + 4, 16 + 260 + 4)


# --- real feature networks

efficientnet = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite_pytorch") is None, reason="needs efficientnet-lite-pytorch"
)
fidelity = pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is None, reason="needs torch-fidelity")


@efficientnet
def test_features_see_what_an_image_shows() -> None:
    weights = WEIGHTS_ROOT.expanduser() / "efficientnet.safetensors"
    if not weights.is_file():
        pytest.skip("weights are not cached: python -m car_train weights efficientnet")
    network = EfficientNetLite0(weights)
    files = sorted((Path(__file__).parents[2] / "examples").glob("*.png"))
    same = [Image.open(f).convert("RGB").resize((64, 64)) for f in files]
    moved = [image.rotate(8, fillcolor=image.getpixel((0, 0)), translate=(3, 2)) for image in same]
    a, b = (network(np.stack([np.asarray(i) for i in images])) for images in (same, moved))
    assert a.shape == (len(files), 1280)
    assert a.dtype == np.float32
    nearest = np.linalg.norm(a[:, None] - b[None], axis=2).argmin(1)
    assert (nearest == np.arange(len(files))).all()
    np.testing.assert_allclose(network(np.asarray(same[0])[None])[0], a[0], rtol=1e-3, atol=1e-4)
    assert network.logits(a[:1]).shape == (1, 1000)
    assert network.about["sha256"] == sha256(weights)


@efficientnet
def test_other_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(EvaluationError, match="not the weights of EfficientNet-Lite0"):
        EfficientNetLite0(tmp_path / "x.safetensors")


@fidelity
def test_inception_weights_cannot_run_code(tmp_path: Path) -> None:
    class Mischief:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "done"),)

    torch.save({"fc.weight": Mischief()}, tmp_path / "w.pth")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    for name in ("w.pth", "other.pth", "missing.pth"):
        with pytest.raises(EvaluationError, match="not torch-fidelity's Inception weights"):
            Inception(tmp_path / name)
    assert not (tmp_path / "done").exists()


@fidelity
def test_importing_torch_fidelity_leaves_no_stand_in_behind() -> None:
    import sys

    library = import_torch_fidelity()
    assert callable(library.calculate_metrics)
    left = sys.modules.get("torchvision")
    assert left is None or left.__spec__ is not None  # the real one, if any


class Tensors(torch.utils.data.Dataset[torch.Tensor]):
    """Images as torch-fidelity takes them: uint8 [3, H, W]."""

    def __init__(self, images_BHW3: np.ndarray):
        self.images = torch.from_numpy(images_BHW3).permute(0, 3, 1, 2).contiguous()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


@fidelity
@pytest.mark.slow
def test_inception_scores_are_the_librarys_own(
    checkpoints: Callable[[str], Path], image_folder: Path, tmp_path: Path
) -> None:
    library = import_torch_fidelity()
    from torch_fidelity import feature_extractor_inceptionv3 as module

    # Random weights in the published format: the numbers mean nothing, and all of the way is run.
    torch.manual_seed(0)
    original, module.load_state_dict_from_url = module.load_state_dict_from_url, lambda *_, **__: {}
    try:
        build = type("Build", (module.FeatureExtractorInceptionV3,), {"load_state_dict": lambda *_: None})
        torch.save(build("random", ["2048"]).state_dict(), tmp_path / "w.pth")
    finally:
        module.load_state_dict_from_url = original
    draw = np.random.default_rng(0)
    real, made = (draw.integers(0, 255, (64, 20, 20, 3), dtype=np.uint8) // k for k in (1, 2))
    network = Inception(tmp_path / "w.pth")
    found = network.scores(*(np.concatenate([network(x[:32]), network(x[32:])]) for x in (real, made)))
    expected = library.calculate_metrics(
        input1=Tensors(made),
        input2=Tensors(real),
        cuda=False,
        fid=True,
        isc=True,
        prc=True,
        verbose=False,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(tmp_path / "w.pth"),
        cache=False,
    )
    assert found["fid"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-3)
    assert found["inception_score"] == pytest.approx(expected["inception_score_mean"], rel=1e-5)
    assert (found["precision"], found["recall"]) == (expected["precision"], expected["recall"])
    report = evaluate.evaluate(options(checkpoints("var"), image_folder), inception=network)
    assert report["inception"]["generated"]["fid"] is None  # 34 images
    assert report["inception"]["generated"]["inception_score"] >= 1
    assert any("no FID of 34" in note for note in report["notes"])


def test_the_tokenizer_alone_has_a_perceptual_distance_and_text(
    checkpoints: Callable[[str], Path], image_folder: Path
) -> None:
    from car_train.training.perceptual import Perceptual

    weights = WEIGHTS_ROOT.expanduser() / "squeezenet.safetensors"
    if not weights.is_file():
        pytest.skip("weights are not cached: python -m car_train weights squeezenet")
    wanted = options(checkpoints("canny"), image_folder, limit=6, tokenizer=True)
    found = evaluate.evaluate(wanted, features=Thumbnail(), perceptual=Perceptual(weights))
    assert not {"teacher_forced", "control"} & set(found)
    assert {k for k, v in found["distribution"].items() if isinstance(v, dict)} == {"floor", "reconstruction"}
    model = checkpoint.load(checkpoints("canny"))
    data = ControlledImages(image_folder, 20, split="all")
    images = torch.stack([data[i]["image"] for i in choose(data, wanted)])
    recon = model.vqvae.decode(model.vqvae.encode(images))
    assert found["reconstruction"]["perceptual"] == pytest.approx(float(Perceptual(weights)(recon, images)), rel=1e-4)
    assert set(found["text"]) == {"8", "12", "16"}
    assert found["text"]["8"]["drawn_letters"] == 1
    assert "text read after the tokenizer" in table(found)
    assert ", perceptual 0." in table(found)

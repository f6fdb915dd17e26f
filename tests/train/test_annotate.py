"""Controls made beforehand: what an annotator makes of an image, with ONNX nets of every kind, and of a folder."""

import argparse
import errno
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageDraw

from car_train.conventions import PRESETS
from car_train.data import annotate as module
from car_train.data.annotate import hed_work_size, make_annotator
from car_train.data.annotator import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Annotator,
    AnnotatorError,
    NetSettings,
    UnusableImageError,
)
from car_train.data.annotator_net import AnnotatorNet, normals_to_pixels
from car_train.data.control_folder import annotate_folder, read_image
from car_train.data.controls import CONTROL_TYPES, NEEDS_ALPHA, make_control, on_white
from car_train.data.dataset import ControlledImages
from car_train.data.folder import DataError
from car_train.data.pretrained import WeightsError
from car_train.files import sha256
from fixtures.random_images import drawing

REAL_HED = Path("~/.cache/car/weights/hed.onnx").expanduser()
PLAIN = NetSettings(range="0-1", multiple=1)
LUMA = np.array([0.25, 0.5, 0.125], np.float32)  # exact in float16

Dims = list[int | str]


# --- nets -----------------------------------------------------------------------------------------------------------


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, Dims]],
    outputs: list[str] | None = None,
    constants: dict[str, np.ndarray] | None = None,
) -> Path:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(name, kind, dims) for name, (kind, dims) in inputs.items()],
        [helper.make_empty_tensor_value_info(name) for name in outputs or ["map"]],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def linear(
    path: Path,
    weights: np.ndarray = LUMA[None],
    *,
    kind: int = TensorProto.FLOAT,
    dims: Dims | None = None,
    nhwc: bool = False,
    out: str = "nchw",
) -> Path:
    """A 1×1 convolution [outputs, 3] on what goes in. out: layout of the map, "nchw", "nhwc" or "bhw"."""
    dims = dims or (["b", "h", "w", 3] if nhwc else ["b", 3, "h", "w"])
    nodes: list[onnx.NodeProto] = []
    x = "image"
    if kind != TensorProto.FLOAT:
        nodes.append(helper.make_node("Cast", [x], ["float"], to=TensorProto.FLOAT))
        x = "float"
    if nhwc:
        nodes.append(helper.make_node("Transpose", [x], ["planes"], perm=[0, 3, 1, 2]))
        x = "planes"
    nodes.append(helper.make_node("Conv", [x, "kernel"], ["map" if out == "nchw" else "conv"]))
    if out == "nhwc":
        nodes.append(helper.make_node("Transpose", ["conv"], ["map"], perm=[0, 2, 3, 1]))
    if out == "bhw":
        nodes.append(helper.make_node("Squeeze", ["conv", "one"], ["map"]))
    constants = {"kernel": weights.astype(np.float32)[:, :, None, None], "one": np.array([1])}
    return save(path, nodes, {"image": (kind, dims)}, constants=constants)


def noise_image(seed: int = 0, height: int = 24, width: int = 24, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def stretched(x: np.ndarray) -> np.ndarray:
    return (x - x.min()) / (x.max() - x.min())


def assert_near(control: np.ndarray, expected_HW: np.ndarray) -> None:
    """All three channels, 0…1 → 0…255. One level: the value may fall on the other side of a rounding border."""
    assert control.dtype == np.uint8
    assert control.shape == (*expected_HW.shape, 3)
    assert np.abs(control.astype(int) - np.rint(255 * expected_HW)[..., None]).max() <= 1


@pytest.mark.parametrize("out", ["nchw", "nhwc", "bhw"])
@pytest.mark.parametrize("nhwc", [False, True])
@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.UINT8])
def test_a_depth_net_of_any_layout_gives_its_map_stretched_to_the_full_range(
    tmp_path: Path, kind: int, nhwc: bool, out: str
) -> None:
    net = linear(tmp_path / "net.onnx", kind=kind, nhwc=nhwc, out=out)
    settings = NetSettings(multiple=1) if kind == TensorProto.UINT8 else replace(PLAIN, range="0-255")
    annotate = make_annotator("depth", onnx=net, settings=settings, threads=1)
    image = noise_image(1, 20, 28)
    control = annotate(image)
    assert_near(control, stretched(image @ LUMA))
    assert (control.min(), control.max()) == (0, 255)


@pytest.mark.parametrize("control_type", CONTROL_TYPES)
def test_any_type_can_come_from_a_net_and_needs_no_alpha_then(tmp_path: Path, control_type: str) -> None:
    weights = np.eye(3) if control_type == "normal" else LUMA[None]
    annotate = make_annotator(control_type, onnx=linear(tmp_path / "net.onnx", weights), settings=PLAIN)
    assert not annotate.needs_alpha
    assert annotate(noise_image()).shape == (24, 24, 3)


def test_transparent_parts_are_white_to_a_net(tmp_path: Path) -> None:
    annotate = make_annotator("hed", onnx=linear(tmp_path / "net.onnx"), settings=PLAIN)
    rgba = noise_image(2, channels=4)
    np.testing.assert_array_equal(annotate(rgba), annotate(on_white(rgba)))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"range": "0-1"}, lambda x: x / 255),
        ({"range": "0-255", "std": (400.0, 500.0, 600.0)}, lambda x: x / [400, 500, 600]),
        ({"range": "-1-1"}, lambda x: x / 127.5 - 1),
        ({"mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 4.0)}, lambda x: (x / 255 - [0.1, 0.2, 0.3]) / [1, 2, 4]),
        ({"bgr": True, "mean": (0.1, 0.2, 0.3)}, lambda x: x[..., ::-1] / 255 - [0.1, 0.2, 0.3]),
        ({}, lambda x: x / 255),
    ],
)
@pytest.mark.parametrize("channel", [0, 2])
@pytest.mark.filterwarnings("ignore:the net gives values far outside")  # −1 of "-1-1"; cut off here too
def test_what_goes_into_the_net_is_normalised_as_asked(
    tmp_path: Path, settings: dict[str, Any], expected: Callable[[np.ndarray], np.ndarray], channel: int
) -> None:
    net = linear(tmp_path / "net.onnx", np.eye(3)[[channel]])
    annotate = make_annotator("hed", onnx=net, settings=NetSettings(multiple=1, **settings))
    image = noise_image(3)
    assert_near(annotate(image), np.clip(expected(image)[..., channel], 0, 1))


@pytest.mark.parametrize("bgr", [False, True])
def test_depth_and_normal_nets_get_imagenets_normalisation_by_default(bgr: bool) -> None:
    x = np.array([10, 100, 200], np.float32)
    order = slice(None, None, -1 if bgr else 1)
    for control_type in ("depth", "normal"):
        factor, summand = NetSettings(bgr=bgr).normalisation(control_type)
        expected = (x / 255 - np.array(IMAGENET_MEAN)[order]) / np.array(IMAGENET_STD)[order]
        np.testing.assert_allclose(x * factor + summand, expected, rtol=1e-5)
        factor, summand = NetSettings(bgr=bgr, range="0-1").normalisation(control_type)
        np.testing.assert_allclose(x * factor + summand, x / 255, rtol=1e-6)


def test_a_net_of_fixed_size_gets_that_size_and_the_map_comes_back_at_the_images(tmp_path: Path) -> None:
    net = linear(tmp_path / "net.onnx", dims=[1, 3, 16, 48])
    annotate = make_annotator("depth", onnx=net, settings=PLAIN)
    image = np.asarray(Image.fromarray(noise_image(4, 4, 4)).resize((40, 32), Image.Resampling.BICUBIC))
    seen = np.asarray(Image.fromarray(image).resize((48, 16), Image.Resampling.BICUBIC)) @ LUMA
    back = Image.fromarray(seen.astype(np.float32)).resize((40, 32), Image.Resampling.HAMMING)
    assert_near(annotate(image), stretched(np.asarray(back)))


def test_sides_are_rounded_up_to_the_multiple_that_a_net_needs(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("SpaceToDepth", ["image"], ["blocks"], blocksize=8),
        helper.make_node("DepthToSpace", ["blocks"], ["whole"], blocksize=8),
        helper.make_node("Conv", ["whole", "kernel"], ["map"]),
    ]
    constants = {"kernel": LUMA[None, :, None, None]}
    net = save(tmp_path / "net.onnx", nodes, {"image": (TensorProto.FLOAT, ["b", 3, "h", "w"])}, constants=constants)
    annotate = make_annotator("depth", onnx=net, settings=replace(PLAIN, multiple=8))
    assert annotate(noise_image(5, 20, 30)).shape == (20, 30, 3)
    with pytest.raises(AnnotatorError, match=r"'image' float32 \[1, 3, 20, 30\].*--multiple"):
        make_annotator("depth", onnx=net, settings=PLAIN)(noise_image(5, 20, 30))


@pytest.mark.parametrize(
    ("settings", "height", "width", "expected"),
    [
        ({}, 64, 64, (64, 64)),
        ({}, 65, 1, (96, 32)),
        ({"multiple": 14, "work_size": 518}, 64, 64, (518, 518)),
        ({"multiple": 1, "work_size": 128, "margin": 8}, 32, 64, (80, 144)),
        ({"multiple": 1, "work_size": 4}, 1, 64, (1, 4)),
    ],
)
def test_the_side_a_net_works_at(
    tmp_path: Path, settings: dict[str, int], height: int, width: int, expected: tuple[int, int]
) -> None:
    net = AnnotatorNet(linear(tmp_path / "net.onnx"), "depth", NetSettings(**settings), 1)
    assert net._sides(height, width) == expected


def test_a_map_of_half_the_size_is_enlarged(tmp_path: Path) -> None:
    nodes = [helper.make_node("Conv", ["image", "kernel"], ["map"], strides=[2, 2])]
    constants = {"kernel": np.broadcast_to(LUMA[None, :, None, None] / 4, (1, 3, 2, 2)).copy()}
    net = save(tmp_path / "net.onnx", nodes, {"image": (TensorProto.FLOAT, ["b", 3, "h", "w"])}, constants=constants)
    image = np.repeat(np.repeat(noise_image(6, 8, 8), 4, axis=0), 4, axis=1)
    control = make_annotator("hed", onnx=net, settings=PLAIN)(image)
    # In the middle of a block of 4×4 pixels the map is what the block is.
    assert_near(control[1::4, 1::4], (image @ LUMA)[1::4, 1::4] / 255)


def test_a_margin_keeps_a_nets_zero_padding_out_of_the_control(tmp_path: Path) -> None:
    """A 5×5 mean over a grey image is the grey itself; darker along the border, where it reaches zeros."""
    nodes = [helper.make_node("Conv", ["image", "kernel"], ["map"], pads=[2] * 4)]
    constants = {"kernel": np.full((1, 3, 5, 5), 1 / 75, np.float32)}
    net = save(tmp_path / "net.onnx", nodes, {"image": (TensorProto.FLOAT, ["b", 3, "h", "w"])}, constants=constants)
    grey = np.full((16, 20, 3), 200, np.uint8)
    without = make_annotator("hed", onnx=net, settings=PLAIN)(grey)
    assert without[0, 0, 0] < 100
    assert (make_annotator("hed", onnx=net, settings=replace(PLAIN, margin=2))(grey) == 200).all()


def test_margins_lie_within_a_fixed_size(tmp_path: Path) -> None:
    net = linear(tmp_path / "net.onnx", dims=[1, 3, 32, 32])
    image = noise_image(7, 24, 24)
    annotate = make_annotator("hed", onnx=net, settings=replace(PLAIN, margin=4))
    assert_near(annotate(image), image @ LUMA / 255)
    with pytest.raises(AnnotatorError, match="margin of 16"):
        make_annotator("hed", onnx=net, settings=replace(PLAIN, margin=16))(image)


def test_several_images_at_once_give_what_they_give_alone(tmp_path: Path) -> None:
    images = [noise_image(i, *size) for i, size in enumerate([(24, 24), (16, 24), (24, 24), (24, 24), (16, 24)])]
    for name, dims in (("any", None), ("three", [3, 3, "h", "w"]), ("one", [1, 3, "h", "w"])):
        annotate = make_annotator("depth", onnx=linear(tmp_path / f"{name}.onnx", dims=dims), settings=PLAIN)
        for image, control in zip(images, annotate.batch(images), strict=True):
            assert_near(control, stretched(image @ LUMA))


def test_invert_turns_far_and_near_round(tmp_path: Path) -> None:
    net = linear(tmp_path / "net.onnx")
    image = noise_image(8)
    assert_near(
        make_annotator("depth", onnx=net, settings=replace(PLAIN, invert=True))(image), 1 - stretched(image @ LUMA)
    )


def test_depth_of_one_value_is_black(tmp_path: Path) -> None:
    annotate = make_annotator("depth", onnx=linear(tmp_path / "net.onnx"), settings=PLAIN)
    assert not annotate(np.full((8, 8, 3), 77, np.uint8)).any()


def test_sigmoid_makes_edges_of_logits(tmp_path: Path) -> None:
    net = linear(tmp_path / "net.onnx", 8 * LUMA[None])
    image = noise_image(9)
    annotate = make_annotator("hed", onnx=net, settings=NetSettings(range="-1-1", multiple=1, sigmoid=True))
    assert_near(annotate(image), 1 / (1 + np.exp(-8 * ((image / 127.5 - 1) @ LUMA))))


def test_logits_without_sigmoid_are_cut_off_with_a_warning(tmp_path: Path) -> None:
    annotate = make_annotator("canny", onnx=linear(tmp_path / "net.onnx", 4 * LUMA[None]), settings=PLAIN)
    image = noise_image(10)
    with pytest.warns(UserWarning, match="--sigmoid"):
        control = annotate(image)
    assert_near(control, np.minimum(4 * (image @ LUMA) / 255, 1))


def test_three_equal_channels_of_edges_are_one(tmp_path: Path) -> None:
    image = noise_image(11)
    annotate = make_annotator("sketch", onnx=linear(tmp_path / "net.onnx", np.eye(3)), settings=PLAIN)
    assert_near(annotate(image), image.mean(axis=2) / 255)


@pytest.mark.parametrize("out", ["nchw", "nhwc"])
@pytest.mark.parametrize("flip", ["", "y", "xz"])
def test_normals_are_of_unit_length_and_turned_as_asked(tmp_path: Path, out: str, flip: str) -> None:
    image = noise_image(12)
    annotate = make_annotator(
        "normal",
        onnx=linear(tmp_path / "net.onnx", 5 * np.eye(3), out=out),
        settings=NetSettings(range="-1-1", multiple=1, flip=flip),
        convention=PRESETS["normal-directx"],
    )
    n = image / 127.5 - 1
    n = n / np.linalg.norm(n, axis=2, keepdims=True) * [-1 if axis in flip else 1 for axis in "xyz"]
    assert np.abs(annotate(image) - np.rint((n + 1) * 127.5)).max() <= 1


@pytest.mark.parametrize("as_uint8", [False, True])
def test_unsigned_normals_are_read_as_colours(tmp_path: Path, as_uint8: bool) -> None:
    """From 0…1, or from 0…255 in a uint8 map: a vector of unit length comes out as the colour that went in."""
    nodes = [helper.make_node("Identity", ["image"], ["map"])]
    kind = TensorProto.UINT8 if as_uint8 else TensorProto.FLOAT
    net = save(tmp_path / "net.onnx", nodes, {"image": (kind, ["b", "h", "w", 3])})
    settings = NetSettings(multiple=1, **({} if as_uint8 else {"range": "0-1", "unsigned": True}))
    image = normals_to_pixels(np.random.default_rng(0).standard_normal((8, 8, 3)).astype(np.float32))
    annotate = make_annotator("normal", onnx=net, settings=settings, convention=PRESETS["normal-directx"])
    assert np.abs(annotate(image).astype(int) - image).max() <= 1
    published = make_annotator("normal", onnx=net, settings=settings)(image)  # red to the left, green up
    turned = [255, 255, 0] + image.astype(int) * [-1, -1, 1]
    assert np.abs(published.astype(int) - turned).max() <= 1


def test_a_normal_of_no_length_looks_at_the_viewer() -> None:
    assert normals_to_pixels(np.zeros((1, 1, 3), np.float32), "z").tolist() == [[[128, 128, 255]]]


def test_values_that_are_not_finite_are_an_error_of_the_image(tmp_path: Path) -> None:
    nodes = [helper.make_node("Log", ["image"], ["log"]), helper.make_node("Conv", ["log", "kernel"], ["map"])]
    constants = {"kernel": LUMA[None, :, None, None]}
    net = save(tmp_path / "net.onnx", nodes, {"image": (TensorProto.FLOAT, ["b", 3, "h", "w"])}, constants=constants)
    annotate = make_annotator("depth", onnx=net, settings=PLAIN)
    image = np.maximum(noise_image(13), 1)
    assert annotate(image).any()
    image[3, 4] = 0
    with pytest.raises(UnusableImageError, match="not finite"):
        annotate(image)


# --- nets that cannot be used ---------------------------------------------------------------------------------------


def two_inputs(path: Path) -> Path:
    nodes = [helper.make_node("Mul", ["image", "scale"], ["map"])]
    return save(path, nodes, {"image": (1, ["b", 3, "h", "w"]), "scale": (1, [1])})


def two_outputs(path: Path) -> Path:
    nodes = [
        helper.make_node("Conv", ["image", "kernel"], ["map"]),
        helper.make_node("Neg", ["map"], ["minus"]),
    ]
    constants = {"kernel": LUMA[None, :, None, None]}
    return save(path, nodes, {"image": (1, ["b", 3, "h", "w"])}, ["map", "minus"], constants)


def identity(path: Path, kind: int, dims: Dims) -> Path:
    return save(path, [helper.make_node("Identity", ["image"], ["map"])], {"image": (kind, dims)})


def flattened(path: Path) -> Path:
    return save(path, [helper.make_node("Flatten", ["image"], ["map"])], {"image": (1, ["b", 3, "h", "w"])})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (two_inputs, r"2 inputs \(image, scale\), not one; export it"),
        (two_outputs, r"outputs are map, minus, and one is used; give it with --tensor"),
        (lambda p: identity(p, TensorProto.INT64, ["b", 3, "h", "w"]), r"input 'image' is tensor\(int64\); export"),
        (lambda p: identity(p, 1, [3, "h", "w"]), r"input 'image' is \[3, 'h', 'w'\], not \[B, 3, h, w\]"),
        (
            lambda p: identity(p, 1, [1, 1, "h", "w"]),
            r"doesn't say where its channels are|without the three channels",
        ),
        (lambda p: identity(p, 1, [1, 1, 64, 64]), r"without the three channels of an image; export"),
        (lambda p: identity(p, 1, ["b", "c", "h", "w"]), r"doesn't say where its channels are; give --layout"),
    ],
)
def test_a_net_of_the_wrong_form_is_refused_when_it_is_opened(
    tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    with pytest.raises(AnnotatorError, match=message):
        make_annotator("depth", onnx=make(tmp_path / "net.onnx"))


@pytest.mark.parametrize(
    ("make", "control_type", "message"),
    [
        (flattened, "depth", r"output 'map' is float32 \[1, 1728\] for 1 images, not \[B, 1, h, w\]"),
        (lambda p: linear(p, np.eye(3)), "depth", r"\[1, 3, 24, 24\].*for depth, or name another with --tensor"),
        (linear, "normal", r"\[1, 1, 24, 24\] for 1 images, not \[B, 3, h, w\] or \[B, h, w, 3\]; export"),
        (lambda p: linear(p, np.eye(3)[:2]), "hed", r"\[1, 2, 24, 24\].*not \[B, 1, h, w\]"),
    ],
)
def test_a_map_of_the_wrong_form_is_refused(
    tmp_path: Path, make: Callable[[Path], Path], control_type: str, message: str
) -> None:
    annotate = make_annotator(control_type, onnx=make(tmp_path / "net.onnx"), settings=PLAIN)
    with pytest.raises(AnnotatorError, match=message):
        annotate(noise_image())


def test_an_output_is_chosen_by_name(tmp_path: Path) -> None:
    net = two_outputs(tmp_path / "net.onnx")
    plus, minus = (
        make_annotator("depth", onnx=net, settings=replace(PLAIN, output=name))(noise_image())
        for name in ("map", "minus")
    )
    assert np.abs(plus.astype(int) + minus - 255).max() <= 1
    with pytest.raises(AnnotatorError, match="none is 'plus'"):
        make_annotator("depth", onnx=net, settings=replace(PLAIN, output="plus"))


def test_the_layout_can_be_given_where_the_net_does_not_say_it(tmp_path: Path) -> None:
    net = linear(tmp_path / "net.onnx", dims=["b", "h", "w", "c"], nhwc=True)
    image = noise_image(14)
    annotate = make_annotator("hed", onnx=net, settings=replace(PLAIN, layout="nhwc"))
    assert_near(annotate(image), image @ LUMA / 255)


@pytest.mark.parametrize("content", [None, b"", b"not a net"])
def test_a_file_that_is_no_net_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "net.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AnnotatorError, match=r"net\.onnx (is not a file; give|cannot be opened by ONNX Runtime)"):
        make_annotator("depth", onnx=path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"range": "0-2"}, "no range '0-2'; choose"),
        ({"mean": (0.5, 0.5)}, "three numbers"),
        ({"std": (1.0, 0.0, 1.0)}, "not positive"),
        ({"mean": (float("nan"), 0.0, 0.0)}, "three numbers"),
        ({"layout": "chw"}, "no layout 'chw'"),
        ({"flip": "w"}, "no axes 'w'"),
        ({"multiple": 0}, "multiple 0 is too small"),
        ({"margin": -1}, "margin -1 is too small"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AnnotatorError, match=message):
        NetSettings(**settings)


@pytest.mark.parametrize(
    ("control_type", "settings"),
    [
        ("depth", {"sigmoid": True}),
        ("normal", {"invert": True}),
        ("hed", {"unsigned": True}),
        ("depth", {"flip": "y"}),
    ],
)
def test_settings_that_mean_nothing_for_the_type_are_refused(
    tmp_path: Path, control_type: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(AnnotatorError, match=f"means nothing for '{control_type}'; leave it out"):
        make_annotator(control_type, onnx=linear(tmp_path / "net.onnx"), settings=NetSettings(**settings))


def test_a_uint8_net_takes_no_normalisation(tmp_path: Path) -> None:
    net = linear(tmp_path / "net.onnx", kind=TensorProto.UINT8)
    with pytest.raises(AnnotatorError, match="takes 0…255 as it is; leave out range"):
        make_annotator("depth", onnx=net, settings=NetSettings(mean=(0.5, 0.5, 0.5)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"control_type": "edges"}, "no annotator 'edges'; choose one of"),
        ({"control_type": "depth", "soft": True}, "soft is"),
        ({"control_type": "canny", "settings": NetSettings(bgr=True)}, "without one; give it with --onnx"),
        ({"control_type": "hed", "settings": NetSettings(margin=3)}, "all but the work size"),
        ({"control_type": "hed", "soft": True, "settings": NetSettings(work_size=64)}, "without one"),
        ({"control_type": "canny", "threads": -1}, "-1 threads"),
    ],
)
def test_annotators_that_make_no_sense_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(AnnotatorError, match=message):
        make_annotator(arguments.pop("control_type"), **arguments)


# --- without a net of one's own -------------------------------------------------------------------------------------


@pytest.mark.parametrize("control_type", CONTROL_TYPES)
def test_without_a_net_controls_are_those_made_on_the_fly(control_type: str) -> None:
    image = np.asarray(drawing())
    annotate = make_annotator(control_type, soft=control_type == "hed")
    assert_same_control(annotate(image), make_control(image, control_type), control_type)


def assert_same_control(a: np.ndarray, b: np.ndarray, control_type: str) -> None:
    """Equal; depth and normal to one level, since OpenCV's distance transform of one mask differs in its last bit
    from call to call (measured: 5 values of 6,912, by one)."""
    assert a.shape == b.shape
    assert np.abs(a.astype(int) - b).max() <= (control_type in NEEDS_ALPHA)


@pytest.mark.parametrize("channels", [3, 4])
def test_depth_without_a_net_needs_transparency(channels: int) -> None:
    image = np.full((16, 16, channels), 255, np.uint8)
    with pytest.raises(UnusableImageError, match=r"alpha channel.*--onnx"):
        make_annotator("depth")(image)


@pytest.mark.parametrize("image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32), noise_image(0, 0, 8)])
def test_what_is_no_image_is_refused(image: np.ndarray) -> None:
    with pytest.raises(AnnotatorError, match=r"uint8 \[H, W, 3 or 4\], not"):
        make_annotator("canny")(image)


def test_hed_is_the_fetched_network_at_twice_the_side_with_a_margin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its place a net with its input and output, whose map is the share of the image's height."""
    nodes = [
        helper.make_node("Shape", ["image"], ["h"], start=1, end=2),
        helper.make_node("Cast", ["h"], ["height"], to=1),
        helper.make_node("Div", ["height", "thousand"], ["share"]),
        helper.make_node("Cast", ["image"], ["float"], to=1),
        helper.make_node("ReduceMean", ["float"], ["mean"], axes=[3], keepdims=0),
        helper.make_node("Mul", ["mean", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "share"], ["map"]),
    ]
    constants = {"thousand": np.float32([1000]), "zero": np.float32([0])}
    net = save(tmp_path / "hed.onnx", nodes, {"image": (TensorProto.UINT8, ["b", "h", "w", 3])}, constants=constants)
    monkeypatch.setattr(module, "fetch", lambda name: {"hed": net}[name])
    assert (make_annotator("hed")(noise_image(0, 64, 64)) == round(255 * (2 * 64 + 16) / 1000)).all()
    fixed = make_annotator("hed", settings=NetSettings(work_size=100))
    assert (fixed(noise_image(0, 64, 64)) == round(255 * (100 + 16) / 1000)).all()


def test_hed_looks_at_small_images_enlarged() -> None:
    assert [hed_work_size(side) for side in (32, 64, 128, 200, 256, 512)] == [64, 128, 256, 256, 256, 512]


def test_weights_that_cannot_be_fetched_are_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Path:
        raise WeightsError(f"no network for {name}; try again")

    monkeypatch.setattr(module, "fetch", fail)
    with pytest.raises(AnnotatorError, match="no network for hed; try again"):
        make_annotator("hed")


@pytest.mark.skipif(not REAL_HED.is_file(), reason=f"no {REAL_HED}; `python -m car_train weights hed` fetches it")
def test_the_real_hed_draws_outline_and_inner_shape_and_no_frame() -> None:
    """A ring on white at 64×64: bright along both circles, dark between them, within and without."""
    image = Image.new("RGB", (256, 256), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((28, 28, 228, 228), fill=(40, 90, 200))
    draw.ellipse((88, 88, 168, 168), fill=(250, 220, 90))
    control = make_annotator("hed", threads=1)(np.asarray(image.resize((64, 64), Image.Resampling.BOX)))[..., 0]
    y, x = np.mgrid[:64, :64] - 31.5
    r = np.hypot(x, y)
    for circle in (25, 10):
        assert control[np.abs(r - circle) < 0.7].mean() > 180
    assert control[np.abs(r - 17.5) < 2].mean() < 60
    assert control[r < 4].mean() < 30
    border = np.ones((64, 64), bool)
    border[2:-2, 2:-2] = False
    assert control[border].max() <= 5


# --- a folder -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three drawings in each of two classes, one in a sub-folder, and a photo as JPEG."""
    root = tmp_path / "images"
    for c, name in enumerate(["ant", "cat"]):
        (root / name / "more").mkdir(parents=True)
        for i in range(2):
            drawing(10 * c + i).save(root / name / f"thing.{i}.png")
        drawing(10 * c + 2).save(root / name / "more" / "thing.2.webp", lossless=True)
    Image.fromarray(noise_image(0, 40, 60)).save(root / "cat" / "photo.jpg")
    (root / "dataset.json").write_text("{}")
    return root


def tree(root: Path) -> list[str]:
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())


CONTROLS = [
    "ant/more/thing.2.png",
    "ant/thing.0.png",
    "ant/thing.1.png",
    "cat/more/thing.2.png",
    "cat/photo.png",
    "cat/thing.0.png",
    "cat/thing.1.png",
    "controls.json",
]


@pytest.mark.parametrize("control_type", ["canny", "hed", "sketch"])
def test_training_takes_the_folder_and_sees_what_it_would_have_made(
    folder: Path, tmp_path: Path, control_type: str
) -> None:
    annotate = make_annotator(control_type, soft=control_type == "hed")
    report = annotate_folder(folder, tmp_path / "controls", annotate, size=32)
    assert (report.made, report.present, report.skipped) == (7, 0, ())
    assert tree(tmp_path / "controls") == CONTROLS
    fly = ControlledImages(folder, 32, split="all", control_type=control_type)
    ready = ControlledImages(folder, 32, split="all", control_type=control_type, control_root=tmp_path / "controls")
    assert len(fly) == len(ready) == 7
    for a, b in zip((fly[i] for i in range(7)), (ready[i] for i in range(7)), strict=True):
        assert torch.equal(a["control"], b["control"])
        assert torch.equal(a["image"], b["image"])


def test_normals_keep_their_colours_and_grey_is_written_as_grey(folder: Path, tmp_path: Path) -> None:
    (folder / "cat" / "photo.jpg").unlink()
    for control_type, mode in (("normal", "RGB"), ("depth", "L")):
        annotate_folder(folder, tmp_path / control_type, make_annotator(control_type), size=32)
        path = tmp_path / control_type / "ant" / "thing.0.png"
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("PNG", mode, (32, 32))
            shown = np.asarray(image.convert("RGB"))
        rgba = read_image(folder / "ant" / "thing.0.png", 32)
        assert_same_control(shown, make_control(rgba, control_type), control_type)


def test_a_net_annotates_a_folder_in_batches(folder: Path, tmp_path: Path) -> None:
    for name, batch, dims in (("one", 1, None), ("three", 3, None), ("fixed", 1, [4, 3, 32, 32])):
        net = linear(tmp_path / f"{name}.onnx", dims=dims)
        annotate_folder(
            folder, tmp_path / name, make_annotator("depth", onnx=net, settings=PLAIN), size=32, batch=batch
        )
    for path in CONTROLS[:-1]:
        shown = [np.asarray(Image.open(tmp_path / name / path)) for name in ("one", "three", "fixed")]
        np.testing.assert_array_equal(shown[0], shown[1])
        np.testing.assert_array_equal(shown[0], shown[2])


def test_images_are_turned_as_their_exif_says(tmp_path: Path) -> None:
    (tmp_path / "images" / "a").mkdir(parents=True)
    image = Image.fromarray(noise_image(1, 20, 30))
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter turn clockwise
    image.save(tmp_path / "images" / "a" / "x.png", exif=exif)
    turned = image.transpose(Image.Transpose.ROTATE_270).resize((16, 16), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(
        read_image(tmp_path / "images" / "a" / "x.png", 16, "stretch")[..., :3], np.asarray(turned)
    )


def test_by_default_controls_are_as_large_as_the_image_up_to_256(tmp_path: Path) -> None:
    (tmp_path / "images" / "a").mkdir(parents=True)
    for name, size in (("small", (20, 48)), ("large", (300, 280))):
        Image.new("RGB", size).save(tmp_path / "images" / "a" / f"{name}.png")
    annotate_folder(tmp_path / "images", tmp_path / "controls", make_annotator("canny"))
    sizes = {n: Image.open(tmp_path / "controls" / "a" / f"{n}.png").size for n in ("small", "large")}
    assert sizes == {"small": (20, 20), "large": (256, 256)}  # the middle
    annotate_folder(tmp_path / "images", tmp_path / "padded", make_annotator("canny"), fit="pad")
    assert Image.open(tmp_path / "padded" / "a" / "small.png").size == (48, 48)


def test_limit_takes_the_first_of_each_class(folder: Path, tmp_path: Path) -> None:
    report = annotate_folder(folder, tmp_path / "controls", make_annotator("canny"), limit=2)
    assert report.made == 4
    assert tree(tmp_path / "controls") == [
        "ant/more/thing.2.png",
        "ant/thing.0.png",
        "cat/more/thing.2.png",
        "cat/photo.png",
        "controls.json",
    ]


def test_what_is_there_is_kept_and_what_is_damaged_is_made_anew(folder: Path, tmp_path: Path) -> None:
    controls = tmp_path / "controls"
    annotate_folder(folder, controls, make_annotator("sketch"), size=32, limit=2)
    whole = (controls / "ant" / "thing.0.png").read_bytes()
    (controls / "ant" / "thing.0.png").write_bytes(whole[:-20])
    os.utime(controls / "cat" / "photo.png", (1, 1))
    report = annotate_folder(folder, controls, make_annotator("sketch"), size=32)
    assert (report.made, report.present) == (4, 3)
    assert (controls / "ant" / "thing.0.png").read_bytes() == whole
    assert (controls / "cat" / "photo.png").stat().st_mtime == 1


@pytest.mark.parametrize(("error", "seen"), [(KeyboardInterrupt, 3), (MemoryError, 3)])
def test_an_interrupted_run_leaves_whole_controls_and_continues(
    folder: Path, tmp_path: Path, error: type[BaseException], seen: int
) -> None:
    sketch, calls = make_annotator("sketch"), []

    def stop(images: Any) -> list[np.ndarray]:
        calls.append(len(images))
        if len(calls) > seen:
            raise error
        return sketch.make(images)

    with pytest.raises(error):
        annotate_folder(folder, tmp_path / "controls", replace(sketch, make=stop), size=32)
    assert len(tree(tmp_path / "controls")) == seen + 1
    report = annotate_folder(folder, tmp_path / "controls", sketch, size=32)
    assert (report.made, report.present) == (7 - seen, seen)
    assert tree(tmp_path / "controls") == CONTROLS


def test_a_run_that_died_while_writing_leaves_nothing_in_the_way(folder: Path, tmp_path: Path) -> None:
    """Killed between writing aside and renaming, once for the marker, once for a control."""
    controls = tmp_path / "controls"
    (controls / "ant").mkdir(parents=True)
    (controls / "ant").rmdir()
    (controls / ".controls.json.part").write_bytes(b"{")
    annotate_folder(folder, controls, make_annotator("canny"), limit=1)
    (controls / "cat" / ".photo.png.part").write_bytes(b"half")
    annotate_folder(folder, controls, make_annotator("canny"))
    assert tree(controls) == CONTROLS


def settings_of(controls: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((controls / "controls.json").read_text())
    return found


def test_other_settings_are_refused_and_overwrite_makes_all_anew(folder: Path, tmp_path: Path) -> None:
    controls = tmp_path / "controls"
    nets = [linear(tmp_path / f"{i}.onnx", (1 + i) * LUMA[None]) for i in range(2)]
    first = make_annotator("depth", onnx=nets[0], settings=PLAIN)
    annotate_folder(folder, controls, first, size=32)
    before = tree(controls), settings_of(controls)
    others = [
        (make_annotator("canny"), 32, "annotator"),
        (make_annotator("depth", onnx=nets[1], settings=PLAIN), 32, "net"),
        (make_annotator("depth", onnx=nets[0], settings=replace(PLAIN, invert=True)), 32, "invert"),
        (first, 48, "size"),
        (first, None, "size"),
    ]
    for annotate, size, what in others:
        with pytest.raises(AnnotatorError, match=f"made with other settings: .*{what}.*add --overwrite"):
            annotate_folder(folder, controls, annotate, size=size)
    assert (tree(controls), settings_of(controls)) == before
    # Of the old ones none stays, not even where this run makes none.
    report = annotate_folder(folder, controls, make_annotator("canny"), size=16, limit=1, overwrite=True)
    assert (report.made, report.present) == (2, 0)
    assert tree(controls) == ["ant/more/thing.2.png", "cat/more/thing.2.png", "controls.json"]
    assert Image.open(controls / "ant" / "more" / "thing.2.png").size == (16, 16)


def test_a_renamed_net_is_the_same_net(folder: Path, tmp_path: Path) -> None:
    net = linear(tmp_path / "a.onnx")
    annotate_folder(folder, tmp_path / "controls", make_annotator("depth", onnx=net), size=32)
    net = net.rename(tmp_path / "b.onnx")
    report = annotate_folder(folder, tmp_path / "controls", make_annotator("depth", onnx=net), size=32)
    assert (report.made, report.present) == (0, 7)


def test_overwrite_with_the_same_settings_makes_again_what_is_asked_for(folder: Path, tmp_path: Path) -> None:
    controls = tmp_path / "controls"
    annotate_folder(folder, controls, make_annotator("canny"), size=32)
    report = annotate_folder(folder, controls, make_annotator("canny"), size=32, limit=1, overwrite=True)
    assert (report.made, report.present) == (2, 0)
    assert tree(controls) == CONTROLS


def test_images_that_cannot_be_used_are_skipped_and_listed(folder: Path, tmp_path: Path) -> None:
    (folder / "ant" / "thing.0.png").write_bytes(b"no image")
    whole = (folder / "ant" / "thing.1.png").read_bytes()
    (folder / "ant" / "thing.1.png").write_bytes(whole[: len(whole) // 2])
    controls = tmp_path / "controls"
    for batch in (1, 7):
        report = annotate_folder(folder, controls, make_annotator("depth"), size=32, batch=batch, overwrite=True)
        assert (report.made, [name for name, _ in report.skipped]) == (
            4,
            ["ant/thing.0.png", "ant/thing.1.png", "cat/photo.jpg"],
        )
        lines = (controls / "skipped.txt").read_text().splitlines()
        assert [line.split("\t")[0] for line in lines] == [name for name, _ in report.skipped]
        assert "cannot identify" in lines[0]
        assert "alpha channel" in lines[2]
    # Mended and removed: the list goes.
    drawing(0).save(folder / "ant" / "thing.0.png")
    (folder / "ant" / "thing.1.png").write_bytes(whole)
    (folder / "cat" / "photo.jpg").unlink()
    report = annotate_folder(folder, controls, make_annotator("depth"), size=32)
    assert (report.made, report.present, report.skipped) == (2, 4, ())
    assert not (controls / "skipped.txt").exists()


def test_nothing_but_unusable_images_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "images" / "a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a" / "x.png")
    with pytest.raises(AnnotatorError, match=r"none of 1 images could be used \(a/x\.png: normal is made from"):
        annotate_folder(tmp_path / "images", tmp_path / "controls", make_annotator("normal"))


def test_a_failing_net_stops_the_run_with_its_reason(folder: Path, tmp_path: Path) -> None:
    annotate = make_annotator("depth", onnx=flattened(tmp_path / "net.onnx"), settings=PLAIN)
    with pytest.raises(AnnotatorError, match="output 'map'"):
        annotate_folder(folder, tmp_path / "controls", annotate, size=16)
    assert tree(tmp_path / "controls") == ["controls.json"]


@pytest.mark.parametrize("after", [0, 2])
def test_a_full_disk_is_reported_and_nothing_half_written_stays(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    replace_file, done = os.replace, []

    def full(source: Any, target: Any) -> None:
        done.append(target)
        if len(done) > after + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace_file(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(AnnotatorError, match="the disk is full; free some space, then run the same command"):
            annotate_folder(folder, tmp_path / "controls", make_annotator("canny"), size=32)
    assert len(tree(tmp_path / "controls")) == after + 1
    assert annotate_folder(folder, tmp_path / "controls", make_annotator("canny"), size=32).present == after


def test_images_that_would_share_a_control_are_refused(folder: Path, tmp_path: Path) -> None:
    drawing(3).save(folder / "ant" / "thing.0.webp")
    with pytest.raises(AnnotatorError, match=r"thing\.0\.(png|webp) and .*would share one control; rename"):
        annotate_folder(folder, tmp_path / "controls", make_annotator("canny"))
    assert not (tmp_path / "controls").exists()


@pytest.mark.parametrize("where", ["images", "images/controls", "images/ant/controls", ".", "link"])
def test_controls_and_images_do_not_mix(folder: Path, tmp_path: Path, where: str) -> None:
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    before = tree(folder)
    with pytest.raises(AnnotatorError, match="lie within each other; give a folder of its own"):
        annotate_folder(folder, tmp_path / where, make_annotator("canny"))
    assert tree(folder) == before


def test_a_folder_of_something_else_is_left_alone(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(AnnotatorError, match=r"holds other files \(no controls\.json\)"):
            annotate_folder(folder, other, make_annotator("canny"), overwrite=overwrite)
    (other / "controls.json").write_text("[")
    with pytest.raises(AnnotatorError, match=r"controls\.json cannot be read"):
        annotate_folder(folder, other, make_annotator("canny"), overwrite=True)
    with pytest.raises(AnnotatorError, match="is not a folder; choose"):
        annotate_folder(folder, other / "thesis.txt", make_annotator("canny"))
    assert tree(other) == ["controls.json", "thesis.txt"]


@pytest.mark.parametrize("numbers", [{"size": 0}, {"limit": 0}, {"batch": -1}])
def test_numbers_below_one_are_refused(folder: Path, tmp_path: Path, numbers: dict[str, int]) -> None:
    with pytest.raises(AnnotatorError, match="is too small; give 1 or more"):
        annotate_folder(folder, tmp_path / "controls", make_annotator("canny"), **numbers)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match="no class folders"):
        annotate_folder(tmp_path / "images", tmp_path / "controls", make_annotator("canny"))
    assert not (tmp_path / "controls").exists()


# --- command --------------------------------------------------------------------------------------------------------


def command(*argv: str | Path) -> Path:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.run(parser.parse_args([str(a) for a in argv]))


def test_the_command_says_what_it_made_and_gives_the_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "controls"
    assert command("--data", folder, "--annotator", "depth", "-o", output, "--size", "32") == output
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "6 made, 0 present, 1 skipped" in captured.err
    assert "skipped.txt lists" in captured.err
    command("--data", folder, "--annotator", "depth", "-o", output, "--size", "32")
    assert "0 made, 6 present, 1 skipped" in capsys.readouterr().err


def test_flags_reach_the_net(folder: Path, tmp_path: Path) -> None:
    net = linear(tmp_path / "net.onnx", np.eye(3), dims=["b", "c", "h", "w"])
    argv = ["--data", folder, "--annotator", "normal", "-o", tmp_path / "controls", "--onnx", net, "--range=-1-1"]
    argv += ["--mean=-0.5,0,0.5", "--std", "1,2,3", "--bgr", "--layout", "nchw", "--tensor", "map", "--unsigned"]
    argv += ["--flip-y", "--flip-z", "--work-size", "40", "--multiple", "8", "--margin", "4", "--threads", "1"]
    command(*argv, "--limit", "1")
    assert settings_of(tmp_path / "controls")["settings"] == {
        "range": "-1-1",
        "mean": [-0.5, 0.0, 0.5],
        "std": [1.0, 2.0, 3.0],
        "bgr": True,
        "layout": "nchw",
        "output": "map",
        "unsigned": True,
        "flip": "yz",
        "work_size": 40,
        "multiple": 8,
        "margin": 4,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert command(*argv, "--limit", "2") == tmp_path / "controls"


@pytest.mark.parametrize("flags", [["--mean", "1,2"], ["--std", "a,b,c"], ["--annotator", "edges"], ["--range", "2"]])
def test_misuse_ends_with_the_usage(folder: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        command("--data", folder, "--annotator", "canny", "-o", "controls", *flags)
    assert raised.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_an_annotator_is_described_by_what_made_it(tmp_path: Path) -> None:
    net = linear(tmp_path / "net.onnx")
    annotate = make_annotator("depth", onnx=net, settings=replace(PLAIN, invert=True))
    assert isinstance(annotate, Annotator)
    assert annotate.origin == {
        "annotator": "depth",
        "net": sha256(net),
        "convention": "depth",
        "settings": {"range": "0-1", "multiple": 1, "invert": True},
    }

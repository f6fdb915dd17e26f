"""A network of the user's makes maps of photos as training's annotators do; its description is checked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx import save as save_onnx
from PIL import Image

from car_runtime.annotator import open_annotator
from car_runtime.cli.main import main
from car_runtime.conventions import PRESETS
from car_runtime.errors import RequestError, RunError
from car_runtime.format.manifest import read_manifest
from car_runtime.images import open_image
from car_runtime.plan import default_plan
from car_train.conventions import PRESETS as TRAIN_PRESETS
from car_train.data import hed
from car_train.data.annotate import make_annotator
from car_train.data.annotator import NetSettings
from fixtures.awkward import photo

LUMA = np.array([0.299, 0.587, 0.114])


def network(path: Path, weights: np.ndarray, *, kind: int = TensorProto.FLOAT, side: Any = "s") -> Path:
    """A 1×1 convolution: float [1, 3, s, s] → [1, C, s, s]."""
    kernel = numpy_helper.from_array(np.float32(weights.reshape(-1, 3))[..., None, None], "kernel")
    nodes = [helper.make_node("Cast", ["image"], ["x"], to=TensorProto.FLOAT)]
    nodes.append(helper.make_node("Conv", ["x", "kernel"], ["map"]))
    image = helper.make_tensor_value_info("image", kind, ["b", 3, side, side])
    out = helper.make_tensor_value_info("map", TensorProto.FLOAT, ["b", len(weights.reshape(-1, 3)), side, side])
    opset = [helper.make_opsetid("", 17)]
    graph = helper.make_graph(nodes, "net", [image], [out], [kernel])
    save_onnx(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path


def described(path: Path, **description: Any) -> Path:
    path.with_suffix(".json").write_text(json.dumps({"annotator": description}))
    return path


@pytest.mark.parametrize(
    ("name", "description", "settings"),
    [
        ("hed", {"gives": "edges"}, {}),
        ("sketch-dark", {"gives": "edges", "invert": True}, {"invert": True}),
        ("hed", {"gives": "logits", "range": "-1-1"}, {"sigmoid": True, "range": "-1-1"}),
        ("hed", {"gives": "edges", "size": 48, "multiple": 7, "margin": 3}, dict(work_size=48, multiple=7, margin=3)),
        ("depth", {"gives": "depth", "mean": [0, 0.5, 1], "std": [1, 2, 3]}, dict(mean=(0, 0.5, 1), std=(1, 2, 3))),
        ("depth-inverse", {"gives": "depth", "colours": "bgr", "range": "0-255"}, dict(bgr=True, range="0-255")),
        ("normal", {"gives": "normals", "range": "-1-1", "flip": "xz"}, dict(range="-1-1", flip="xz")),
        ("normal-opengl", {"gives": "normals", "unsigned": True, "range": "0-1"}, dict(unsigned=True, range="0-1")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_a_network_makes_what_training_makes_with_it(
    name: str, description: dict[str, Any], settings: dict[str, Any], kind: int, tmp_path: Path
) -> None:
    """To the bit: both take the same steps in the same types."""
    weights = np.eye(3) if name.startswith("normal") else LUMA
    net = described(network(tmp_path / "net.onnx", weights, kind=kind), **description)
    control_type = PRESETS[name].control_type
    if control_type == "depth" and "mean" not in settings:
        settings = {**settings, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    if control_type == "normal":
        settings = {**settings, "mean": (0.0, 0.0, 0.0)}
    square = photo((64, 64))
    made = make_annotator(
        control_type, onnx=net, settings=NetSettings(**settings), convention=TRAIN_PRESETS[name], threads=1
    )(np.asarray(square))
    ours = open_annotator(net, PRESETS[name], threads=1)(square, 64, "crop")
    np.testing.assert_array_equal(ours, made)


def test_a_finished_map_goes_through_as_it_is(tmp_path: Path) -> None:
    net = described(network(tmp_path / "net.onnx", np.eye(3)), gives="map")
    square = photo((64, 64))
    made = open_annotator(net, PRESETS["canny"], threads=1)(square, 64, "crop")
    np.testing.assert_array_equal(made, np.asarray(square))


@pytest.mark.parametrize(
    ("description", "says"),
    [
        ({}, "annotator.gives is missing"),
        ({"gives": "colour"}, "gives is 'colour', not one of edges, logits"),
        ({"gives": "depth"}, "gives 'depth', but hed maps need edges or logits or map"),
        ({"gives": "edges", "size": 10**9}, "size is 1000000000, not in 8…4096"),
        ({"gives": "edges", "size": 64.5}, "annotator.size is 64.5, but must be an integer"),
        ({"gives": "edges", "multiple": 0}, "multiple is 0, not in 1…4096"),
        ({"gives": "edges", "std": [1, 0, 1]}, "must be positive"),
        ({"gives": "edges", "mean": [1, 2]}, "mean has 2 numbers, not 3"),
        ({"gives": "edges", "range": "0-2"}, "range is '0-2', not one of 0-1"),
        ({"gives": "edges", "invert": "yes"}, "must be true or false"),
        ({"gives": "edges", "flip": "w"}, "flip is 'w'"),
        ({"gives": "edges", "output": "x"}, "has the outputs map"),
        ({"gives": "edges", "layout": "nhwc"}, 'say "layout"'),
    ],
)
def test_a_bad_description_is_refused_with_the_remedy(description: dict[str, Any], says: str, tmp_path: Path) -> None:
    net = described(network(tmp_path / "net.onnx", LUMA, side=16), **description)
    with pytest.raises(RequestError) as caught:
        open_annotator(net, PRESETS["hed"])
    assert says in str(caught.value)
    assert "; " in str(caught.value)


def test_networks_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="there is no network"):
        open_annotator(tmp_path / "none.onnx", PRESETS["hed"])
    (tmp_path / "x.onnx").write_bytes(b"no network")
    with pytest.raises(RequestError, match=r"no description 'x.json' next to it; write one"):
        open_annotator(tmp_path / "x.onnx", PRESETS["hed"])
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(RequestError, match="cannot read"):
        open_annotator(tmp_path / "x.onnx", PRESETS["hed"])
    with pytest.raises(RequestError, match="cannot be opened by ONNX Runtime"):
        open_annotator(described(tmp_path / "x.onnx", gives="edges"), PRESETS["hed"])


def test_a_description_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    network(tmp_path / "net.onnx", LUMA)
    os.mkfifo(tmp_path / "net.json")
    with pytest.raises(RequestError, match="is not a file; correct it"):
        open_annotator(tmp_path / "net.onnx", PRESETS["hed"])


def test_values_that_are_not_finite_are_an_error_of_the_run(tmp_path: Path) -> None:
    net = described(network(tmp_path / "net.onnx", LUMA * np.float32(np.inf)), gives="edges")
    with pytest.raises(RunError, match="not finite"):
        open_annotator(net, PRESETS["hed"], threads=1)(photo((64, 64)), 64, "crop")


def test_the_command_takes_a_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = described(network(tmp_path / "net.onnx", 2 * (np.array([1, 0, 0]) - 0.3)), gives="edges")
    given, out = tmp_path / "photo.png", tmp_path / "map.png"
    photo((96, 64)).save(given)
    size = read_manifest(default_plan()).model.image_size
    assert main(["control", str(given), "--annotator", str(net), "-o", str(out), "--threads", "1"]) == 0
    expected = open_annotator(net, PRESETS["canny"], threads=1)(open_image(given), size, "crop")
    np.testing.assert_array_equal(np.asarray(Image.open(out)), expected)
    assert main(["--photo", str(given), "--annotator", str(net), "-o", str(out), "--threads", "1"]) == 0
    assert main(["--control", str(given), "--annotator", str(net), "-o", str(out)]) == 2
    assert "add --photo FILE" in capsys.readouterr().err


def test_heds_own_description_makes_what_training_makes(tmp_path: Path) -> None:
    """On random weights; what the network knows doesn't matter to how it is given the image."""
    rng = np.random.default_rng(0)
    weights = {}
    for name, _, kernel in hed.layers():
        weights[f"{name}.kernel"] = np.float32(rng.standard_normal(kernel) / np.sqrt(np.prod(kernel[:3])))
        weights[f"{name}.bias"] = np.zeros(kernel[3], np.float32)
    save_onnx(hed.build(weights), tmp_path / "hed.onnx")
    net = described(tmp_path / "hed.onnx", **hed.DESCRIPTION)
    square = photo((64, 64))
    from car_train.data.annotate import HED_MARGIN, hed_work_size
    from car_train.data.annotator_net import AnnotatorNet

    trained = AnnotatorNet(
        net, "hed", NetSettings(multiple=1, margin=HED_MARGIN), 1, work_size=hed_work_size
    ).annotator()(np.asarray(square))
    np.testing.assert_array_equal(open_annotator(net, PRESETS["hed"], threads=1)(square, 64, "crop"), trained)

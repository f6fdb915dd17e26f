"""Networks that turn images into the features that sets of images are compared by.

Shape legend: B images, N of a set, D features, H, W sides in pixels.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from car_train.evaluation.metrics import NEIGHBOURS
from car_train.evaluation.options import EvaluationError
from car_train.evaluation.reference import Gaussian
from car_train.evaluation.sets import LEAST_IMAGES
from car_train.files import check_archive, sha256

Pixels = NDArray[np.uint8]
Floats = NDArray[np.floating[Any]]


class FeatureNetwork(Protocol):
    """What turns images into the features that sets of images are compared by."""

    @property
    def about(self) -> Mapping[str, Any]:
        """Network, weights and preparation of the images, for the report."""

    def __call__(self, images_BHW3: Pixels) -> Floats:
        """uint8 [B, H, W, 3] → float32 [B, D]."""


class EfficientNetLite0:
    """The 1280 features before the classifier of EfficientNet-Lite0, trained on ImageNet.

    weights: safetensors with the published names, as `car_train.data.pretrained.fetch("efficientnet")` writes them.
    Images are resized to 224×224 with Pillow's bicubic filter, then (x − 127)/128. Raises EvaluationError.
    """

    side = 224

    def __init__(self, weights: Path, device: str = "cpu"):
        try:
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise EvaluationError(
                f"features need {error.name}; install `car-deploy[lab]`, or leave them out: --features none"
            ) from error
        self.net, self.device = EfficientNet.from_name("efficientnet-lite0"), device
        try:
            self.net.load_state_dict(load_file(weights))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise EvaluationError(
                f"{weights}: not the weights of EfficientNet-Lite0 ({str(error).splitlines()[0]}); "
                "leave --features out, and they are fetched"
            ) from error
        # Channels last: 25 instead of 50 ms an image on one core of an AMD EPYC (Zen 5).
        self.net.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)
        self.about = {
            "network": "EfficientNet-Lite0",
            "features": 1280,
            "input": "224×224, Pillow bicubic, (x − 127)/128",
            "sha256": sha256(weights),
        }

    @torch.no_grad()
    def logits(self, features_BD: Floats) -> Floats:
        """Logits of the 1000 ImageNet classes, float32 [B, 1000], from the features that a call gives."""
        return self.net._fc(torch.from_numpy(features_BD).to(self.device)).cpu().numpy()

    @torch.no_grad()
    def __call__(self, images_BHW3: Pixels) -> Floats:
        size = (self.side, self.side)
        resized = [np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BICUBIC)) for p in images_BHW3]
        x = (torch.from_numpy(np.stack(resized)).to(self.device).float() - 127) / 128
        return self.net.extract_features(x.permute(0, 3, 1, 2)).mean((2, 3)).cpu().numpy()


class Inception:
    """Inception-v3 as FID has it, and the scores made of it, by torch-fidelity.

    weights: the state dict that torch-fidelity publishes (`weights-inception-2015-12-05-6726825d.pth`), or the same
    tensors as .safetensors. Features are the 2048 of the last pooling, after them the 1008 logits without bias, and
    with `spatial` those of sFID (Nash et al. 2021): 7 channels of mixed_6/conv, row by row, 17·17·7.
    The library resizes to 299×299, bilinearly as TensorFlow 1 did. Raises EvaluationError.
    """

    split, logits, places = 2048, 1008, 7 * 17 * 17

    def __init__(self, weights: Path, device: str = "cpu", *, spatial: bool = False):
        library = import_torch_fidelity()
        from torch_fidelity.utils import create_feature_extractor

        try:
            state: Any = load_file(weights) if weights.suffix == ".safetensors" else _load_tensors(weights)
            # The library unpickles its weights without restriction: it gets a file that was written here, of nothing
            # but the tensors that were read with `weights_only`.
            with tempfile.TemporaryDirectory(prefix="car-inception-") as folder:
                torch.save(state, Path(folder) / "inception.pth")
                self.net = create_feature_extractor(
                    "inception-v3-compat",
                    ["2048", "logits_unbiased"],
                    cuda=False,
                    feature_extractor_weights_path=str(Path(folder) / "inception.pth"),
                    verbose=False,
                ).to(device)
        except (OSError, SafetensorError, RuntimeError, TypeError, AttributeError) as error:
            raise EvaluationError(
                f"{weights}: not torch-fidelity's Inception weights ({str(error).splitlines()[0][:200]}); "
                "give its weights-inception-2015-12-05-6726825d.pth"
            ) from error
        self.device, self.spatial = device, spatial
        self.net.Mixed_6d.branch1x1.register_forward_hook(self._see)  # TensorFlow's mixed_6/conv
        self.about = {
            "network": "Inception-v3 (2015-12-05)",
            "library": f"torch-fidelity {library.__version__}",
            "input": "299×299, bilinear as in TensorFlow 1",
            "sha256": sha256(weights),
        }

    @torch.no_grad()
    def __call__(self, images_BHW3: Pixels) -> Floats:
        x = torch.from_numpy(images_BHW3).permute(0, 3, 1, 2).contiguous().to(self.device)
        found = torch.cat(self.net(x), 1).float()
        return torch.cat([found, self._seen] if self.spatial else [found], 1).cpu().numpy()

    @classmethod
    def check_statistics(cls, pool: Gaussian | None, spatial: Gaussian | None) -> None:
        """Raise EvaluationError for statistics of other features."""
        for given, width in ((pool, cls.split), (spatial, cls.places)):
            if given is not None and len(given[0]) != width:
                raise EvaluationError(
                    f"the reference's mean is of {len(given[0])} features, Inception's of {width}; "
                    "give statistics of Inception, or a reference with images"
                )

    def _see(self, layer: object, inputs: object, output_BCHW: torch.Tensor) -> None:
        self._seen = output_BCHW[:, :7].permute(0, 2, 3, 1).flatten(1).float()

    def scores(
        self, real_ND: Floats | None, made_ND: Floats, pool: Gaussian | None = None, spatial: Gaussian | None = None
    ) -> dict[str, float | None]:
        """FID, sFID, Inception Score (10 parts), precision and recall (3 neighbours); None with too few images.

        pool, spatial: statistics instead of those of `real`'s features (`check_statistics`); without `real` no
        precision or recall.
        """
        from torch_fidelity import metric_isc, metric_prc

        at = (
            slice(0, self.split),
            slice(self.split, self.split + self.logits),
            slice(self.split + self.logits, None),
        )
        made, logits, made_spatial = (made_ND[:, columns].copy() for columns in at)
        real, _, real_spatial = (None if real_ND is None else real_ND[:, columns].copy() for columns in at)
        out: dict[str, float] = {}
        if len(made) >= LEAST_IMAGES:
            out |= {"fid": distance} if (distance := _distance(made, real, pool)) is not None else {}
            if self.spatial and (distance := _distance(made_spatial, real_spatial, spatial)) is not None:
                out["sfid"] = distance
        if len(made) >= 10:
            out |= metric_isc.isc_features_to_metric(torch.from_numpy(logits))
            if real is not None:
                features = (torch.from_numpy(made), torch.from_numpy(real))
                out |= metric_prc.prc_features_to_metric(*features, verbose=False) if len(real) > NEIGHBOURS else {}
        names = {
            "fid": "fid",
            **({"sfid": "sfid"} if self.spatial else {}),
            "inception_score": "inception_score_mean",
            "inception_score_std": "inception_score_std",
            "precision": "precision",
            "recall": "recall",
        }
        return {mine: out.get(theirs) for mine, theirs in names.items()}


def _distance(made_ND: Floats, real_ND: Floats | None, given: Gaussian | None) -> float | None:
    """torch-fidelity's Fréchet distance of some features from the given statistics, or else from other features."""
    from torch_fidelity import metric_fid

    if given is None and (real_ND is None or len(real_ND) < 2):
        return None
    made = metric_fid.fid_features_to_statistics(torch.from_numpy(made_ND))
    if given is None:
        real = metric_fid.fid_features_to_statistics(torch.from_numpy(real_ND))
    else:
        real = {"mu": given[0].astype(made["mu"].dtype), "sigma": given[1].astype(made["sigma"].dtype)}
    return float(metric_fid.fid_statistics_to_metric(made, real, verbose=False)["frechet_inception_distance"])


def _load_tensors(file: Path) -> Any:
    try:
        check_archive(file)
        return torch.load(file, weights_only=True, map_location="cpu")
    except OSError:
        raise
    except Exception as error:  # unpickling fails in many ways
        raise RuntimeError(str(error) or repr(error)) from error


def import_torch_fidelity() -> Any:
    """The module `torch_fidelity`, also alongside a torchvision that can't be imported. Raises EvaluationError."""
    try:
        with _torchvision_or_nothing():
            import torch_fidelity
    except ImportError as error:
        raise EvaluationError(f"--inception needs {error.name}; install `car-deploy[fid]`") from error
    return torch_fidelity


@contextmanager
def _torchvision_or_nothing() -> Iterator[None]:
    """While torch-fidelity is imported: empty modules in place of a torchvision that is missing or broken.

    It imports torchvision for data sets and networks that play no part here, and the torchvision that PyPI has for
    Linux can't be imported alongside a PyTorch without CUDA.
    """
    before = set(sys.modules)
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision" and n not in before]:
            del sys.modules[name]  # what a failed import left behind
    else:
        yield
        return
    names = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
    modules: dict[str, Any] = {name: ModuleType(name) for name in names}
    for name, module in modules.items():
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(modules[parent], last, module)
    for unused in ("CIFAR10", "CIFAR100", "STL10"):
        setattr(modules["torchvision.datasets"], unused, type(unused, (), {}))
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]

"""What a checkpoint is worth on pictures it has not seen, in numbers; and what is noise in them.

    python -m car_train eval runs/car --data ~/.cache/car/data/emoji -o report.json --sheet sheet.png

From a tokenizer on: reconstruction (PSNR, SSIM, L1, codes in use). From a transformer on: the loss with the teacher's
tokens, and pictures drawn by the reference loop, one for each real one, of its class and with its control, as a set
against the set of real pictures: KID, Fréchet distance, precision and recall on features of a network that is fetched
(EfficientNet-Lite0), and with `--inception` FID and Inception Score as the literature has them, by torch-fidelity.
With a control branch: how well a picture follows its control (CAR section 4), beside four yardsticks.

    base             the same classes and uniform numbers without the control: what the control adds
    reconstruction   the real picture through the tokenizer: what no control can better
    truth            the real picture itself: the error of deriving a control from a picture
    shuffled         the drawn picture against another picture's control: chance

Real pictures alone give the noise floor of the distances between sets: random halves of them against each other.

Picture i of the split is drawn with the uniform numbers of seed `seed + i`, as `car-run --seed` draws them, so
neither the batch nor the choice of pictures changes it (up to rounding: a sum may be taken in another order). Only
features and numbers are kept, no pictures.

Shape legend: B pictures of a batch, N of the whole evaluation, K scales, L tokens of a picture, D features, H, W
sides in pixels. Pictures are uint8 [B, H, W, 3] where they are measured, f32 [B, 3, H, W] in [-1, 1] in the model.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from car_train import checkpoint
from car_train.data.controls import NEEDS_ALPHA, make_control
from car_train.data.dataset import SPLITS, ControlledImages, select_classes
from car_train.data.pretrained import DEFAULT_ROOT as WEIGHTS_ROOT
from car_train.data.pretrained import PACKAGES, fetch
from car_train.errors import UserError
from car_train.evaluation.metrics import (
    KID_SIZE,
    NEIGHBOURS,
    control_errors,
    frechet_distance,
    kernel_distance,
    kid,
    perplexity,
    precision_recall,
    psnr,
    ssim,
)
from car_train.files import sha256, written_aside
from car_train.model import Model
from car_train.model.sample import control_pyramid, sample
from car_train.model.vqvae import join_tokens

FORMAT = 1
WHITE_DIFFERENCE = 16
"""Grey levels of the strongest channel by which a pixel differs from white ground; decoders leave smaller ones."""
LEAST_PICTURES = 64
"""Below this many pictures a Fréchet distance is left out: it would be bias of the covariances for the most part."""
HALVINGS = 10
"""Random halvings behind each noise floor."""
MOST_NEIGHBOURS = 10_000
"""Pictures of each set behind precision and recall, at most."""
SHEET_PICTURES, SHEET_COLUMNS, SHEET_SIDES = 64, 4, (96, 256)

Pixels = NDArray[np.uint8]
Floats = NDArray[np.floating[Any]]
Maker = Callable[[Sequence[Pixels]], list[Pixels]]
Report = dict[str, Any]


class EvaluationError(UserError, ValueError):
    """An evaluation that can't be made. The message names what is in the way and ends with the remedy."""


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What is evaluated, on which pictures, drawn how."""

    checkpoint: Path
    """Of any stage, or a run's folder: its newest one."""
    data: Path
    split: str = "val"
    classes: str | None = None
    """Only these: indices (`7`), ranges (`100-999`), names, patterns (`noto-*`). Empty: all."""
    control_root: Path | None = None
    """Ready control images that mirror `data`; otherwise they are made on the fly."""
    limit: int = 0
    """At most so many pictures, at random; 0 = all."""
    per_class: int = 0
    """At most so many of each class, at random; 0 = all."""
    batch: int = 16
    seed: int = 0
    cfg: float = 2.5
    top_k: int = 100
    """0, or no less than the vocabulary: off."""
    top_p: float = 0.8
    """0 or 1: off."""
    annotator_onnx: Path | None = None
    """Network that derives the control from a drawn picture, in place of `car_train.data.controls`."""
    device: str = "cpu"
    baseline: bool = True
    """Also draw and measure without the control."""

    def __post_init__(self) -> None:
        _require(self.split in SPLITS, f"no split {self.split!r}; choose one of: {', '.join(SPLITS)}")
        _require(self.batch >= 1, f"batch is {self.batch}; it must be at least 1")
        for name in ("limit", "per_class", "seed", "top_k"):
            _require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it must be at least 0")
        _require(0 <= self.cfg < math.inf, f"cfg is {self.cfg}; it must be a number from 0")
        _require(0 <= self.top_p <= 1, f"top_p is {self.top_p}; it must be between 0 and 1")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise EvaluationError(
                f"device {self.device!r} can't be used ({reason}); give cpu, or cuda with a GPU"
            ) from error


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise EvaluationError(message)


# --- networks that describe pictures --------------------------------------------------------------------------------


class FeatureNetwork(Protocol):
    """What turns pictures into the features that sets of pictures are compared by."""

    @property
    def about(self) -> Mapping[str, Any]:
        """Network, weights and preparation of the pictures, for the report."""

    def __call__(self, pictures_BHW3: Pixels) -> Floats:
        """uint8 [B, H, W, 3] → float32 [B, D]."""


class EfficientNetLite0:
    """The 1280 features before the classifier of EfficientNet-Lite0, trained on ImageNet.

    weights: safetensors with the published names, as `car_train.data.pretrained.fetch("efficientnet")` writes them.
    Pictures are resized to 224×224 with Pillow's bicubic filter, then (x − 127)/128. Raises EvaluationError.
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
        # Channels last: 25 instead of 50 ms a picture on one core of an AMD EPYC (Zen 5).
        self.net.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)
        self.about = {
            "network": "EfficientNet-Lite0",
            "features": 1280,
            "input": "224×224, Pillow bicubic, (x − 127)/128",
            "sha256": sha256(weights),
        }

    @torch.no_grad()
    def logits(self, pictures_BHW3: Pixels) -> Floats:
        """Of the 1000 ImageNet classes, float32 [B, 1000]."""
        return self.net._fc(torch.from_numpy(self(pictures_BHW3)).to(self.device)).cpu().numpy()

    @torch.no_grad()
    def __call__(self, pictures_BHW3: Pixels) -> Floats:
        size = (self.side, self.side)
        resized = [np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BICUBIC)) for p in pictures_BHW3]
        x = (torch.from_numpy(np.stack(resized)).to(self.device).float() - 127) / 128
        return self.net.extract_features(x.permute(0, 3, 1, 2)).mean((2, 3)).cpu().numpy()


class Inception:
    """Inception-v3 as FID has it, and the scores made of it, by torch-fidelity.

    weights: the state dict that torch-fidelity publishes (`weights-inception-2015-12-05-6726825d.pth`), or the same
    tensors as .safetensors. Features are the 2048 of the last pooling and, after them, the 1008 logits without bias.
    The library resizes to 299×299, bilinearly as TensorFlow 1 did. Raises EvaluationError.
    """

    split = 2048

    def __init__(self, weights: Path, device: str = "cpu"):
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
        self.device = device
        self.about = {
            "network": "Inception-v3 (2015-12-05)",
            "library": f"torch-fidelity {library.__version__}",
            "input": "299×299, bilinear as in TensorFlow 1",
            "sha256": sha256(weights),
        }

    @torch.no_grad()
    def __call__(self, pictures_BHW3: Pixels) -> Floats:
        x = torch.from_numpy(pictures_BHW3).permute(0, 3, 1, 2).contiguous().to(self.device)
        return torch.cat(self.net(x), 1).float().cpu().numpy()

    def scores(self, real_ND: Floats, made_ND: Floats) -> dict[str, float | None]:
        """FID, Inception Score (10 parts), precision and recall (3 neighbours); None with too few pictures."""
        from torch_fidelity import metric_fid, metric_isc, metric_prc

        real, made = (torch.from_numpy(x[:, : self.split].copy()) for x in (real_ND, made_ND))
        logits = torch.from_numpy(made_ND[:, self.split :].copy())
        out: dict[str, float] = {}
        if len(made) >= LEAST_PICTURES:
            statistics = [metric_fid.fid_features_to_statistics(x) for x in (made, real)]
            out |= metric_fid.fid_statistics_to_metric(*statistics, verbose=False)
        if len(made) >= 10:
            out |= metric_isc.isc_features_to_metric(logits)
            out |= metric_prc.prc_features_to_metric(made, real, verbose=False)
        names = {
            "fid": "frechet_inception_distance",
            "inception_score": "inception_score_mean",
            "inception_score_std": "inception_score_std",
            "precision": "precision",
            "recall": "recall",
        }
        return {mine: out.get(theirs) for mine, theirs in names.items()}


def _load_tensors(file: Path) -> Any:
    try:
        return torch.load(file, weights_only=True, map_location="cpu")
    except OSError:
        raise
    except Exception as error:  # unpickling fails in many ways
        raise RuntimeError(str(error) or repr(error)) from error


def import_torch_fidelity() -> Any:
    """The module `torch_fidelity`, also beside a torchvision that can't be imported. Raises EvaluationError."""
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
    Linux can't be imported beside a PyTorch without CUDA.
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


# --- the control of a drawn picture ---------------------------------------------------------------------------------


def silhouette(rgb: Pixels, difference: int = WHITE_DIFFERENCE) -> NDArray[np.bool_]:
    """Where a picture on white shows its object, bool [H, W]: all but the white that is connected with the border.

    rgb: uint8 [H, W, 3]. difference: grey levels by which some channel must differ from white.
    """
    white = np.pad((255 - rgb.min(2) < difference).astype(np.uint8), 1, constant_values=1)
    areas = cv2.connectedComponents(white, connectivity=4)[1]
    return (areas != areas[0, 0])[1:-1, 1:-1]


def control_maker(control_type: str, options: EvalOptions) -> tuple[Maker, str]:
    """(pictures uint8 [H, W, 3] → their controls uint8 [H, W, 3]; in words, how these are made).

    With `annotator_onnx`: that network. HED controls that were given as files (`control_root`) are compared with
    those of the real HED network, if its weights are there; all others with what `car_train.data.controls` makes,
    which is what made them.
    Raises AnnotatorError.
    """
    published = WEIGHTS_ROOT.expanduser() / PACKAGES["hed"].file
    by_hed = control_type == "hed" and options.control_root is not None and published.is_file()
    if options.annotator_onnx is not None or by_hed:
        from car_train.data.annotate import make_annotator

        annotator = make_annotator(control_type, onnx=options.annotator_onnx, threads=torch.get_num_threads())
        return annotator.batch, options.annotator_onnx.name if options.annotator_onnx else "the HED network"
    if control_type in NEEDS_ALPHA:
        about = (
            f"geometry of the silhouette: what differs from white by {WHITE_DIFFERENCE} grey levels or is enclosed"
        )
        return lambda pictures: [make_control(_with_alpha(p), control_type) for p in pictures], about
    about = "car_train.data.controls" + (
        ", an approximation of HED without its network" if control_type == "hed" else ""
    )
    return lambda pictures: [make_control(p, control_type) for p in pictures], about


def _with_alpha(rgb: Pixels) -> Pixels:
    return np.dstack([rgb, silhouette(rgb).astype(np.uint8) * 255])


# --- choosing pictures ----------------------------------------------------------------------------------------------


def open_pictures(model: Model, options: EvalOptions) -> ControlledImages:
    """The split of `options`, with controls if the model has a branch. Raises EvaluationError, DataError."""
    config = model.config
    for name in ("control_root", "annotator_onnx"):
        _require(
            getattr(options, name) is None or config.car is not None,
            f"{options.checkpoint} has no control branch; leave out --{name.replace('_', '-')}",
        )
    data = ControlledImages(
        options.data,
        config.vqvae.image_size,
        split=options.split,
        control_type=config.car.control_type if config.car else None,
        control_root=options.control_root,
        preload=False,
    )
    if config.var is not None:
        names, known = data.class_names, config.class_names
        _require(
            len(names) == config.var.classes and (known is None or tuple(names) == known),
            f"{options.data} has {len(names)} classes ({', '.join(names[:3])}, …), the model {config.var.classes} "
            f"({', '.join(known[:3]) + ', …' if known else 'without names'}); give a folder of the model's classes",
        )
    return data


def choose(data: ControlledImages, options: EvalOptions) -> list[int]:
    """Positions in the split of the pictures to evaluate, in an order that the seed decides."""
    wanted = select_classes(options.classes, data.class_names)
    left = dict.fromkeys(wanted, options.per_class or len(data))
    chosen: list[int] = []
    for i in np.random.default_rng(options.seed).permutation(len(data)).tolist():
        label = data.files[i][1]
        if left.get(label, 0):
            left[label] -= 1
            chosen.append(i)
    _require(
        bool(chosen),
        f"{options.data}: no picture of split {options.split!r} is of the classes {options.classes}; "
        "give others, or --split all",
    )
    return chosen[: options.limit or None]


# --- the pass over the pictures -------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    options: EvalOptions,
    *,
    features: FeatureNetwork | None = None,
    inception: Inception | None = None,
    sheet: Path | None = None,
) -> Report:
    """Evaluate a checkpoint; the report is made of what JSON knows (numbers that don't exist are None).

    features: compares sets of pictures; without it that part is left out. inception: adds FID, Inception Score,
    precision and recall. sheet: PNG to write, 64 random pictures: control, drawn, real.

    Raises EvaluationError, CheckpointError, DataError, and what annotators raise.
    """
    began = time.monotonic()
    path = checkpoint.locate(options.checkpoint)
    model = checkpoint.load(path)
    data = open_pictures(model, options)
    order = choose(data, options)
    networks: dict[str, FeatureNetwork] = {"features": features} if features is not None else {}
    if inception is not None:
        networks["inception"] = inception
    run = _Pass(model, options, networks)
    if model.config.car is not None and len(order) > 1:
        run.previous = data[order[-1]]["control"].numpy()
    bar = tqdm(total=len(order), desc="evaluating", unit="img", file=sys.stderr, disable=None)
    with bar:
        for start in range(0, len(order), options.batch):
            positions = order[start : start + options.batch]
            run.add([data[i] for i in positions], [options.seed + i for i in positions])
            bar.update(len(positions))
    report: Report = {
        "format": FORMAT,
        "checkpoint": {
            "name": f"{path.parent.name}/{path.name}",
            "sha256": checkpoint.fingerprint(path),
            "control": model.config.car.control_type if model.config.car else None,
        },
        "data": {
            "name": options.data.expanduser().resolve().name,
            "split": options.split,
            "pictures": len(order),
            "classes": options.classes or "all",
        },
        "options": {k: getattr(options, k) for k in ("seed", "cfg", "top_k", "top_p", "batch", "limit", "per_class")},
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        **run.report(data.class_names),
    }
    report["seconds"] = {
        **{k: round(v, 1) for k, v in run.seconds.items()},
        "all": round(time.monotonic() - began, 1),
    }
    if sheet is not None:
        with written_aside(sheet) as file:
            contact_sheet(run.tiles, run.heads).save(file, "PNG")
    finite: Report = _finite(report)
    return finite


class _Pass:
    """All that is gathered from the pictures, batch by batch: columns of numbers, features, counts of codes."""

    def __init__(self, model: Model, options: EvalOptions, networks: Mapping[str, FeatureNetwork]):
        self.model, self.options, self.networks = model.to(options.device), options, networks
        self.config, self.car = model.config.vqvae, model.car
        self.control_type = model.config.car.control_type if model.config.car else None
        self.maker: Maker | None = None
        if self.control_type is not None:
            self.maker, self.made_by = control_maker(self.control_type, options)
        self.columns: dict[str, list[Floats]] = defaultdict(list)
        self.labels: list[int] = []
        self.features: dict[str, dict[str, list[Floats]]] = {name: defaultdict(list) for name in networks}
        self.codes_KV = np.zeros((len(self.config.sides), self.config.vocab), np.int64)
        self.previous: Pixels | None = None
        """The control before the next one: what `shuffled` compares with."""
        self.tiles: list[list[Pixels]] = []
        self.heads = (["control"] if self.control_type else []) + [
            "drawn" if self.car else "reconstruction",
            "real",
        ]
        self.seconds: dict[str, float] = defaultdict(float)

    def add(self, items: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> None:
        """Take in one batch: items of `ControlledImages`, and the seed of each picture's uniform numbers."""
        images = torch.stack([item["image"] for item in items]).to(self.options.device)
        labels = torch.tensor([item["label"] for item in items], device=self.options.device)
        controls = [item["control"].numpy() for item in items] if self.control_type else None
        self.labels += labels.tolist()
        grids, recon = self._reconstruct(images)
        pictures = {"truth": images, "reconstruction": recon}
        if self.car is not None:
            pyramid = self._pyramid(controls) if controls else None
            self._teacher_forced("model", labels, grids, pyramid)
            pictures["generated"] = self._draw(labels, seeds, pyramid)
            if pyramid and self.options.baseline:
                self._teacher_forced("base", labels, grids, None)
                pictures["base"] = self._draw(labels, seeds, None)
        pixels = {source: to_pixels(x) for source, x in pictures.items()}
        self._describe(pixels)
        if controls:
            self._follow(controls, pixels)
        drawn = pixels.get("generated", pixels["reconstruction"])
        for i in range(min(len(items), SHEET_PICTURES - len(self.tiles))):
            self.tiles.append(([controls[i]] if controls else []) + [drawn[i], pixels["truth"][i]])

    def _reconstruct(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        with self._timed("reconstruction"):
            grids = self.model.vqvae.encode(images)
            recon = self.model.vqvae.decode(grids)
            for counts, grid in zip(self.codes_KV, grids, strict=True):
                counts += np.bincount(grid.flatten().cpu().numpy(), minlength=self.config.vocab)
            a, b = images.cpu().double(), recon.cpu().double()
            mse = (a - b).square().mean((1, 2, 3)).numpy()
            self._column("l1", (a - b).abs().mean((1, 2, 3)).numpy())
            self._column("mse", mse)
            self._column("psnr", [psnr(e) for e in mse])
            unit = [((x + 1) / 2).permute(0, 2, 3, 1).contiguous().numpy() for x in (a, b)]
            self._column("ssim", [ssim(x, y) for x, y in zip(*unit, strict=True)])
        return grids, recon

    def _teacher_forced(self, name: str, labels: Tensor, grids: list[Tensor], pyramid: list[Tensor] | None) -> None:
        with self._timed("loss"):
            loss_BL, hit_BL = teacher_forced(self.model, labels, grids, pyramid)
            for what, x_BL in (("loss", loss_BL), ("accuracy", hit_BL)):
                scales = x_BL.cpu().double().split([s * s for s in self.config.sides], 1)
                self._column(f"{name}/{what}", torch.stack([s.mean(1) for s in scales], 1).numpy())

    def _draw(self, labels: Tensor, seeds: Sequence[int], pyramid: list[Tensor] | None) -> Tensor:
        options, V = self.options, self.config.vocab
        assert self.car is not None
        noise = np.stack([np.random.default_rng(s).random(self.config.tokens, dtype=np.float32) for s in seeds])
        with self._timed("sampling"):
            return sample(
                self.model.vqvae,
                self.car,
                labels,
                torch.from_numpy(noise).to(options.device),
                pyramid,
                cfg=options.cfg,
                top_k=options.top_k if options.top_k < V else 0,
                top_p=options.top_p,
            )[1]

    def _pyramid(self, controls: Sequence[Pixels]) -> list[Tensor]:
        sizes = [s * self.config.patch for s in self.config.sides]
        each = [control_pyramid(Image.fromarray(c), sizes) for c in controls]
        return [torch.cat(scale).to(self.options.device) for scale in zip(*each, strict=True)]

    def _describe(self, pixels: Mapping[str, Pixels]) -> None:
        with self._timed("features"):
            for name, network in self.networks.items():
                for source, pictures in pixels.items():
                    self.features[name][source].append(network(pictures))

    def _follow(self, controls: Sequence[Pixels], pixels: Mapping[str, Pixels]) -> None:
        assert self.maker is not None
        assert self.control_type is not None
        with self._timed("controls"):
            found = {source: self.maker(list(pictures)) for source, pictures in pixels.items()}
            for i, given in enumerate(controls):
                pairs = {source: (given, made[i]) for source, made in found.items()}
                if self.previous is not None:
                    pairs["shuffled"] = (self.previous, found["generated"][i])
                    self.previous = given
                for name, pair in pairs.items():
                    for measure, error in control_errors(self.control_type, *pair).items():
                        self._column(f"{name}/{measure}", [error])

    def _column(self, name: str, values: Sequence[float] | Floats) -> None:
        self.columns[name].append(np.asarray(values, np.float64))

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[name] += time.monotonic() - began

    # --- what it comes to

    def report(self, class_names: Sequence[str]) -> Report:
        columns = {name: np.concatenate(parts) for name, parts in self.columns.items()}
        notes: list[str] = []
        report: Report = {"reconstruction": self._reconstruction(columns)}
        models = [m for m in ("model", "base") if f"{m}/loss" in columns]
        if models:
            report["teacher_forced"] = {m: self._likelihood(columns, m) for m in models}
        with self._timed("statistics"):
            banks = {n: {s: np.concatenate(x) for s, x in bank.items()} for n, bank in self.features.items()}
            if "features" in banks:
                about = dict(self.networks["features"].about)
                report["distribution"] = {**about, **compare_sets(banks["features"], self.options.seed, notes)}
            if "inception" in banks:
                report["inception"] = self._inception(banks["inception"], notes)
        if self.control_type is not None:
            report["control"] = self._control(columns)
        report["classes"] = self._classes(columns, class_names)
        report["notes"] = notes
        return report

    def _reconstruction(self, columns: Mapping[str, Floats]) -> Report:
        use_V = self.codes_KV.sum(0)
        return {
            "psnr": columns["psnr"].mean(),
            "psnr_pooled": psnr(columns["mse"].mean()),
            "ssim": columns["ssim"].mean(),
            "l1": columns["l1"].mean(),
            "l2": columns["mse"].mean(),
            "codes_used": (use_V > 0).mean(),
            "perplexity": perplexity(use_V),
            "codes_used_per_scale": (self.codes_KV > 0).mean(1).tolist(),
            "perplexity_per_scale": [perplexity(c) for c in self.codes_KV],
        }

    def _likelihood(self, columns: Mapping[str, Floats], model: str) -> Report:
        out: Report = {}
        for what in ("loss", "accuracy"):
            scales_K = columns[f"{model}/{what}"].mean(0)
            out |= {what: self._over_tokens(scales_K), f"{what}_last": scales_K[-1]}
            out[f"{what}_per_scale"] = scales_K.tolist()
        return out

    def _over_tokens(self, scales: Floats) -> Floats:
        """The mean over all tokens, of means over those of each scale, [..., K] → [...]."""
        return scales @ np.square(self.config.sides) / self.config.tokens

    def _inception(self, bank: Mapping[str, Floats], notes: list[str]) -> Report:
        network, real = self.networks["inception"], bank["truth"]
        assert isinstance(network, Inception)
        if len(real) < LEAST_PICTURES:
            notes.append(
                f"Inception: no FID of {len(real)} pictures; it needs {LEAST_PICTURES}, and thousands to mean much"
            )
        elif len(real) <= network.split:
            notes.append(
                f"Inception: FID of {len(real)} pictures and {network.split} features is biased upwards by much"
            )
        made = {s: network.scores(real, x) for s, x in tqdm(bank.items(), "inception", disable=None) if s != "truth"}
        return {**network.about, **made}

    def _control(self, columns: Mapping[str, Floats]) -> Report:
        sources = ("generated", "base", "reconstruction", "truth", "shuffled")
        measures = [name.partition("/")[2] for name in columns if name.startswith("truth/")]
        found = {
            s: {m: _mean(columns[f"{s}/{m}"]) for m in measures} for s in sources if f"{s}/{measures[0]}" in columns
        }
        report: Report = {"type": self.control_type, "made_by": self.made_by, **found}
        if "base" in found:
            base = found["base"]
            report["generated_over_base"] = {m: _ratio(x, base[m]) for m, x in found["generated"].items()}
        return report

    def _classes(self, columns: Mapping[str, Floats], names: Sequence[str]) -> Report:
        labels = np.asarray(self.labels)
        per_picture = {"psnr": columns["psnr"]}
        for name, column in columns.items():
            source, _, measure = name.partition("/")
            if measure == "loss":
                per_picture[f"{source}_loss"] = self._over_tokens(column)
            elif source in ("generated", "base") and measure != "accuracy":
                per_picture[f"{source}_{measure}"] = column
        return {
            names[label]: {
                "pictures": int((labels == label).sum()),
                **{name: _mean(column[labels == label]) for name, column in per_picture.items()},
            }
            for label in np.unique(labels)
        }


def teacher_forced(
    model: Model, label_B: Tensor, grids: list[Tensor], controls: list[Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats, and 1 where the likeliest token is the right one; of every token, f32 [B, L] each.

    label: int64 [B]. grids: the pictures' tokens, coarse first. controls: as in `CAR.forward`.
    """
    assert model.car is not None
    inputs, target_BL = model.vqvae.quantizer.decode(grids)[1], join_tokens(grids)
    logits_BLV = model.car(label_B, inputs, controls)
    loss = F.cross_entropy(logits_BLV.flatten(0, 1), target_BL.flatten(), reduction="none")
    return loss.view(target_BL.shape), (logits_BLV.argmax(-1) == target_BL).float()


def to_pixels(x_B3HW: Tensor) -> Pixels:
    """f32 [B, 3, H, W] in [-1, 1] → uint8 [B, H, W, 3], rounded."""
    return ((x_B3HW.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()


# --- sets of pictures -----------------------------------------------------------------------------------------------


def compare_sets(bank: Mapping[str, Floats], seed: int, notes: list[str]) -> Report:
    """The distances of sets of pictures from the real ones, and the noise floor of these distances.

    bank: features [N, D] by source; `truth` holds the real ones, all in the same order. notes: is added to.

    Per source: `kid` and `kid_std` over subsets, `fid` of all pictures (that is: the Fréchet distance on these
    features), `precision`, `recall`; and, so that nothing but the source differs from the floor, the same from one
    half of the real pictures to the source's pictures of the other half, mean and std over random halvings
    (`kid_half`, `kid_half_std`, …). `floor`: these for the real pictures themselves.
    """
    real = bank["truth"]
    n, D = real.shape
    frechet = n >= LEAST_PICTURES
    if not frechet:
        notes.append(
            f"{n} pictures are too few for covariances of {D} features: no Fréchet distance, only KID; "
            f"evaluate at least {LEAST_PICTURES}"
        )
    elif n // 2 <= D:
        notes.append(
            f"{n} pictures, {D} features: covariances of a half are singular and Fréchet distances biased upwards; "
            "compare them only with the floor and with reports of as many pictures"
        )
    if n < 4:
        notes.append(f"{n} pictures can't be halved: no distances between sets; evaluate more")
        return {}
    rng = np.random.default_rng([seed, 1])
    halvings = [np.array_split(rng.permutation(n), 2) for _ in range(HALVINGS)]
    report: Report = {"halvings": HALVINGS, "floor": _half_scores(real, real, halvings, frechet)}
    for source, made in tqdm(bank.items(), "statistics", unit="set", file=sys.stderr, disable=None):
        if source != "truth":
            mean, std = kid(real, made, np.random.default_rng([seed, 2]))
            whole = _scores(real, made, MOST_NEIGHBOURS, frechet)
            halves = _half_scores(real, made, halvings, frechet)
            report[source] = {"kid": mean, "kid_std": std, **whole, **halves}
    return report


def _scores(real: Floats, made: Floats, most: int, frechet: bool) -> dict[str, float]:
    """Fréchet distance if wanted; precision and recall of at most `most` pictures: these cost N²."""
    out = {"fid": frechet_distance(real, made)} if frechet else {}
    if len(made) > NEIGHBOURS:
        out["precision"], out["recall"] = precision_recall(real[:most], made[:most])
    return out


def _half_scores(
    real: Floats, made: Floats, halvings: Sequence[Sequence[NDArray[np.intp]]], frechet: bool
) -> dict[str, float]:
    each: list[dict[str, float]] = []
    for a, b in halvings:
        distance = kernel_distance(real[a[:KID_SIZE]], made[b[:KID_SIZE]])
        each.append({"kid": distance, **_scores(real[a], made[b], KID_SIZE, frechet)})
    out: dict[str, float] = {}
    for name in each[0]:
        values = [scores[name] for scores in each]
        out |= {f"{name}_half": float(np.mean(values)), f"{name}_half_std": float(np.std(values))}
    return out


def _mean(values: Floats) -> float | None:
    """The mean of what is a number, None without any."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


# --- output ---------------------------------------------------------------------------------------------------------


def contact_sheet(rows: Sequence[Sequence[Pixels]], heads: Sequence[str]) -> Image.Image:
    """Groups of pictures side by side, four groups a line, with their names above.

    rows: for each group, uint8 [H, W, 3] of one size. Pictures smaller than 96 pixels are enlarged by a whole factor,
    larger ones than 256 reduced.
    """
    side = rows[0][0].shape[0]
    tile = min(side * math.ceil(SHEET_SIDES[0] / side), max(SHEET_SIDES)) if side < SHEET_SIDES[0] else min(side, 256)
    way = Image.Resampling.NEAREST if tile >= side else Image.Resampling.LANCZOS
    gap, top = 4, 16
    columns = min(SHEET_COLUMNS, len(rows))
    width, height = len(heads) * (tile + 1) + gap, tile + gap
    sheet = Image.new("RGB", (columns * width + gap, top + math.ceil(len(rows) / columns) * height + gap), "grey")
    draw = ImageDraw.Draw(sheet)
    for at, row in enumerate(rows):
        for k, picture in enumerate(row):
            x, y = gap + at % columns * width + k * (tile + 1), top + at // columns * height
            sheet.paste(Image.fromarray(picture).resize((tile, tile), way), (x, y))
            if at < columns:
                draw.text((x + 2, 2), heads[k], fill="white")
    return sheet


def table(report: Report) -> str:
    """The report for people, as lines of text."""
    data, steered = report["data"], report["checkpoint"]["control"]
    lines = [
        f"{report['checkpoint']['name']}{f' ({steered})' if steered else ''} on {data['pictures']} pictures of "
        f"{data['name']}, split {data['split']}, {len(report['classes'])} classes",
        "",
        *_reconstruction_lines(report["reconstruction"]),
    ]
    if "teacher_forced" in report:
        rows = {_title(k, steered): v for k, v in report["teacher_forced"].items()}
        names: tuple[str, ...] = ("loss", "accuracy", "loss_last", "accuracy_last")
        lines += _block("teacher forced (nats, share; last scale)", names, rows)
    for part, names in (
        ("distribution", ("kid", "kid_std", "fid", "precision", "recall")),
        ("inception", ("fid", "inception_score", "inception_score_std", "precision", "recall")),
    ):
        if part in report:
            about = report[part]
            rows = {_title(k, steered): v for k, v in about.items() if isinstance(v, dict) and k != "floor"}
            lines += _block(f"against the real pictures, {about['network']} ({about['input']})", names, rows)
    if "floor" in report.get("distribution", {}):
        about = report["distribution"]
        rows = {_title(k, steered): v for k, v in about.items() if isinstance(v, dict)}
        names = ("kid_half", "kid_half_std", "fid_half", "fid_half_std", "precision_half", "recall_half")
        lines += _block(f"one half against the other, {about['halvings']} random halvings", names, rows)
    if "control" in report:
        control = report["control"]
        rows = {_title(k, steered): v for k, v in control.items() if isinstance(v, dict)}
        lines += _block(f"following the control ({control['made_by']})", tuple(control["generated"]), rows)
    lines += ["", *(f"note: {note}" for note in report["notes"])] if report["notes"] else []
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in report["seconds"].items())
    return "\n".join([*lines, "", f"seconds: {seconds}"])


def _title(source: str, steered: str | None) -> str:
    titles = {
        "model": f"with {steered}" if steered else "transformer",
        "generated": f"drawn with {steered}" if steered else "drawn",
        "base": "without control",
        "reconstruction": "reconstruction",
        "truth": "real picture",
        "shuffled": "another's control",
        "floor": "real pictures",
        "generated_over_base": "with / without",
    }
    return titles[source]


def _reconstruction_lines(part: Report) -> list[str]:
    one = f"PSNR {_number(part['psnr'])} dB (of the pooled error {_number(part['psnr_pooled'])}), "
    one += f"SSIM {_number(part['ssim'])}, L1 {_number(part['l1'])}"
    codes = f"{part['codes_used']:.1%} of the codes used, perplexity {part['perplexity']:.0f}; per scale "
    per_scale = zip(part["codes_used_per_scale"], part["perplexity_per_scale"], strict=True)
    codes += ", ".join(f"{used:.1%} {size:.0f}" for used, size in per_scale)
    return [f"reconstruction  {one}", f"                {codes}"]


def _block(title: str, names: Sequence[str], rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A heading, the names of the columns and one line of numbers for each row."""
    heads = [name.removesuffix("_half").replace("_half_std", "_std").replace("_", " ") for name in names]
    widths = [max(9, len(head)) for head in heads]
    out = ["", title, " " * 24 + "  ".join(h.rjust(w) for h, w in zip(heads, widths, strict=True))]
    for label, numbers in rows.items():
        cells = (_number(numbers.get(name)).rjust(w) for name, w in zip(names, widths, strict=True))
        out.append(f"  {label:<22}" + "  ".join(cells))
    return out


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def _finite(value: Any) -> Any:
    """The same with plain numbers, and None for those that JSON doesn't have."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = EvalOptions(checkpoint=Path(), data=Path())
    parser.add_argument("checkpoint", type=Path, help="checkpoint, or folder of a run (its newest one)")
    parser.add_argument("--data", type=Path, required=True, help="folder of class folders")
    parser.add_argument("--split", choices=SPLITS, default=default.split, help=f"(default: {default.split})")
    parser.add_argument(
        "--classes", metavar="LIST", help='only these: names, noto-*, 7, 100-999, with commas; "!0-99": all others'
    )
    parser.add_argument("--control-root", type=Path, metavar="DIR", help="ready control images that mirror --data")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="at most N pictures, at random")
    parser.add_argument("--per-class", type=int, default=0, metavar="N", help="at most N of each class, at random")
    parser.add_argument("--batch", type=int, default=default.batch, help=f"(default: {default.batch})")
    parser.add_argument("--seed", type=int, default=default.seed, help=f"(default: {default.seed})")
    parser.add_argument("--cfg", type=float, default=default.cfg, help=f"guidance (default: {default.cfg})")
    parser.add_argument("--top-k", type=int, default=default.top_k, help=f"0 = off (default: {default.top_k})")
    parser.add_argument("--top-p", type=float, default=default.top_p, help=f"0 = off (default: {default.top_p})")
    parser.add_argument(
        "--features",
        metavar="FILE",
        help="EfficientNet-Lite0 as .safetensors (default: fetched once); none leaves the comparison of sets out",
    )
    parser.add_argument(
        "--inception", type=Path, metavar="FILE", help="torch-fidelity's Inception weights: FID and Inception Score"
    )
    parser.add_argument(
        "--annotator-onnx", type=Path, metavar="FILE", help="network that derives the control from a drawn picture"
    )
    parser.add_argument(
        "--baseline",
        action=argparse.BooleanOptionalAction,
        default=default.baseline,
        help="also draw without the control, to compare (default: yes)",
    )
    parser.add_argument("--device", default=default.device, help=f"e.g. cuda (default: {default.device})")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: 0, all)")
    parser.add_argument("-o", "--output", type=Path, metavar="JSON", help="where to write the report")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="where to write 64 random pictures")
    parser.add_argument("--json", action="store_true", help="the report as JSON on stdout, the table on stderr")


def run(args: argparse.Namespace) -> None:
    """Evaluate, write what was asked for, print the result."""
    for file, suffix in ((args.output, ".json"), (args.sheet, ".png")):
        _require(
            file is None or (file.suffix.lower() == suffix and file.absolute().parent.is_dir()),
            f"can't write {file}; give a {suffix} in a folder that exists",
        )
    _require(args.threads >= 0, f"threads is {args.threads}; it must be at least 0")
    options = EvalOptions(**{name: getattr(args, name) for name in EvalOptions.__dataclass_fields__})
    if args.threads:
        torch.set_num_threads(args.threads)
        cv2.setNumThreads(args.threads)
    features = None
    if args.features != "none":
        features = EfficientNetLite0(
            Path(args.features).expanduser() if args.features else fetch("efficientnet"), args.device
        )
    inception = Inception(args.inception, args.device) if args.inception else None
    report = evaluate(options, features=features, inception=inception, sheet=args.sheet)
    text = json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    if args.output is not None:
        with written_aside(args.output) as file:
            file.write_text(text, encoding="utf-8")
    print(table(report), file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(text, end="")

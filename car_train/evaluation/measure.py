"""One pass over the images of an evaluation: what is gathered batch by batch, and what it comes to.

Only features and numbers are kept, no images.

Shape legend: B images of a batch, N of the whole evaluation, K scales, L tokens of an image, D features, H, W sides
in pixels. Images are uint8 [B, H, W, 3] where they are measured, f32 [B, 3, H, W] in [-1, 1] in the model.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from car_train.evaluation.controls import Maker, control_maker
from car_train.evaluation.features import FeatureNetwork, Inception
from car_train.evaluation.generate import uniform_numbers
from car_train.evaluation.metrics import control_errors, perplexity, psnr, ratios, ssim
from car_train.evaluation.options import EvalOptions
from car_train.evaluation.sets import LEAST_IMAGES, compare_sets
from car_train.images import to_pixels
from car_train.model import Model
from car_train.model.sample import sample
from car_train.model.vqvae import join_tokens
from car_train.training.perceptual import Perceptual
from car_train.training.stages import control_pyramids

SHEET_IMAGES = 64
"""Images of the contact sheet."""

Pixels = NDArray[np.uint8]
Floats = NDArray[np.floating[Any]]
Report = dict[str, Any]


class Measurements:
    """All that is gathered from the images, batch by batch: columns of numbers, features, counts of codes."""

    def __init__(
        self,
        model: Model,
        options: EvalOptions,
        networks: Mapping[str, FeatureNetwork],
        perceptual: Perceptual | None = None,
    ):
        self.model, self.options, self.networks = model.to(options.device), options, networks
        self.config, self.car = model.config.vqvae, model.car
        self.perceptual = None if perceptual is None else perceptual.to(options.device)
        self.control_type = model.config.car.control_type if model.config.car else None
        self.convention = model.config.car.control_convention if model.config.car else None
        self.maker: Maker | None = None
        if self.convention is not None:
            self.maker, self.made_by = control_maker(self.convention, options)
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
        """Take in one batch: items of `ControlledImages`, and the seed of each image's uniform numbers."""
        images = torch.stack([item["image"] for item in items]).to(self.options.device)
        labels = torch.tensor([item["label"] for item in items], device=self.options.device)
        controls = [item["control"].numpy() for item in items] if self.control_type else None
        self.labels += labels.tolist()
        grids, recon = self._reconstruct(images)
        shown = {"truth": images, "reconstruction": recon}
        if self.car is not None:
            pyramid = control_pyramids(controls, self.config, self.options.device) if controls else None
            self._teacher_forced("model", labels, grids, pyramid)
            shown["generated"] = self._draw(labels, seeds, pyramid)
            if pyramid and self.options.baseline is not False:
                self._teacher_forced("base", labels, grids, None)
                shown["base"] = self._draw(labels, seeds, None)
        pixels = {source: to_pixels(x) for source, x in shown.items()}
        self._describe(pixels)
        if controls:
            self._follow(controls, pixels)
        drawn = pixels.get("generated", pixels["reconstruction"])
        for i in range(min(len(items), SHEET_IMAGES - len(self.tiles))):
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
            if self.perceptual is not None:
                self._column("perceptual", self.perceptual.distance(recon, images).cpu().numpy())
        return grids, recon

    def _teacher_forced(self, name: str, labels: Tensor, grids: list[Tensor], pyramid: list[Tensor] | None) -> None:
        with self._timed("loss"):
            loss_BL, hit_BL = teacher_forced(self.model, labels, grids, pyramid)
            for what, x_BL in (("loss", loss_BL), ("accuracy", hit_BL)):
                scales = x_BL.cpu().double().split([s * s for s in self.config.sides], 1)
                self._column(f"{name}/{what}", torch.stack([s.mean(1) for s in scales], 1).numpy())

    def _draw(self, labels: Tensor, seeds: Sequence[int], pyramid: list[Tensor] | None) -> Tensor:
        options, chosen = self.options, self.options.sampling(self.config.vocab)
        assert self.car is not None
        with self._timed("sampling"):
            return sample(
                self.model.vqvae,
                self.car,
                labels,
                uniform_numbers(seeds, self.config.tokens).to(options.device),
                pyramid,
                cfg=chosen.cfg,
                top_k=chosen.top_k,
                top_p=chosen.top_p,
            )[1]

    def _describe(self, pixels: Mapping[str, Pixels]) -> None:
        with self._timed("features"):
            for name, network in self.networks.items():
                for source, images in pixels.items():
                    self.features[name][source].append(network(images))

    def _follow(self, controls: Sequence[Pixels], pixels: Mapping[str, Pixels]) -> None:
        assert self.maker is not None
        assert self.convention is not None
        with self._timed("controls"):
            found = {source: self.maker(list(images)) for source, images in pixels.items()}
            for i, given in enumerate(controls):
                pairs = {source: (given, made[i]) for source, made in found.items()}
                if self.previous is not None:
                    pairs["shuffled"] = (self.previous, found["generated"][i])
                    self.previous = given
                for name, pair in pairs.items():
                    for measure, error in control_errors(self.convention, *pair, self.options.tolerance).items():
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
            **({"perceptual": columns["perceptual"].mean()} if "perceptual" in columns else {}),
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
        if len(real) < LEAST_IMAGES:
            notes.append(
                f"Inception: no FID of {len(real)} images; it needs {LEAST_IMAGES}, and thousands to mean much"
            )
        elif len(real) <= network.split:
            notes.append(
                f"Inception: FID of {len(real)} images and {network.split} features is biased upwards by much"
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
            report["generated_over_base"] = ratios(found["generated"], found["base"])
        return report

    def _classes(self, columns: Mapping[str, Floats], names: Sequence[str]) -> Report:
        labels = np.asarray(self.labels)
        per_image = {"psnr": columns["psnr"]}
        for name, column in columns.items():
            source, _, measure = name.partition("/")
            if measure == "loss":
                per_image[f"{source}_loss"] = self._over_tokens(column)
            elif source in ("generated", "base") and measure != "accuracy":
                per_image[f"{source}_{measure}"] = column
        return {
            names[label]: {
                "pictures": int((labels == label).sum()),
                **{name: _mean(column[labels == label]) for name, column in per_image.items()},
            }
            for label in np.unique(labels)
        }


def teacher_forced(
    model: Model, label_B: Tensor, grids: list[Tensor], controls: list[Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats, and 1 where the most probable token is the right one; of every token, f32 [B, L] each.

    label: int64 [B]. grids: the images' tokens, coarse first. controls: as in `CAR.forward`.
    """
    assert model.car is not None
    inputs, target_BL = model.vqvae.quantizer.decode(grids)[1], join_tokens(grids)
    logits_BLV = model.car(label_B, inputs, controls)
    loss = F.cross_entropy(logits_BLV.flatten(0, 1), target_BL.flatten(), reduction="none")
    return loss.view(target_BL.shape), (logits_BLV.argmax(-1) == target_BL).float()


def _mean(values: Floats) -> float | None:
    """The mean of what is a number, None without any."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None

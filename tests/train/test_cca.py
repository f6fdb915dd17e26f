"""Condition Contrastive Alignment: the loss in closed form, what it trains, that an image's own condition wins."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from car_train import checkpoint
from car_train.cli import main
from car_train.config import CARConfig, ConfigError, VARConfig, VQVAEConfig
from car_train.model import Model
from car_train.training.cca import CCAStage, cca_loss
from car_train.training.options import CCAOptions
from car_train.training.stages import add_branch, add_var, new_vqvae

TOKENIZER = VQVAEConfig(sides=(1, 2, 4), vocab=32, latent_channels=8, channels=8, multipliers=(1, 2, 2), res_blocks=1)
BASE = VARConfig(depth=2, width=32, heads=2, classes=2)


def model(branch: bool = True) -> Model:
    torch.manual_seed(0)
    made = add_var(new_vqvae(TOKENIZER), BASE, ("bar", "disc"))
    if branch:
        made = add_branch(made, CARConfig(encoder_widths=(8, 8, 16), encoder_strides=(2, 2)))
    assert made.car is not None
    with torch.no_grad():  # away from the start, where the head hardly depends on anything
        for p in made.car.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return made


def batch(labels: tuple[int, ...] = (0, 1, 0, 1), drop: float = 1.0, seed: int = 1) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    B = len(labels)
    return {
        "tokens": torch.randint(0, 32, (B, 21), generator=rng),
        "label": torch.tensor(labels),
        "control": torch.randint(0, 256, (B, 16, 16, 3), generator=rng).to(torch.uint8),
        "drop": torch.full((B,), drop),
    }


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_the_loss_in_closed_form() -> None:
    """Two pairs by hand: one with another condition, one whose other condition is its own."""
    own, other = torch.tensor([3.0, -10.0]), torch.tensor([5.0, -10.0])
    loss = cca_loss(own, other, torch.tensor([True, False]), beta=0.1, weight=4.0)
    first = -math.log(sigma(0.3)) - 4 * math.log(sigma(-0.5))
    second = -math.log(sigma(-1.0)) - math.log(sigma(-1.0))
    assert loss.item() == pytest.approx((first + second) / 2 / 4, rel=1e-6)
    small = cca_loss(own, other, torch.tensor([True, True]), beta=0.1, weight=0.5)  # not divided by less than 1
    second = -math.log(sigma(-1.0)) - 0.5 * math.log(sigma(1.0))
    assert small.item() == pytest.approx((-math.log(sigma(0.3)) - 0.5 * math.log(sigma(-0.5)) + second) / 2, rel=1e-6)


@pytest.mark.parametrize("negative", ["class", "control"])
def test_at_the_start_the_model_is_its_reference(negative: str) -> None:
    stage = CCAStage(model(), CCAOptions(negative=negative, weight=50.0))
    loss, metrics = stage.loss(batch())
    assert loss.item() == pytest.approx((1 + 50) * math.log(2) / 50, rel=1e-5)
    assert metrics["margin"].item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(("negative", "part"), [("class", "base"), ("class", "both"), ("control", "branch")])
def test_steps_make_the_own_condition_likelier_than_the_other(negative: str, part: str) -> None:
    stage, fixed = CCAStage(model(), CCAOptions(part=part, negative=negative, beta=0.1, weight=1.0)), batch()
    stage.train()
    before = {name: p.clone() for name, p in stage.model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in stage.model.parameters() if p.requires_grad], 1e-3)
    for _ in range(15):
        optimizer.zero_grad()
        loss, metrics = stage.loss(fixed)
        loss.backward()
        optimizer.step()
    assert metrics["margin"] > 1
    assert metrics["preferred"] == 1
    moved = {name.split(".")[1] for name, p in stage.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"base": {"base"}, "branch": {"branch"}, "both": {"base", "branch"}}[part]
    assert stage.car is not None  # and the reference has stayed as the model was
    for name, p in stage.reference.named_parameters():
        assert torch.equal(p, before[f"car.{name}"]), name


def test_a_condition_that_is_the_same_or_dropped_counts_as_ones_own() -> None:
    """The gradient of the second term then points where the first one's does."""
    assert BASE.label_dropout > 0
    for given in (batch(labels=(1, 1)), batch(labels=(0, 1), drop=0.0)):
        stage = CCAStage(model(branch=False), CCAOptions(weight=1.0))
        stage.train()
        given.pop("control")
        loss, _ = stage.loss(given)
        loss.backward()
        grads = {name: p.grad.clone() for name, p in stage.car.named_parameters() if p.grad is not None}
        (label,) = {1} if given["drop"][0] == 1 else {BASE.classes}
        stage.car.zero_grad()
        inputs = stage._teacher_forcing(given)[1]
        logits = stage.car(torch.full((2,), label), inputs)
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), given["tokens"].flatten(), reduction="sum")
        (0.02 * nll / 2).backward()  # 2 terms, each σ(0)·β of the gradient of −log p, mean over 2 images
        for name, p in stage.car.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(grads[name], p.grad, rtol=1e-3, atol=1e-6)


def test_what_it_cannot_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="no control branch"):
        CCAStage(model(branch=False), CCAOptions(negative="control"))
    with pytest.raises(ConfigError, match=r"weight is 0\.0"):
        CCAOptions(weight=0.0)
    stage = CCAStage(model(), CCAOptions())
    stage.train()
    with pytest.raises(ConfigError, match="a batch of 1 has no other condition"):
        stage.loss(batch(labels=(0,)))


def test_the_command_takes_an_epoch_and_continues_with_the_same_reference(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("bar", "disc"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(20):
            image = Image.new("RGB", (16, 16), "white")
            shape = ImageDraw.Draw(image).ellipse if name == "disc" else ImageDraw.Draw(image).rectangle
            shape((2, 2, 8 + int(rng.integers(6)), 13), fill=(200, 30 * (i % 8), 0))
            image.save(tmp_path / "data" / name / f"{name}{i}.png")
    checkpoint.save(model(), tmp_path / "start", {})
    quick = "--batch 4 --workers 0 --threads 1 --lr 1e-3 --views 1 --validate-every 100"
    flags = [*quick.split(), "--token-root", str(tmp_path / "tokens"), "--data", str(tmp_path / "data")]
    flags += ["--model", str(tmp_path / "start"), "--lambda", "2", "--beta", "0.1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["cca", *flags, "-o", str(whole)]) == 0
    log = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    images = json.loads((whole / "run.json").read_text())["pictures"]["train"]
    assert len(log) == images // 4  # one epoch
    assert log[-1]["val_margin"] > 0
    half = ["--save-every", str(len(log) // 2)]
    assert main(["cca", *flags, *half, "-o", str(parts)]) == 0
    newest = sorted(parts.glob("step-*"))[-1]
    for old in newest.iterdir():
        old.unlink()
    newest.rmdir()  # as if it had stopped half-way
    assert main(["cca", *flags, *half, "-o", str(parts), "--resume"]) == 0
    pair = [checkpoint.modules(checkpoint.load(run))["car"].state_dict() for run in (whole, parts)]
    assert all(torch.equal(p, pair[1][name]) for name, p in pair[0].items())

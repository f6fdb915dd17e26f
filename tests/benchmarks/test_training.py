"""The training benchmark compares like with like: the plain step computes the same loss as ours."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import training
from car_train.config import CARConfig, VARConfig, VQVAEConfig
from car_train.model.vqvae import join_tokens

TINY = (
    VQVAEConfig(sides=(1, 2, 3), vocab=32, latent_channels=8, channels=8, multipliers=(1, 2), res_blocks=1),
    VARConfig(depth=2, width=32, heads=2, classes=3),
    CARConfig(encoder_widths=(8, 8), encoder_strides=(2,)),
)


def test_plain_attention_and_the_tokenizer_in_the_loop_give_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(training.PRESETS, "tiny", TINY)
    stage = training.make_stage("car", "tiny", None)
    for p in stage.model.parameters():  # away from the initialisation, at which attention hardly counts
        p.data.add_(0.1 * torch.randn(p.shape))
    batch = training.make_batch(stage, 2)
    stage.trainable.eval()
    stage.model.to(memory_format=torch.channels_last)
    cached = dict(batch, tokens=join_tokens(stage.model.vqvae.encode(batch["image"])))
    ours, _ = stage.loss({k: v for k, v in cached.items() if k != "image"})
    with training.plain_attention(), training.plain_kernels(), training.float32_injection():
        plain, _ = stage.loss(batch)
    torch.testing.assert_close(plain, ours, rtol=1e-5, atol=1e-5)


def test_it_measures_every_variant_of_a_stage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(training.PRESETS, "tiny", TINY)
    flags = "--preset tiny --stages vqvae,car --batch 2 --runs 2 --warmup 0 --no-memory".split()
    assert training.main(flags) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = [(r["stage"], r["variant"]) for r in found["results"]]
    alone = ("attention per scale only", "token cache only", "kernels only")
    assert rows == [("vqvae", v) for v in ("plain", "ours")] + [("car", v) for v in ("plain", *alone, "ours")]
    assert all(r["images_per_s"] > 0 for r in found["results"])

"""VAR d36-s: 512×512, one AdaLN projection for all blocks; here of depth 2 and narrow, with random weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch

from car_export.config import ExportOptions
from car_export.plan2 import build_plan_of_2
from car_runtime import open_plan
from car_train.config import SIDES_512, ModelConfig, VARConfig, VQVAEConfig
from car_train.images import to_pixels
from car_train.model import Model
from car_train.model.sample import sample


def narrow(config: VARConfig) -> VARConfig:
    """The same transformer with 2 blocks of width 64."""
    return dataclasses.replace(config, depth=2, width=64, heads=2, classes=10)


def test_d36s_at_depth_2_draws_the_tokens_of_the_reference_loop(tmp_path: Path) -> None:
    published = VARConfig(depth=36, shared_aln=True)
    assert (published.C, published.H, sum(s * s for s in SIDES_512)) == (2304, 36, 2240)
    torch.manual_seed(0)
    small = {"vocab": 64, "latent_channels": 8, "channels": 8, "multipliers": (1,) * 5, "res_blocks": 1}
    tokenizer = VQVAEConfig(sides=SIDES_512, **small)
    model = Model(ModelConfig(vqvae=tokenizer, var=narrow(published))).requires_grad_(False).eval()
    for parameter in model.parameters():  # the published initialisation starts the head near zero
        if parameter.ndim >= 2:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    output = build_plan_of_2(model, ExportOptions(output=tmp_path / "d36s.plan", name="d36s"))
    with open_plan(output, "ort-cpu", threads=1) as plan:
        found = plan.generate(label=3, seed=5, cfg=1.5, top_k=20, top_p=0.9)
    assert found.images.shape == (1, 512, 512, 3)
    uniforms = torch.from_numpy(np.random.default_rng(5).random((1, 2240), dtype=np.float32))
    assert model.car is not None
    tokens, image = sample(model.vqvae, model.car, torch.tensor([3]), uniforms, None, 1.5, 20, 0.9)
    np.testing.assert_array_equal(found.tokens, torch.as_tensor(tokens).numpy())
    assert np.abs(found.images.astype(int) - to_pixels(image)).max() <= 1

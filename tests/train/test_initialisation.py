"""Where a base starts, and which of its parameters decay: as in the published training."""

from __future__ import annotations

import math

import pytest
import torch

from car_train.config import CARConfig, ModelConfig, VARConfig, VQVAEConfig
from car_train.model import Model, decays
from car_train.model.var import VAR, initialise

TOKENIZER = VQVAEConfig(sides=(1, 2), vocab=32, latent_channels=8, channels=8, multipliers=(1, 2), res_blocks=1)


def new_model(shared_aln: bool) -> Model:
    torch.manual_seed(0)
    var = VARConfig(depth=4, width=256, heads=4, classes=3, shared_aln=shared_aln)
    car = CARConfig(encoder_widths=(8, 12), encoder_strides=(2,))
    return Model(ModelConfig(vqvae=TOKENIZER, var=var, car=car))


def base_of(model: Model) -> VAR:
    assert model.car is not None
    return model.car.base


@pytest.mark.parametrize("alng", [1e-3, 1e-5])
def test_each_projection_of_a_block_starts_with_small_gammas(alng: float) -> None:
    base = base_of(new_model(shared_aln=False))
    initialise(base, alng)
    C, std = base.config.C, math.sqrt(1 / (3 * base.config.C))
    for block in base.blocks:
        assert block.ada_linear is not None
        weight = block.ada_linear.weight
        assert weight[: 2 * C].std().item() == pytest.approx(alng * std, rel=0.05)
        assert weight[2 * C :].std().item() == pytest.approx(0.5 * std, rel=0.05)
        assert not block.ada_linear.bias.any()
        # A truncated normal of this std is cut far outside: at ±2, 64 deviations.
        assert block.attn.proj.weight.std().item() == pytest.approx(std / math.sqrt(2 * 4), rel=0.05)
        assert block.mlp.fc1.weight.std().item() == pytest.approx(std, rel=0.05)
    assert base.head.weight.std().item() == pytest.approx(0.02 * std, rel=0.05)
    assert base.head_ada_linear.weight.std().item() == pytest.approx(0.5 * std, rel=0.05)


def test_offsets_are_scaled_and_the_projection_they_share_is_not() -> None:
    base = base_of(new_model(shared_aln=True))
    C = base.config.C
    assert base.shared_ada_linear is not None
    for rows in base.shared_ada_linear.weight.split(2 * C):
        assert rows.std().item() == pytest.approx(math.sqrt(1 / (3 * C)), rel=0.05)
    offsets = torch.stack([block.ada_offset for block in base.blocks if block.ada_offset is not None])
    assert offsets[:, :2].std().item() == pytest.approx(1e-5 / math.sqrt(C), rel=0.1)
    assert offsets[:, 2:].std().item() == pytest.approx(0.5 / math.sqrt(C), rel=0.1)


def test_what_decays_is_what_decays_in_the_published_training() -> None:
    model = new_model(shared_aln=True)
    names = {name for name, parameter in model.named_parameters() if decays(name, parameter)}
    base = {name.removeprefix("car.base.") for name in names if name.startswith("car.base.")}
    assert {"class_embedding.weight", "word_embedding.weight", "shared_ada_linear.weight", "head.weight"} < base
    assert {"blocks.0.attn.qkv_weight", "blocks.3.mlp.fc2.weight"} < base
    free = {name for name, _ in model.named_parameters()} - names
    ends = ("bias", "norm.weight", "norm1.weight", "norm2.weight", "norm_out.weight", "log_scale_H", "ada_offset")
    known = {"car.base.pos_start", "car.base.pos_LC", "car.base.level_KC", "vqvae.quantizer.embedding"}
    assert {name for name in free if not name.endswith(ends)} == known
    assert not any(name.endswith(ends) for name in names)
    # Of a module by itself, whose names are shorter, the same.
    assert base == {name for name, parameter in base_of(model).named_parameters() if decays(name, parameter)}

"""Transformers without AdaLN or attention norm (VAR table 3) are what the words say, and can't be exported."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from car_export.config import ExportOptions
from car_export.errors import ExportError
from car_export.plan2 import build_plan_of_2
from car_train.config import ConfigError, ModelConfig, VARConfig
from car_train.model import Model, decays
from car_train.model.sample import Recording, sample
from car_train.model.var import Attention
from car_train.model.vqvae import split_tokens
from fixtures.small import SIDES, small_config


def plain_model(adaln: bool = False, attn_norm: bool = False) -> Model:
    config = small_config(control=False)
    assert config.var is not None
    var = dataclasses.replace(config.var, shared_aln=False, adaln=adaln, attn_norm=attn_norm)
    torch.manual_seed(7)
    model = Model(dataclasses.replace(config, var=var)).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def test_attention_without_norm_is_pytorchs_scaled_by_a_quarter() -> None:
    torch.manual_seed(0)
    layer = Attention(48, 3, norm=False)
    for parameter in layer.parameters():
        parameter.data.normal_()
    x = torch.randn(2, sum(s * s for s in SIDES), 48)
    scale_L = torch.cat([torch.full((s * s,), i) for i, s in enumerate(SIDES)])
    bias = torch.cat([layer.q_bias, torch.zeros(48), layer.v_bias])
    q, k, v = F.linear(x, layer.qkv_weight, bias).view(2, -1, 3, 3, 16).permute(2, 0, 3, 1, 4)
    mask = scale_L[:, None] >= scale_L
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.25 / 16**0.5)
    wanted = layer.proj(found.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, None, 0, SIDES), wanted, rtol=1e-4, atol=1e-4)


def test_a_block_without_adaln_is_the_usual_one_for_every_class() -> None:
    model = plain_model()
    assert model.car is not None
    block, width = model.car.base.blocks[1], 48
    assert block.norm_4C is not None
    rows = model.car.modulations(torch.tensor([0, 3, 5]))
    assert torch.equal(rows, rows[:1].expand_as(rows))
    x, (scale1, scale2, shift1, shift2) = torch.randn(1, 39, width), block.norm_4C
    h = x + block.attn(F.layer_norm(x, (width,), 1 + scale1, shift1, 1e-6), None, 1, SIDES)
    wanted = h + block.mlp(F.layer_norm(h, (width,), 1 + scale2, shift2, 1e-6))
    found = block(x, rows[:1, 6:12].split(1, dim=1), sides=SIDES)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("adaln", "attn_norm"), [(False, False), (True, False), (False, True)])
def test_sampling_sees_what_teacher_forcing_sees(adaln: bool, attn_norm: bool) -> None:
    model = plain_model(adaln, attn_norm)
    assert model.car is not None
    label, uniforms = torch.tensor([1, 4]), torch.rand(2, 39, generator=torch.Generator().manual_seed(0))
    seen = Recording()
    tokens, _ = sample(model.vqvae, model.car, label, uniforms, cfg=0.0, record=seen)
    logits = model.car(label, model.vqvae.quantizer.decode(split_tokens(tokens, SIDES))[1])
    drawn = torch.cat([scale["logits"] for scale in seen.scales], 1)
    torch.testing.assert_close(drawn, logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits[0, 0], logits[1, 0])  # the class is in the start token at least


def test_norms_do_not_decay_and_old_configs_stay_as_they_are() -> None:
    model = plain_model()
    free = {name for name, parameter in model.named_parameters() if not decays(name, parameter)}
    assert {"car.base.blocks.0.norm_4C", "car.base.head_norm_2C"} < free
    assert ModelConfig.from_json(model.config.to_json()) == model.config
    published = small_config(control=False)
    assert not {"adaln", "attn_norm"} & set(json.loads(published.to_json())["var"])
    with pytest.raises(ConfigError, match="leave out one"):
        VARConfig(shared_aln=True, adaln=False)


def test_it_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="train it without --no-adaln"):
        build_plan_of_2(plain_model(attn_norm=True), ExportOptions(output=tmp_path / "x.plan", name="x"))
    assert not (tmp_path / "x.plan").exists()

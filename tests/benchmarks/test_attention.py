"""Attention maps are the weights that the model itself attends with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.attention import attention, attention_weights, main, per_scale
from car_train import checkpoint
from fixtures.small import SIDES, small_model


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (20, 20, 3), np.uint8)


def test_weights_times_values_are_the_attentions_output(pixels: np.ndarray) -> None:
    model = small_model(control=False)
    assert model.car is not None
    layer = model.car.base.blocks[1].attn
    x = torch.randn(1, 39, 48, generator=torch.Generator().manual_seed(0))
    weights_HNL = attention_weights(layer, x, 25)
    v_LHd = (x[0] @ layer.qkv_weight[96:].T + layer.v_bias).view(39, 3, 16)
    by_hand = layer.proj(torch.einsum("hnl,lhd->nhd", weights_HNL, v_LHd).flatten(1))
    torch.testing.assert_close(by_hand, layer(x, None, 0, SIDES)[0, -25:], rtol=1e-4, atol=1e-5)

    maps = attention(model, pixels, 2)
    assert [m.shape for m in maps] == [(25, 39)] * 3
    for weights_NL in maps:
        np.testing.assert_allclose(weights_NL.sum(1), 1, rtol=1e-6)
    assert not np.allclose(maps[0], attention(model, pixels, 3)[0])  # another class


def test_weights_are_cut_into_the_squares_of_the_scales() -> None:
    squares = per_scale(np.arange(39.0), SIDES)
    assert [s.shape for s in squares] == [(s, s) for s in SIDES]
    assert squares[1][1, 0] == 3


def test_the_command_draws_a_figure(pixels: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = str(checkpoint.save(small_model(control=False), tmp_path / "var"))
    Image.fromarray(pixels).save(tmp_path / "image.png")
    base = [saved, "--image", str(tmp_path / "image.png"), "-o", str(tmp_path / "a.png")]
    assert main([*base, "--class", "1", "--tokens", "0.9,0.1", "--blocks", "0", "2"]) == 0
    assert Image.open(tmp_path / "a.png").width > 1000
    assert main([*base, "--class", "9"]) == 2
    assert "give 0…4" in capsys.readouterr().err
    assert main([*base, "--blocks", "3"]) == 2
    assert "0…2" in capsys.readouterr().err

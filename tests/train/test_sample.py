"""The sampling definition in PyTorch (and so in the exported step) against a plain numpy oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from car_train.model.sample import TOP_P_OFF, draw, mix


def oracle(logits: np.ndarray, uniform: float, top_k: int, top_p: float) -> tuple[int, np.ndarray]:
    """One token by the definition, in float64 and with loops: (token, kept)."""
    order = np.sort(logits)[::-1]
    kept = logits >= order[top_k - 1]
    p = np.where(kept, np.exp(logits - logits.max()), 0)
    p /= p.sum()
    passed = 0.0
    border = -np.inf
    for value in order:
        if value < order[top_k - 1] or passed >= top_p:
            break
        border = value
        passed += p[logits == value].sum() / (logits == value).sum()
    kept &= logits >= border
    p = np.where(kept, p, 0)
    cdf = np.cumsum(p) / p.sum()
    return int(np.argmax(cdf > uniform)), kept


def torch_draw(logits: np.ndarray, uniform: float, top_k: int, top_p: float) -> int:
    return int(
        draw(torch.from_numpy(logits)[None], torch.tensor([uniform]), torch.tensor([top_k]), torch.tensor([top_p]))[0]
    )


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(2, 60),
    st.floats(0, 0.999),
    st.floats(0.01, 1.2),
    st.floats(0.1, 8),
    st.data(),
)
def test_draw_equals_the_oracle(
    seed: int, V: int, uniform: float, top_p: float, spread: float, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, V))
    logits = (np.random.default_rng(seed).standard_normal(V) * spread).astype(np.float32)
    token, kept = oracle(logits.astype(np.float64), uniform, top_k, top_p)
    drawn = torch_draw(logits, uniform, top_k, top_p)
    if drawn != token:
        # Only rounding may separate them: the uniform number or top_p lies on a border of the running sum.
        p = np.exp(logits.astype(np.float64) - logits.max())
        near_p = any(abs(c - top_p) < 1e-5 for c in np.cumsum(np.sort(np.where(kept, p, 0) / p[kept].sum())[::-1]))
        cdf = np.cumsum(np.where(kept, p, 0)) / p[kept].sum()
        assert near_p or np.abs(cdf - uniform).min() < 1e-5


def test_top_k_keeps_ties_at_its_border() -> None:
    logits = np.array([1, 3, 2, 2, 0], np.float32)
    drawn = {torch_draw(logits, u, 2, TOP_P_OFF) for u in np.linspace(0, 0.999, 200)}
    assert drawn == {1, 2, 3}


def test_top_k_one_is_the_best_token_whatever_the_uniform_number() -> None:
    logits = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    assert {torch_draw(logits, u, 1, TOP_P_OFF) for u in (0.0, 0.3, 0.9999999)} == {int(logits.argmax())}


def test_top_p_always_keeps_the_best_token() -> None:
    assert torch_draw(np.array([5, 0, 0], np.float32), 0.99, 3, 1e-6) == 0


def test_the_largest_uniform_number_never_falls_off_the_end() -> None:
    top = float(np.nextafter(np.float32(1), np.float32(0)))
    for seed in range(200):
        logits = np.random.default_rng(seed).standard_normal(1000).astype(np.float32) * 10
        token = torch_draw(logits, top, 50, 0.9)
        assert 0 <= token < 1000
        assert logits[token] >= np.sort(logits)[-50]


def test_frequencies_follow_the_probabilities() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    uniforms = torch.from_numpy(np.random.default_rng(0).random(20000, dtype=np.float32))
    tokens = draw(logits.expand(20000, 4), uniforms, torch.tensor([4]), torch.tensor([TOP_P_OFF]))
    share = np.bincount(tokens.numpy(), minlength=4) / 20000
    np.testing.assert_allclose(share, [0.5, 0.3, 0.15, 0.05], atol=0.015)  # about four standard deviations


@pytest.mark.parametrize("images", [1, 3])
def test_guidance_mixes_the_two_halves_and_is_off_without_a_second(images: int) -> None:
    logits = torch.randn(2 * images, 5, 7)
    cond, uncond = logits[:images], logits[images:]
    torch.testing.assert_close(mix(logits, 1.5, images), 2.5 * cond - 1.5 * uncond)
    torch.testing.assert_close(mix(cond, 1.5, images), cond)

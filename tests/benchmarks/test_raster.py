"""The autoregressive baseline: no token sees a later one, and drawing follows what was trained."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.baselines.raster import RasterStage, raster_logits, raster_sample
from fixtures.small import small_model

SIDES = (1, 4)


def test_no_token_sees_a_later_one() -> None:
    model = small_model(control=False, sides=SIDES)
    label = torch.tensor([2])
    tokens = torch.randint(48, (1, 17), generator=torch.Generator().manual_seed(0))
    logits = raster_logits(model, label, tokens)
    other = tokens.clone()
    other[0, 9] = (other[0, 9] + 1) % 48
    changed = (raster_logits(model, label, other) - logits).abs().amax((0, 2)) > 1e-4
    assert changed.tolist() == [False] * 10 + [True] * 7


def test_drawing_is_by_the_probabilities_of_teacher_forcing() -> None:
    model = small_model(control=False, sides=SIDES)
    label, uniforms = torch.tensor([1, 3]), torch.rand(2, 17, generator=torch.Generator().manual_seed(1))
    tokens, pixels = raster_sample(model, label, uniforms)
    assert pixels.shape == (2, 3, 16, 16)
    cdf = raster_logits(model, label, tokens).double().softmax(-1).cumsum(-1).numpy()
    by_hand = np.array(
        [
            [np.searchsorted(c, u, "right") for c, u in zip(*pair, strict=True)]
            for pair in zip(cdf, uniforms.double().numpy(), strict=True)
        ]
    )
    np.testing.assert_array_equal(tokens.numpy(), by_hand)
    guided, _ = raster_sample(model, label, uniforms, cfg=3.0, top_k=20)
    assert torch.equal(guided[:, 0], raster_sample(model, label, uniforms, top_k=20)[0][:, 0])  # none at the first
    assert not torch.equal(guided, tokens)


def test_the_loss_is_the_likelihood_of_the_tokens() -> None:
    model = small_model(control=False, sides=SIDES)
    stage = RasterStage(model)
    stage.train(False)
    tokens = torch.randint(48, (2, 17), generator=torch.Generator().manual_seed(0))
    label = torch.tensor([0, 4])
    loss, metrics = stage.loss({"tokens": tokens, "label": label})
    each = raster_logits(model, label, tokens).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(loss, -each.mean())
    torch.testing.assert_close(metrics["loss_last"], -each[:, 1:].mean())

"""A model small enough to export in seconds, unlike the published one in every dial."""

from __future__ import annotations

import torch

from car_train.config import CARConfig, ModelConfig, VARConfig, VQVAEConfig
from car_train.model import Model

SIDES = (1, 2, 3, 5)


def small_config(
    control: bool = True, vocab: int = 48, sides: tuple[int, ...] = SIDES, depth: int = 3
) -> ModelConfig:
    # A width of 64 makes a bias of exactly the size from which initializers leave the graph.
    return ModelConfig(
        vqvae=VQVAEConfig(
            sides=sides, vocab=vocab, latent_channels=8, channels=8, multipliers=(1, 2, 2), res_blocks=1, phis=3
        ),
        var=VARConfig(depth=depth, width=48, heads=3, classes=5, shared_aln=True, mlp_ratio=2),
        car=CARConfig(control_type="sketch", encoder_widths=(8, 64, 16), encoder_strides=(2, 2)) if control else None,
        class_names=("ant", "bee", "cat", "dog", "eel"),
    )


def small_model(
    control: bool = True, spread: float = 1.0, vocab: int = 48, sides: tuple[int, ...] = SIDES, depth: int = 3
) -> Model:
    """Random weights of ordinary size.

    The published initialisation starts heads and γ near zero, which would hide mistakes.
    """
    torch.manual_seed(7)
    model = Model(small_config(control, vocab, sides, depth)).requires_grad_(False).eval()
    for name, p in model.named_parameters():
        if p.ndim >= 2 and "embedding" not in name:
            p.normal_(std=spread / p[0].numel() ** 0.5)
        elif name.endswith("bias") or (p.ndim == 1 and "norm" not in name):
            p.add_(0.05 * torch.randn(p.shape))
    return model

"""What the shapes of a model's parameters, and a plan's manifest, say of the model's config."""

from __future__ import annotations

from typing import Protocol

from car_runtime.format.manifest import Manifest
from car_train.config import VARConfig, VQVAEConfig

ENCODER = "car.branch.encoder."


class Parameters(Protocol):
    """A model's parameters, by their names in a checkpoint."""

    def has(self, name: str) -> bool:
        """Whether there is such a parameter."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a parameter that has to be there."""

    def count(self, pattern: str) -> int:
        """How many numbers 0, 1, … stand in the place of the group of a pattern, in names."""


def base_config(manifest: Manifest, known: Parameters) -> tuple[VQVAEConfig, VARConfig]:
    """The configs of a plan's tokenizer and transformer; ConfigError for sizes that no model has."""
    facts = manifest.model
    levels = known.count(r"vqvae\.encoder\.levels\.(\d+)\.")
    channels = known.shape("vqvae.encoder.conv_in.weight")[0]
    widths = [known.shape(f"vqvae.encoder.levels.{i}.block.0.conv1.weight")[0] for i in range(levels)]
    vqvae = VQVAEConfig(
        sides=tuple(scale.side for scale in manifest.scales),
        vocab=facts.vocab,
        latent_channels=facts.latent_channels,
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        res_blocks=known.count(r"vqvae\.encoder\.levels\.0\.block\.(\d+)\."),
        phis=known.shape("vqvae.quantizer.phi_weight")[0] // facts.latent_channels,
    )
    var = VARConfig(
        depth=facts.depth,
        width=facts.width,
        heads=facts.heads,
        classes=facts.classes,
        shared_aln=known.has("car.base.shared_ada_linear.weight"),
        mlp_ratio=known.shape("car.base.blocks.0.mlp.fc1.weight")[0] // facts.width,
    )
    return vqvae, var


def encoder_widths(known: Parameters) -> dict[str, int]:
    """Convolution of a branch's own control encoder → its channels, in order; empty where it is the tokenizer's."""
    if not known.has(f"{ENCODER}conv_in.weight"):
        return {}
    steps = known.count(r"car\.branch\.encoder\.steps\.(\d+)\.")
    names = ["conv_in", *(f"steps.{i}" for i in range(1, steps, 2))]
    return {name: known.shape(f"{ENCODER}{name}.weight")[0] for name in names}

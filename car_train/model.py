"""A whole model: tokenizer, and transformer with or without control."""

from __future__ import annotations

from torch import nn

from .car import CAR
from .config import ModelConfig
from .vqvae import VQVAE


class Model(nn.Module):
    """What a checkpoint holds. `car` is None until a transformer is trained; `car.branch` is None without control."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.vqvae = VQVAE(config.vqvae)
        self.car = CAR(config) if config.var is not None else None

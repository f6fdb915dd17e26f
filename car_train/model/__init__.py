"""A whole model: tokenizer, and transformer with or without control."""

from __future__ import annotations

from torch import nn

from car_train.config import ModelConfig
from car_train.model.car import CAR
from car_train.model.vqvae import VQVAE


class Model(nn.Module):
    """What a checkpoint holds. `car` is None until a transformer is trained; `car.branch` is None without control."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.vqvae = VQVAE(config.vqvae)
        self.car = CAR(config) if config.var is not None else None

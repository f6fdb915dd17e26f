"""A whole model: tokenizer, and transformer with or without control."""

from __future__ import annotations

from torch import Tensor, nn

from car_train.config import ModelConfig
from car_train.model.car import CAR
from car_train.model.vqvae import VQVAE

NO_DECAY = ("pos_start", "pos_LC", "level_KC", "ada_offset", "log_scale_H", "norm_4C", "head_norm_2C", "embedding")
"""Parameters that don't decay whatever their shape: positions, levels, offsets, temperatures, the codebook."""


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies to a parameter of a model or of one of its modules, as published.

    Matrices and kernels decay, and with them the class embedding and the projection of the latents. Biases, norms and
    `NO_DECAY` don't.
    """
    return parameter.ndim > 1 and name.rpartition(".")[2] not in NO_DECAY


class Model(nn.Module):
    """What a checkpoint holds. `car` is None until a transformer is trained; `car.branch` is None without control."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.vqvae = VQVAE(config.vqvae)
        self.car = CAR(config) if config.var is not None else None

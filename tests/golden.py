"""The published model's golden numbers, and official-format checkpoints to reach them with.

See tests/data/reference/README.md.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.reference.fill import fill

REFERENCE = Path(__file__).parent / "data" / "reference"
OFFICIAL_D16 = json.loads((REFERENCE / "car_d16_keys.json").read_text())
OFFICIAL_VAE = json.loads((REFERENCE / "vae_keys.json").read_text())
BUFFERS = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias", "ema_vocab_hit_SV")


class Golden:
    """One recorded model: `tiny` (64×64, depth 2) or `ten` (256×256, the official ten scales, depth 4)."""

    def __init__(self, name: str):
        self.name = name
        self.arrays = np.load(REFERENCE / f"{name}.npz")
        self.config = json.loads(str(self.arrays["config"]))

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]

    @property
    def sides(self) -> tuple[int, ...]:
        return tuple(self.config["patch_nums"])

    @cached_property
    def state_dicts(self) -> dict[str, dict[str, Tensor]]:
        return official_state_dicts(**self.config)


def official_state_dicts(
    V: int, Cvae: int, ch: int, depth: int, num_classes: int, patch_nums: list[int], shared_aln: bool = False
) -> dict[str, dict[str, Tensor]]:
    """vae, var and car state dicts with the official names, of any size; values from `fill`, zeros for buffers."""
    C, L, K = 64 * depth, sum(s * s for s in patch_nums), len(patch_nums)
    vae = {
        k: [K if n == 10 else V if n == 4096 else n * ch // 160 if n >= 160 else Cvae if n == 32 else n for n in s]
        for k, s in OFFICIAL_VAE.items()
    }
    special = {
        "lvl_1L": [1, L],
        "attn_bias_for_masking": [1, 1, L, L],
        "pos_1LC": [1, L, C],
        "class_emb.weight": [num_classes + 1, C],
        "lvl_embed.weight": [K, C],
        "word_embed.weight": [C, Cvae],
        "head.weight": [V, C],
        "head.bias": [V],
        "car_control_convs.conv_out.weight": [C, 1024, 3, 3],
    }
    both: dict[str, list[int]] = {}
    for key, shape in OFFICIAL_D16.items():
        part, *rest = key.split(".")
        if part == "blocks" and int(rest[0]) >= depth:
            continue
        if part in ("car_blocks", "car_skip_norm", "car_skip_linear") and int(rest[0]) >= depth // 2:
            continue
        if shared_aln and ".ada_lin." in key and "blocks" in part:
            both[f"{part}.{rest[0]}.ada_gss"] = [1, 1, 6, C]
        elif key in special:
            both[key] = special[key]
        elif key.endswith("scale_mul_1H11"):
            both[key] = [1, depth, 1, 1]
        elif key.startswith("car_control_convs") and "conv_out" not in key:
            both[key] = shape
        else:
            both[key] = [n * C // 1024 if n >= 1024 else n for n in shape]
    if shared_aln:
        both |= {"shared_ada_lin.1.weight": [6 * C, C], "shared_ada_lin.1.bias": [6 * C]}
    return {
        "vae": _filled(vae),
        "var": _filled({k: s for k, s in both.items() if not k.startswith("car_")}),
        "car": _filled({k: s for k, s in both.items() if k.startswith("car_")}),
    }


def _filled(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    return {
        k: torch.zeros(s) if k.endswith(BUFFERS) else torch.from_numpy(fill(k, tuple(s))) for k, s in shapes.items()
    }


def save_official(state_dicts: dict[str, dict[str, Tensor]], folder: Path) -> dict[str, Path]:
    """The three .pth files, as released."""
    paths = {part: folder / f"{part}.pth" for part in state_dicts}
    for part, tensors in state_dicts.items():
        torch.save(tensors, paths[part])
    return paths

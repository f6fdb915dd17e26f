"""What a model is, in numbers: frozen configs with every derived value in one place.

Three parts, as the papers have them: the multi-scale VQVAE (VAR, arXiv 2404.02905, section 3.2), the VAR transformer
(section 3.3) and CAR's control branch (arXiv 2410.04671, section 3). A config is what `config.json` of a checkpoint
holds.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from car_train.conventions import CONTROL_TYPES, FIRST, PRESETS, ControlConvention
from car_train.errors import UserError
from car_train.flags import option

SIDES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SIDES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
# The parts of a control branch that CAR's Table 3 compares; the first of each is the published model's.
ENCODERS = ("conv", "vqvae")
TRANSFORMERS = ("blocks", "conv")
FUSIONS = ("concat", "zero", "cross_norm")


class ConfigError(UserError, ValueError):
    """A value that no model can have, with the remedy."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class VQVAEConfig:
    """The tokenizer. The defaults are the published `vae_ch160v4096z32`."""

    sides: tuple[int, ...] = option(
        SIDES_256,
        "tokens per edge of each scale, coarse first; the last is also the latent's edge",
        flag="--patch-nums",
        aliases=("--sides",),
        metavar="PATCH_NUMS",
    )
    vocab: int = option(4096, "codes")
    latent_channels: int = option(32)
    channels: int = option(160, "channels of the finest level; level i has this times its multiplier")
    multipliers: tuple[int, ...] = option((1, 1, 2, 2, 4), "channels of each level; its length sets f")
    res_blocks: int = option(2, "residual blocks per level of the encoder; the decoder has one more")
    phis: int = 4
    """Residual convolutions φ, shared by the scales."""
    beta: float = option(0.25, "weight of the commitment loss (VAR eq. 5)")

    def __post_init__(self) -> None:
        _require(
            len(self.sides) >= 2,
            f"sides {list(self.sides)}: a multi-scale model has at least two scales; give e.g. 1,2,3,4",
        )
        ordered = self.sides[0] == 1 and all(a < b for a, b in zip(self.sides, self.sides[1:], strict=False))
        _require(ordered, f"sides {list(self.sides)}: they start at 1 and grow; give e.g. 1,2,3,4")
        for field in ("vocab", "latent_channels", "channels", "res_blocks", "phis"):
            _require(getattr(self, field) >= 1, f"{field} is {getattr(self, field)}; it must be at least 1")
        _require(
            len(self.multipliers) >= 1 and min(self.multipliers) >= 1,
            f"multipliers {list(self.multipliers)} must be positive",
        )

    @property
    def patch(self) -> int:
        """Pixels per latent edge, f."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def latent_size(self) -> int:
        return self.sides[-1]

    @property
    def image_size(self) -> int:
        return self.patch * self.latent_size

    @property
    def tokens(self) -> int:
        """Tokens of one image, all scales, L."""
        return sum(s * s for s in self.sides)

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Token range (start, stop) of each scale."""
        out, start = [], 0
        for s in self.sides:
            out.append((start, start + s * s))
            start += s * s
        return tuple(out)

    @property
    def ratios(self) -> tuple[float, ...]:
        """k / (K - 1) of each scale: where it stands between coarse and fine."""
        last = len(self.sides) - 1
        return tuple(k / last for k in range(last + 1))

    @property
    def phi_index(self) -> tuple[int, ...]:
        """Which φ each scale uses: the one whose tick is nearest to the scale's ratio.

        Ties (ratio 2/9 between ticks 1/12 and 13/36) fall as they do in float64 by numpy: the published weights were
        trained that way.
        """
        edge = 1 / 3 / self.phis if self.phis == 4 else 1 / 2 / self.phis
        ticks = np.linspace(edge, 1 - edge, self.phis)
        return tuple(int(np.argmin(np.abs(ticks - ratio))) for ratio in self.ratios)


@dataclass(frozen=True, kw_only=True)
class VARConfig:
    """The transformer. One dial, `depth`: width 64·depth and `depth` heads unless they are given."""

    depth: int = option(16, "blocks")
    width: int | None = option(None, "(default: 64·depth)")
    heads: int | None = option(None, "(default: depth)")
    classes: int = 1000
    shared_aln: bool = option(
        False, "one AdaLN projection for all blocks plus a learned offset per block (published for 512×512)"
    )
    adaln: bool = option(
        True, "the class as the start token alone, and norms that know no class (VAR table 3; can't be exported)"
    )
    attn_norm: bool = option(
        True, "queries and keys of any length, scores divided by 4√d (VAR table 3; can't be exported)"
    )
    mlp_ratio: int = 4
    label_dropout: float = 0.1
    drop_path: float | None = option(
        None, "largest drop-path rate, reached at the last block (default: 0.1·depth/24)"
    )

    def __post_init__(self) -> None:
        _require(self.depth >= 1, f"depth is {self.depth}; it must be at least 1")
        _require(self.classes >= 1, f"classes is {self.classes}; it must be at least 1")
        for name, value in (("width", self.C), ("heads", self.H), ("mlp_ratio", self.mlp_ratio)):
            _require(value >= 1, f"{name} is {value}; it must be at least 1")
        _require(self.adaln or not self.shared_aln, "shared_aln is a kind of AdaLN; leave out one of the two flags")
        _require(self.C % self.H == 0, f"width {self.C} is not a multiple of heads {self.H}; change one of them")
        for name, rate in (("label_dropout", self.label_dropout), ("drop_path", self.drop_path_rate)):
            _require(0 <= rate < 1, f"{name} is {rate}; it must be in [0, 1)")

    @property
    def C(self) -> int:  # noqa: N802 - the field's symbol
        return self.width if self.width is not None else 64 * self.depth

    @property
    def H(self) -> int:  # noqa: N802
        return self.heads if self.heads is not None else self.depth

    @property
    def drop_path_rate(self) -> float:
        return 0.1 * self.depth / 24 if self.drop_path is None else self.drop_path


@dataclass(frozen=True, kw_only=True)
class CARConfig:
    """The control branch: 𝓕 (control encoder), 𝒯 (half of the base's depth) and 𝓖 (fusion), CAR section 3.2.

    Each has the alternatives of the paper's Table 3; the defaults are what the published weights are made for.
    """

    control_type: str = option(
        "canny", "made on the fly, unless --control-root is given", flag="--control", choices=CONTROL_TYPES
    )
    convention: str | None = option(
        None,
        "how its maps are made: "
        + ", ".join(PRESETS)
        + " (default: the published one of the type; for maps made on the fly, the nearest that needs no network)",
        metavar="NAME",
    )
    encoder_widths: tuple[int, ...] = option(
        (64, 128, 256, 512, 1024),
        "channels of a convolutional 𝓕 (default: 16, doubling at each halving; published: 64,128,256,512,1024)",
    )
    encoder_strides: tuple[int, ...] = (2, 2, 2, 2)
    """Stride of the step from each width to the next; their product is the tokenizer's `patch`."""
    encoder: str = option(
        "conv",
        "𝓕: a shared convolutional encoder; or the tokenizer's encoder, frozen, and a projection",
        flag="--control-encoder",
        choices=ENCODERS,
    )
    transformer: str = option(
        "blocks",
        "𝒯: transformer blocks like the base's; or residual convolutions on each scale by itself",
        flag="--control-transformer",
        choices=TRANSFORMERS,
    )
    fusion: str = option(
        "concat",
        "𝓖: Linear(LayerNorm([x, c])); x plus a projection of c that starts at zero; or x plus c brought to x's mean "
        "and variance, times a gain that starts at zero",
        choices=FUSIONS,
    )

    @property
    def control_convention(self) -> ControlConvention:
        """How the control maps are made; the published way of the control type where none is named."""
        return PRESETS[self.convention or self.control_type]

    def __post_init__(self) -> None:
        _require(
            self.control_type in CONTROL_TYPES,
            f"control_type is {self.control_type!r}; choose one of {', '.join(CONTROL_TYPES)}",
        )
        known = [name for name, preset in PRESETS.items() if preset.control_type == self.control_type]
        _require(
            self.convention is None or self.convention in known,
            f"convention is {self.convention!r}; for {self.control_type} choose one of {', '.join(known)}",
        )
        for field, choices in (("encoder", ENCODERS), ("transformer", TRANSFORMERS), ("fusion", FUSIONS)):
            value = getattr(self, field)
            _require(value in choices, f"{field} is {value!r}; choose one of {', '.join(choices)}")
        _require(
            len(self.encoder_strides) == len(self.encoder_widths) - 1,
            f"encoder_strides {list(self.encoder_strides)}: one for each step between "
            f"encoder_widths {list(self.encoder_widths)}",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A whole model. `var` and `car` are None while they are not trained (or not wanted)."""

    vqvae: VQVAEConfig
    var: VARConfig | None = None
    car: CARConfig | None = None
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _require(self.car is None or self.var is not None, "a control branch (car) needs a base (var)")
        if self.car is not None and self.var is not None:
            stride = math.prod(self.car.encoder_strides)
            _require(
                self.car.encoder != "conv" or stride == self.vqvae.patch,
                f"encoder_strides {list(self.car.encoder_strides)} shrink by {stride}, "
                f"the tokenizer by {self.vqvae.patch}; make them equal",
            )
            _require(
                self.var.depth >= 2, f"depth is {self.var.depth}; a control branch needs a base of at least 2 blocks"
            )
        if self.class_names is not None and self.var is not None:
            _require(
                len(self.class_names) == self.var.classes,
                f"{len(self.class_names)} class names for {self.var.classes} classes; give one for each",
            )

    def to_json(self) -> str:
        data = dataclasses.asdict(self)
        for name in ("adaln", "attn_norm"):  # only where they are off: what has both, earlier versions read too
            if data["var"] is not None and data["var"][name]:
                del data["var"][name]
        return json.dumps(data, indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> ModelConfig:
        """Parse `config.json`; ConfigError for anything that is not a config."""
        try:
            data = json.loads(text)
            _check_numbers(data)
            return ModelConfig(
                vqvae=_build(VQVAEConfig, data["vqvae"]),
                var=_build(VARConfig, data["var"]) if data.get("var") else None,
                car=_build(CARConfig, _with_convention(data["car"])) if data.get("car") else None,
                class_names=tuple(data["class_names"]) if data.get("class_names") else None,
            )
        except ConfigError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
            why = repr(error)[:120]
            raise ConfigError(f"config.json is not a model config ({why}); use one that car_train wrote") from error


_LARGEST = {
    "sides": 1024,
    "vocab": 2**20,
    "latent_channels": 4096,
    "channels": 8192,
    "multipliers": 64,
    "res_blocks": 64,
    "phis": 64,
    "depth": 256,
    "width": 2**16,
    "heads": 1024,
    "classes": 2**20,
    "mlp_ratio": 64,
    "encoder_widths": 2**16,
    "encoder_strides": 64,
}
"""The most that each whole number of a config.json may be: far above every published model."""
_LONGEST = 64
"""Numbers in one of its lists."""


def _check_numbers(data: dict[str, Any]) -> None:
    """Refuse a config.json whose sizes are no whole numbers or beyond `_LARGEST`, before anything is made of them."""
    for part in ("vqvae", "var", "car"):
        for name, value in (data.get(part) or {}).items():
            if name not in _LARGEST or value is None:
                continue
            values = value if isinstance(value, list) else [value]
            _require(len(values) <= _LONGEST, f"{part}.{name} has {len(values)} numbers, over {_LONGEST}; give fewer")
            for one in values:
                whole = isinstance(one, int) and not isinstance(one, bool)
                _require(whole, f"{part}.{name} is {repr(one)[:40]}; it must be a whole number")
                # Not printed: it may have thousands of digits.
                _require(one <= _LARGEST[name], f"{part}.{name} is over {_LARGEST[name]}; give a smaller one")
    names = data.get("class_names") or []
    _require(all(isinstance(name, str) for name in names), "class_names are not all texts; use a config of car_train")


def _with_convention(car: dict[str, Any]) -> dict[str, Any]:
    """Checkpoints of version 0.1.0 state no convention: theirs is that version's."""
    return {"convention": FIRST.get(car.get("control_type", "canny")), **car}


def _build(cls: Any, data: dict[str, Any]) -> Any:
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})

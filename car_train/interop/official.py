"""The published checkpoints: their names and shapes, mapped to ours, and the config they imply.

Three files, as released: `vae_ch160v4096z32.pth`, `var_d16.pth`, `car_<control>_d16.pth`. Nothing in them is executed
(`weights_only=True`), nothing is guessed silently: a missing, unexpected or misshapen tensor stops the import, and
all of them are listed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from car_train.config import SIDES_256, SIDES_512, CARConfig, ModelConfig, VARConfig, VQVAEConfig
from car_train.errors import UserError
from car_train.files import check_archive
from car_train.model import Model

# Buffers that the published modules save and that follow from the config. They are checked for shape, not loaded.
_BUFFERS = re.compile(
    r"(lvl_1L|attn_bias_for_masking|(car_)?blocks\.\d+\.attn\.zero_k_bias|quantize\.ema_vocab_hit_SV|quantize\.beta)$"
)


class OfficialCheckpointError(UserError, ValueError):
    """The files are not what they should be; the message lists every finding and ends with the remedy."""


def load_pth(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a `.pth` file, memory-mapped, without running any of its code.

    Unwraps the containers the published training scripts write (`{"trainer": {"var_wo_ddp": …}}`,
    `{"state_dict": …}`, `{"model": …}`).
    """
    path = Path(path)
    if not path.is_file():
        raise OfficialCheckpointError(f"{path}: no such file; give the path of the downloaded .pth file")
    try:
        check_archive(path)
        try:
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, ValueError):  # files in the format before zip archives can't be memory-mapped
            data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0][:160]
        raise OfficialCheckpointError(
            f"{path}: not a readable weights-only checkpoint ({reason}); download it again"
        ) from error
    for key in ("trainer", "car_wo_ddp", "var_wo_ddp", "vae_local", "state_dict", "model"):
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
    items = data.items() if isinstance(data, Mapping) else ()
    tensors = {str(k).removeprefix("module."): v for k, v in items if isinstance(v, Tensor)}
    if not tensors:
        raise OfficialCheckpointError(f"{path}: holds no tensors by name; give an official vae, var or car .pth file")
    return tensors


def official_name(name: str) -> str:
    """Official name of one of our VQVAE, VAR or CAR parameters (φ is stacked here: its name is that of the list)."""
    for ours, theirs in _RENAMES:
        name = re.sub(ours, theirs, name)
    return name


_RENAMES = [
    # tokenizer
    (r"^vqvae\.encoder\.levels\.(\d+)\.resample\.", r"vqvae.encoder.down.\1.downsample."),
    (r"^vqvae\.decoder\.levels\.(\d+)\.resample\.", r"vqvae.decoder.up.\1.upsample."),
    (r"^vqvae\.encoder\.levels\.", r"vqvae.encoder.down."),
    (r"^vqvae\.decoder\.levels\.", r"vqvae.decoder.up."),
    (r"^vqvae\.quantizer\.embedding$", r"vqvae.quantize.embedding.weight"),
    (r"^vqvae\.quantizer\.phi_(weight|bias)$", r"vqvae.quantize.quant_resi.qresi_ls.#.\1"),
    (r"^vqvae\.", r""),
    # transformer, base and branch
    (r"\.attn\.qkv_weight$", r".attn.mat_qkv.weight"),
    (r"\.attn\.log_scale_H$", r".attn.scale_mul_1H11"),
    (r"\.mlp\.fc(\d)\.", r".ffn.fc\1."),
    (r"\.ada_linear\.", r".ada_lin.1."),
    (r"\.ada_offset$", r".ada_gss"),
    (r"^car\.base\.class_embedding\.", r"class_emb."),
    (r"^car\.base\.word_embedding\.", r"word_embed."),
    (r"^car\.base\.pos_LC$", r"pos_1LC"),
    (r"^car\.base\.level_KC$", r"lvl_embed.weight"),
    (r"^car\.base\.shared_ada_linear\.", r"shared_ada_lin.1."),
    (r"^car\.base\.head_ada_linear\.", r"head_nm.ada_lin.1."),
    (r"^car\.base\.", r""),
    # control branch
    (r"^car\.branch\.encoder\.steps\.", r"car_control_convs.blocks."),
    (r"^car\.branch\.encoder\.", r"car_control_convs."),
    (r"^car\.branch\.input_conv\.", r"car_var_conv."),
    (r"^car\.branch\.fusions\.(\d+)\.norm\.", r"car_skip_norm.\1."),
    (r"^car\.branch\.fusions\.(\d+)\.linear\.", r"car_skip_linear.\1."),
    (r"^car\.branch\.blocks\.", r"car_blocks."),
]


def _shape(tensors: Mapping[str, Tensor], name: str, file: str, rank: int) -> tuple[int, ...]:
    """The sizes of a tensor, of which there must be `rank`, none of them 0."""
    question = f"is it an official {file.split()[0]} checkpoint?"
    if name not in tensors:
        raise OfficialCheckpointError(f"{file} has no tensor {name!r}; {question}")
    shape = tuple(tensors[name].shape)
    if len(shape) != rank or 0 in shape:
        raise OfficialCheckpointError(f"{file}: {name!r} is {list(shape)}, expected {rank} sizes from 1; {question}")
    return shape


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    found = {int(m.group(1)) for name in tensors if (m := re.match(pattern, name))}
    return max(found) + 1 if found else 0


def infer_vqvae(vae: Mapping[str, Tensor], sides: tuple[int, ...] | None) -> VQVAEConfig:
    """Config of a tokenizer checkpoint. Sides come from the argument, else they are the official ones of 256 pixels.

    A tokenizer doesn't show its sides, but it counted its codes for each scale: a number other than ten is refused.
    """
    file = "vae checkpoint"
    counted = "quantize.ema_vocab_hit_SV"
    scales = _shape(vae, counted, file, 2)[0] if counted in vae else len(SIDES_256)
    if sides is None and scales != len(SIDES_256):
        raise OfficialCheckpointError(
            f"{file}: it has {scales} scales, the official ones have {len(SIDES_256)}; "
            "name the sides, e.g. --patch-nums 1,2,3,4"
        )
    vocab, Z = _shape(vae, "quantize.embedding.weight", file, 2)
    channels = _shape(vae, "encoder.conv_in.weight", file, 4)[0]
    levels = _count(vae, r"encoder\.down\.(\d+)\.")
    widths = [_shape(vae, f"encoder.down.{i}.block.0.conv1.weight", file, 4)[0] for i in range(levels)]
    if any(w % channels for w in widths):
        raise OfficialCheckpointError(
            f"{file}: level widths {widths} are no multiples of {channels}; this is not a VQGAN tokenizer"
        )
    return VQVAEConfig(
        sides=sides or SIDES_256,
        vocab=vocab,
        latent_channels=Z,
        channels=channels,
        multipliers=tuple(w // channels for w in widths),
        res_blocks=_count(vae, r"encoder\.down\.0\.block\.(\d+)\."),
        phis=_count(vae, r"quantize\.quant_resi\.qresi_ls\.(\d+)\.") or 1,
    )


def infer_sides(var: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The official sides whose tokens a transformer has positions for.

    OfficialCheckpointError when it is neither list.
    """
    file = "var checkpoint"
    tokens, scales = _shape(var, "pos_1LC", file, 3)[1], _shape(var, "lvl_embed.weight", file, 2)[0]
    for sides in (SIDES_256, SIDES_512):
        if len(sides) == scales and sum(s * s for s in sides) == tokens:
            return sides
    raise OfficialCheckpointError(
        f"{file}: {scales} scales with {tokens} tokens are neither the official 256 nor 512 pixel sides; "
        "name the sides, e.g. --patch-nums 1,2,3,4"
    )


def infer_var(var: Mapping[str, Tensor]) -> VARConfig:
    file = "var checkpoint"
    classes, width = _shape(var, "class_emb.weight", file, 2)
    return VARConfig(
        depth=_count(var, r"blocks\.(\d+)\."),
        width=width,
        heads=_shape(var, "blocks.0.attn.scale_mul_1H11", file, 4)[1],
        classes=classes - 1,
        shared_aln="shared_ada_lin.1.weight" in var,
        mlp_ratio=_shape(var, "blocks.0.ffn.fc1.weight", file, 2)[0] // width,
    )


def infer_car(car: Mapping[str, Tensor], control_type: str, patch: int) -> CARConfig:
    file = "car checkpoint"
    steps = _count(car, r"car_control_convs\.blocks\.(\d+)\.")
    widths = [_shape(car, "car_control_convs.conv_in.weight", file, 4)[0]]
    widths += [_shape(car, f"car_control_convs.blocks.{i}.weight", file, 4)[0] for i in range(1, steps, 2)]
    halvings = patch.bit_length() - 1
    if len(widths) - 1 < halvings:
        raise OfficialCheckpointError(
            f"{file}: {len(widths) - 1} strided convolutions can't shrink by {patch}; is it for another tokenizer?"
        )
    strides = (2,) * halvings + (1,) * (len(widths) - 1 - halvings)
    return CARConfig(
        control_type=control_type, convention=control_type, encoder_widths=tuple(widths), encoder_strides=strides
    )


def build_model(
    vae: Mapping[str, Tensor],
    var: Mapping[str, Tensor] | None = None,
    car: Mapping[str, Tensor] | None = None,
    control_type: str = "canny",
    sides: tuple[int, ...] | None = None,
) -> Model:
    """A model from official state dicts; tensors are shared, not copied.

    The car file may hold its base too (`var` is then not needed).
    Raises OfficialCheckpointError that lists every missing, unexpected and misshapen tensor.
    """
    if car is not None and var is None and "pos_1LC" in car:
        var = car
    if car is not None and var is None:
        raise OfficialCheckpointError("a control branch needs its base; give the var checkpoint too (--var)")
    sides = sides or (infer_sides(var) if var is not None else None)
    vqvae_config = infer_vqvae(vae, sides)
    config = ModelConfig(
        vqvae=vqvae_config,
        var=infer_var(var) if var is not None else None,
        car=infer_car(car, control_type, vqvae_config.patch) if car is not None else None,
    )
    with torch.device("meta"):
        model = Model(config)
    sources = {"vae": dict(vae)}
    if var is not None:
        sources["var"] = {k: v for k, v in var.items() if not k.startswith("car_")}
    if car is not None:
        sources["car"] = {
            k: v for k, v in car.items() if k.startswith("car_") or (var is not car and k not in (var or {}))
        }
    _assign(model, sources)
    return model


def _assign(model: Model, sources: dict[str, dict[str, Tensor]]) -> None:
    """Give every parameter its official tensor, or raise with all that is wrong."""
    problems: list[str] = []
    used: set[tuple[str, str]] = set()
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        theirs = official_name(name)
        source = "vae" if name.startswith("vqvae.") else "car" if name.startswith("car.branch.") else "var"
        names = [theirs.replace("#", str(i)) for i in range(model.config.vqvae.phis)] if "#" in theirs else [theirs]
        missing = [n for n in names if n not in sources[source]]
        problems += [f"missing in {source}: {n}" for n in missing]
        used |= {(source, n) for n in names}
        if missing:
            continue
        tensors = [sources[source][n].float() for n in names]
        value = torch.cat(tensors) if "#" in theirs else tensors[0]
        # Broadcast axes of length 1 (pos_1LC, scale_mul_1H11, ada_gss) carry no information: ours have none.
        squeezed = tuple(s for s in value.shape if s != 1) == tuple(s for s in parameter.shape if s != 1)
        if value.numel() != parameter.numel() or not squeezed:
            problems.append(
                f"misshapen in {source}: {theirs} is {list(value.shape)}, expected {list(parameter.shape)}"
            )
            continue
        state[name] = value.reshape(parameter.shape)
    for source, tensors_by_name in sources.items():
        extra = (n for n in tensors_by_name if (source, n) not in used and not _BUFFERS.match(n))
        problems += [f"unexpected in {source}: {n} {list(tensors_by_name[n].shape)}" for n in extra]
    if problems:
        raise OfficialCheckpointError(
            f"{len(problems)} tensors don't fit:\n  "
            + "\n  ".join(problems)
            + "\ngive matching vae, var and car files (same depth and release)"
        )
    model.load_state_dict(state, strict=False, assign=True)
    model.vqvae.quantizer.reset_buffers()
    model.requires_grad_(False).eval()

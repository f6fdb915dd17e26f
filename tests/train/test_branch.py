"""The parts of a control branch: every combination trains, samples, saves and exports as the published one does."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

import car_runtime
from car_export import verify
from car_export.plan import ExportOptions, build_plan
from car_runtime.format import manifest as schema
from car_train import checkpoint
from car_train.cli import main as train_main
from car_train.config import (
    ENCODERS,
    FUSIONS,
    TRANSFORMERS,
    CARConfig,
    ConfigError,
    ModelConfig,
    VARConfig,
    VQVAEConfig,
)
from car_train.data.dataset import ControlledImages
from car_train.model import Model
from car_train.model.car import ConvBlock, TokenizerEncoder, calibrate_fusion, cross_normalise, to_maps, to_tokens
from car_train.model.sample import Recording, control_pyramid, sample
from car_train.training.stages import TransformerStage, add_branch

Parts = tuple[str, str, str]
COMBINATIONS = list(itertools.product(ENCODERS, TRANSFORMERS, FUSIONS))
every_combination = pytest.mark.parametrize("parts", COMBINATIONS, ids="-".join)
TOKENIZER = VQVAEConfig(
    sides=(1, 2, 4), vocab=32, latent_channels=4, channels=24, multipliers=(1, 2), res_blocks=1, phis=2
)


def new_model(parts: Parts, depth: int = 4) -> Model:
    """A branch of half the depth, initialised, and random numbers added everywhere, so that nothing stays zero."""
    torch.manual_seed(3)
    encoder, transformer, fusion = parts
    car = CARConfig(
        encoder_widths=(8, 12), encoder_strides=(2,), encoder=encoder, transformer=transformer, fusion=fusion
    )
    model = Model(ModelConfig(vqvae=TOKENIZER, var=VARConfig(depth=depth, width=24, heads=2, classes=3), car=car))
    model.requires_grad_(False).eval()
    assert model.car is not None
    assert model.car.branch is not None
    model.car.branch.initialise(model.car.base, model.vqvae)
    for parameter in model.parameters():
        spread = 0.5 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.05
        parameter.add_(spread * torch.randn(parameter.shape))
    return model


def batch(model: Model, seed: int = 5) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Labels, teacher's inputs and controls of two images."""
    config, generator = model.config.vqvae, torch.Generator().manual_seed(seed)
    grids = [torch.randint(config.vocab, (2, s, s), generator=generator) for s in config.sides]
    sizes = [s * config.patch for s in config.sides]
    controls = [torch.rand(2, 3, s, s, generator=generator) * 2 - 1 for s in sizes]
    return torch.tensor([0, 2]), model.vqvae.quantizer.decode(grids)[1], controls


@every_combination
@torch.no_grad()
def test_teacher_forcing_equals_sampling_scale_by_scale(parts: Parts) -> None:
    model, record = new_model(parts), Recording()
    assert model.car is not None
    label, _, controls = batch(model)
    uniforms = torch.rand(2, TOKENIZER.tokens, generator=torch.Generator().manual_seed(1))
    sample(model.vqvae, model.car, label, uniforms, controls, cfg=0, record=record)
    inputs = model.vqvae.quantizer.decode([scale["tokens"] for scale in record.scales])[1]
    forced = model.car(label, inputs, controls)
    drawn = torch.cat([scale["logits"] for scale in record.scales], 1)
    assert (forced - model.car(label, inputs)).abs().max() > 0.01  # the branch is heard
    # The same float32 arithmetic in sums of another order: a few roundings of logits of the size of 1.
    torch.testing.assert_close(forced, drawn, atol=2e-5, rtol=0)


@every_combination
def test_gradient_reaches_all_that_trains_and_nothing_else(parts: Parts) -> None:
    model = new_model(parts)
    assert model.car is not None
    branch = model.car.branch
    assert branch is not None
    branch.requires_grad_(True)
    label, inputs, controls = batch(model)
    model.car(label, inputs, controls).square().mean().backward()
    frozen = {f"encoder.{part}" for part in ("encoder", "quant_conv")} if parts[0] == "vqvae" else set()
    for name, parameter in branch.named_parameters():
        trains = ".".join(name.split(".")[:2]) not in frozen
        assert parameter.requires_grad == trains, name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == trains, name
    assert all(p.grad is None for p in (*model.car.base.parameters(), *model.vqvae.parameters()))


def assert_same(loaded: Model, model: Model) -> None:
    """The same weights to the bit; their place in memory may still change the order of a convolution's sums."""
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert loaded.car is not None
    assert model.car is not None
    torch.testing.assert_close(loaded.car(*batch(loaded)), model.car(*batch(model)), atol=2e-6, rtol=0)


@every_combination
@torch.no_grad()
def test_a_checkpoint_brings_every_part_back(parts: Parts, tmp_path: Path) -> None:
    model = new_model(parts)
    loaded = checkpoint.load(checkpoint.save(model, tmp_path / "checkpoint"))
    assert loaded.config == model.config
    assert_same(loaded, model)


@pytest.mark.parametrize("fusion", ["zero", "cross_norm"])
@pytest.mark.parametrize("transformer", TRANSFORMERS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_an_added_fusion_starts_exactly_as_the_base_and_learns(encoder: str, transformer: str, fusion: str) -> None:
    model = new_model((encoder, transformer, fusion))
    assert model.car is not None
    branch = model.car.branch
    assert branch is not None
    branch.initialise(model.car.base, model.vqvae)
    label, inputs, controls = batch(model)
    branch.requires_grad_(True)
    optimizer = torch.optim.SGD(branch.parameters(), lr=1e-2)
    start = model.car(label, inputs, controls)
    assert torch.equal(start, model.car(label, inputs))
    start.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    after = model.car(label, inputs, controls)
    assert not torch.equal(after, start)
    after.square().mean().backward()  # from the second step on, all of the branch learns
    assert all(bool(p.grad.any()) for p in branch.parameters() if p.requires_grad and p.grad is not None)
    assert all((p.grad is not None) == p.requires_grad for p in branch.parameters())


def opinionated_base(depth: int = 4, shared_aln: bool = False) -> Model:
    """A base whose blocks and head do much: random weights of ordinary size, not the published initialisation."""
    torch.manual_seed(7)
    var = VARConfig(depth=depth, width=48, heads=3, classes=3, shared_aln=shared_aln)
    base = Model(ModelConfig(vqvae=TOKENIZER, var=var)).requires_grad_(False).eval()
    for name, parameter in base.named_parameters():
        if parameter.ndim > 1 and not any(word in name for word in ("embedding", "pos_", "level_")):
            parameter.normal_(std=(2 if "head.weight" in name else 1) / parameter[0].numel() ** 0.5)
    return base


@pytest.mark.parametrize("shared_aln", [False, True], ids=["own", "shared"])
@every_combination
@torch.no_grad()
def test_a_fresh_branch_leaves_the_base_as_it_was(parts: Parts, shared_aln: bool) -> None:
    """Within 0.05 nats a token, on images and controls that the calibration hasn't seen; 0.2 without it."""
    encoder, transformer, fusion = parts
    config = CARConfig(
        encoder_widths=(8, 12), encoder_strides=(2,), encoder=encoder, transformer=transformer, fusion=fusion
    )
    model = add_branch(opinionated_base(depth=6, shared_aln=shared_aln), config).eval()
    assert model.car is not None
    calibrate_fusion(model.car, *batch(model))
    assert divergence(model, *batch(model, seed=6)) <= (0.05 if fusion == "concat" else 0)


def test_training_a_new_branch_starts_at_its_base_and_a_trained_one_where_it_was(tmp_path: Path) -> None:
    for shape in ("ellipse", "rectangle", "line"):
        (tmp_path / "data" / shape).mkdir(parents=True)
        for i in range(40):
            image = Image.new("RGB", (8, 8), "white")
            getattr(ImageDraw.Draw(image), shape)([1 + i % 3, 1, 5, 4 + i % 4], fill=(6 * i, 100, 60))
            image.save(tmp_path / "data" / shape / f"{i}.png")
    base_path = checkpoint.save(opinionated_base(shared_aln=True), tmp_path / "base")
    flags = ["--data", tmp_path / "data", "--base", base_path, "--encoder-widths", "8,12", "--control", "canny"]
    flags += ["--steps", 1, "--batch", 8, "--lr", 1e-12, "--warmup", 0, "--workers", 0, "--no-augment"]
    flags += ["--token-root", tmp_path / "tokens"]
    assert train_main([str(a) for a in ["car", *flags, "-o", tmp_path / "first"]]) == 0
    again = ["car", *flags, "-o", tmp_path / "second", "--init", tmp_path / "first"]
    assert train_main([str(a) for a in again]) == 0
    first, second = (checkpoint.load(tmp_path / run) for run in ("first", "second"))
    for name, value in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value, atol=1e-9, rtol=0)
    data = ControlledImages(tmp_path / "data", 8, split="all", control_type="canny", preload=False)
    items = [data[i] for i in range(0, len(data), 8)]
    sizes = [side * TOKENIZER.patch for side in TOKENIZER.sides]
    pyramids = [control_pyramid(Image.fromarray(item["control"].numpy()), sizes) for item in items]
    label = torch.tensor([item["label"] for item in items])
    with torch.no_grad():
        inputs = first.vqvae.quantizer.decode(first.vqvae.encode(torch.stack([item["image"] for item in items])))[1]
    controls = [torch.cat(scale) for scale in zip(*pyramids, strict=True)]
    assert divergence(first, label, inputs, controls) <= 0.05  # 0.57 without calibration


@torch.no_grad()
def divergence(model: Model, label: Tensor, inputs: Tensor, controls: list[Tensor]) -> float:
    """KL(base ‖ base with branch) in nats a token, of a base that there is something to lose of."""
    assert model.car is not None
    base, steered = (model.car(label, inputs, c).log_softmax(-1) for c in (None, controls))
    assert -(base.exp() * base).sum(-1).mean() < 0.8 * math.log(TOKENIZER.vocab)
    return (base.exp() * (base - steered)).sum(-1).mean().item()


@torch.no_grad()
def test_calibration_changes_nothing_but_the_concat_fusions() -> None:
    for fusion in FUSIONS:
        model = new_model(("conv", "blocks", fusion))
        assert model.car is not None
        before = {name: p.clone() for name, p in model.named_parameters()}
        calibrate_fusion(model.car, *batch(model))
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        names = ("norm.weight", "norm.bias", "linear.weight", "linear.bias")
        assert changed == {f"car.branch.fusions.{i}.{n}" for i in range(2) for n in names if fusion == "concat"}
        assert not any(m._forward_pre_hooks for m in model.modules())


def test_stochastic_depth_is_in_base_and_branch_while_a_branch_trains() -> None:
    model = add_branch(opinionated_base(), CARConfig(encoder_widths=(8, 12), encoder_strides=(2,)))
    stage, car = TransformerStage(model), model.car
    assert car is not None
    assert car.branch is not None
    rates = [0.0, 0.1 * 4 / 24 / 3, 0.1 * 4 / 24 * 2 / 3, 0.1 * 4 / 24]
    assert [block.drop_path_rate for block in car.base.blocks] == pytest.approx(rates)
    assert [block.drop_path_rate for block in car.branch_blocks] == pytest.approx(rates[:2])
    label, inputs, controls = batch(model)

    def varies(controls: list[Tensor] | None) -> bool:
        with torch.no_grad():
            return not torch.equal(car(label, inputs, controls), car(label, inputs, controls))

    assert not varies(controls)
    stage.train()
    car.set_drop_path(0.5)
    assert varies(None)  # the frozen base too
    car.set_drop_path(0)
    assert not varies(controls)
    car.branch.blocks[1].drop_path_rate = 0.5  # type: ignore[union-attr]
    assert varies(controls)
    stage.train(False)
    assert not varies(controls)
    stage = TransformerStage(model, drop_path=0)
    stage.train()
    assert not varies(controls)
    assert all(p.requires_grad for p in car.branch.parameters())
    assert not any(p.requires_grad for p in car.base.parameters())


@torch.no_grad()
def test_a_run_that_samples_drops_nothing_even_in_training_mode() -> None:
    model = new_model(("conv", "blocks", "concat"))
    assert model.car is not None
    uniforms = torch.rand(2, TOKENIZER.tokens, generator=torch.Generator().manual_seed(1))
    label, _, controls = batch(model)
    expected = sample(model.vqvae, model.car, label, uniforms, controls)
    model.car.set_drop_path(0.9)
    model.car.train()
    assert all(map(torch.equal, sample(model.vqvae, model.car, label, uniforms, controls), expected))


@torch.no_grad()
def test_the_frozen_encoder_is_the_tokenizers() -> None:
    model = new_model(("vqvae", "blocks", "concat"))
    assert model.car is not None
    branch = model.car.branch
    assert branch is not None
    branch.initialise(model.car.base, model.vqvae)
    assert isinstance(branch.encoder, TokenizerEncoder)
    control = batch(model)[2][-1]
    expected = branch.encoder.proj(model.vqvae.latent(control)).flatten(2).transpose(1, 2)
    assert torch.equal(branch.features(control), expected)
    # A copy: the tokenizer may go on training, the branch stays as it is.
    model.vqvae.quant_conv.weight.zero_()
    assert torch.equal(branch.features(control), expected)


def test_a_tokenizer_too_narrow_for_one_pixel_is_refused() -> None:
    narrow = dataclasses.replace(TOKENIZER, channels=8)
    car = CARConfig(encoder="vqvae")  # widths and strides of the convolutional encoder are of no account
    with pytest.raises(ConfigError, match="16 channels, each a norm group of its own; choose encoder conv"):
        Model(ModelConfig(vqvae=narrow, var=VARConfig(depth=2, width=16, heads=2, classes=3), car=car))


@pytest.mark.parametrize(
    ("field", "choices"), [("encoder", ENCODERS), ("transformer", TRANSFORMERS), ("fusion", FUSIONS)]
)
def test_an_unknown_part_is_refused_with_the_choices(field: str, choices: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=f"{field} is 'magic'; choose one of {', '.join(choices)}"):
        CARConfig(**{field: "magic"})  # type: ignore[arg-type]


@torch.no_grad()
def test_a_checkpoint_from_before_there_was_a_choice_still_loads(tmp_path: Path) -> None:
    model = new_model(("conv", "blocks", "concat"))
    path = checkpoint.save(model, tmp_path / "checkpoint")
    config = json.loads((path / "config.json").read_text())
    for field in ("encoder", "transformer", "fusion"):
        del config["car"][field]
    (path / "config.json").write_text(json.dumps(config))
    loaded = checkpoint.load(path)
    assert loaded.config == model.config
    assert_same(loaded, model)


def test_only_blocks_with_attention_have_a_cache_and_modulation() -> None:
    for transformer, layers in (("blocks", 6), ("conv", 4)):
        car = new_model(("conv", transformer, "concat")).car
        assert car is not None
        assert car.layers == layers
        assert car.modulations(torch.tensor([0])).shape[1] == 6 * layers + 2


def test_cross_normalisation_gives_each_token_the_mean_and_variance_of_the_base() -> None:
    generator = torch.Generator().manual_seed(0)
    c, x = (torch.randn(2, 5, 64, generator=generator) for _ in range(2))
    c, x = 7 * c - 3, x * torch.arange(1, 6)[:, None] + 2
    both = torch.var_mean(cross_normalise(c, x), -1, correction=0)
    torch.testing.assert_close(both, torch.var_mean(x, -1, correction=0), atol=1e-4, rtol=1e-4)
    flat = torch.ones(1, 1, 64, requires_grad=True)  # nothing to divide by: finite all the same
    cross_normalise(flat, flat).sum().backward()
    assert flat.grad is not None
    assert flat.grad.isfinite().all()


def test_maps_and_tokens_are_each_others_inverse() -> None:
    x = torch.randn(2, 14, 6)
    maps = to_maps(x, (1, 2, 3))
    assert [tuple(m.shape) for m in maps] == [(2, 6, 1, 1), (2, 6, 2, 2), (2, 6, 3, 3)]
    assert torch.equal(maps[2][:, :, 1, 2], x[:, 1 + 4 + 5])
    assert torch.equal(to_tokens(maps), x)
    assert torch.equal(to_tokens(to_maps(x[:, 5:], ())), x[:, 5:])


@torch.no_grad()
def test_a_convolution_sees_its_own_scale_and_all_of_the_neighbourhood() -> None:
    torch.manual_seed(0)
    block, x = ConvBlock(6), torch.randn(1, 14, 6)
    before = block(x, (1, 2, 3))
    x[:, 13] += 1  # the last corner of the 3×3 map: two 3×3 convolutions carry it to every corner
    changed = (block(x, (1, 2, 3)) != before).any(-1)[0]
    assert changed.tolist() == [False] * 5 + [True] * 9


@pytest.mark.parametrize(
    ("parts", "options"),
    [
        (("vqvae", "conv", "cross_norm"), {}),
        pytest.param(("vqvae", "blocks", "zero"), {}, marks=pytest.mark.slow),
        pytest.param(("conv", "conv", "zero"), {"precision": "fp16"}, marks=pytest.mark.slow),
        pytest.param(("vqvae", "conv", "cross_norm"), {"precision": "fp16"}, marks=pytest.mark.slow),
    ],
)
def test_exported_branches_draw_what_pytorch_draws(parts: Parts, options: dict[str, Any], tmp_path: Path) -> None:
    """Building verifies every graph in all its forms; here the free-running draw of the whole plan."""
    model = new_model(parts, depth=2)
    assert model.car is not None
    plan = build_plan(model, ExportOptions(output=tmp_path / "parts.plan", name="parts", **options))
    manifest = schema.read_manifest(plan)
    assert manifest.model.cache_layers == model.car.layers
    size = TOKENIZER.image_size
    control = verify.scene(size, np.random.default_rng(3))
    pyramid = control_pyramid(Image.fromarray(control), [s * TOKENIZER.patch for s in TOKENIZER.sides])
    seeds = range(20, 23)
    uniforms = np.stack([np.random.default_rng(seed).random(TOKENIZER.tokens, dtype=np.float32) for seed in seeds])
    settings: dict[str, Any] = {"cfg": 2.0, "top_k": 12, "top_p": 0.9}
    expected, _ = sample(model.vqvae, model.car, torch.full((3,), 1), torch.from_numpy(uniforms), pyramid, **settings)
    with car_runtime.open_plan(plan, backend="ort-cpu") as opened:
        drawn = opened.generate(control, label=1, seed=20, n=3, **settings).tokens
    if not options:
        np.testing.assert_array_equal(drawn, expected.numpy())
        # A branch with another 𝒯 is another model.
        other = new_model((parts[0], "blocks" if parts[1] == "conv" else "conv", parts[2]), depth=2)
        with pytest.raises(verify.VerificationError, match=r"K/V pairs (2 and 3|3 and 2)"):
            verify.verify_plan(plan, other, print)
    else:
        # Eleven bits of precision move a draw now and then, and later tokens follow it.
        assert (drawn == expected.numpy()).mean() > 0.8
